#!/usr/bin/env python3
"""The label maps of several segmenters beside image and ground truth, with the mean IoU of each
image.

Writes label_maps.png/.csv and summary.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from detectron2.data import MetadataCatalog

from d2dense.analyses import command
from d2dense.analyses.label_maps import compare_label_maps
from d2dense.analyses.subjects import SEGMENTERS, annotated_records
from d2dense.errors import run_tool


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.make_parser(__doc__)
    parser.set_defaults(num=4)
    args = parser.parse_intermixed_args(argv)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    subjects = command.open_subjects(args, kinds=(SEGMENTERS,))
    dataset = subjects[0].dataset
    records = annotated_records(dataset)
    spread = np.linspace(0, len(records) - 1, min(args.num, len(records))).round().astype(int)
    records = records.select(spread)
    compare_label_maps(
        {each.name: each.predictions(records) for each in subjects},
        records,
        MetadataCatalog.get(dataset),
        args.output,
    )
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
