#!/usr/bin/env python3
"""Write pictures of what the mapper feeds the model: boxes, masks, label maps or classes.

tools/visualize_data.py --config-file CONFIG [--num 20] [--output DIR] [overrides ...]
tools/visualize_data.py --dataset shapes_train        the annotations, without augmentation
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from detectron2.data import MetadataCatalog

from d2dense import config
from d2dense.data import classification, datasets, mappers, visualize
from d2dense.errors import ToolParser, UserError, one_or_more, run_tool


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config-file", help="config file or model-zoo name")
    source.add_argument("--dataset", help="registered name")
    parser.add_argument("--output", default="output/data", help="folder of the pictures")
    parser.add_argument("--num", type=one_or_more, default=20, help="how many pictures")
    parser.add_argument("--scale", type=float, default=1.0, help="enlarge the pictures")
    parser.add_argument("overrides", nargs="*", help="config overrides, KEY VALUE or key=value")
    return parser.parse_intermixed_args(argv)


def from_config(args: argparse.Namespace) -> tuple[Iterator[dict[str, Any]], str, str]:
    """Return mapped samples of a config's training loader, a dataset name and the image format."""
    from d2dense.engine.experiment import experiment  # slow to import, and only needed here

    run = experiment(config.load(args.config_file, args.overrides), device="cpu")
    loader = run.build_train_loader()
    samples = itertools.chain.from_iterable(loader)
    image_format = getattr(loader.dataset.mapper, "image_format", "BGR")
    return samples, run.train_names[0], image_format


def from_dataset(args: argparse.Namespace) -> tuple[Iterator[dict[str, Any]], str, str]:
    """Return the samples of one dataset as annotated."""
    if args.overrides:
        raise UserError(f"overrides {args.overrides} need --config-file")
    records = datasets.load(args.dataset)
    mapper: Callable[[dict[str, Any]], dict[str, Any]]
    if "annotations" in records[0]:
        objects = [a for record in records for a in record["annotations"]]
        masks = bool(objects) and all("segmentation" in a for a in objects if not a.get("iscrowd"))
        mapper = mappers.DetectionMapper(is_train=True, augmentations=[], use_instance_mask=masks)
    elif "label" in records[0]:
        mapper = classification.ClassificationMapper(
            is_train=True, augmentations=[], image_format="BGR"
        )
    else:
        mapper = mappers.SemanticMapper(is_train=True, augmentations=[])
    return map(mapper, records), args.dataset, "BGR"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    samples, name, image_format = (from_dataset if args.dataset else from_config)(args)
    metadata = MetadataCatalog.get(name)
    count = 0
    for index, sample in zip(range(args.num), samples):
        visualize.write_sample(
            sample, metadata, args.output, index, image_format=image_format, scale=args.scale
        )
        count += 1
    print(f"{count} pictures of {name} in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
