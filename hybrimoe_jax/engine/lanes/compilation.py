"""Seconds spent compiling, so that no measured step hides a compilation."""

from __future__ import annotations

import functools

import jax.monitoring


class CompileClock:
    """Adds up what jax reports of tracing, lowering and compiling in this process."""

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration: float, **_) -> None:
        if event.startswith("/jax/core/compile"):
            self.seconds += duration


@functools.lru_cache(maxsize=1)
def compile_clock() -> CompileClock:
    """The process's one clock: listeners cannot be unregistered one by one."""
    return CompileClock()
