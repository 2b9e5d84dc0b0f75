#!/usr/bin/env python3
"""How far the queries of a Co-DETR, those that get an object and those that get none, are from the
customised positives of the same object.

Writes query_distance.png/.csv and summary.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from d2dense import projects
from d2dense.analyses import command
from d2dense.analyses.query_distance import query_report
from d2dense.analyses.subjects import annotated_records
from d2dense.errors import run_tool
from d2dense.evaluation.base import image_key


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.make_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of what heads with region proposals draw")
    args = parser.parse_intermixed_args(argv)
    command.exactly_one(args)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    projects.import_all()
    from codetr import analyses  # found once the projects are known

    (subject,) = command.open_subjects(args)
    model = analyses.require_collaborative(subject.model)
    records = annotated_records(subject.dataset, args.num)
    rows = []
    for record, sample in zip(records, subject.labelled_images(records)):
        rows += analyses.query_distances(
            model, sample, image=str(image_key(record)), seed=args.seed
        )
    means = query_report(rows, args.output, images=len(records))
    for name, (matched, others) in means.items():
        print(f"{name}: queries with the object {matched:.4f}, without object {others:.4f}")
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
