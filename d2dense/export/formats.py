"""The formats of exported files: how each is written, and opened again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2dense.errors import UserError, nearest

from .adapters import frozen_adapter
from .exported_program import LEAST_SIDE, open_exported_program, save_exported_program
from .onnx import OPSET, open_onnx, require_onnx, save_onnx
from .torchscript import METHODS, to_torchscript

__all__ = ["FORMATS", "Format", "check_format"]

Run = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format.

    Attributes:
        title: its name in messages.
        file_name: what the file is called.
        dtypes: types of the image that the file takes.
        least_side: pixels that an image's sides have at least, in the file's view.
        details: what else ``model.json`` says of the format.
        save: ``save(model, image, path, method=...)`` writes the file.
        open: ``open(path, device)`` returns the function of an image that the file is.
        check: raises a ``UserError`` where packages are missing.
    """

    title: str
    file_name: str
    save: Callable[..., None]
    open: Callable[[Path, str | torch.device], Run]
    dtypes: tuple[str, ...] = ("float32",)
    least_side: int = 1
    details: dict[str, Any] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None


def _save_torchscript(model: nn.Module, image: Tensor, path: Path, *, method: str) -> None:
    torch.jit.save(to_torchscript(model, image, method=method), str(path))


def _open_torchscript(path: Path, device: str | torch.device) -> Run:
    return torch.jit.load(str(path), map_location=device)


def _save_torch_export(model: nn.Module, image: Tensor, path: Path, *, method: str) -> None:
    del method  # TorchScript's
    save_exported_program(frozen_adapter(model), image, path)


def _save_onnx(model: nn.Module, image: Tensor, path: Path, *, method: str) -> None:
    del method
    save_onnx(frozen_adapter(model), image, path)


FORMATS: dict[str, Format] = {
    "torchscript": Format(
        title="TorchScript",
        file_name="model.ts",
        dtypes=("uint8", "float32"),
        save=_save_torchscript,
        open=_open_torchscript,
    ),
    "torch_export": Format(
        title="torch.export",
        file_name="model.pt2",
        least_side=LEAST_SIDE,
        save=_save_torch_export,
        open=open_exported_program,
    ),
    "onnx": Format(
        title="ONNX",
        file_name="model.onnx",
        least_side=LEAST_SIDE,
        details={"opset": OPSET},
        save=_save_onnx,
        open=open_onnx,
        check=require_onnx,
    ),
}


def check_format(format: str, method: str = "trace") -> None:
    """Raise a ``UserError`` for an unknown format or method, and for missing packages."""
    if format not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"format {format!r}, expected one of {known}{nearest(format, FORMATS)}")
    if format == "torchscript" and method not in METHODS:
        raise UserError(f"method {method!r}, expected one of {', '.join(METHODS)}")
    if format != "torchscript" and method == "script":
        raise UserError(f"--method script is TorchScript's; leave it out with --format {format}")
    FORMATS[format].check()
