"""`python scripts/timeline_picture.py run.json timeline.svg`: a picture of some layers of a timeline file.

The file is what `generate --timeline` or `simulate --timeline` wrote. Needs matplotlib (the extra `plots`).
The picture says whether its times were measured, paced or computed. That of the README:

    python -m hybrimoe_jax.generate --prompt "To be, or not to be" --max-tokens 64 --device paced:a6000-paper:8 \
        --cost-shape qwen2-57b-a14b --timeline run.json
    python scripts/timeline_picture.py run.json docs/images/timeline.svg --step 23 --layers 6
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend comes first

from hybrimoe_jax.cli import first_paragraph
from hybrimoe_jax.trace.timeline import Timeline


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=first_paragraph(__doc__))
    parser.add_argument("timeline", type=Path, help="a file that --timeline wrote")
    parser.add_argument("out", type=Path, help="the picture, .svg or .png")
    parser.add_argument("--step", type=int, default=1, help="the step that is shown; 0 is the prompt (default 1)")
    parser.add_argument("--layers", type=int, default=4, help="its first layers (default 4)")
    args = parser.parse_args(argv)
    plt.rcParams.update({"svg.hashsalt": "timeline", "svg.fonttype": "none"})
    figure = Timeline.read(args.timeline).plot(args.step, layers=args.layers).figure
    figure.savefig(args.out, bbox_inches="tight", metadata={"Date": None} if args.out.suffix == ".svg" else None)
    plt.close(figure)


if __name__ == "__main__":
    main()
