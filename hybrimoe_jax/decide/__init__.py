"""The decision plane: which expert stays, moves, and runs where. Pure Python; imports no jax.

`Planner` joins the parts: `schedule` (one layer's lanes), `cache` (who makes room), `residency` (who is in the slots,
and what is on its way), `prefetch` (what to move ahead) and `systems` (named bundles). The live engine and a replay use
the same objects. What things take is handed in, see `schedule.Problem`.
"""

from hybrimoe_jax.decide.cache import POLICIES, CachePolicy
from hybrimoe_jax.decide.plan import REFUSED, Counters, Fetch, LayerPlan, Prefetch
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.prefetch.prediction import Accuracy, Prediction, Predictor, RouterOutlook, predict
from hybrimoe_jax.decide.prefetch.predictors import PREDICTORS
from hybrimoe_jax.decide.schedule import SCHEDULERS, Problem, Schedule, Scheduler, get_scheduler, replay
from hybrimoe_jax.decide.systems import SYSTEMS, System, get_system

__all__ = [
    "POLICIES",
    "PREDICTORS",
    "REFUSED",
    "SCHEDULERS",
    "SYSTEMS",
    "Accuracy",
    "CachePolicy",
    "Counters",
    "Fetch",
    "LayerPlan",
    "Planner",
    "Prediction",
    "Predictor",
    "Prefetch",
    "Problem",
    "RouterOutlook",
    "Schedule",
    "Scheduler",
    "System",
    "get_scheduler",
    "get_system",
    "predict",
    "replay",
]
