"""Build every backbone under every head, small, in both kinds of config; train a step and predict;
write what works, the config lines, and the cost of the recipes that combine papers.

  tools/composition_matrix.py --output docs/composition
"""

import sys
from pathlib import Path

from d2dense import composition_report
from d2dense.composition_cells import HEADS, SOURCES
from d2dense.errors import ToolParser, UserError, nearest, run_tool


def main(argv=None):
    parser = ToolParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="PATH.md and PATH.json are written"
    )
    parser.add_argument(
        "--heads", nargs="+", default=[], metavar="NAME", help="these only, for a quick look"
    )
    parser.add_argument(
        "--keep-costs",
        action="store_true",
        help="take the costs of recipes from the table that is there, where it has them; counting "
        "them takes minutes",
    )
    args = parser.parse_args(argv)
    by_name = {head.name: head for head in HEADS}
    for name in args.heads:
        if name not in by_name:
            raise UserError(
                f"there is no head {name!r}{nearest(name, by_name)}; use {', '.join(by_name)}"
            )
    heads = [by_name[name] for name in args.heads] or HEADS
    command = f"tools/composition_matrix.py --output {args.output}"
    if args.heads:
        command += " --heads " + " ".join(f'"{name}"' for name in args.heads)
    known = composition_report.known_recipes(args.output) if args.keep_costs else ()
    print(
        composition_report.write(
            args.output, command=command, heads=heads, sources=SOURCES, known=known
        )
    )


if __name__ == "__main__":
    sys.exit(run_tool(main))
