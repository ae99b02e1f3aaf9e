"""Rules of a user's own, one of each kind, as `own_rules:Fading:decay=0.5` names them."""

from __future__ import annotations

from hybrimoe_jax.decide import CachePolicy, Prediction, Predictor, Scheduler, replay
from hybrimoe_jax.decide.schedule.problem import split


class Fading(CachePolicy):
    """Counts uses that fade."""

    def __init__(self, num_experts, capacity, top_k, *, decay=0.9, **common):
        super().__init__(num_experts, capacity, top_k, **common)
        self.decay = decay

    def update(self, scores, loads):
        for expert in range(self.num_experts):
            self.heat[expert] = self.decay * self.heat[expert] + loads.get(expert, 0)


class Half(Scheduler):
    """So much of the misses crosses the link, the CPU computes the others."""

    def __init__(self, share=0.5):
        self.share = share

    def schedule(self, problem):
        here, moving, absent = split(problem)
        count = int(self.share * len(absent))
        return replay(problem, absent[count:], here + moving + absent[:count], absent[:count])


class Popular(Predictor):
    """Each layer's most frequent experts so far."""

    def __init__(self, *model, step=1):
        super().__init__(*model)
        self.step = step
        self.seen = [[0] * self.num_experts for _ in range(self.num_layers)]

    def predict(self, layer, shown, depth):
        for expert in shown.ids.ravel().tolist():
            self.seen[layer][expert] += self.step
        coming = range(layer + 1, layer + 1 + self.max_distance(layer, depth))
        return [Prediction(dict.fromkeys(self.best(self.seen[one]), 1)) for one in coming]

    def best(self, seen):
        return sorted(range(self.num_experts), key=lambda expert: -seen[expert])[: self.top_k]
