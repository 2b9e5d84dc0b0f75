"""Write the table to pick a model from: sizes, costs, what papers report, what is verified, speed.

    tools/model_table.py --output docs/models

Latencies are taken from what `make bench` has written, benchmarks/machine_*.json.
"""

import argparse
import shlex
import sys
from pathlib import Path

from d2dense.errors import ToolParser, run_tool
from d2dense.model_table import write_table


def main(argv=None):
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="without ending: .md and .json")
    parser.add_argument("--benchmarks", type=Path, default=Path("benchmarks"), metavar="DIR")
    parser.add_argument(
        "--recount", action="store_true", help="count costs also of models that have not changed"
    )
    args = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "tools/model_table.py", *words])
    table = write_table(
        args.output, command=command, benchmarks=args.benchmarks, recount=args.recount
    )
    print(table)


if __name__ == "__main__":
    sys.exit(run_tool(main))
