"""The command line that the analyses share: which models, which data, where to write."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from d2dense.data import datasets
from d2dense.errors import ToolParser, UserError

from .detectors import Detector, distinct_names, open_detector

__all__ = [
    "add_configs",
    "add_data",
    "add_run",
    "at_least_one",
    "custom_dataset",
    "exactly_one",
    "open_detectors",
    "per_config",
]


def add_configs(parser: ToolParser, *, required: bool = True) -> None:
    """Add ``--config-file``, ``--name``, ``--output`` and overrides."""
    add = parser.add_argument
    add(
        "--config-file",
        action="append",
        default=[],
        required=required,
        metavar="F",
        help="yaml or py config, or model-zoo name; once per model",
    )
    add("--name", action="append", default=[], help="in figures; once per --config-file")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    add(
        "overrides",
        nargs="*",
        metavar="KEY VALUE | key=value",
        help="changes of every one of the configs",
    )


def add_run(parser: ToolParser) -> None:
    """Add what models that run need: ``--weights`` and ``--device``."""
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="W",
        help="checkpoint; once per --config-file; by default the config's",
    )
    parser.add_argument("--device", help="cpu or cuda; replaces the config's device")


def add_data(parser: ToolParser) -> None:
    """Add ``--dataset``, or ``--json`` and ``--images``."""
    add = parser.add_argument
    add("--dataset", help="registered name; by default the test set of the configs")
    add("--json", metavar="FILE", help="annotations in COCO's format instead")
    add("--images", metavar="DIR", help="pictures of --json")


def custom_dataset(args: argparse.Namespace) -> str | None:
    """Return the name of the data set that the command line asks for, or None."""
    if (args.json is None) != (args.images is None):
        raise UserError("--json and --images belong together; give both or none")
    if args.json is None:
        return args.dataset
    if args.dataset is not None:
        raise UserError("--dataset and --json name two data sets; give one of them")
    slot = {"analysis": {"json": args.json, "images": args.images}}
    return datasets.register_custom(slot)["analysis"]


def per_config(values: Sequence[str], flag: str, configs: Sequence[str]) -> list[str | None]:
    """Return one value per config, None where the flag was not given at all."""
    if values and len(values) != len(configs):
        raise UserError(
            f"{flag} is given {len(values)} times for {len(configs)} --config-file; give it once "
            "for each, in the same order, or not at all"
        )
    return list(values) if values else [None] * len(configs)


def open_detectors(args: argparse.Namespace) -> list[Detector]:
    """Open the models of the command line on one data set.

    Raises:
        UserError: also if their test sets differ.
    """
    dataset = custom_dataset(args)
    weights = per_config(args.weights, "--weights", args.config_file)
    names = per_config(args.name, "--name", args.config_file)
    found = [
        open_detector(
            config,
            weights=file,
            overrides=args.overrides,
            device=args.device,
            dataset=dataset,
            name=name or "",
        )
        for config, file, name in zip(args.config_file, weights, names)
    ]
    tested = sorted({each.dataset for each in found})
    if len(tested) > 1:
        raise UserError(f"the configs have the test sets {', '.join(tested)}; choose by --dataset")
    return distinct_names(found)


def at_least_one(args: argparse.Namespace, *flags: str) -> None:
    """Refuse numbers below 1."""
    for flag in flags:
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} is {value}, expected 1 or more")


def exactly_one(args: argparse.Namespace) -> None:
    """Refuse several models."""
    if len(args.config_file) != 1:
        raise UserError(f"--config-file is given {len(args.config_file)} times, expected once")
