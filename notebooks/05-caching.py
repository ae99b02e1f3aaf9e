# %% [markdown]
# # Caching
#
# Which experts should have the few places on the device? This notebook replays recorded routing under every cache
# policy that evicts, from an empty cache, one token at a time, each missing expert fetched and kept. Belady's rule
# knows the future and evicts the expert that is needed last: no policy that keeps each miss hits more. Hit rates are
# counts; they are the same on every machine.

# %% short="tokens, steps = 6, 6"
tokens, steps = 120, 100

# %%
import hybrimoe_jax as hj

PROMPTS = ["To be, or not to be", "My lord,", "Enter the King and all his train,", "Of Man's first disobedience"]
with hj.load(cache_ratio=0.25, machine="a6000-paper") as engine, engine.recording() as record:
    for seed, prompt in enumerate(PROMPTS):
        engine.generate(prompt, max_new_tokens=tokens, temperature=0.8, seed=seed)

# %% [markdown]
# Every policy is a cache in the same system, `on-demand`: the device computes all experts, and each miss crosses the
# link. Look at two things: the distance of all policies from Belady's rule, and how close they are to one another.

# %% short="ratios = [0.25]"
POLICIES = ["random", "lru", "lfu:decay=0.99", "lfru", "slru", "s3-fifo", "mrs", "mrs:alpha=0.3", "echo"]
systems = [*(hj.system(policy, base="on-demand", cache=policy) for policy in POLICIES), "belady"]
ratios = [0.125, 0.25, 0.5, 0.75]

# %%
runs = hj.replay(record.trace, ratios=ratios, systems=systems, starts=["cold"], steps=steps, jobs=2)
runs.plot.hit_rate()


# %%
def hits(runs, ratio=0.25):
    """{policy: hit rate} at one capacity."""
    return {record["system"]: record["hit_rate"]["mean"] for record in runs if record["cache_ratio"] == ratio}


found = hits(runs)
best = max((policy for policy in found if policy != "belady"), key=found.get)
print(f"at 25%: LRU {found['lru']:.1%}, MRS {found['mrs']:.1%}, the best is {best} with {found[best]:.1%}; ")
print(f"Belady's rule {found['belady']:.1%}")

# %% [markdown]
# ## Larger models
#
# The same on public traces, where they are at hand. They hold the weights of the chosen experts only, so MRS sees no
# score of an expert that was not chosen.

# %% tags=["data"]
from hybrimoe_jax.reproduce.__main__ import public_traces

larger = {
    name: hj.replay(path, ratios=ratios, systems=systems, starts=["cold"], steps=steps, jobs=2)
    for name, path in public_traces(None).items()
    if "intent" not in name  # a trace a model
}

# %% tags=["data"]
from hybrimoe_jax.figures import panels

if larger:
    for axes, one in zip(panels(larger, width=3.4, height=2.6), larger.values()):
        one.plot.hit_rate(axes)

# %% [markdown]
# ## Where MRS wins, and where it does not
#
# MRS ranks experts by a running score, LRU by when they were used last, LFU by how often. The lines say how many
# percentage points more of the experts a policy finds resident than LRU does. Look at where MRS is above zero, and at
# what is above MRS. With as many slots as a token has experts (12.5% of the bundled model's and of gpt-oss's) there is
# nothing to choose.

# %% tags=["data"]
from hybrimoe_jax.figures import draw_lines
from hybrimoe_jax.tables import table

models = {"bundled model": runs, **larger}
for axes, one in zip(panels(models, width=3.0, height=2.6), models.values()):
    above = table(
        {"slots [%]": 100 * ratio, "policy": policy}
        | {"points above LRU's hit rate": 100 * (rate - hits(one, ratio)["lru"])}
        for ratio in ratios
        for policy, rate in hits(one, ratio).items()
        if policy not in ("belady", "random")
    )
    draw_lines(above, "slots [%]", "points above LRU's hit rate", by="policy", ax=axes)

# %% tags=["data"]
for name, one in models.items():
    mrs, lru, belady = (100 * hits(one)[policy] for policy in ("mrs", "lru", "belady"))
    print(f"{name}, 25%: MRS {mrs - lru:+.1f} points, Belady's rule {belady - lru:+.1f} of LRU's {lru:.1f}%")

# %% [markdown]
# MRS is above LRU nearly everywhere, by 1.3 points at most, and on none of these traces it is the best. `echo`, a
# policy of ours that remembers what followed similar tokens, is above it, and so is frequency with recency, `lfru`.
# With a quarter of the slots an `alpha` of 0.3 is better too: the newest scores weigh less than with the paper's 0.5.
# What is left up to Belady's rule is far more than what lies between all of them. A policy of your own takes one
# method: [notebook 8](08-own-policy.ipynb).
