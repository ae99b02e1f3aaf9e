"""What the experiments replay: public traces, and synthetic routing where there is none."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from hybrimoe_jax.encoding import say
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.simulate.synthetic import PREFIX

TRACES = {
    "gpt-oss-20b": "trace-gpt-oss-20b/decode.npz",
    "deepseek-v2-lite, law": "trace-deepseek-v2-lite-esft/law.npz",
    "deepseek-v2-lite, intent": "trace-deepseek-v2-lite-esft/intent.npz",
    "qwen3-30b-a3b": "trace-edge-routes/qwen3-30b-a3b.route.csv.gz",
}
"""Row -> its file under the folder of the public traces."""
ONE_SEQUENCE = ("qwen3-30b-a3b",)
"""Rows of a single sequence: nothing to learn a placement from, no interval."""
SIZE = "sequences=32,tokens=24"
SYNTHETIC = {f"{model} (synthetic)": f"{PREFIX}{model}:{SIZE}" for model in ("mixtral-8x7b", "qwen2-57b-a14b")}
QWEN2 = "qwen2-57b-a14b (synthetic)"
BUNDLED = "the bundled model"


def public_traces(folder: str | None) -> dict[str, str]:
    """The traces at hand, by row; says which are not. UserError where `folder` is given and holds none."""
    data = Path(folder or os.environ.get("HYBRIMOE_DATA") or "../shared/data")
    traces = {row: str(data / path) for row, path in TRACES.items() if (data / path).is_file()}
    if folder and not traces:
        raise UserError(f"--data {data}: holds none of {', '.join(TRACES.values())}")
    for row, path in TRACES.items():
        if row not in traces:
            say(f"{data / path} is not there: rows of {row} are left out")
    return traces


def inputs(traces: Mapping[str, str]) -> list[dict]:
    """What the figures are made from besides the code, as a record each: the file's name and its SHA-256."""
    package = Path(__file__).parents[1]
    files = {row: Path(path) for row, path in traces.items()}
    files |= {f"profile {path.stem}": path for path in sorted((package / "machine" / "profiles").glob("*.json"))}
    files["paper-numbers.json"] = package / "reproduce" / "paper-numbers.json"
    return [{"input": name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for name, path in files.items()]
