#!/usr/bin/env python3
"""How alike the class kernels of a segmenter or detector are: cosine similarity of every two.

Writes kernel_similarity.png/.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from d2dense.analyses import command
from d2dense.analyses.kernels import class_kernels, kernel_report
from d2dense.errors import ToolParser, UserError, run_tool
from d2dense.inference import Predictor


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_configs(parser)
    command.add_run(parser)
    parser.add_argument(
        "--module",
        help="name of the layer with one kernel per class; by default the only one of its size, "
        "or sem_seg_head.classifier",
    )
    args = parser.parse_intermixed_args(argv)
    if len(args.config_file) != 1:
        raise UserError(f"--config-file is given {len(args.config_file)} times, expected once")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    weights = command.per_config(args.weights, "--weights", args.config_file)[0]
    predictor = Predictor(args.config_file[0], weights, args.device, args.overrides)
    classes = predictor.metadata.get("stuff_classes") or predictor.metadata.get("thing_classes")
    kernels = class_kernels(predictor.model, args.module)
    for path in kernel_report(kernels, classes or [], args.output):
        print(f"written {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
