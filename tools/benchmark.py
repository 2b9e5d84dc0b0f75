#!/usr/bin/env python3
"""Measure the headline models beside timm's, torchvision's and Detectron2's on this machine."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2dense.errors import ToolParser, UserError, one_or_more, run_tool

_SIZES = {"cpu": (384, 384), "cuda": (800, 1280)}
_COMPILED = ("backbone of *", "timm convnext*", "timm test_*")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=[], metavar="PATTERN", help="of our models; default: all")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add(
        "--size",
        nargs=2,
        type=one_or_more,
        metavar=("H", "W"),
        help="of the images; default: 384 384 on the CPU, 800 1280 on CUDA",
    )
    add(
        "--batch",
        nargs="+",
        type=one_or_more,
        default=[1, 8],
        metavar="N",
        help="images of inference",
    )
    add("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    modes = ("eager", "compiled", "exported")
    add("--modes", nargs="+", choices=modes, default=list(modes))
    add(
        "--formats",
        nargs="+",
        default=["torchscript"],
        metavar="FORMAT",
        help="of tools/export_model.py, for the mode exported",
    )
    add(
        "--compile",
        nargs="+",
        default=list(_COMPILED),
        metavar="PATTERN",
        help="models for the mode compiled; default: backbones",
    )
    add("--training", action=argparse.BooleanOptionalAction, default=True)
    add(
        "--training-batch",
        type=one_or_more,
        metavar="N",
        help="least of a step; default: 1 on the CPU, 2 on CUDA",
    )
    add("--rounds", type=one_or_more, default=3, help="of one image; others take fewer")
    add("--minutes", type=float, default=20.0, help="after which nothing new is begun")
    add("--quick", action="store_true", help="tiny models, to see whether the command works")
    add("--resume", action="store_true", help="measure what the last, equal run did not")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="default: benchmarks; output/benchmark with --quick or --models",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nor will the processes of the groups see one
    import torch  # after the parser: --help stays quick

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but there is no CUDA device; use --device cpu")
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    from d2dense.model_benchmark import catalogue
    from d2dense.model_benchmark.record import Record
    from d2dense.model_benchmark.report import failures
    from d2dense.model_benchmark.runner import Results, run

    settings = _settings(args)
    kind = "quick" if args.quick else "full"
    groups = catalogue.select(catalogue.KINDS[kind], args.models)
    folder = Path("output/benchmark" if args.quick or args.models else "benchmarks")
    given = sys.argv[1:] if argv is None else argv
    command = shlex.join(["tools/benchmark.py", *given])
    record = Record(args.output or folder, groups, settings, command)
    results = record.read() if args.resume else Results()
    run(
        groups,
        settings,
        results,
        kind=kind,
        seconds=args.minutes * 60,
        save=lambda: record.write(results),
        say=lambda text: print(text, flush=True),
    )
    print(record.write(results))
    failed = failures(results)
    print(f"\n{record.path}.md" + (f"; {failed} measurements failed" if failed else ""))
    return 0


def _settings(args: argparse.Namespace) -> Any:
    from d2dense.export.formats import check_format
    from d2dense.model_benchmark.cells import Settings

    for each in args.formats:
        check_format(each)
    if args.minutes <= 0:
        raise UserError(f"--minutes is {args.minutes}, expected a positive number")
    return Settings(
        size=tuple(args.size or ((64, 64) if args.quick else _SIZES[args.device])),
        batches=tuple(sorted(set(args.batch))),
        precisions=tuple(dict.fromkeys(args.precision)),
        modes=tuple(args.modes),
        formats=tuple(args.formats),
        training=args.training,
        training_batch=args.training_batch or {"cpu": 1, "cuda": 2}[args.device],
        rounds=args.rounds,
        compile=tuple(args.compile),
        device=args.device,
    )


if __name__ == "__main__":
    sys.exit(run_tool(main))
