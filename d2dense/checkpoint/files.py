"""One model file: read without running code from it, write so that no half file is ever seen."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import detectron2.checkpoint  # noqa: F401  registers detectron2:// addresses with the PathManager
import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from d2dense.errors import UserError

__all__ = ["read", "write"]

_ALLOW = "set TRAIN.ALLOW_PICKLE or train.allow_pickle if you trust its author"


def read(path: str | os.PathLike, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Return the content of a checkpoint, tensors on the CPU.

    Args:
        path: a local file or an address (``https://``, ``detectron2://``), which is downloaded.
        allow_pickle: also open ``.pkl`` files and files that hold arbitrary objects. They can run
            code, so this is for files from a trusted author only.

    Returns:
        The saved mapping; a file that is a bare state dict becomes ``{"model": state_dict}``.

    Raises:
        UserError: missing, damaged or refused file.
    """
    local = _local(str(path))
    if local.suffix == ".pkl":
        if not allow_pickle:
            raise UserError(f"{path} is a pickle, which can run code when opened; {_ALLOW}")
        content = _read_pickle(local, path)
    else:
        content = _read_torch(local, path, allow_pickle)
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} holds {type(content).__name__}, expected a checkpoint or a state dict"
        )
    content = dict(content)
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content["model"] = content.pop(key)
            return content
    if not any(isinstance(value, (torch.Tensor, np.ndarray)) for value in content.values()):
        raise UserError(f"{path} holds no weights; found the keys {', '.join(map(str, content))}")
    return {"model": content}


def _local(path: str) -> Path:
    try:
        local = Path(PathManager.get_local_path(path))
    except Exception as error:  # a handler may raise anything: no network, no such host, ...
        raise UserError(f"checkpoint {path} could not be fetched: {error}") from error
    if not local.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    return local


def _read_torch(local: Path, path: object, allow_pickle: bool) -> Any:
    try:
        return torch.load(local, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            # torch reports both an unknown object and a file that is no checkpoint in this way.
            if not zipfile.is_zipfile(local):
                raise UserError(f"checkpoint {path} is damaged or not a checkpoint") from error
            raise UserError(f"{path} holds more than plain values and tensors; {_ALLOW}") from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"checkpoint {path} is damaged or not a checkpoint") from error
    try:
        return torch.load(local, map_location="cpu", weights_only=False)
    except Exception as error:  # whatever the objects inside raise
        raise UserError(f"checkpoint {path} cannot be opened: {error}") from error


def _read_pickle(local: Path, path: object) -> Any:
    try:
        with local.open("rb") as file:
            content = pickle.load(file, encoding="latin1")
    except Exception as error:  # whatever the objects inside raise
        raise UserError(f"checkpoint {path} cannot be opened: {error}") from error
    if isinstance(content, Mapping) and "blobs" in content:
        content = content["blobs"]
    if isinstance(content, Mapping) and "model" not in content:
        # Caffe2 names, with optimizer state beside the weights
        weights = {name: value for name, value in content.items() if not name.endswith("_momentum")}
        content = {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
    return content


def _plain(value: Any, key: str) -> Any:
    """Return ``value`` made of dicts, lists, tuples, plain values and tensors only."""
    if isinstance(value, np.generic):  # first: numpy's float64 is a float too
        return value.item()
    if value is None or isinstance(value, (torch.Tensor, str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {name: _plain(each, f"{key}.{name}") for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(each, key) for each in value)
    if isinstance(value, Sequence):
        return [_plain(each, key) for each in value]
    raise TypeError(f"checkpoint entry {key} is a {type(value).__name__}, expected plain values")


def write(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write a checkpoint under a temporary name, flush it to the disk and rename it.

    Raises:
        TypeError: a value that :func:`read` would refuse; containers become plain ones.
    """
    content = _plain(content, "")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
