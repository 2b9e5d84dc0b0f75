#!/usr/bin/env python
"""Draw loss, learning-rate and AP curves of one or more runs from their metrics.json to a PNG."""

import sys

from d2dense.engine.curves import draw
from d2dense.errors import ToolParser, run_tool


def main(argv=None) -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="output folders or metrics.json files")
    parser.add_argument("--output", default="metrics.png", help="the picture to write")
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="what to draw, one panel each (total_loss lr bbox/AP ...); by default the losses, "
        "the learning rate and the APs that were logged",
    )
    parser.add_argument("--smooth", type=int, default=1, help="average over that many points")
    args = parser.parse_args(argv)
    print(draw(args.runs, args.output, names=args.metrics, smooth=args.smooth))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
