#!/usr/bin/env python3
"""How differently the main head and the auxiliary heads of a Co-DETR look at the encoder's
features: divergence of their class activation maps.

Writes head_distance.png/.csv and summary.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from d2dense import projects
from d2dense.analyses import command
from d2dense.analyses.head_distance import HeadDistances, distance_report
from d2dense.analyses.subjects import annotated_records
from d2dense.errors import one_or_more, run_tool


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.make_parser(__doc__)
    add = parser.add_argument
    add("--top", type=one_or_more, default=100, help="best candidates of each head that count")
    args = parser.parse_intermixed_args(argv)
    command.exactly_one(args)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    projects.import_all()
    from codetr import analyses  # found once the projects are known

    (subject,) = command.open_subjects(args)
    model = analyses.require_collaborative(subject.model)
    names = ["main", *analyses.head_names(model)]
    distances = HeadDistances(len(names))
    for sample in subject.labelled_images(annotated_records(subject.dataset, args.num)):
        distances.add(analyses.activation_maps(model, sample, top=args.top))
    for name, distance in distance_report(distances, names, args.output).items():
        print(f"{name}: mean distance {distance:.4f}")
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
