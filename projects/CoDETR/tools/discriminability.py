#!/usr/bin/env python3
"""How much stronger the features of detectors are on objects than elsewhere: IoF-IoB curves and
score maps, of the encoded levels (of detectors without encoder: of the backbone's), or of the cross
attention of the queries that get an object.

Writes iof_iob.png/.csv, summary.json and pictures under maps/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from d2dense.analyses import command
from d2dense.analyses.attention_maps import attention_levels
from d2dense.analyses.detectors import annotated_records
from d2dense.analyses.discriminability import discriminability_report, encoder_levels
from d2dense.errors import ToolParser, run_tool

SOURCES = {"encoder": encoder_levels, "cross-attention": attention_levels}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_configs(parser)
    command.add_run(parser)
    command.add_data(parser)
    add = parser.add_argument
    add("--source", choices=SOURCES, default="encoder", help="what is scored")
    add("--num", type=int, help="images to use, the first ones that have objects")
    add("--pictures", type=int, default=4, help="of how many images maps are drawn")
    args = parser.parse_intermixed_args(argv)
    command.at_least_one(args, "num")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    detectors = command.open_detectors(args)
    areas = discriminability_report(
        detectors,
        annotated_records(detectors[0].dataset, args.num),
        args.output,
        levels=SOURCES[args.source],
        pictures=args.pictures,
    )
    for name, area in areas.items():
        print(f"{name}: area under the IoF-IoB curve {area:.4f}")
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
