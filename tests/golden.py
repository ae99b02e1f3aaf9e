"""The keys of records, against those of a record of the same kind and version that is kept for ever.

`tests/data/records/<kind>-<version>.json` are those records. A change of keys without a new version fails; a new
version needs a file of its own: run the test that failed with RECORDS=keep.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hybrimoe_jax.records import PREFIX

FOLDER = Path(__file__).parent / "data" / "records"
BY_DATA = {
    "generation": {"prefetch.accuracy", "overshoot", "costs", "host_kernel", "tbt_ms"},
    "simulation": {"costs", "versions"},
    "calibration": {"costs", "spread", "drift", "misfit", "memory", "points", "slower_beside_link"},
    "reproduction live": {"versions"},
    "training": {"works"},
    "trace info": {"expert_bytes", "router_reuse", "about"},
    "bench engine": {"models"},
    "bench e2e": {"figures", "left_out", "rows", "options", "bars", "versions"},
    "bench paced": {"machines"},
    "bench cache": {"traces"},
    "bench schedule": {"gap", "seconds", "us"},
    "bench kernels": {"limits", "ratios", "absent", "rows"},
    "bench formats": {"bars"},
    "bench start": {"seconds", "median", "times_faster", "runs"},
    "bench llamacpp": {"models"},
}
"""Places whose keys are names in the data, such as models, or lists of such."""


def check(record: dict[str, Any]) -> None:
    """AssertionError where a record has other keys than the one that is kept."""
    kind = record["kind"].removeprefix(PREFIX)
    path = FOLDER / f"{kind.replace(' ', '-')}-{record['version']}.json"
    if not path.exists() and os.environ.get("RECORDS") == "keep":
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    assert path.exists(), f"{path.name}: no record of this version is kept; run this test with RECORDS=keep"
    kept = json.loads(path.read_text(encoding="utf-8"))
    _compare(kept, record, "", BY_DATA.get(kind, set()), path.name)


def _compare(kept: Any, made: Any, place: str, by_data: set[str], name: str) -> None:
    if place in by_data:
        return
    if isinstance(kept, dict) and isinstance(made, dict):
        assert list(kept) == list(made), f"{name}: other keys at {place or 'the top'}: this asks for a new version"
        for key, value in kept.items():
            _compare(value, made[key], f"{place}.{key}".lstrip("."), by_data, name)
    elif isinstance(kept, list) and isinstance(made, list) and kept and made:
        _compare(kept[0], made[0], place, by_data, name)
