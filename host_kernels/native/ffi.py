"""The library's handlers for XLA's foreign-function interface (placeholder until the build has them)."""

from __future__ import annotations

import functools

import jax

from hybrimoe_jax.host_kernels.native.library import library


@functools.cache
def register(name: str, symbol: str) -> None:
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library(), symbol)), platform="cpu")


def available() -> bool:
    return hasattr(library(), "experts_ffi_routed")
