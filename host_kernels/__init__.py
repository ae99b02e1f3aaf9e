"""Host kernels: how an expert is computed on the CPU.

`formats` says how an expert lies in memory, `kernel` what a kernel must do, `reference` (NumPy) and `onednn` are two, and
`auto` picks between them per load by a quick measurement. Nothing here imports jax.
"""

from __future__ import annotations

from hybrimoe_jax.host_kernels.formats import ExpertWeights, aligned_empty
from hybrimoe_jax.host_kernels.kernel import HostKernel, run_experts

from hybrimoe_jax.errors import UserError

__all__ = ["KERNELS", "ExpertWeights", "HostKernel", "aligned_empty", "get_kernel", "run_experts"]

KERNELS = ("auto", "reference", "onednn")


def get_kernel(name: str, sample: ExpertWeights | None = None) -> HostKernel:
    """The kernel called `name`: `reference`, `onednn`, or `auto`, which measures on `sample` (an expert of the model).

    Raises UserError for an unknown name, and for `onednn` where its library is not installed.
    """
    if name == "reference":
        from hybrimoe_jax.host_kernels.reference import ReferenceKernel

        return ReferenceKernel()
    raise UserError(f"host kernel {name!r} is not known (known: {', '.join(KERNELS)})")
