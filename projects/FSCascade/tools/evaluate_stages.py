#!/usr/bin/env python3
"""Evaluate every stage and ensemble of a trained cascade in one pass over the test images."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from d2dense import checkpoint, config
from d2dense.engine.experiment import experiment
from d2dense.errors import ToolParser, UserError, run_tool


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("--config-file", required=True, metavar="F", help="yaml or py config, or model-zoo name")
    add("--weights", metavar="W", help="checkpoint; by default the config's")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for results.json etc.")
    add("--device", help="cpu or cuda; replaces the config's device")
    add("overrides", nargs="*", metavar="KEY VALUE | key=value", help="changes of the config")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from fscascade.stage_evaluation import evaluate_stages  # found once the projects are known

    cfg = config.load(args.config_file, args.overrides)
    exp = experiment(cfg, device=args.device, training=False)
    weights = args.weights or exp.settings.init_checkpoint
    if not weights:
        raise UserError("stages are evaluated of trained weights: give --weights FILE")
    model = exp.build_model()
    checkpoint.load_weights(
        model, weights, allow_pickle=exp.settings.allow_pickle
    ).require_complete()
    for name in exp.test_names:
        folder = args.output if len(exp.test_names) == 1 else args.output / name
        results = evaluate_stages(model, exp.build_test_loader(name), name, output_dir=folder)
        for stage, tasks in results.items():
            values = "  ".join(
                f"{task} AP {m['AP']:.2f} AP50 {m['AP50']:.2f} AP75 {m['AP75']:.2f}"
                for task, m in tasks.items()
            )
            print(f"{name} {stage:<20}{values}")
        print(f"written to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
