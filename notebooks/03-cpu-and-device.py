# %% [markdown]
# # CPU against device
#
# Hybrid scheduling rests on two cost curves. On the CPU an expert takes longer the more tokens it has. On a device it
# takes about as long for one token as for many, but it must be there first. This notebook measures the curves on the
# machine that it runs on, then looks at those of the paper's machine.
#
# ## This machine
#
# A calibration measures experts on the CPU and on the device, transfers and attention, each by all that it depends on.
# Without a GPU "the device" is XLA's CPU backend: it takes turns with the CPU lane on the same cores, so nothing is
# gained by moving an expert. Times are measured, by the wall clock; they differ from run to run.

# %% short="from hybrimoe_jax.engine.warmup import AT_LOAD as plan"
import hybrimoe_jax as hj
from hybrimoe_jax.engine.calibration import WHOLE, calibrate

plan = WHOLE

# %%
with hj.load(cache_ratio=0.25, start_cache="off") as engine:
    found = calibrate(engine, plan=plan)

# %% [markdown]
# Look at the left figure: each line is straight, and its height at one expert is more than the step to the next. That
# is the *first-expert effect*: the first expert of a run pays for waking threads and filling caches. In the middle one,
# the CPU's line rises from some load on, where arithmetic takes longer than reading the weights. Dots are measured,
# lines are the fitted cost model.

# %% tags=["measured"]
from hybrimoe_jax.machine.plots import figure_of

figure = figure_of(found)
# %% tags=["measured"]
from hybrimoe_jax.machine.calibration_text import calibration_text

print(calibration_text(found))

# %% tags=["measured"]
costs = found.costs
first, next_one = 1e6 * costs.cpu(1, first=True), 1e6 * costs.cpu(1)
print(f"first expert {first:.0f} us, each further one {next_one:.0f} us; a transfer {1e6 * costs.transfer():.0f} us")

# %% [markdown]
# ## The paper's machine
#
# The released code of HybriMoE holds fits that were measured on an RTX A6000 and ten cores, for an expert of
# DeepSeek-V2-Lite in 4 bits: the profile `a6000-paper`. `a6000-engineered` is the same machine with kernels that use it
# fully. Look at where the line of the CPU crosses the dotted one: from that load on a missing expert is done sooner by
# way of the link. These times are computed from the profiles.

# %%
from hybrimoe_jax.figures import draw_lines, panels
from hybrimoe_jax.machine.profile import load_costs
from hybrimoe_jax.machine.shapes import get_shape
from hybrimoe_jax.tables import table

machines = ["a6000-paper", "a6000-engineered", "rtx4090-pcie4", "h100-pcie5", "laptop-8gb"]
of = {machine: load_costs(machine, get_shape("deepseek-v2-lite"), "int4") for machine in machines}

for axes, machine in zip(panels(machines[:2], width=3.2), machines):
    costs = of[machine]
    ways = {"CPU": costs.cpu, "device": costs.device, "by link": lambda n, c=costs: c.transfer(True) + c.device(n)}
    rows = table(
        {"load [tokens]": load, "time [ms]": 1e3 * seconds(load), "where": way}
        for way, seconds in ways.items()
        for load in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    )
    draw_lines(rows, "load [tokens]", "time [ms]", by="where", ax=axes)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")

# %% [markdown]
# ## Break-even
#
# What the costs mean for a decision, on each machine that a profile describes: the load from which on a missing expert
# is worth fetching, and the load from which on a resident one is done sooner on the device than on the CPU.

# %%
from hybrimoe_jax.machine.break_even import device_from_load, fetch_from_load, layers_to_hide

table(
    {
        "machine": machine,
        "CPU, load 1 [ms]": 1e3 * costs.cpu(1),
        "transfer [ms]": 1e3 * costs.transfer(True),
        "fetch from load": fetch_from_load(costs),
        "device from load": device_from_load(costs),
        "layers that hide a transfer": layers_to_hide(costs, costs.layer(1) + costs.shared(1)),
    }
    for machine, costs in of.items()
)

# %% [markdown]
# On the paper's machine a transfer takes less than the CPU needs for an expert of one token, so even in decoding misses
# are shared between CPU and link. On the others a CPU with good kernels is faster than the link up to a load of 15 to
# 28 tokens: there decoding is the CPU's, and the link is for prefetches and prompts. Where figures of a profile come
# from, and which are assumptions: [simulation](../docs/simulation.md).
