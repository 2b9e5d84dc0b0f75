"""The official code's names, weights by rule and recorded outputs."""

from __future__ import annotations

import functools
import json
import os
import zlib
from math import prod, sqrt
from pathlib import Path

import numpy as np
import torch

_DATA = Path(
    os.environ.get("D2DENSE_TEST_DATA", Path(__file__).resolve().parents[4] / "shared" / "data")
)
REFERENCE = _DATA.parent / "reference"
GOLDEN = REFERENCE / "golden" / "cednet"
TOLERANCE = 5e-5  # of the reference's standard deviation


@functools.cache
def variants() -> dict[str, list]:
    """Official model -> [name, shape, dtype] of its tensors; empty where there is no reference."""
    path = REFERENCE / "cednet_state_dicts.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())["variants"]
    return {k: v["tensors"] for k, v in found.items() if not k.startswith("full_cedhead")}


def filled(tensors, salt: str = "") -> dict[str, torch.Tensor]:
    """Weights by the reference's rule, for [name, shape, dtype]."""
    return {key: _value(key, shape, salt) for key, shape, dtype in tensors if "float" in dtype}


def _value(key: str, shape, salt: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(zlib.crc32((salt + key).encode()))
    if len(shape) >= 2:
        v = torch.randn(shape, generator=g) / sqrt(prod(shape[1:]))
        depthwise = len(shape) == 4 and shape[1] == 1 and shape[2] > 1
        return v * 0.02 if depthwise else v
    if key.endswith("running_var"):
        return 0.5 + torch.rand(shape, generator=g)
    if key.endswith("gamma"):
        return 0.5 + 0.1 * torch.randn(shape, generator=g)
    if key.endswith("weight"):
        return 1.0 + 0.1 * torch.randn(shape, generator=g)
    return 0.02 * torch.randn(shape, generator=g)


def image(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Recording:
    """One file of recorded outputs."""

    def __init__(self, path: Path):
        self.arrays = np.load(path)
        self.meta = json.loads(str(self.arrays["meta"]))

    def names(self) -> list[str]:
        return [k.removesuffix("__flat") for k in self.arrays.files if k.endswith("__flat")]

    def error(self, name: str, value: torch.Tensor) -> float:
        """Largest difference in units of the reference's standard deviation."""
        assert tuple(value.shape) == tuple(self.arrays[f"{name}__shape"]), name
        stride = int(self.arrays[f"{name}__stride"])
        mine = value.detach().flatten()[::stride].numpy()
        std = float(self.arrays[f"{name}__stats"][1])
        return float(np.abs(mine - self.arrays[f"{name}__flat"]).max()) / std

    def assert_equal(self, **values: torch.Tensor) -> None:
        errors = {name: self.error(name, value) for name, value in values.items()}
        assert max(errors.values()) <= TOLERANCE, errors


def train_meta() -> dict:
    """Parameter groups and stochastic depth of the official training; empty without a reference."""
    path = REFERENCE / "cednet_train_meta.json"
    return json.loads(path.read_text()) if path.is_file() else {}
