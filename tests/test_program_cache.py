"""What one process of the tests has compiled, another does not compile again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import program_cache

CODE = """
import program_cache
cache = program_cache.start()
import jax
counts = []
jax.monitoring.register_event_listener(lambda name, **_: counts.append(name.endswith("/cache_hits")))
jax.jit(lambda x: x * 3 + 1)(2.0)
cache.close()
print(sum(counts))
"""


def test_programs_are_found_by_the_next_process(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(program_cache.__file__).parent))
    found = [int(subprocess.check_output([sys.executable, "-c", CODE])) for _ in range(2)]
    assert found[0] == 0 < found[1]
