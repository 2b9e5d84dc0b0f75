"""ONNX of an adapter, from its exported program, and onnxruntime to run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from d2dense.errors import UserError
from d2dense.evaluation.base import require

from .adapters import Adapter
from .exported_program import record

__all__ = ["OPSET", "open_onnx", "require_onnx", "save_onnx"]

OPSET = 18  # what PyTorch's operators are written in; any other is a conversion

_INSTALL = "pip install '.[onnx]' (onnx, onnxscript, onnxruntime)"


def require_onnx() -> None:
    """Raise a ``UserError`` unless all that writing and checking a file needs is installed."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "ONNX export", _INSTALL)


def save_onnx(adapter: Adapter, image: Tensor, path: Path) -> None:
    """Write ``model.onnx``: standard operators, float32 images of the sizes that
    :func:`record` says, one output per tensor of the adapter.
    """
    require_onnx()
    program = torch.onnx.export(
        record(adapter, image),
        (),
        dynamo=True,
        opset_version=OPSET,
        input_names=["image"],
        output_names=[output.name for output in adapter.outputs],
        external_data=False,
        verbose=False,
    )
    assert program is not None  # what torch.onnx.export returns with dynamo
    found = program.model_proto
    others = {node.domain for node in found.graph.node} - {"", "ai.onnx"}
    if others or found.functions:
        raise RuntimeError(f"the ONNX graph has operators of its own: {sorted(others)}")
    path.write_bytes(found.SerializeToString())


def open_onnx(path: Path, device: str | torch.device) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return a function of a float32 image ``(C, H, W)`` that gives the file's outputs, on the CPU.

    Raises:
        UserError: onnxruntime is not installed or has no CUDA where ``device`` asks for it.
    """
    runtime = require("onnxruntime", "running ONNX files", _INSTALL)
    provider = "CPUExecutionProvider"
    if torch.device(device).type != "cpu":
        provider = "CUDAExecutionProvider"
        if provider not in runtime.get_available_providers():
            raise UserError(
                f"onnxruntime has no CUDA here, but the device is {device}; install "
                "onnxruntime-gpu in place of onnxruntime, or use the device cpu"
            )
    session = runtime.InferenceSession(str(path), providers=[provider])

    def run(image: Tensor) -> tuple[Tensor, ...]:
        found = session.run(None, {"image": image.cpu().numpy()})
        return tuple(torch.from_numpy(each) for each in found)

    return run
