#!/usr/bin/env python3
"""How alike the class kernels of a segmenter, detector or classifier are: cosine similarity of
every two.

Writes kernel_similarity.png/.csv and summary.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from d2dense.analyses import command
from d2dense.analyses.kernels import class_kernels, kernel_report
from d2dense.errors import UserError, run_tool
from d2dense.inference import Predictor


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.make_parser(__doc__, data=False)
    parser.add_argument(
        "--module",
        help="name of the layer with one kernel per class; by default the classifier of the last "
        "layer or stage",
    )
    args = parser.parse_intermixed_args(argv)
    command.exactly_one(args)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    (config_file,) = args.config_file
    (weights,) = command.per_config(args.weights, "--weights", args.config_file)
    if weights is None:
        raise UserError(f"{config_file}: trained weights are needed, give --weights FILE")
    predictor = Predictor(config_file, weights, args.device, args.overrides)
    kernels = class_kernels(predictor.model, args.module)
    names = [predictor.metadata.get(f"{kind}_classes") for kind in ("thing", "stuff", "image")]
    # R-CNNs and Mask2Former have a class more, that of no object
    classes = next((each for each in names if each and len(kernels) - len(each) in (0, 1)), [])
    kernel_report(kernels, classes, args.output)
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
