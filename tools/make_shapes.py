#!/usr/bin/env python3
"""Make the generated dataset ``shapes``: pictures, COCO instances, panoptic and semantic maps."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from d2dense.data import shapes
from d2dense.errors import ToolParser, UserError, run_tool

_MOST = 10_000_000


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--output", default="datasets/shapes", metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--train", type=int, default=shapes.DEFAULT_COUNTS["train"], help="pictures in split train"
    )
    parser.add_argument(
        "--val", type=int, default=shapes.DEFAULT_COUNTS["val"], help="pictures in split val"
    )
    parser.add_argument(
        "--size", type=int, nargs="+", default=[256], metavar="PX", help="side, or height and width"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    parser.add_argument(
        "--objects", type=int, nargs=2, default=[1, 8], metavar=("MIN", "MAX"), help="per picture"
    )
    parser.add_argument(
        "--crops", action="store_true", help="also every object as a picture in a folder per class"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes; no change of the result")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace splits that exist")
    existing.add_argument("--if-missing", action="store_true", help="keep splits that exist")
    return parser.parse_args(argv)


def _generate(
    args: argparse.Namespace, split: str, count: int, size: int | tuple[int, int]
) -> None:
    start = time.perf_counter()
    shapes.generate(
        output_dir=args.output,
        split=split,
        count=count,
        size=size,
        seed=args.seed,
        objects=(args.objects[0], args.objects[1]),
        workers=args.workers,
        # an interrupted split, without its settings file, is made again
        overwrite=args.overwrite or args.if_missing,
    )
    rate = count / (time.perf_counter() - start)
    print(f"{args.output}: {count} pictures in split {split}, {rate:.0f} images/s")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if len(args.size) > 2:
        raise UserError(f"--size takes a side or height and width, found {len(args.size)} numbers")
    size = args.size[0] if len(args.size) == 1 else (args.size[0], args.size[1])
    counts = {split: count for split, count in (("train", args.train), ("val", args.val)) if count}
    if not counts:
        raise UserError("nothing to make: both --train and --val are 0")
    if max(counts.values()) > _MOST:
        raise UserError(f"--train and --val make at most {_MOST} pictures each")
    for split, count in counts.items():
        if args.if_missing and Path(args.output, "annotations", f"settings_{split}.json").exists():
            print(f"{args.output}: split {split} is there")
        else:
            _generate(args, split, count, size)
        if args.crops:
            print(f"{shapes.ensure_crops(args.output, split)}: objects in a folder per class")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
