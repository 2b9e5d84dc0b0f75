#!/usr/bin/env python3
"""Evaluate every stage and ensemble of a trained cascade in one pass over the test images; of any
other detector its result.

Writes results.json, confidence.csv and the detections of each stage, from which draw_figures.py
draws.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from d2dense.analyses import command
from d2dense.data import loaders
from d2dense.errors import run_tool


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.make_parser(__doc__, num=False)
    args = parser.parse_intermixed_args(argv)
    command.exactly_one(args)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (subject,) = command.open_subjects(args)
    from fscascade.stage_evaluation import evaluate_stages  # found once the projects are known

    records = loaders.get_dataset_dicts(names=subject.dataset, filter_empty=False)
    images = subject.test_images(records)
    results = evaluate_stages(subject.model, images, subject.dataset, output_dir=args.output)
    for stage, tasks in results.items():
        values = "  ".join(
            f"{task} AP {m['AP']:.2f} AP50 {m['AP50']:.2f} AP75 {m['AP75']:.2f}"
            for task, m in tasks.items()
        )
        print(f"{subject.dataset} {stage:<20}{values}")
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
