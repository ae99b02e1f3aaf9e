#!/usr/bin/env bash
# Everything that wants a GPU, unattended, in under 20 minutes: what is installed, the exactness tests, the facts the design
# rests on, and the engine benchmark. Run from the repository's root; see docs/gpu.md.
#
#     scripts/gpu_checks.sh [environment] [tests] [facts] [bench]        all four, in this order, if none is named
#
# Writes under ${OUT:-gpu-out}: one log per part, summary.txt, facts.json and bench.json. Each part has its own time limit and
# none stops the others. Exit code 0 if all passed. PYTHON names the interpreter; the project need not be installed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-out}
export PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONDONTWRITEBYTECODE=1

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

environment() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
    "$PYTHON" - <<'PROGRAM'
import importlib.metadata as metadata, platform, sys

print("python", platform.python_version(), "cores", __import__("os").cpu_count())
wanted = "jax jaxlib flax orbax-checkpoint numpy chex optax tokenizers jinja2 safetensors threadpoolctl".split()
missing = []
for name in [*wanted, "onednn-cpu-gomp", "pytest", "hypothesis"]:
    try:
        print(f"{name:20}{metadata.version(name)}")
    except metadata.PackageNotFoundError:
        missing.append(name)
        print(f"{name:20}MISSING{'' if name in wanted else ' (some parts are left out)'}")
import jax

device = jax.devices()[0]
print("device", device.device_kind, device.platform, "memories", sorted(m.kind for m in device.addressable_memories()))
if device.platform == "cpu":
    print("jax finds no GPU: everything below runs on the CPU backend")
sys.exit(bool(set(missing) & set(wanted)))
PROGRAM
}

tests() {
    "$PYTHON" -c "import pytest" || return 1
    local files=()
    for name in exactness engine engine_stats slots overlap budget hybrid_module packed_experts packed_triton dense_format layer_stream; do
        files+=("tests/test_$name.py")
    done
    # A newer jax may warn where the pinned one does not: here warnings are listed, not errors.
    "$PYTHON" -m pytest -v --tb=short -W default -p no:cacheprovider --continue-on-collection-errors "${files[@]}"
}

facts() {
    "$PYTHON" scripts/gpu_facts.py
}

bench() {
    "$PYTHON" -m hybrimoe_jax.bench engine --models bundled --no-baseline
}

export -f environment tests facts bench

limit_s() {
    case $1 in environment) echo 60 ;; tests) echo 590 ;; facts) echo 240 ;; bench) echo 300 ;; esac
}

part() {
    local name=$1 start=$SECONDS code=0
    timeout --kill-after=10 "$(limit_s "$name")" bash -c "$name" >"$OUT/$name.txt" 2>&1 || code=$?
    local said=passed
    [ "$code" -ne 0 ] && said="FAILED (exit $code)"
    [ "$code" -eq 124 ] && said="FAILED (stopped after $(limit_s "$name") s)"
    echo "$name: $said in $((SECONDS - start)) s" | tee -a "$OUT/summary.txt"
    if [ "$name" = environment ]; then cat "$OUT/$name.txt"; else tail -n 3 "$OUT/$name.txt" | cut -c 1-200; fi
    if [ "$name" = facts ] || [ "$name" = bench ]; then
        grep '^{"benchmark"' "$OUT/$name.txt" | tail -n 1 >"$OUT/$name.json"
    fi
    return "$code"
}

for name in "$@"; do
    case $name in environment | tests | facts | bench) ;; *) echo "unknown part $name" >&2 && exit 2 ;; esac
done
[ $# -gt 0 ] || set -- environment tests facts bench
: >"$OUT/summary.txt"
failed=0
for name in "$@"; do
    part "$name" || failed=1
done
exit "$failed"
