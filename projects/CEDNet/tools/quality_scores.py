#!/usr/bin/env python3
"""Detection quality score of every image by a model and a baseline, and the images ranked by the
difference.

Either two models, the model first: --config-file A --weights WA --config-file B --weights WB
or two files in COCO's results format: --predictions A.json B.json --dataset NAME

Writes scores.png/.csv, summary.json and, of the best images, pictures under panels/.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from d2dense import projects
from d2dense.analyses import command, quality
from d2dense.analyses.gradients import input_gradient
from d2dense.analyses.reports import quality_panels, quality_report
from d2dense.analyses.subjects import Subject, annotated_records, records_of
from d2dense.data import loaders
from d2dense.errors import UserError, one_or_more, run_tool
from d2dense.evaluation.base import image_key


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.make_parser(__doc__, configs=False)
    add = parser.add_argument
    add("--predictions", nargs=2, metavar=("A", "B"), help="instead of models")
    add("--any-class", action="store_true", help="detections of other classes count as well")
    add(
        "--keep",
        type=one_or_more,
        default=1000,
        help="how many of the best are marked in scores.csv",
    )
    add("--panels", type=int, default=4, help="of how many of the best pictures are drawn")
    args = parser.parse_intermixed_args(argv)
    if args.predictions and (args.config_file or args.weights):
        raise UserError("--predictions take the place of --config-file and --weights")
    if not args.predictions and len(args.config_file) != 2:
        raise UserError(
            f"--config-file is given {len(args.config_file)} times, expected 2: the model and the "
            "baseline; or give --predictions A B"
        )
    return args


def from_models(args: argparse.Namespace):
    """Return records, detections by name, and the models."""
    subjects = command.open_subjects(args)
    records = annotated_records(subjects[0].dataset, args.num)
    found = {d.name: quality.detect(d.model, d.test_images(records)) for d in subjects}
    return records, found, subjects


def from_files(args: argparse.Namespace):
    """Return the same from prediction files; there are no models."""
    projects.import_all()
    dataset = command.custom_dataset(args)
    if dataset is None:
        raise UserError("--predictions need --dataset, or --json and --images")
    if args.overrides:
        raise UserError(f"overrides {args.overrides} need --config-file")
    everything = loaders.get_dataset_dicts(names=dataset, filter_empty=False)
    ids = [image_key(record) for record in everything]
    names = command.per_config(args.name, "--name", args.predictions)
    names = [name or Path(file).stem for name, file in zip(names, args.predictions)]
    if names[0] == names[1]:
        names = [f"{name} {k}" for k, name in enumerate(names, start=1)]
    found = {
        name: quality.read_predictions(file, dataset, ids)
        for name, file in zip(names, args.predictions)
    }
    return annotated_records(dataset, args.num), found, []


def gradient_maps(subjects: Sequence[Subject], image_ids: Sequence):
    """Return, by model, an iterator over the maps of these images."""
    if not subjects:
        return {}
    records = records_of(subjects[0].dataset, [str(each) for each in image_ids])
    return {
        subject.name: (
            input_gradient(subject.model, sample).map for sample in subject.labelled_images(records)
        )
        for subject in subjects
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    records, found, subjects = (from_files if args.predictions else from_models)(args)
    comparisons = quality.compare(records, *found.values(), any_class=args.any_class)
    names = tuple(found)
    summary = quality_report(comparisons, args.output, keep=args.keep, names=names)
    best = comparisons[: max(args.panels, 0)]
    if best:
        maps = gradient_maps(subjects, [image_key(each.record) for each in best])
        quality_panels(best, found, args.output, any_class=args.any_class, gradients=maps)
    for name, score in summary["mean_score"].items():
        print(f"{name}: mean image score {score:.4f} over {summary['images']} images")
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
