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
from d2dense.analyses.discriminability import discriminability_report, encoder_levels
from d2dense.analyses.subjects import annotated_records
from d2dense.errors import run_tool

SOURCES = {"encoder": encoder_levels, "cross-attention": attention_levels}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.make_parser(__doc__)
    add = parser.add_argument
    add("--source", choices=SOURCES, default="encoder", help="what is scored")
    add("--pictures", type=int, default=4, help="of how many images maps are drawn")
    args = parser.parse_intermixed_args(argv)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    subjects = command.open_subjects(args)
    areas = discriminability_report(
        subjects,
        annotated_records(subjects[0].dataset, args.num),
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
