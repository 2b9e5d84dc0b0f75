#!/usr/bin/env python3
"""Input gradient maps of detectors or segmenters, and the area of the regions that their losses
depend on.

Writes areas.png/.csv (one threshold for all images and models), areas_relative.png/.csv (thresholds
relative to each image's largest gradient), images.csv, summary.json and pictures under maps/.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from d2dense.analyses import command
from d2dense.analyses.reports import gradient_report
from d2dense.analyses.subjects import DETECTORS, SEGMENTERS, annotated_records, records_of
from d2dense.errors import UserError, one_or_more, run_tool


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.make_parser(__doc__)
    add = parser.add_argument
    add("--ranking", type=Path, metavar="CSV", help="scores.csv of quality_scores.py: its images")
    add("--pictures", type=int, default=4, help="of how many images maps are drawn")
    add("--arrays", action="store_true", help="write every map as .npz too")
    add("--steps", type=one_or_more, default=1000, help="of the relative threshold")
    add("--seed", type=int, default=0, help="of the sampling in two-stage detectors")
    args = parser.parse_intermixed_args(argv)
    return args


def ranked_images(path: Path) -> list[str]:
    """Return the kept images of a ranking, best first."""
    try:
        with path.open(newline="") as file:
            return [row["image_id"] for row in csv.DictReader(file) if row["kept"] == "1"]
    except OSError as error:
        raise UserError(f"ranking {path} cannot be read: {error.strerror}") from None
    except (KeyError, ValueError, csv.Error):
        raise UserError(f"{path} is no scores.csv of quality_scores.py") from None


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    subjects = command.open_subjects(args, kinds=(DETECTORS, SEGMENTERS))
    if args.ranking is None:
        records = annotated_records(subjects[0].dataset, args.num)
    else:
        records = records_of(subjects[0].dataset, ranked_images(args.ranking)[: args.num])
    areas = gradient_report(
        subjects,
        records,
        args.output,
        pictures=args.pictures,
        arrays=args.arrays,
        steps=args.steps,
        seed=args.seed,
    )
    for name in areas["common"]:
        common, relative = (areas[kind][name] for kind in ("common", "relative"))
        print(f"{name}: area under the curve {common:.4g}, relative {relative:.4g}")
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
