#!/usr/bin/env python3
"""Draw saved predictions beside the annotations: predictions left, annotations right.

  tools/visualize_predictions.py --dataset shapes_val --output output/drawn \\
      --predictions RUN/inference/shapes_val/coco_instances_results.json
  tools/visualize_predictions.py --json my/val.json --images my/images --output output/drawn \\
      --predictions results.json

Reads what evaluations write (coco_instances_results.json, sem_seg_predictions.json) and any file in
COCO's results format under the dataset's image and category ids.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import MetadataCatalog

from d2dense.analyses import command
from d2dense.data import datasets
from d2dense.data.reading import read_image, read_size
from d2dense.errors import ToolParser, UserError, one_or_more, run_tool
from d2dense.evaluation.base import image_key
from d2dense.inference import annotated, draw, read_outputs, select

_GAP = 8  # pixels between the two pictures


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--predictions", required=True, metavar="FILE", help="what was predicted")
    command.add_data(parser, default="or --json or --labels, with --images")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the drawings")
    add("--num", type=one_or_more, default=20, help="how many pictures")
    add("--confidence-threshold", "--score-threshold", type=float, default=0.5, metavar="S")
    args = parser.parse_args(argv)
    if not 0 <= args.confidence_threshold <= 1:
        raise UserError(f"score threshold {args.confidence_threshold} is not within 0 to 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    name = command.custom_dataset(args)
    if name is None:
        raise UserError("which dataset? Give --dataset, or --images with --json or --labels")
    records = {image_key(record): record for record in datasets.load(name)}
    metadata = MetadataCatalog.get(name)
    outputs = read_outputs(
        args.predictions, name, {key: _size(record) for key, record in records.items()}
    )
    args.output.mkdir(parents=True, exist_ok=True)
    chosen = [key for key in records if key in outputs]
    chosen = chosen[: args.num]
    for key in chosen:
        image = read_image(dict(records[key]), "BGR")
        found = select(outputs[key], score_threshold=args.confidence_threshold)
        ignored = metadata.get("ignore_label", 255)
        truth = annotated(records[key], image, ignore_label=ignored)
        gap = np.full((len(image), _GAP, 3), 255, dtype=np.uint8)
        sheet = np.hstack([draw(image, found, metadata), gap, draw(image, truth, metadata)])
        path = args.output / f"{Path(records[key]['file_name']).stem}.jpg"
        if not cv2.imwrite(str(path), sheet):
            raise UserError(f"cannot write {path}; name another --output")
    print(f"{len(chosen)} of {len(outputs)} pictures with predictions in {args.output}")
    return 0


def _size(record: dict) -> tuple[int, int]:
    if "height" in record and "width" in record:
        return record["height"], record["width"]
    return read_size(record["file_name"])


if __name__ == "__main__":
    sys.exit(run_tool(main))
