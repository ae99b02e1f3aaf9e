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
# profile. These times are computed, not measured; the text is the same.

# %%
with hj.load(cache_ratio=0.25, machine="a6000-paper") as engine, engine.recording(timeline=True) as record:
    elsewhere = engine.generate("To be, or not to be", max_new_tokens=tokens)

assert elsewhere.text == result.text
elsewhere.stats.table()

# %% [markdown]
# ## What the cache did
#
# A *hit* is an activated expert that was resident when its layer was planned. Look at how the rate rises in the first
# steps, while the cache finds the experts that this text wants.

# %%
elsewhere.stats.plot.hit_rate()
# %%
stats = elsewhere.stats
print(f"{stats.hit_rate:.0%} of the experts were found resident, with slots for 25% of them")

# %% [markdown]
# Who computed the experts, step by step: hits on the device, and misses that the CPU took or the link brought.

# %%
elsewhere.stats.plot.experts()
# %%
said = stats.summary()
print(
    f"{said['device_experts']} on the device, {said['cpu_experts']} on the CPU, {said['demand_fetches']} fetched, "
    f"{said['prefetch']['issued']} prefetched, of which {said['prefetch']['useful']} were useful"
)

# %% [markdown]
# ## A timeline
#
# Each box is an expert or a transfer, on the lane that it kept busy. Look at the link: it works beside the other lanes.
# Time is that of the profile's machine.

# %%
record.timeline.plot(last=1, layers=3)
# %%
timeline = record.timeline
for lane in timeline.lanes:
    print(f"{lane}: busy {timeline.busy(lane) / timeline.span:.0%} of the time")

# %% [markdown]
# `timeline.write("run.json")` writes a file that [Perfetto](https://ui.perfetto.dev) opens. What each statistic means:
# [statistics](../docs/statistics.md).
