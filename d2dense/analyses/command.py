"""The command line that the analyses share: which models, which data, where to write."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2dense.data import datasets
from d2dense.errors import ToolParser, UserError, one_or_more

from .subjects import DETECTORS, Subject, distinct_names, open_subject

__all__ = [
    "add_data",
    "check_one_each",
    "custom_dataset",
    "distinct_config_names",
    "exactly_one",
    "make_parser",
    "open_subjects",
    "per_config",
]

# Entries of a dataset that the command line may give, see d2dense.data.dataset_spec.DatasetSpec.
_FILES = {
    "kind": "of these data: coco, lvis, cityscapes or sem_seg; by default by what is given",
    "json": "annotations in COCO's format instead of --dataset",
    "images": "folder of the pictures of --json or --labels",
    "labels": "folder of label maps (PNG) instead of --json",
    "classes": "file with the class names of --labels",
}


def make_parser(
    description: str | None,
    *,
    configs: bool = True,
    weights: bool = True,
    data: bool = True,
    num: bool = True,
) -> ToolParser:
    """Return the parser of an analysis, to which it adds its own flags.

    Args:
        description: the tool's docstring.
        configs: whether a model must be named.
        weights: whether it takes ``--weights`` once per config, and ``--device``.
        data: whether it takes a dataset.
        num: whether it takes ``--num``, a number of its images, by default all.
    """
    parser = ToolParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--config-file",
        action="append",
        default=[],
        required=configs,
        metavar="F",
        help="yaml or py config, or model-zoo name; once per model",
    )
    add("--name", action="append", default=[], help="in figures; once per --config-file")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    if weights:
        add(
            "--weights",
            action="append",
            default=[],
            metavar="W",
            help="checkpoint; once per --config-file; by default the config's",
        )
        add("--device", help="cpu or cuda; replaces the config's device")
    if data:
        add_data(parser, default="by default the test set of the configs")
    if data and num:
        add("--num", type=one_or_more, help="images to use")
    add(
        "overrides",
        nargs="*",
        metavar="KEY VALUE | key=value",
        help="changes of every one of the configs",
    )
    return parser


def add_data(parser: ToolParser, *, default: str) -> None:
    """Add ``--dataset``, and the files of a dataset that has no name; :func:`custom_dataset` reads
    them.

    Args:
        default: what is taken without them, for the help.
    """
    parser.add_argument("--dataset", help=f"registered name; {default}")
    for entry, meaning in _FILES.items():
        parser.add_argument(f"--{entry}", help=meaning)


def custom_dataset(args: argparse.Namespace) -> str | None:
    """Return the name of the dataset that the command line asks for, or None."""
    given = {k: getattr(args, k) for k in _FILES if getattr(args, k) is not None}
    if not given:
        return args.dataset
    if "images" not in given or not given.keys() & {"json", "labels"}:
        other = "labels" if "labels" in given else "json"
        raise UserError(f"--{other} and --images belong together; give both or none")
    if args.dataset is not None:
        raise UserError("--dataset and --images name two datasets; give one of them")
    return datasets.register_custom({"analysis": given})["analysis"]


def check_one_each(values: Sequence[Any], flag: str, configs: Sequence[str]) -> None:
    """Require one value per config, or none at all.

    Args:
        values: of the flag, in the order of the command line.
        flag: its name, for the message.
        configs: the command line's ``--config-file``.

    Raises:
        UserError: another number of them.
    """
    if values and len(values) != len(configs):
        raise UserError(
            f"{flag} is given {len(values)} times for {len(configs)} --config-file; give it once "
            "for each, in the same order, or not at all"
        )


def per_config(values: Sequence[str], flag: str, configs: Sequence[str]) -> list[str | None]:
    """Return one value per config, None where the flag was not given at all; arguments and errors
    as of :func:`check_one_each`.
    """
    check_one_each(values, flag, configs)
    return list(values) if values else [None] * len(configs)


def distinct_config_names(args: argparse.Namespace) -> list[str]:
    """Return a name per config, by default that of its file.

    Raises:
        UserError: two are the same.
    """
    given = per_config(args.name, "--name", args.config_file)
    names = [name or Path(path).stem for name, path in zip(given, args.config_file)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two models are called {name!r}; tell them apart by --name")
    return names


def open_subjects(
    args: argparse.Namespace, *, kinds: Sequence[str] = (DETECTORS,)
) -> list[Subject]:
    """Open the models of the command line on one dataset.

    Args:
        kinds: of models that the analysis is for.

    Raises:
        UserError: also if their test sets differ.
    """
    dataset = custom_dataset(args)
    weights = per_config(args.weights, "--weights", args.config_file)
    names = per_config(args.name, "--name", args.config_file)
    found = [
        open_subject(
            config,
            weights=file,
            overrides=args.overrides,
            device=args.device,
            dataset=dataset,
            name=name or "",
            kinds=kinds,
        )
        for config, file, name in zip(args.config_file, weights, names)
    ]
    tested = sorted({each.dataset for each in found})
    if len(tested) > 1:
        raise UserError(f"the configs have the test sets {', '.join(tested)}; choose by --dataset")
    return distinct_names(found)


def exactly_one(args: argparse.Namespace) -> None:
    """Refuse several models."""
    if len(args.config_file) != 1:
        raise UserError(f"--config-file is given {len(args.config_file)} times, expected once")
