"""`python tests/fuzz`: a campaign; `python tests/fuzz KIND SEED`: one of its cases again, with its traceback."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def main() -> int:
    from fuzz.kinds import KINDS

    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("kind", nargs="?", choices=KINDS, help="one kind alone")
    parser.add_argument("seed", nargs="?", type=int, help="one case again")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the whole campaign (default 60)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first seed (default 0)")
    parser.add_argument("--most", type=int, metavar="N", help="of each kind (default: no limit)")
    parser.add_argument("--planted", action="store_true", help="with a fault planted for each kind (fuzz.planted)")
    parser.add_argument("--serve", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        from fuzz.worker import serve

        serve(Path(args.serve), args.planted)
        return 0
    import program_cache

    programs = program_cache.start()
    try:
        return tried(args)
    finally:
        if programs is not None:
            programs.close()


def tried(args: argparse.Namespace) -> int:
    """Exit code: whether something was found."""
    from fuzz import campaign

    if args.seed is not None:
        done = campaign.repeat(args.kind, args.seed, args.planted)
        print(done, getattr(done, "trace", ""), sep="\n")
        return int(isinstance(done, campaign.Finding))
    kinds = [args.kind] if args.kind else list(campaign.KINDS)
    limits = {"first": args.first, "most": args.most, "planted": args.planted}
    run = campaign.run(args.seconds, kinds, **limits, told=lambda found: print(found, flush=True))
    print(run.table())
    return int(bool(run.found))


if __name__ == "__main__":
    sys.exit(main())
