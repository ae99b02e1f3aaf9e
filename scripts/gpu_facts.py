"""`python scripts/gpu_facts.py`: what the engine's design rests on, measured on the device that jax finds.

Eight parts, each a question that the design answers by assumption until it is measured (docs/gpu.md lists them):

  read-back  how long the host waits for a layer's expert ids
  transfer   device_put from plain, aligned and pinned host memory, alone and beside compute; whether the two overlap
  callback   the round trip of an empty pure_callback
  slots      writing and reading experts kept in buffers of their own, or in one stacked buffer
  dispatch   what a layer costs when its programs do nothing
  threads    device_put from a second thread while the first writes donated slots
  packed     a quantised expert at load 1: does its program read the packed bytes and little else, or write a
             dequantised matrix first
  pallas     the same experts with our own kernel and as XLA computes them: times, share of the memory's bandwidth,
             largest difference

Needs jax, numpy and this package. On the CPU backend sizes are small and an aligned device_put aliases host memory,
so there the figures only show that the script works. A table for people, then ONE JSON line. Exit code 1 if any part
failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from statistics import median

import numpy as np

LAYERS, ARGUMENTS, PACKED_WIDTH, WIDTH = 32, 20, 68, 1024
CALLBACK_TIMEOUT_S = 120


def timed(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of `run`, after one call that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def host_array(megabytes: float, aligned: bool) -> np.ndarray:
    """float32 [WIDTH, n], on a 64-byte boundary or 16 bytes past one."""
    columns = max(1, int(megabytes * 1e6) // (4 * WIDTH))
    raw = np.zeros(4 * WIDTH * columns + 128, np.uint8)
    start = -raw.ctypes.data % 64 + (0 if aligned else 16)
    array = raw[start : start + 4 * WIDTH * columns].view(np.float32).reshape(WIDTH, columns)
    array[:] = 1.0
    return array


def measure_read_back(sizes, repeats) -> dict[str, float]:
    """Microseconds until ids, weights and scores [tokens, 68] are a numpy array."""
    import jax
    import jax.numpy as jnp

    step = jax.jit(lambda x: (x + 1.0, x[:, :PACKED_WIDTH] * 2.0))
    found = {}
    for tokens in (1, 128):
        state = {"x": jnp.ones((tokens, WIDTH), jnp.float32)}

        def dispatch(state=state):
            state["x"], packed = step(state["x"])
            return packed

        def ahead(dispatch=dispatch):
            packed = dispatch()
            packed.copy_to_host_async()
            return np.asarray(packed)

        settled = []
        for _ in range(repeats + 1):  # a new array each time: jax keeps the host copy of one that was read
            packed = jax.block_until_ready(dispatch())
            start = time.perf_counter()
            np.asarray(packed)
            settled.append(time.perf_counter() - start)
        found[f"{tokens} tokens, finished array (us)"] = 1e6 * median(settled[1:])
        found[f"{tokens} tokens, dispatch and read (us)"] = 1e6 * timed(lambda d=dispatch: np.asarray(d()), repeats)
        found[f"{tokens} tokens, with copy_to_host_async (us)"] = 1e6 * timed(ahead, repeats)
    return found


def measure_transfer(sizes, repeats) -> dict[str, float]:
    """GB/s of device_put; beside compute; and the share of the shorter of the two that the other hides."""
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    target = jax.sharding.SingleDeviceSharding(device)

    @jax.jit
    def compute(x, rounds):
        return jax.lax.fori_loop(0, rounds, lambda _, y: jnp.tanh(y @ x), x)

    weights = jnp.full((512, 512), 1e-3, jnp.float32)
    one_round = timed(lambda: compute(weights, 50).block_until_ready(), 5) / 50
    found = {}
    for size in sizes:
        sources = {"numpy": host_array(size, False), "aligned numpy": host_array(size, True)}
        if "pinned_host" in kinds:
            pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
            sources["pinned_host"] = jax.block_until_ready(jax.device_put(sources["aligned numpy"], pinned))
        for name, source in sources.items():
            label, nbytes = f"{size:g} MB {name}", source.nbytes
            put = jax.device_put(source, target)
            if isinstance(source, np.ndarray) and put.unsafe_buffer_pointer() == source.ctypes.data:
                found[f"{label}: aliases host memory (us)"] = 1e6 * timed(
                    lambda s=source: jax.device_put(s, target).block_until_ready(), repeats
                )
                continue
            alone = timed(lambda s=source: jax.device_put(s, target).block_until_ready(), repeats)
            rounds = max(1, int(2 * alone / one_round))
            busy = timed(lambda n=rounds: compute(weights, n).block_until_ready(), repeats)
            beside, together, returns = [], [], []
            for _ in range(repeats):
                start = time.perf_counter()
                result = compute(weights, rounds)
                issued = time.perf_counter()
                moved = jax.device_put(source, target)
                returns.append(time.perf_counter() - issued)
                moved.block_until_ready()
                beside.append(time.perf_counter() - issued)
                result.block_until_ready()
                together.append(time.perf_counter() - start)
            hidden = (alone + busy - median(together)) / min(alone, busy)
            found[f"{label}: alone (GB/s)"] = nbytes / alone / 1e9
            found[f"{label}: beside compute (GB/s)"] = nbytes / median(beside) / 1e9
            found[f"{label}: the call returns after (us)"] = 1e6 * median(returns)
            found[f"{label}: overlap (0 none, 1 all)"] = min(1.0, max(0.0, hidden))
    return found


def measure_callback(sizes, repeats) -> dict[str, float]:
    """Microseconds of a jitted program that only calls the host."""
    import jax
    import jax.numpy as jnp

    found = {}
    for tokens in (1, 128):
        x = jnp.ones((tokens, 4096), jnp.float32)
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        call = jax.jit(lambda x, shape=shape: jax.pure_callback(lambda y: np.asarray(y), shape, x))
        nothing = jax.jit(lambda x: x + 1.0)
        found[f"{tokens} x 4096 (us)"] = 1e6 * timed(lambda c=call, x=x: c(x).block_until_ready(), repeats)
        found[f"{tokens} x 4096, program without it (us)"] = 1e6 * timed(
            lambda n=nothing, x=x: n(x).block_until_ready(), repeats
        )
    return found


def measure_slots(sizes, repeats) -> dict[str, float]:
    """Microseconds to write one expert, and to run 4 of n experts on one token, by layout."""
    import jax
    import jax.numpy as jnp

    from hybrimoe_jax.engine.lanes.slots import write_slot
    from hybrimoe_jax.models.moe import expert_forward

    size = sizes[1]
    hidden = max(16, int(size * 1e6) // (12 * WIDTH))
    new = (jnp.ones((2 * hidden, WIDTH), jnp.float32), jnp.ones((WIDTH, hidden), jnp.float32))
    x = jnp.ones((1, WIDTH), jnp.float32)

    @jax.jit
    def separate(x, slots):
        return sum(expert_forward(slot, x) for slot in slots)

    @jax.jit
    def indexed(x, stack, ids):
        return sum(expert_forward((stack[0][ids[i]], stack[1][ids[i]]), x) for i in range(4))

    def set_row(stack, new, index):
        return tuple(jax.lax.dynamic_update_index_in_dim(s, n, index, 0) for s, n in zip(stack, new))

    donated, copied = jax.jit(set_row, donate_argnums=0), jax.jit(set_row)
    found = {}
    slots = [tuple(jnp.zeros_like(part) for part in new) for _ in range(4)]
    before = slots[0][0].unsafe_buffer_pointer()

    def write():
        slots[0] = jax.block_until_ready(write_slot(slots[0], new))

    found[f"{size:g} MB: write to a buffer of its own (us)"] = 1e6 * timed(write, repeats)
    found["written in place (1 yes, 0 no)"] = float(slots[0][0].unsafe_buffer_pointer() == before)
    found["4 experts, buffers of their own (us)"] = 1e6 * timed(
        lambda: separate(x, tuple(slots)).block_until_ready(), repeats
    )
    ids = jnp.array([0, 2, 4, 6])
    for count in (8, 32):
        stack = {"s": tuple(jnp.zeros((count, *part.shape), jnp.float32) for part in new)}

        def write_row(stack=stack):
            stack["s"] = jax.block_until_ready(donated(stack["s"], new, 3))

        found[f"{size:g} MB: write to a stack of {count} (us)"] = 1e6 * timed(write_row, repeats)
        found[f"4 experts of a stack of {count} (us)"] = 1e6 * timed(
            lambda s=stack: indexed(x, s["s"], ids).block_until_ready(), repeats
        )
        if count == 8:
            found["the same write, not donated (us)"] = 1e6 * timed(
                lambda s=stack: jax.block_until_ready(copied(s["s"], new, 3)), repeats
            )
    return found


def measure_dispatch(sizes, repeats) -> dict[str, float]:
    """Microseconds a layer: programs of 20 arguments that do next to nothing.

    Queued, or with the ids read in between.
    """
    import jax
    import jax.numpy as jnp

    weights = [jnp.ones((8,), jnp.float32) for _ in range(ARGUMENTS)]
    front = jax.jit(lambda h, *w: (h + w[0][0], h[:, :PACKED_WIDTH] * w[-1][0]))
    experts = jax.jit(lambda h, mix: h * mix)
    h = jnp.ones((1, WIDTH), jnp.float32)
    mix = np.ones((1, 1), np.float32)

    def queued() -> float:
        """-> when the last program was issued."""
        x = h
        for _ in range(LAYERS):
            x, _ = front(x, *weights)
        issued = time.perf_counter()
        x.block_until_ready()
        return issued

    def planned():
        x = h
        for _ in range(LAYERS):
            x, packed = front(x, *weights)
            np.asarray(packed)
            x = experts(x, mix)
        x.block_until_ready()

    issue = []
    whole = timed(queued, repeats)
    for _ in range(repeats):
        start = time.perf_counter()
        issue.append(queued() - start)
    return {
        "issuing one program (us)": 1e6 * median(issue) / LAYERS,
        "one program, finished (us)": 1e6 * whole / LAYERS,
        "front, ids read, experts (us)": 1e6 * timed(planned, repeats) / LAYERS,
    }


def measure_threads(sizes, repeats) -> dict[str, float]:
    """Rates of device_put on a second thread and of donated writes on the first.

    Each alone, and together; contents are checked.
    """
    import jax
    import jax.numpy as jnp

    from hybrimoe_jax.engine.lanes.slots import write_slot

    device, seconds = jax.devices()[0], 0.1 + 0.02 * repeats
    source = host_array(sizes[0], False)
    news = [(jnp.full((64, WIDTH), float(i)), jnp.full((WIDTH, 32), float(i))) for i in range(4)]
    slots = [tuple(jnp.zeros_like(part) for part in new) for new in news]
    errors: list[BaseException] = []

    def put():
        jax.device_put(source, device).block_until_ready()

    def write(turn: int):
        slots[turn % 4] = jax.block_until_ready(write_slot(slots[turn % 4], news[turn % 4]))

    def rate(stop: Callable[[], bool], run) -> float:
        count, start = 0, time.perf_counter()
        while not stop():
            run(count)
            count += 1
        return count / (time.perf_counter() - start)

    def for_seconds():
        end = time.perf_counter() + seconds
        return lambda: time.perf_counter() > end

    put()
    write(0)
    found = {"puts alone (1/s)": rate(for_seconds(), lambda _: put()), "writes alone (1/s)": rate(for_seconds(), write)}
    done, rates = threading.Event(), []

    def second():
        try:
            rates.append(rate(done.is_set, lambda _: put()))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=second)
    thread.start()
    found["writes together (1/s)"] = rate(for_seconds(), write)
    done.set()
    thread.join()
    if errors:
        raise errors[0]
    found["puts together (1/s)"] = rates[0]
    for i, slot in enumerate(slots):
        if not all(bool((part == float(i)).all()) for part in slot):
            raise RuntimeError(f"slot {i} does not hold what was written")
    return found


def packed_slots(sizes, format: str, count: int) -> list:
    """Experts of DeepSeek-V2-Lite's shape (an eighth of it if small) on the device.

    Enough of them, run in turn, that none stays in a cache.
    """
    import jax

    from hybrimoe_jax.formats.packing import ExpertLayout, Format, PackedExpert

    width, hidden = (2048, 1408) if max(sizes) > 4 else (512, 352)
    layout = ExpertLayout(Format.parse(format), width, hidden)
    data = np.random.default_rng(0).integers(0, 63, (count, layout.nbytes), np.uint8)  # below 63: finite float16 scales
    return [PackedExpert(jax.device_put(row), layout) for row in data]


def temporary_bytes(program) -> int:
    """Memory that a compiled program takes beside its arguments and results, at least 1."""
    return max(program.memory_analysis().temp_size_in_bytes, 1)


def measure_packed(sizes, repeats) -> dict[str, float]:
    """An int4-g64 expert from several slots in turn."""
    import jax
    import jax.numpy as jnp

    from hybrimoe_jax.models.packed import packed_forward

    slots = packed_slots(sizes, "int4-g64", 16)
    layout, width, hidden = slots[0].layout, slots[0].width, slots[0].hidden
    rng = np.random.default_rng(0)
    plain = [jax.device_put(rng.standard_normal((3, hidden, width), np.float32)) for _ in range(4)]
    x = jnp.ones((1, width), jnp.float32)
    packed = jax.jit(packed_forward)
    dense = jax.jit(lambda w, x: jnp.einsum("f,fd->d", jax.nn.silu(w[0] @ x[0]) * (w[1] @ x[0]), w[2]))
    temporary = temporary_bytes(packed.lower(slots[0], x).compile())
    each = timed(lambda: jax.block_until_ready([packed(slot, x) for slot in slots]), repeats) / len(slots)
    floats = timed(lambda: jax.block_until_ready([dense(w, x) for w in plain]), repeats) / len(plain)
    return {
        "one packed expert (us)": 1e6 * each,
        "the same in float32 (us)": 1e6 * floats,
        "packed bytes read (GB/s)": layout.nbytes / each / 1e9,
        "float32 bytes read (GB/s)": 12 * width * hidden / floats / 1e9,
        "temporary memory over a float32 matrix (1: it is written out)": temporary / (4 * width * hidden),
    }


def measure_pallas(sizes, repeats) -> dict[str, float]:
    """Both forms of a quantised expert, alternately.

    Programs of several experts, so that issuing one is not what is timed.
    """
    import jax
    import jax.numpy as jnp

    from hybrimoe_jax.models.moe import expert_forward

    small = max(sizes) <= 4
    kernel = "pallas-interpret" if jax.devices()[0].platform == "cpu" else "pallas"
    memory = jnp.ones((4 if small else 256) << 18, jnp.float32)
    total = jax.jit(jnp.sum)
    bandwidth = memory.nbytes / timed(lambda: total(memory).block_until_ready(), repeats)
    found = {"bandwidth: sum of a large array (GB/s)": bandwidth / 1e9}
    for format, load in [("int4-g64", 1), ("int4-g64", 8), ("int8-g64", 1)]:
        slots = packed_slots(sizes, format, 2 if small else 16)
        x = jnp.asarray(np.random.default_rng(1).standard_normal((load, slots[0].width), np.float32))
        programs, times, label = {}, {"xla": [], "pallas": []}, f"{format}, load {load}"
        for name, chosen in (("xla", "xla"), ("pallas", kernel)):
            run = jax.jit(lambda slots, x, chosen=chosen: sum(expert_forward(slot, x, chosen) for slot in slots))
            programs[name] = run.lower(slots, x).compile()
        outputs = {name: np.asarray(run(slots, x)) for name, run in programs.items()}
        for _ in range(repeats):
            for name, run in programs.items():
                start = time.perf_counter()
                run(slots, x).block_until_ready()
                times[name].append((time.perf_counter() - start) / len(slots))
        for name, run in programs.items():
            found[f"{label}, {name}: one expert (us)"] = 1e6 * median(times[name])
            found[f"{label}, {name}: share of bandwidth"] = slots[0].nbytes / median(times[name]) / bandwidth
            found[f"{label}, {name}: temporary memory (MB)"] = temporary_bytes(run) / 1e6
        difference = np.abs(outputs["pallas"] - outputs["xla"]).max() / np.abs(outputs["xla"]).max()
        found[f"{label}: largest difference, over the output's (1e-6)"] = 1e6 * float(max(difference, 1e-9))
    return found


def callback_apart(small: bool) -> dict[str, float]:
    """The callback part in a process of its own.

    On the CPU backend it wants synchronous dispatch, and a hang must end.
    """
    command = [sys.executable, __file__, "--part", "callback", *(["--small"] if small else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CALLBACK_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])["facts"]["callback"]


PARTS = {
    "read-back": measure_read_back,
    "transfer": measure_transfer,
    "callback": measure_callback,
    "slots": measure_slots,
    "dispatch": measure_dispatch,
    "threads": measure_threads,
    "packed": measure_packed,
    "pallas": measure_pallas,
}


def main() -> int:
    top = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    top.add_argument("--part", choices=PARTS, action="append", help="only this part (repeatable)")
    top.add_argument("--small", action="store_true", help="small sizes and few repeats (always so on the CPU backend)")
    args = top.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    if args.part == ["callback"]:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    device = jax.devices()[0]
    small = args.small or device.platform == "cpu"
    sizes, repeats = ((0.25, 1, 4), 5) if small else ((4, 17, 88), 30)
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}, wall clock, medians of {repeats}")
    facts, failed = {}, {}
    for name in args.part or PARTS:
        try:
            apart = name == "callback" and args.part != ["callback"]
            facts[name] = callback_apart(small) if apart else PARTS[name](sizes, repeats)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            print(f"\n{name}: FAILED: {failed[name]}")
            continue
        print(f"\n{name}")
        for what, value in facts[name].items():
            print(f"  {what:56}{value:12.2f}")
    record = {"benchmark": "gpu_facts", "device": device.device_kind, "platform": device.platform, "clock": "wall"}
    print(json.dumps({**record, "jax": jax.__version__, "small": small, "facts": facts, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
