#!/usr/bin/env python3
"""Draw the paper's figures from evaluations by stage (evaluate_stages.py), as PNG and CSV."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from d2dense import projects
from d2dense.errors import ToolParser, run_tool


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add(
        "--results",
        nargs="+",
        required=True,
        metavar="[NAME=]DIR",
        help="output folders of evaluate_stages.py; a line style for each",
    )
    add("--baseline", metavar="[NAME=]DIR", help="the same of Faster R-CNN")
    add("--task", choices=["bbox", "segm"], default="bbox")
    add("--output", type=Path, required=True, metavar="DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    projects.import_all()
    from fscascade import figures  # found once the projects are known

    def read(text: str):
        name, _, folder = text.rpartition("=")
        return figures.Run.read(folder, name=name, task=args.task)

    baseline = read(args.baseline) if args.baseline else None
    for path in figures.draw([read(text) for text in args.results], args.output, baseline=baseline):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
