"""NUMA: the topology as the system tells it, which pages are spread, and that the kernel takes the policy. Made-up topologies."""

from __future__ import annotations

import ctypes
import mmap
import platform

import numpy as np
import pytest
import tiny

from hybrimoe_jax.checkpoint.expert_store import ExpertStore
from hybrimoe_jax.formats import numa
from hybrimoe_jax.formats import plain as formats
from hybrimoe_jax.formats.plain import aligned_empty

PAGE = mmap.PAGESIZE
GET_POLICY = {"x86_64": 239, "aarch64": 236}
OF_ADDRESS = 2  # MPOL_F_ADDR


def machine(folder, memory: str, **cpulists: str):
    """A folder as /sys/devices/system/node."""
    (folder / "has_normal_memory").write_text(memory + "\n")
    for node, cpus in cpulists.items():
        (folder / node).mkdir()
        (folder / node / "cpulist").write_text(cpus + "\n")
    return folder


@pytest.mark.parametrize(
    ("text", "numbers"), [("", set()), ("0\n", {0}), ("0-3,8", {0, 1, 2, 3, 8}), ("1,5-6\n", {1, 5, 6})]
)
def test_the_kernels_lists(text, numbers):
    assert numa.parse_list(text) == numbers


def test_nodes_count_that_have_memory_and_a_processor_of_ours(tmp_path):
    topology = machine(tmp_path, "0-1,3", node0="0-3", node1="4-7", node2="8-11", node3="")
    assert numa.nodes(topology, frozenset(range(12))) == (0, 1)  # 2 has no memory, 3 no processor
    assert numa.nodes(topology, frozenset({1, 2})) == (0,)  # a process kept on one node
    assert numa.nodes(topology, frozenset()) == ()


def test_a_system_that_tells_nothing_or_nonsense_has_no_nodes(tmp_path):
    assert numa.nodes(tmp_path / "absent", frozenset({0})) == ()
    assert numa.nodes(machine(tmp_path, "what?"), frozenset({0})) == ()


def test_whole_pages_within_the_array_are_spread():
    bound = []

    def bind(*arguments):
        bound.append(arguments)
        return True

    array = aligned_empty(5 * PAGE, np.uint8)
    assert numa.spread(array, (0, 2), bind) is array
    ((start, size, over),) = bound
    assert start % PAGE == size % PAGE == 0 and over == (0, 2)
    assert array.ctypes.data <= start < array.ctypes.data + PAGE
    assert array.ctypes.data + array.nbytes - PAGE < start + size <= array.ctypes.data + array.nbytes


@pytest.mark.parametrize(("size", "over"), [(5 * PAGE, (0,)), (5 * PAGE, ()), (100, (0, 1)), (0, (0, 1))])
def test_one_node_or_no_whole_page_is_left_alone(size, over):
    numa.spread(aligned_empty(size, np.uint8), over, lambda *_: pytest.fail("nothing to do"))


def policy_at(address: int) -> int:
    mode = ctypes.c_int(-1)
    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    arguments = (GET_POLICY[platform.machine()], ctypes.addressof(mode), 0, 0, address, OF_ADDRESS)
    failed = call(*map(ctypes.c_long, arguments))
    return -1 if failed else mode.value


@pytest.mark.skipif(platform.system() != "Linux" or platform.machine() not in numa.CALLS, reason="another system")
def test_the_kernel_takes_the_policy_and_the_contents_stay():
    """One node is enough for that: the kernel interleaves over the nodes of a set, of any size."""
    node = (numa.own_nodes() or (0,))[0]
    with mmap.mmap(-1, 8 * PAGE) as pages:
        array = np.frombuffer(pages, np.uint8)
        array[:] = np.arange(array.size) % 251
        if policy_at(array.ctypes.data) < 0 or not numa.mbind(array.ctypes.data, array.nbytes, (node,)):
            del array
            pytest.skip("memory policies are not allowed here")
        assert policy_at(array.ctypes.data) == numa.INTERLEAVE
        assert np.array_equal(array, np.arange(array.size) % 251)
        assert not numa.mbind(array.ctypes.data + 1, PAGE, (node,)), "no page begins there"
        del array


@pytest.mark.parametrize("format", [None, "int4-g32"])
def test_every_buffer_of_an_expert_is_spread(format, monkeypatch):
    spread = []

    def note(array):
        spread.append(array)
        return array

    monkeypatch.setattr(formats, "spread", note)
    _, _, experts = tiny.weights("qwen2_moe")
    store = ExpertStore.from_arrays(experts, format=format)
    store.load_all()
    for moe_layer in range(store.num_layers):
        for expert in range(store.num_experts):
            own = store.get(moe_layer, expert)
            arrays = (own.data,) if format else own
            assert all(any(np.may_share_memory(array, block) for block in spread) for array in arrays)
