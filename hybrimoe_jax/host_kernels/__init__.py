"""Host kernels: how an expert is computed on the CPU.

`kernel` says what a kernel must do; `reference` (NumPy), `onednn` and `native` (C++) are the kernels. Nothing here
imports jax, but for `native`'s calls from jitted programs.
"""

from __future__ import annotations

from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.formats.packing import HostExpert, refuse_packed
from hybrimoe_jax.formats.plain import ExpertWeights, aligned_empty
from hybrimoe_jax.host_kernels.kernel import HostKernel, run_experts

if __name__ != "hybrimoe_jax.host_kernels":  # the link at the repository's root would load a second copy
    raise ImportError("import this package as hybrimoe_jax.host_kernels")

__all__ = ["KERNELS", "ExpertWeights", "HostKernel", "aligned_empty", "get_kernel", "run_experts"]

KERNELS = ("auto", "reference", "onednn", "native")


def get_kernel(name: str, sample: HostExpert | None = None, threads: int = 1) -> HostKernel:
    """The kernel called `name`, for experts like `sample` (float32 or bfloat16 where there is none).

    `auto` is the first of native, onednn and reference that is installed and computes such experts; its `unavailable`
    says why it is not an earlier one. Measured on AVX-512 over formats and loads, choosing by a measurement was no
    faster. `threads` is what one call may use where the library takes it per calling thread (oneDNN; NumPy's BLAS is
    limited for the whole process with threadpoolctl, before this is called).

    Raises UserError for an unknown name, for a kernel that is not installed, and for one that does not compute
    `sample`'s format.
    """
    if name == "auto":
        unavailable = []
        for better in ("native", "onednn"):
            try:
                kernel = get_kernel(better, sample, threads)
                break
            except UserError as error:
                unavailable.append(str(error))
        else:
            kernel = get_kernel("reference")
        kernel.unavailable = unavailable
        return kernel
    if name == "reference":
        from hybrimoe_jax.host_kernels.reference import ReferenceKernel

        return ReferenceKernel()
    if name == "onednn":
        from hybrimoe_jax.host_kernels.onednn import OneDnnKernel

        if sample is not None:
            refuse_packed(sample, name)
        return OneDnnKernel(threads)
    if name == "native":
        from hybrimoe_jax.host_kernels.native.kernel import NativeKernel

        return NativeKernel(threads)
    raise UserError(f"host kernel {shown(name)} is not known (known: {', '.join(KERNELS)})")
