"""Which versions and devices a run sees, and which optional pieces it lacks."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys

import d2dense

__all__ = ["collect"]

_REQUIRED = (
    "torch",
    "torchvision",
    "detectron2",
    "numpy",
    "scipy",
    "timm",
    "fvcore",
    "omegaconf",
    "pycocotools",
    "faster-coco-eval",
    "cityscapesscripts",
    "opencv-python-headless",
    "Pillow",
    "matplotlib",
    "tensorboard",
)
_OPTIONAL = {
    "lvis": "LVIS evaluation",
    "triton": "fast deformable attention on the GPU",
    "onnx": "ONNX export",
    "onnxruntime": "running exported ONNX models",
    "wandb": "logging to Weights & Biases",
    "shapely": "Cityscapes instances from polygon files",
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _detectron2_kind() -> str:
    """Say whether detectron2 brings its compiled operators."""
    try:
        importlib.import_module("detectron2._C")
    except ImportError:
        return "pure Python: no rotated boxes, no deformable convolution"
    return "with compiled operators"


def collect(*, brief: bool = False) -> str:
    """Return a readable report; with ``brief`` one line with the main versions and the device."""
    import torch  # after the parser of the tool: --help stays quick

    cuda = torch.cuda.is_available()
    devices = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    )
    if brief:
        parts = [f"python {platform.python_version()}", f"d2dense {d2dense.__version__}"]
        parts += [f"{name} {_version(name)}" for name in ("torch", "torchvision", "detectron2")]
        return "ready: " + ", ".join([*parts, devices[0] if devices else "no GPU (CPU runs)"])
    rows = [
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", platform.platform()),
        ("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads"),
        ("cuda", f"built for {torch.version.cuda or 'none'}; {', '.join(devices) or 'no device'}"),
        ("d2dense", d2dense.__version__),
    ]
    rows += [(name, _version(name) or "MISSING: run make setup") for name in _REQUIRED]
    rows.append(("detectron2 kind", _detectron2_kind()))
    rows += [
        (name, _version(name) or f"missing, optional: {purpose}")
        for name, purpose in _OPTIONAL.items()
    ]
    rows.append(("datasets", os.environ.get("DETECTRON2_DATASETS", "./datasets (default)")))
    return "\n".join(f"{name:<24}{value}" for name, value in rows)
