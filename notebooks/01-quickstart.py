# %% [markdown]
# # Quickstart
#
# A mixture-of-experts model with little device memory: some experts have a place on the device, the others lie in host
# memory, and a scheduler decides for each layer and token who computes a missing one. This notebook loads the model
# that comes with the package, writes a text within a memory budget, and looks at what happened: statistics, and a
# timeline.
#
# It needs no GPU: "the device" is then XLA's CPU backend. The extra `notebooks` has what it draws with.
#
# ## Load and write
#
# An engine is best loaded before any other use of jax: it divides the cores. The budget is the device memory that dense
# weights, slots and workspace may take together.

# %% short="tokens = 6"
tokens = 48

# %% tags=["measured"]
import hybrimoe_jax as hj

with hj.load(vram_budget="32MiB") as engine:
    result = engine.generate("To be, or not to be", max_new_tokens=tokens)

print(result.text)

# %% [markdown]
# The text is what the dense model would write: where an expert is computed never changes it. These times are measured,
# by the wall clock. The first token has the compilation before it, which is told apart.

# %% tags=["measured"]
result.stats

# %% [markdown]
# ## A machine with a GPU
#
# On a CPU alone the CPU computes a missing expert sooner than it could be moved, so nothing moves. With a `machine` the
# same run is computed for another one: the virtual clock counts what each step would take there, from that machine's
# profile, here with the costs of a model of full size. These times are computed, not measured; the text is the same.

# %%
with (
    hj.load(cache_ratio=0.25, machine="a6000-paper", cost_shape="deepseek-v2-lite") as engine,
    engine.recording(timeline=True) as record,
):
    elsewhere = engine.generate("To be, or not to be", max_new_tokens=tokens)

assert elsewhere.text == result.text
elsewhere.stats

# %% [markdown]
# ## What the cache did
#
# A *hit* is an activated expert that was resident when its layer was planned. Look at how far the rate goes up and down
# around its mean: what the next token wants is only half foreseeable.

# %%
elsewhere.stats.plot.hit_rate()

# %%
stats = elsewhere.stats
print(f"{stats.hit_rate:.0%} of the experts were found resident, with slots for 25% of them")

# %% [markdown]
# Who computed the experts, layer by layer: hits on the device, and misses that the CPU took or the link brought.

# %%
elsewhere.stats.plot.layers()

# %%
said = stats.summary()
print(
    f"{said['device_experts']} on the device, {said['cpu_experts']} on the CPU, {said['demand_fetches']} fetched, "
    f"{said['prefetch']['issued']} prefetched, of which {said['prefetch']['useful']} were useful"
)

# %% [markdown]
# The same as a table, a DataFrame where pandas is installed. It can be had by step and by expert, too.

# %%
stats.table(by="layer")

# %% [markdown]
# ## A timeline
#
# Each box is an expert or a transfer, on the lane that it kept busy. Look at all three lanes at once: while the device
# computes residents, the CPU has taken a miss and the link brings another.

# %%
record.timeline.plot(last=1, layers=4)

# %%
timeline = record.timeline
for lane in timeline.lanes:
    print(f"{lane}: busy {timeline.busy(lane) / timeline.span:.0%} of the time")

# %% [markdown]
# `timeline.write("run.json")` writes a file that [Perfetto](https://ui.perfetto.dev) opens. What each statistic means:
# [statistics](../docs/statistics.md).
