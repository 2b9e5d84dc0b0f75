#!/usr/bin/env python
"""Train the models of a study file from several seeds; write a table and curves of how they learn.

Trainings that are finished are kept: run it again to go on after a stop, or after adding seeds.
"""

import shlex
import sys
from pathlib import Path

from d2dense.engine.study import draw_curves, read_study, run_study, write_table
from d2dense.errors import ToolParser, UserError, one_or_more, run_tool


def main(argv=None):
    parser = ToolParser(description=__doc__)
    parser.add_argument("study", help="yaml file, see d2dense/engine/study.py")
    parser.add_argument("--runs", required=True, help="folder of the trainings")
    parser.add_argument("--output", required=True, help="Markdown file; .json and .png beside it")
    parser.add_argument("--jobs", type=one_or_more, default=1, help="trainings at a time")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="values of $NAME in the study"
    )
    args = parser.parse_args(argv)
    values = {}
    for each in args.set:
        name, sign, value = each.partition("=")
        if not sign:
            raise UserError(f"--set {each}: expected NAME=VALUE")
        values[name] = value
    study = read_study(args.study, output=args.runs, values=values)
    run_study(study, jobs=args.jobs)
    output = Path(args.output)
    command = shlex.join(["python", "tools/compare_training.py", *(argv or sys.argv[1:])])
    write_table(study, path=output, command=command)
    draw_curves(study, output.with_suffix(".png"))
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
