#!/usr/bin/env python3
"""How early backbones fuse features: their share of parameters before the first fusion.

Writes fusion_time.png/.csv. Models are not computed, so any size takes seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from d2dense import config
from d2dense.analyses import command
from d2dense.analyses.fusion import fusion_time
from d2dense.analyses.reports import fusion_report
from d2dense.errors import ToolParser, UserError, run_tool


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    command.add_configs(parser)
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    names = command.per_config(args.name, "--name", args.config_file)
    times = {}
    for path, name in zip(args.config_file, names):
        name = name or Path(path).stem
        if name in times:
            raise UserError(f"two models are called {name!r}; tell them apart by --name")
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
