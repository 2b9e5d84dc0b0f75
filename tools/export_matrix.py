"""Try every way of exporting for every model of the model zoo and write a table; goes on where it
was stopped.
"""

import logging
import sys
from pathlib import Path

import torch

from d2dense import model_zoo
from d2dense.errors import ToolParser, UserError, nearest, run_tool
from d2dense.export.matrix import Matrix, rows_of
from d2dense.export.support import WAYS


def parser():
    result = ToolParser(description=__doc__)
    add = result.add_argument
    add("--output", type=Path, default=Path("docs/export"), help="report without .md or .json")
    add("--full", nargs="+", default=[], metavar="NAME", help="models to try in full size too")
    add("--only", default="*", metavar="PATTERN", help="rows with a model of such a name")
    add("--formats", nargs="+", default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    add("--seconds", type=float, help="start no further row after these")
    add("--redo", action="store_true", help="forget earlier results")
    return result


def main(argv=None):
    args = parser().parse_args(argv)
    for way in args.formats:
        if way not in WAYS:
            raise UserError(
                f"--formats {way!r}, expected some of {', '.join(WAYS)}{nearest(way, WAYS)}"
            )
    logging.basicConfig(format="%(message)s")  # exporters have much to say below warnings
    logging.getLogger("d2dense.export.matrix").setLevel(logging.INFO)
    torch.set_num_threads(1)
    if args.redo:
        args.output.with_suffix(".json").unlink(missing_ok=True)
    matrix = Matrix(args.output, command=f"python tools/export_matrix.py --output {args.output}")
    rows = rows_of(model_zoo.list_models())
    matrix.run(rows, full=args.full, only=args.only, ways=args.formats, seconds=args.seconds)
    print(f"wrote {args.output}.md and {args.output}.json")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
