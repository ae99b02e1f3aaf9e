"""hybrimoe-jax: mixture-of-experts models on one machine with little GPU memory, CPU and GPU at once.

Public names load on first use (PEP 562), so that `import hybrimoe_jax.decide` imports no jax and thread counts can be
set before jax starts.
"""

from __future__ import annotations

from hybrimoe_jax import interrupts  # isort: skip - before all that takes time to import

interrupts.listen()

import importlib  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

if TYPE_CHECKING:
    from hybrimoe_jax.baselines.torch_offload import TorchOffload
    from hybrimoe_jax.bench.compare import Comparison, compare
    from hybrimoe_jax.decide import CachePolicy, Predictor, Scheduler
    from hybrimoe_jax.decide.check import check
    from hybrimoe_jax.decide.systems import system
    from hybrimoe_jax.engine.config import EngineConfig
    from hybrimoe_jax.engine.engine import Engine
    from hybrimoe_jax.engine.generation import Generation
    from hybrimoe_jax.engine.load import bundled_model, load
    from hybrimoe_jax.engine.streaming import StreamChunk, stream_generate
    from hybrimoe_jax.errors import RuleError, UserError
    from hybrimoe_jax.simulate.runs import Runs, replay
    from hybrimoe_jax.trace.importers import open_trace

_PUBLIC = {
    "CachePolicy": "hybrimoe_jax.decide",
    "Predictor": "hybrimoe_jax.decide",
    "Scheduler": "hybrimoe_jax.decide",
    "open_trace": "hybrimoe_jax.trace.importers",
    "Comparison": "hybrimoe_jax.bench.compare",
    "compare": "hybrimoe_jax.bench.compare",
    "Runs": "hybrimoe_jax.simulate.runs",
    "replay": "hybrimoe_jax.simulate.runs",
    "EngineConfig": "hybrimoe_jax.engine.config",
    "UserError": "hybrimoe_jax.errors",
    "RuleError": "hybrimoe_jax.errors",
    "load": "hybrimoe_jax.engine.load",
    "bundled_model": "hybrimoe_jax.engine.load",
    "Engine": "hybrimoe_jax.engine.engine",
    "Generation": "hybrimoe_jax.engine.generation",
    "check": "hybrimoe_jax.decide.check",
    "system": "hybrimoe_jax.decide.systems",
    "stream_generate": "hybrimoe_jax.engine.streaming",
    "StreamChunk": "hybrimoe_jax.engine.streaming",
    "TorchOffload": "hybrimoe_jax.baselines.torch_offload",
}
__all__ = [
    "CachePolicy",
    "Comparison",
    "Engine",
    "EngineConfig",
    "Generation",
    "Predictor",
    "RuleError",
    "Runs",
    "Scheduler",
    "StreamChunk",
    "TorchOffload",
    "UserError",
    "bundled_model",
    "check",
    "compare",
    "load",
    "open_trace",
    "replay",
    "stream_generate",
    "system",
]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hybrimoe_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__():
    return sorted({*globals(), *_PUBLIC})
