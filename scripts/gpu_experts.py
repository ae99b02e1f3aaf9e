"""Parts of `gpu_facts` about experts on the device: slots, and quantised experts in both forms."""

from __future__ import annotations

import time
from statistics import median

import numpy as np
from gpu_link import timed


def measure_slots(sizes, repeats) -> dict[str, float]:
    """Microseconds to write one int4 expert, and to run 6 of them on one token, by the engine's two kinds of slots."""
    import jax
    import jax.numpy as jnp

    from hybrimoe_jax.engine import programs
    from hybrimoe_jax.engine.checks import device_kernel
    from hybrimoe_jax.engine.lanes.slots import SeparateSlots
    from hybrimoe_jax.engine.lanes.stacked import StackedSlots
    from hybrimoe_jax.models.pooled import routed_experts

    format, chosen = "int4-g64", tuple(range(0, 12, 2))
    kernel, experts = device_kernel("auto", format), packed_slots(sizes, format, 12)
    layout, found, in_place = experts[0].layout, {}, True
    x = jnp.ones((1, layout.width), jnp.float32)
    acc, mix = jnp.zeros_like(x), np.ones(1, np.float32)
    run = jax.jit(lambda acc, x, slots, mix, pool: routed_experts(acc, x, slots, mix, pool, kernel))
    slots, weights = jnp.asarray([chosen], jnp.int32), jnp.ones((1, len(chosen)), jnp.float32)

    def address(pool) -> int:
        return pool.buffers(pool.some(1)[0])[0].unsafe_buffer_pointer()

    for kind, count in (("slots of their own", 16), ("a stack", 16), ("a stack", 64)):
        lies = ([count], layout.width, layout.hidden, jnp.float32, 2, layout)
        pool = (
            SeparateSlots(*lies, kernel=kernel)
            if kind != "a stack"
            else StackedSlots(*lies, kernel=kernel, num_experts=count)
        )
        label = kind if kind != "a stack" else f"a stack of {count}"
        for number, expert in enumerate(experts):
            pool.write(0, number, expert, None)
        pool.stream(experts[0])  # the first of two staging slots, and so twice below
        before = address(pool)
        pool.stream(experts[1])
        pool.stream(experts[2])
        in_place = in_place and address(pool) == before

        def write(pool=pool):
            jax.block_until_ready(pool.buffers(pool.stream(experts[0])))

        def compute(pool=pool):
            if isinstance(pool, StackedSlots):
                return run(acc, x, slots, weights, pool.pool).block_until_ready()
            mine, row = [(e, pool.get(0, e)) for e in chosen], dict.fromkeys(chosen, np.zeros(1, np.int64))
            every = programs.add_device_experts(acc, x, mine, row, dict.fromkeys(chosen, mix), kernel)
            return every.block_until_ready()

        found[f"an expert written to {label} (us)"] = 1e6 * timed(write, repeats)
        found[f"6 experts out of {label} (us)"] = 1e6 * timed(compute, repeats)
    return found | {"written in place (1 yes, 0 no)": float(in_place)}


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


def measure_cuda(sizes, repeats) -> dict[str, float]:
    """Both forms of a quantised expert, alternately.

    Programs of several experts, so that issuing one is not what is timed.
    """
    import jax
    import jax.numpy as jnp

    from hybrimoe_jax.models.moe import expert_forward

    small = max(sizes) <= 4
    kernel = "xla" if jax.devices()[0].platform == "cpu" else "cuda"  # without a GPU XLA's form stands in for ours
    memory = jnp.ones((4 if small else 256) << 18, jnp.float32)
    total = jax.jit(jnp.sum)
    bandwidth = memory.nbytes / timed(lambda: total(memory).block_until_ready(), repeats)
    found = {"bandwidth: sum of a large array (GB/s)": bandwidth / 1e9}
    for format, load in [("int4-g64", 1), ("int4-g64", 8), ("int8-g64", 1)]:
        slots = packed_slots(sizes, format, 2 if small else 16)
        x = jnp.asarray(np.random.default_rng(1).standard_normal((load, slots[0].width), np.float32))
        programs, times, label = {}, {"xla": [], "cuda": []}, f"{format}, load {load}"
        for name, chosen in (("xla", "xla"), ("cuda", kernel)):
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
        difference = np.abs(outputs["cuda"] - outputs["xla"]).max() / np.abs(outputs["xla"]).max()
        found[f"{label}: largest difference, over the output's (1e-6)"] = 1e6 * float(max(difference, 1e-9))
    return found


def measure_precision(sizes, repeats) -> dict[str, float]:
    """A prompt's product [512, 2048] x [2048, 2816] by each way that a GPU has: time, and worst error."""
    import jax
    import jax.numpy as jnp

    rows, inner, columns = (512, 2048, 2816) if max(sizes) > 4 else (16, 128, 64)
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape, np.float32) for shape in ((rows, inner), (inner, columns)))
    exact = x.astype(np.float64) @ w.astype(np.float64)
    presets = jax.lax.DotAlgorithmPreset
    ways = {"HIGHEST": jax.lax.Precision.HIGHEST, "DEFAULT": jax.lax.Precision.DEFAULT}
    ways |= {p: getattr(presets, p) for p in ("BF16_BF16_F32_X3", "BF16_BF16_F32_X6", "TF32_TF32_F32_X3")}
    found, a, b = {}, jnp.asarray(x), jnp.asarray(w)
    for name, way in ways.items():
        run = jax.jit(lambda x, w, way=way: jax.lax.dot(x, w, precision=way, preferred_element_type=jnp.float32))
        try:
            error = np.abs(np.asarray(run(a, b)) - exact).max() / np.abs(exact).max()
        except Exception as refused:  # a chip without the instruction
            print(f"{name}: {type(refused).__name__}: {str(refused)[:120]}")
            continue
        found[f"{name}: one product (us)"] = 1e6 * timed(lambda run=run: run(a, b).block_until_ready(), repeats)
        found[f"{name}: error (1e-6)"] = 1e6 * float(max(error, 1e-12))
    return found
