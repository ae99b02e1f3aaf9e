# %% [markdown]
# # How experts behave
#
# Caching and prefetching rest on three habits of experts. A token's experts are often chosen again by the next token.
# Those with high scores are chosen again more often. And what a layer will choose can be told some layers ahead. This
# notebook counts all three on the bundled model, and on the routing of larger models where the public traces are at
# hand (`HYBRIMOE_DATA`, or `../shared/data` beside the repository).

# %% short="tokens = 5"
tokens = 120

# %% [markdown]
# Four texts are written and their routing is recorded, a sequence each. The virtual clock computes times instead of
# measuring them: they do not matter here, and the run is the same everywhere.

# %%
import hybrimoe_jax as hj

PROMPTS = ["To be, or not to be", "My lord,", "Enter the King and all his train,", "Of Man's first disobedience"]

with hj.load(cache_ratio=0.25, machine="a6000-paper") as engine, engine.recording() as record:
    for seed, prompt in enumerate(PROMPTS):
        engine.generate(prompt, max_new_tokens=tokens, temperature=0.8, seed=seed)

bundled = record.trace
bundled.table()

# %% [markdown]
# A row is a MoE layer. `reused` is the share of a token's experts that the token before it chose too. The other traces
# were recorded by others: they hold the chosen experts and their weights only.

# %% tags=["data"]
from hybrimoe_jax.reproduce.__main__ import public_traces
from hybrimoe_jax.trace.importers import open_trace

public = {name: path for name, path in public_traces(None).items() if "intent" not in name}  # a trace a model
traces = {"bundled model": bundled} | {name: open_trace(path) for name, path in public.items()}
for name, trace in traces.items():
    print(f"{name}: {trace.facts.layers} layers of {trace.facts.experts} experts, {trace.facts.top_k} a token")

# %% [markdown]
# ## Reuse by score rank
#
# Look at how the line falls: MRS caching keeps experts by their scores, so it gains as much as this line is steep.

# %% tags=["data"]
from hybrimoe_jax.figures import panels

for axes, trace in zip(panels(traces), traces.values()):
    trace.plot.reuse_by_rank(axes)

# %% tags=["data"]
for name, trace in traces.items():
    chance, k = trace.reuse_by_rank(), trace.facts.top_k
    print(f"{name}: rank 1 is chosen again with {chance[0]:.0%}, rank {k} with {chance[k - 1]:.0%}")

# %% [markdown]
# Where the trace has the scores of all experts, those beyond the chosen ones tell something too: the experts just
# behind the line are chosen next more often than by chance. That is why MRS looks at twice as many as were chosen.

# %%
chance, k, experts = bundled.reuse_by_rank(), bundled.facts.top_k, bundled.facts.experts
print(f"ranks {k + 1} to {2 * k}: {chance[k : 2 * k].mean():.1%} on average; by chance {k / experts:.1%}")

# %% [markdown]
# ## What earlier layers know
#
# A later layer's router is applied to an earlier layer's state. Look at how slowly the lines fall with the distance:
# prefetching several layers ahead needs them to stay far above chance.

# %%
bundled.plot.similarity()
# %%
for distance in sorted(bundled.lookahead):
    recall, cosine = bundled.recall(distance), bundled.similarity(distance)
    print(f"{distance} layers ahead: {recall:.0%} of the experts named rightly, cosine of the scores {cosine:.2f}")

# %% [markdown]
# ## How often each expert is used
#
# Look for dark squares: experts that most tokens want. A fixed placement keeps those.

# %% tags=["data"]
for axes, trace in zip(panels(traces), traces.values()):
    trace.plot.frequency(axes)

# %% [markdown]
# The same, cumulated. The further the line is above the diagonal, the more a fixed placement of the most frequent
# experts can hit.

# %% tags=["data"]
for axes, trace in zip(panels(traces), traces.values()):
    trace.plot.concentration(axes)

# %% tags=["data"]
for name, trace in traces.items():
    share = trace.table()["hottest_quarter"]
    print(f"{name}: the most frequent quarter has {sum(share) / len(share):.0%} of the activations")

# %% [markdown]
# ## Reuse distance
#
# How many other experts of a layer are chosen before one is chosen again? The line says what share of the uses is at
# most so far apart: the hit rate of an LRU cache of that size, beside the running token's own experts.

# %% tags=["data"]
for axes, trace in zip(panels(traces), traces.values()):
    trace.plot.reuse_distance(axes)

# %% tags=["data"]
for name, trace in traces.items():
    found = trace.reuse_distance()
    print(f"{name}: {found.quantile(0.5)} experts at the median, {found.quantile(0.9)} at the 90th percentile")
