# %% [markdown]
# # Your own policy
#
# A cache policy, a predictor and a scheduler, each in one cell. They are checked, then run live, in a replay, and in
# the PyTorch baseline: all three take the same classes. What decides is plain Python; nothing here knows of slots,
# transfers or threads. In files and on the command line a rule is named `module:Class:param=1`
# ([policies](../docs/policies.md)).
#
# ## A cache policy
#
# A policy keeps a *heat* for every expert of a layer. When room is needed, the coldest resident that the step does not
# need makes room. This one counts uses that fade, and adds the newest scores.

# %%
import hybrimoe_jax as hj
from hybrimoe_jax.decide import CachePolicy, Prediction, Predictor, Scheduler, replay


class Fading(CachePolicy):
    """Uses and scores, both fading."""

    def __init__(self, num_experts, capacity, top_k, *, decay=0.9, **common):
        super().__init__(num_experts, capacity, top_k, **common)
        self.decay = decay

    def update(self, scores, loads):
        for expert in range(self.num_experts):
            score = scores[expert] if scores is not None else 0.0
            self.heat[expert] = self.decay * self.heat[expert] + (expert in loads) + score


# %% [markdown]
# ## A predictor
#
# It says what the coming layers will want. This one names each layer's most frequent experts so far.


# %%
class Popular(Predictor):
    """Each layer's most frequent experts so far."""

    def __init__(self, *model):
        super().__init__(*model)
        self.seen = [[0] * self.num_experts for _ in range(self.num_layers)]

    def predict(self, layer, shown, depth):
        for expert in shown.ids.ravel().tolist():
            self.seen[layer][expert] += 1
        coming = range(layer + 1, layer + 1 + self.max_distance(layer, depth))
        return [Prediction(dict.fromkeys(self.most(self.seen[one]), 1)) for one in coming]

    def most(self, counts):
        return sorted(range(self.num_experts), key=counts.__getitem__, reverse=True)[: self.top_k]


# %% [markdown]
# ## A scheduler
#
# It gives every activated expert to one lane. This one sends a share of the misses over the link, the heaviest first,
# and leaves the others to the CPU. `replay` times the three lanes.


# %%
class Share(Scheduler):
    """A share of the misses is fetched, the CPU computes the others."""

    name = "share"

    def __init__(self, share=0.5):
        self.share = share

    def schedule(self, problem):
        loads = problem.loads
        here = sorted((e for e in loads if e in problem.resident), key=loads.get, reverse=True)
        moving = sorted(
            (e for e in loads if e in problem.in_flight and e not in problem.resident), key=problem.in_flight.get
        )
        absent = sorted((e for e in loads if e not in here and e not in moving), key=loads.get, reverse=True)
        fetched = absent[: round(self.share * len(absent))]
        return replay(problem, absent[len(fetched) :], here + moving + fetched, fetched)


# %% [markdown]
# ## Checked
#
# A rule that is wrong would give wrong text, or wrong times that look good. `check` runs one over random problems; the
# same checks watch it in every run. Look at what it says of a scheduler that forgets an expert: its runs look faster,
# and their text is wrong.

# %%
for rule in (Fading(decay=0.9), Popular, Share(share=0.5)):
    print(hj.check(rule))


class Forgetful(Scheduler):
    """Forgets the last miss."""

    name = "forgetful"

    def schedule(self, problem):
        absent = [e for e in problem.loads if e not in problem.resident and e not in problem.in_flight]
        return replay(problem, absent[:-1], [e for e in problem.loads if e not in absent], [])


try:
    hj.check(Forgetful)
except hj.UserError as error:
    print(error)

# %% [markdown]
# ## Live
#
# A system is a bundle of rules. This one takes all three, and runs like a built-in one: here under the virtual clock,
# with the costs of DeepSeek-V2-Lite on the paper's machine. The text does not depend on the rules.

# %% short="tokens = 4"
tokens = 32

# %%
from hybrimoe_jax.tables import table

PROMPT = "Enter the King and all his train, with"
mine = hj.system("mine", cache=Fading(decay=0.9), predictor=Popular, scheduler=Share(share=0.5))
options = dict(cache_ratio=0.25, cost_shape="deepseek-v2-lite")
live = {}
for system in (mine, "hybrimoe", "ktransformers"):
    with hj.load(system=system, machine="a6000-paper", **options) as engine, engine.recording() as record:
        live[getattr(system, "name", system)] = engine.generate(PROMPT, max_new_tokens=tokens)
    trace = record.trace

table(
    {
        "system": name,
        "same text": made.text == live["hybrimoe"].text,
        "ms a token, computed": made.stats.tbt_ms()["median"],
        "hit rate": made.stats.hit_rate,
    }
    for name, made in live.items()
)

# %% [markdown]
# ## In a replay
#
# The recorded routing is replayed with the same classes, at several cache sizes. Look at where your own line is.

# %% short="ratios = [0.25]"
ratios = [0.125, 0.25, 0.5, 0.75]

# %%
runs = hj.replay(
    trace, machine="a6000-paper", ratios=ratios, systems=[mine, "hybrimoe", "ktransformers"], starts="cold"
)
runs.plot.hit_rate()

# %%
for record in runs:
    if record["cache_ratio"] == 0.25:
        print(f"{record['system']}: hit rate {record['hit_rate']['mean']:.1%} at a quarter")

# %% [markdown]
# ## In the PyTorch baseline
#
# The baseline is an offloading engine in PyTorch with the same planner. Given the same rules and the same costs it
# decides the same: the text, the hits and the experts on each lane agree with the live run above.

# %%
with hj.TorchOffload(mode=mine, clock="virtual", profile="a6000-paper", **options) as engine:
    theirs = engine.generate(PROMPT, max_new_tokens=tokens)

ours, torch = live["mine"].stats.summary(), theirs.stats.summary()
table(
    {"what": what, "in JAX": ours[what], "in PyTorch": torch[what]}
    for what in ("hits", "misses", "cpu_experts", "device_experts", "demand_fetches")
)

# %%
print("same text:", theirs.text == live["mine"].text)
