"""`python scripts/gpu_facts.py`: what the engine's design rests on, measured on the device that jax finds.

Nine parts, each a question that the design answers by assumption until it is measured (docs/gpu.md lists them):

  read-back  how long the host waits for a layer's expert ids
  transfer   device_put from plain, registered and pinned host memory, alone and beside compute, in both orders
  callback   the round trip of an empty pure_callback
  slots      writing and reading experts kept in buffers of their own, or in one stacked buffer
  dispatch   what a layer costs when its programs do nothing
  threads    device_put from a second thread while the first writes donated slots
  packed     a quantised expert at load 1: does its program read the packed bytes and little else, or write a
             dequantised matrix first
  cuda       the same experts with our own kernel and as XLA computes them: times, share of the memory's bandwidth,
             largest difference
  precision  a prefill's product in float32 and by split products: time, and error against float64

Needs jax, numpy and this package. On the CPU backend sizes are small, and the figures only show that the script
works. A table for people, then ONE JSON line. Exit code 1 if any part
failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_experts
import gpu_link
from gpu_report import report

CALLBACK_TIMEOUT_S = 120


def callback_apart(small: bool) -> dict[str, float]:
    """The callback part in a process of its own: on the CPU backend it wants synchronous dispatch; a hang must end."""
    command = [sys.executable, __file__, "--part", "callback", *(["--small"] if small else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CALLBACK_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])["facts"]["callback"]


PARTS = {
    "read-back": gpu_link.measure_read_back,
    "transfer": gpu_link.measure_transfer,
    "callback": gpu_link.measure_callback,
    "slots": gpu_experts.measure_slots,
    "dispatch": gpu_link.measure_dispatch,
    "threads": gpu_link.measure_threads,
    "packed": gpu_experts.measure_packed,
    "cuda": gpu_experts.measure_cuda,
    "precision": gpu_experts.measure_precision,
}


def main() -> int:
    top = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    top.add_argument("--part", choices=PARTS, action="append", help="only this part (repeatable)")
    top.add_argument("--small", action="store_true", help="small sizes and few repeats (always so on the CPU backend)")
    top.add_argument("--json", type=Path, help="a file that is brought up to date after every part")
    args = top.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    if args.part == ["callback"]:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    device = jax.devices()[0]
    small = args.small or device.platform == "cpu"
    sizes, repeats = ((0.25, 1, 4), 5) if small else ((4, 17, 88), 30)
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}, wall clock, medians of {repeats}")
    facts, failed = {}, {}
    about = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}
    for name in args.part or PARTS:
        try:
            apart = name == "callback" and args.part != ["callback"]
            facts[name] = callback_apart(small) if apart else PARTS[name](sizes, repeats)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            print(f"\n{name}: FAILED: {failed[name]}")
            continue
        report(args.json, facts, about)
        print(f"\n{name}", flush=True)
        for what, value in facts[name].items():
            print(f"  {what:56}{value:12.2f}")
    record = {"benchmark": "gpu_facts", **about, "clock": "wall"}
    print(json.dumps({**record, "small": small, "facts": facts, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
