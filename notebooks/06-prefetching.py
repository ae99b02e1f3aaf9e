# %% [markdown]
# # Prefetching
#
# While one layer runs, the experts of the coming layers can be guessed and moved ahead of need. A prefetch is *useful*
# if its layer used it and it had landed, *late* if the layer had to wait for it, *wasted* otherwise. This notebook asks
# how many layers one should look ahead, and what a prefetch gains. All times are computed, by the virtual clock of a
# machine's profile.

# %% short="steps, depths = 3, (0, 2)"
steps, depths = 60, range(7)

# %% [markdown]
# ## Depth
#
# The routing is synthetic: Qwen2-57B's sizes, with predictions whose accuracy follows published figures. Look at how
# different the three machines are, and at where a line stops falling: what is farther away is guessed worse.

# %%
import hybrimoe_jax as hj
from hybrimoe_jax.figures import draw_bars, draw_lines, panels
from hybrimoe_jax.simulate.synthetic import synthetic_trace
from hybrimoe_jax.tables import table

trace = synthetic_trace("qwen2-57b-a14b")
by_depth = {depth: hj.system(f"{depth}", prefetch="impact", lookahead=depth) for depth in depths}
runs = {
    machine: hj.replay(trace, machine=machine, systems=by_depth.values(), steps=steps)
    for machine in ("a6000-paper", "a6000-engineered", "h100-pcie5")
}


# %%
def seconds(record):
    return record["seconds_per_step"]["mean"]


COST = "time a token [% of that without]"
rows = table(
    {"layers ahead": int(record["system"]), "machine": machine, COST: 100 * seconds(record) / seconds(found.records[0])}
    for machine, found in runs.items()
    for record in found
)
draw_lines(rows, "layers ahead", COST, by="machine")

# %%
for machine, found in runs.items():
    best = min(found, key=seconds)
    gain = 1 - seconds(best) / seconds(found.records[0])
    print(f"{machine}: best with {best['system']} layers, {gain:.1%} less time a token than without prefetching")

# %% [markdown]
# ## What becomes of prefetches
#
# Look at the engineered machine: its layers are much shorter than a transfer. One layer ahead nothing is worth
# starting, two layers ahead some arrive late.

# %%
for axes, found in zip(panels(runs, columns=3), runs.values()):
    fates = table(
        {
            "layers ahead": record["system"],
            "prefetches a token": record["prefetch"][fate] / record["steps"],
            "fate": fate,
        }
        for record in found
        for fate in ("useful", "late", "wasted")
    )
    draw_bars(fates, "layers ahead", "prefetches a token", by="fate", ax=axes, stacked=True)

# %%
for machine, found in runs.items():
    deepest = found.records[-1]["prefetch"]
    print(
        f"{machine}, {found.records[-1]['system']} layers: {deepest['wasted'] / max(1, deepest['issued']):.0%} wasted"
    )

# %% [markdown]
# ## Which ones: impact
#
# HybriMoE ranks candidates by *impact*: what the scheduler says the coming layer takes without the expert, less what it
# takes with it. The rival is AdapMoE's rule: what the next layer probably misses, in order. Look at the time, and at
# how many transfers it took.

# %%
rules = [
    hj.system("none", prefetch="none"),
    hj.system("next layer", prefetch="next-layer", lookahead=1),
    hj.system("impact, 1 layer", prefetch="impact", lookahead=1),
    hj.system("impact, 3 layers", prefetch="impact", lookahead=3),
]
ruled = {machine: hj.replay(trace, machine=machine, systems=rules, steps=steps) for machine in runs}
table(
    {
        "machine": machine,
        "prefetch": record["system"],
        "ms a token": 1e3 * seconds(record),
        "issued": record["prefetch"]["issued"] / record["steps"],
        "useful": record["prefetch"]["useful"] / record["steps"],
        "wasted": record["prefetch"]["wasted"] / record["steps"],
        "hit rate": record["hit_rate"]["mean"],
    }
    for machine, found in ruled.items()
    for record in found
)

# %%
for machine, found in ruled.items():
    none, eager, _, impact = map(seconds, found)
    sent, chosen = (found.records[n]["prefetch"]["issued"] / found.records[n]["steps"] for n in (1, 3))
    print(f"{machine}: the next layer's misses {1 - eager / none:+.1%} time saved by {sent:.0f} transfers a token,")
    print(f"    by impact {1 - impact / none:+.1%} by {chosen:.1f}")

# %% [markdown]
# Impact moves few experts, and nearly all of what it moves is used. On the paper's machine, whose link is idle most of
# the time, that is too careful: moving all that the next layer may miss saves more. On the engineered one, whose layers
# are shorter than a transfer, the same rule costs time, and impact does not.
#
# ## How good must a prediction be?
#
# The same with other predictors: `previous` says that a layer will choose what it chose for the token before,
# `co-activation` learns which experts follow which, `router-reuse` applies a later layer's router early, and `perfect`
# knows the future. Look at the last bar: it is all that better predictions could bring.

# %%
predictors = ["previous", "co-activation", "router-reuse", "perfect"]
systems = [hj.system(name, prefetch="impact", lookahead=3, predictor=name) for name in predictors]
found = hj.replay(trace, machine="h100-pcie5", systems=[rules[0], *systems], steps=steps)
none, *others = found.records
SAVED = "time saved [%]"
rows = table({"predictor": one["system"], SAVED: 100 * (1 - seconds(one) / seconds(none))} for one in others)
draw_bars(rows, "predictor", SAVED)

# %%
print("h100-pcie5:", "; ".join(f"{one['system']} {1 - seconds(one) / seconds(none):+.1%}" for one in others))

# %% [markdown]
# The same on real routing: [reproduction](../docs/reproduction.md).
