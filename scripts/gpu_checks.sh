#!/usr/bin/env bash
# Everything that wants a GPU, unattended, as two calls of 300 and 240 seconds. Run from the repository's root; see
# docs/gpu.md and gpu_checks.py. The project need not be installed; PYTHON names the interpreter, OUT the folder for results.
#
#     scripts/gpu_checks.sh first|second [PART ...] [--dry-run]
#     scripts/gpu_checks.sh summary FOLDER ...
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD:$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" scripts/gpu_checks.py "$@"
