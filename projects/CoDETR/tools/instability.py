#!/usr/bin/env python3
"""How often the queries of detection transformers change their objects during training, from the
checkpoints of a run, in the order of training:

    --config-file A --weights A/model_0001.pth A/model_0002.pth ... --config-file B --weights ...

Writes instability.png/.csv and summary.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from d2dense.analyses import command
from d2dense.analyses.instability import assignments, instability_report
from d2dense.analyses.subjects import annotated_records, open_subject
from d2dense.errors import UserError, run_tool


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.make_parser(__doc__, weights=False)
    add = parser.add_argument
    add(
        "--weights",
        action="append",
        nargs="+",
        required=True,
        metavar="W",
        help="two or more checkpoints, in the order of training; once per --config-file",
    )
    add("--device", help="cpu or cuda; replaces the config's device")
    args = parser.parse_intermixed_args(argv)
    for files in args.weights:
        if len(files) < 2:
            raise UserError(f"--weights has only {files[0]}; give two or more checkpoints of a run")
        if len(set(files)) < len(files):
            raise UserError("--weights names a checkpoint twice; give each of a run once")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    dataset = command.custom_dataset(args)
    command.check_one_each(args.weights, "--weights", args.config_file)
    names = command.distinct_config_names(args)
    options = {"overrides": args.overrides, "device": args.device}
    runs, tested, records = {}, "", None
    for config, files, name in zip(args.config_file, args.weights, names):
        runs[name] = {}
        for file in files:
            subject = open_subject(config, weights=file, dataset=dataset, **options)
            if records is None:
                tested, records = subject.dataset, annotated_records(subject.dataset, args.num)
            if subject.dataset != tested:
                raise UserError(
                    f"the configs have the test sets {tested} and {subject.dataset}; choose by "
                    "--dataset"
                )
            runs[name][file] = assignments(subject, records)
    for name, values in instability_report(runs, args.output).items():
        print(f"{name}: instability {', '.join(f'{value:.2f}' for value in values)}")
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
