"""jax's settings while an engine works: what users chose for programs of their own does not change its."""

from __future__ import annotations

import contextlib
from typing import Any

import jax

GUARDS = [f"jax_transfer_guard_{way}" for way in ("host_to_device", "device_to_device", "device_to_host")]


def own_settings() -> contextlib.AbstractContextManager[Any]:
    """In the block, and this thread, jax is as the programs here need it; mostly it is so already.

    They are written for 32 bits, for NumPy's broadcasting, and hand numbers to the device unasked.
    """

    def setting(name: str) -> Any:
        return getattr(jax.config, name)

    stack = None
    for wrong, need in (
        (setting("jax_enable_x64"), lambda: jax.enable_x64(False)),
        (setting("jax_numpy_rank_promotion") != "allow", lambda: jax.numpy_rank_promotion("allow")),
        (any(setting(guard) not in (None, "allow") for guard in GUARDS), lambda: jax.transfer_guard("allow")),
    ):
        if wrong:
            stack = stack or contextlib.ExitStack()
            stack.enter_context(need())
    return stack or contextlib.nullcontext()
