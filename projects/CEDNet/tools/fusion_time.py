#!/usr/bin/env python3
"""How early backbones fuse features: their share of parameters before the first fusion.

Writes fusion_time.png/.csv and summary.json. Models are not computed, so any size takes seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from d2dense import config
from d2dense.analyses import command
from d2dense.analyses.fusion import fusion_time
from d2dense.analyses.reports import fusion_report
from d2dense.errors import run_tool


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.make_parser(__doc__, weights=False, data=False)
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    times = {}
    for path, name in zip(args.config_file, command.distinct_config_names(args)):
        cfg = config.load(path, args.overrides)
        with torch.device("meta"):
            times[name] = fusion_time(config.build_model(cfg, device="meta"))
        time = times[name]
        print(f"{name}: {100 * time.share:.1f} % ({time.before:,} of {time.whole:,} parameters)")
    fusion_report(times, args.output)
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
