"""Where the measuring scripts of `gpu_checks` put what they found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def report(file: Path | None, facts: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> None:
    """Writes {"facts": ..., "about": ...} in place of what the file held: who is stopped half-way has told the rest."""
    if file is None:
        return
    whole = file.with_suffix(".part")
    whole.write_text(json.dumps({"facts": facts, "about": about or {}}), encoding="utf-8")
    whole.replace(file)
