"""The decision plane: which expert stays, moves, and runs where. Pure Python; imports no jax.

`Planner` joins the parts: `costs` (what things take), `schedule` (one layer's lanes), `caching` (who makes room), `predictors` and
`prefetch` (what to move ahead) and `systems` (named bundles). The live engine and a replay use the same objects.
"""

from hybrimoe_jax.decide.cache import POLICIES, CachePolicy
from hybrimoe_jax.decide.plan import REFUSED, Counters, Fetch, LayerPlan, Prefetch
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.prefetch.prediction import Accuracy, Prediction, Predictor, RouterOutlook, predict
from hybrimoe_jax.decide.prefetch.predictors import PREDICTORS
from hybrimoe_jax.decide.schedule import SCHEDULERS, Problem, Schedule, Scheduler, get_scheduler, replay
from hybrimoe_jax.decide.systems import SYSTEMS, System, get_system
from hybrimoe_jax.formats.sizes import expert_bytes
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.fit import Samples, fit

__all__ = [
    "POLICIES",
    "PREDICTORS",
    "REFUSED",
    "SCHEDULERS",
    "SYSTEMS",
    "Accuracy",
    "CachePolicy",
    "CostModel",
    "Counters",
    "Fetch",
    "LayerPlan",
    "Planner",
    "Prediction",
    "Predictor",
    "Prefetch",
    "Problem",
    "RouterOutlook",
    "Samples",
    "Schedule",
    "Scheduler",
    "System",
    "expert_bytes",
    "fit",
    "get_scheduler",
    "get_system",
    "predict",
    "replay",
]
