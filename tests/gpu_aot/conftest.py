"""Only `make test-gpu-aot` runs these: their processes compile for a GPU that is not there, and for nothing else."""

from __future__ import annotations

import os

import topology

collect_ignore_glob = [] if os.environ.get("HYBRIMOE_GPU_AOT") else ["test_*"]

if not collect_ignore_glob and topology.missing() is None:
    topology.prepare()
