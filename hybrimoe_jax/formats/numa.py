"""Memory of machines with several NUMA nodes: weights are spread over the nodes page by page, so that all of them serve every read.

Linux puts a page on the node of the thread that touches it first. One thread loads the weights, so all of them would lie on its node: the other
nodes' cores read across the interconnect, and one node's memory channels do the work of all. Which thread computes which rows is
not fixed (the native team's helpers take ranges as they come), so there is no node that owns a row; spread pages give every thread the same
mixture and use every channel. (Untested on such a machine: there was none. What is tested is the reading of the topology and that the
kernel takes the policy.)

On a machine with one node, or where the process may run on one node alone, nothing is done. Imports no jax.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np

TOPOLOGY = Path("/sys/devices/system/node")
CALLS = {"x86_64": 237, "aarch64": 235}
"""The number of the system call `mbind`, by machine."""
INTERLEAVE, MOVE = 3, 2  # MPOL_INTERLEAVE, MPOL_MF_MOVE of linux/mempolicy.h
MASK_BITS = 1024


def parse_list(text: str) -> frozenset[int]:
    """The numbers of the kernel's list format: "0-3,8" -> 0, 1, 2, 3, 8."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def nodes(topology: Path = TOPOLOGY, cpus: frozenset[int] | None = None) -> tuple[int, ...]:
    """The nodes that have memory and a processor which this process may run on, in order; none where the system tells no topology.

    Args:
      topology: the folder of `nodeN/cpulist` and `has_normal_memory`.
      cpus: processors that count; those of the process if None.
    """
    if cpus is None:
        cpus = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
    try:
        with_memory = parse_list((topology / "has_normal_memory").read_text())
        return tuple(n for n in sorted(with_memory) if parse_list((topology / f"node{n}/cpulist").read_text()) & cpus)
    except (OSError, ValueError):
        return ()


@functools.cache
def own_nodes() -> tuple[int, ...]:
    """`nodes()` of this process, asked once."""
    return nodes()


def mbind(address: int, nbytes: int, over: tuple[int, ...]) -> bool:
    """Has the kernel interleave whole pages over nodes, those that were touched already too; whether it did (a container may forbid it)."""
    number = CALLS.get(platform.machine())
    if number is None or platform.system() != "Linux":
        return False
    words = (ctypes.c_uint64 * (MASK_BITS // 64))()
    for node in over:
        words[node // 64] |= 1 << (node % 64)
    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    arguments = (number, address, nbytes, INTERLEAVE, ctypes.addressof(words), MASK_BITS + 1, MOVE)
    return call(*map(ctypes.c_long, arguments)) == 0


def spread(
    array: np.ndarray,
    over: tuple[int, ...] | None = None,
    bind: Callable[[int, int, tuple[int, ...]], bool] = mbind,
) -> np.ndarray:
    """Spreads the pages that lie wholly within a C-contiguous array over the nodes and returns the array.

    `over`: the nodes (`own_nodes` if None); with fewer than two nothing is done. `bind`: what does it.
    """
    over = own_nodes() if over is None else over
    start = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if len(over) > 1 and end > start:
        bind(start, end - start, over)
    return array
