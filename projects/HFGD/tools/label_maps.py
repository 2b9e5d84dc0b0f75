#!/usr/bin/env python3
"""The label maps of several models beside image and ground truth, with the mean IoU of each image.

Writes label_maps.png/.csv. The data set is the first test set of the first config, or --dataset.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog

from d2dense import config
from d2dense.analyses import command
from d2dense.analyses.label_maps import compare_label_maps
from d2dense.data import loaders
from d2dense.engine.experiment import experiment
from d2dense.errors import ToolParser, UserError, run_tool
from d2dense.inference import Predictor


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_configs(parser)
    command.add_run(parser)
    parser.add_argument("--dataset", help="registered name; by default that of the first config")
    parser.add_argument("--num", type=int, default=4, help="how many images, evenly spread")
    args = parser.parse_intermixed_args(argv)
    command.at_least_one(args, "num")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    weights = command.per_config(args.weights, "--weights", args.config_file)
    names = command.per_config(args.name, "--name", args.config_file)
    predictors = {}
    for path, file, name in zip(args.config_file, weights, names):
        name = name or Path(path).stem
        if name in predictors:
            raise UserError(f"two models are called {name!r}; tell them apart by --name")
        predictors[name] = Predictor(path, file, args.device, args.overrides)
    first = config.load(args.config_file[0], args.overrides)
    dataset = args.dataset or experiment(first, training=False).test_names[0]
    records = loaders.get_dataset_dicts(names=dataset, filter_empty=False)
    chosen = np.linspace(0, len(records) - 1, min(args.num, len(records))).round().astype(int)
    for path in compare_label_maps(
        predictors,
        [records[int(k)] for k in chosen],
        MetadataCatalog.get(dataset),
        args.output,
    ):
        print(f"written {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
