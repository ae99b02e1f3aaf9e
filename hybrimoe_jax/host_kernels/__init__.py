"""Host kernels: how an expert is computed on the CPU.

`formats` says how a plain expert lies in memory and `layout` a quantised one, `kernel` what a kernel must do; `reference` (NumPy), `onednn` and `native` are some, and
`auto` picks among them per load by a quick measurement. Nothing here imports jax.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.host_kernels.choices import Measurement
from hybrimoe_jax.formats.plain import ExpertWeights, aligned_empty
from hybrimoe_jax.host_kernels.kernel import HostKernel, run_experts
from hybrimoe_jax.formats.packing import HostExpert, refuse_packed

if __name__ != "hybrimoe_jax.host_kernels":  # the link at the repository's root would load a second copy
    raise ImportError("import this package as hybrimoe_jax.host_kernels")

__all__ = ["KERNELS", "ExpertWeights", "HostKernel", "aligned_empty", "get_kernel", "run_experts"]

KERNELS = ("auto", "reference", "onednn", "native")


def get_kernel(
    name: str,
    sample: HostExpert | None = None,
    threads: int = 1,
    pack_limit: int | None = None,
    known: Sequence[Measurement] = (),
) -> HostKernel:
    """The kernel called `name`: `reference`, `onednn`, or `auto`, which measures on `sample`, an expert of the model.

    `threads` is what one call may use where the library takes it per calling thread (oneDNN; NumPy's BLAS is limited for
    the whole process with threadpoolctl, before this is called). `pack_limit` bounds oneDNN's packed copies, in bytes. `known`: earlier
    measurements, of which `auto` takes one that fits instead of measuring.
    Raises UserError for an unknown name, for `onednn` where its library is not installed, and for a kernel that does not compute `sample`'s format.
    """
    if sample is not None and name == "onednn":
        refuse_packed(sample, name)
    if name == "reference":
        from hybrimoe_jax.host_kernels.reference import ReferenceKernel

        return ReferenceKernel()
    if name == "onednn":
        from hybrimoe_jax.host_kernels.onednn import OneDnnKernel

        return OneDnnKernel(threads, pack_limit)
    if name == "native":
        from hybrimoe_jax.host_kernels.native.kernel import NativeKernel

        return NativeKernel(threads)
    if name == "auto":
        from hybrimoe_jax.host_kernels.auto import AutoKernel

        if sample is None:
            raise UserError("host kernel 'auto' measures on one expert of the model: pass it as `sample`")
        return AutoKernel(sample, threads, pack_limit, known=known)
    raise UserError(f"host kernel {name!r} is not known (known: {', '.join(KERNELS)})")
