#!/usr/bin/env python3
"""Check datasets before training: files, sizes, annotations, labels, and a table of the classes.

    tools/check_dataset.py --config-file CONFIG [overrides ...]     every dataset of a config
    tools/check_dataset.py --dataset coco_2017_val                  a registered dataset
    tools/check_dataset.py --json train.json --images images/       a COCO or LVIS json
    tools/check_dataset.py --images images/ --labels labels/ --classes names.txt
    tools/check_dataset.py --kind image_folder --images train/      a folder per class

Exit code 0: training can start; 1: there are errors, at which training would end or replace the
sample, and evaluation would end; 2: the command is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf

from d2dense import config
from d2dense.data import check, datasets
from d2dense.errors import ToolParser, UserError, one_or_more, run_tool


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", help="config file or model-zoo name")
    parser.add_argument("--dataset", nargs="+", default=[], help="registered names")
    parser.add_argument(
        "--kind", default="", help="coco, lvis, cityscapes, sem_seg or image_folder"
    )
    parser.add_argument("--json", default="", help="annotation file")
    parser.add_argument("--images", default="", help="folder of the pictures")
    parser.add_argument("--labels", default="", help="folder of the label maps")
    parser.add_argument("--classes", default="", help="file with the class names of label maps")
    parser.add_argument("--ignore-label", type=int, help="by default the class file's, or 255")
    parser.add_argument(
        "--reduce-zero-label",
        action="store_true",
        help="label maps count classes from 1; 0 is no class",
    )
    parser.add_argument("--label-table", default="", help="what the values of label maps mean")
    parser.add_argument("--split", default="", help="file with the names of the images to use")
    parser.add_argument("--task", default="instance", help="cityscapes: instance or semantic")
    parser.add_argument("--masks", action="store_true", help="masks are needed")
    parser.add_argument("--fast", action="store_true", help="read only the headers of the images")
    parser.add_argument("--workers", type=one_or_more, default=4)
    parser.add_argument("overrides", nargs="*", help="config overrides, KEY VALUE or key=value")
    return parser.parse_intermixed_args(argv)


def wants_masks(cfg: CfgNode | DictConfig) -> bool:
    """Return whether the training mapper of a config asks for instance masks."""
    if config.kind_of(cfg) == "yaml":
        return cfg.MODEL.MASK_ON
    return bool(OmegaConf.select(cfg, "dataloader.train.mapper.use_instance_mask"))


def names_of(args: argparse.Namespace) -> tuple[list[str], bool | None]:
    """Return the names of the datasets to check, and whether masks are needed (None: unknown)."""
    masks = args.masks or None
    if args.config_file:
        from d2dense.engine.experiment import experiment  # slow to import, and only needed here

        run = experiment(config.load(args.config_file, args.overrides), device="cpu")
        names = list(dict.fromkeys([*run.train_names, *run.test_names]))
        return names, masks or wants_masks(run.cfg)
    if args.overrides:
        raise UserError(f"overrides {args.overrides} need --config-file")
    if args.dataset:
        return args.dataset, masks
    entries = {
        "kind": args.kind,
        "json": args.json,
        "images": args.images,
        "labels": args.labels,
        "classes": args.classes,
        "ignore_label": args.ignore_label,
        "reduce_zero_label": args.reduce_zero_label,
        "label_table": args.label_table,
        "split": args.split,
        "task": args.task,
    }
    if not (args.json or args.images):
        raise UserError("nothing to check; give --config-file, --dataset, or --json and --images")
    name = args.json or args.images
    datasets.register(name, datasets.DatasetSpec(**entries), where="the command line")
    return [name], masks


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    names, masks = names_of(args)
    reports = [
        check.check_dataset(name, masks=masks, decode=not args.fast, workers=args.workers)
        for name in names
    ]
    print("\n\n".join(report.text() for report in reports))
    return 0 if all(report.ok for report in reports) else 1


if __name__ == "__main__":
    sys.exit(run_tool(main))
