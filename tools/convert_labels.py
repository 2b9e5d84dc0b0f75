#!/usr/bin/env python3
"""Write label maps with class numbers from published ones, or published ones from class numbers.

    tools/convert_labels.py --table pascal_context SegmentationClassContext/ classes/
    tools/convert_labels.py --table coco_stuff --inverse classes/ stuffthingmaps/
    tools/convert_labels.py --table cityscapes_label_ids --suffix _labelIds.png \\
        --new-suffix _labelTrainIds.png gtFine/train gtFine/train

Training and evaluation need no such files: they read published ones by label_table=NAME. A table of
your own is a json file, {"classes": [names], "values": {"0": null, "7": 0, ...}}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from d2dense.data import label_conversion, label_tables
from d2dense.errors import ToolParser, one_or_more, run_tool


def main(argv: Sequence[str] | None = None) -> int:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--table", required=True, help=f"{', '.join(label_tables.TABLES)}, or a json file"
    )
    parser.add_argument("--inverse", action="store_true", help="from class numbers to values")
    parser.add_argument("--ignore-label", type=int, default=255, help="the number of no class")
    parser.add_argument("--suffix", default=".png", help="ending of the files to read")
    parser.add_argument("--new-suffix", help="what replaces it; by default it stays")
    parser.add_argument("--workers", type=one_or_more, default=4)
    parser.add_argument("source", metavar="SOURCE", help="folder of label maps")
    parser.add_argument("target", metavar="TARGET", help="folder to write")
    args = parser.parse_args(argv)
    count = label_conversion.convert_folder(
        args.source,
        args.target,
        table=args.table,
        inverse=args.inverse,
        ignore_label=args.ignore_label,
        suffix=args.suffix,
        new_suffix=args.suffix if args.new_suffix is None else args.new_suffix,
        workers=args.workers,
    )
    print(f"{count} label maps in {args.target}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
