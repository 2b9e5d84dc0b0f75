"""Weights and images by rule, as the official code was given them for the recordings."""

from __future__ import annotations

import functools
import gzip
import json
import math
import zlib

import numpy as np
import torch
from torch import Tensor

from tests.projects.cednet.golden import REFERENCE

FOLDER = REFERENCE / "golden" / "codetr"
NAMES = REFERENCE / "codetr_state_dicts.json.gz"
HEADS, POINTS = 8, 4


@functools.cache
def tables() -> dict[str, dict[str, tuple[list[int], str]]]:
    """Variant -> official name -> (shape, dtype)."""
    with gzip.open(NAMES, "rt") as file:
        found = json.load(file)
    return {
        variant: {name: (shape, dtype) for name, shape, dtype in rows}
        for variant, rows in found.items()
    }


def is_kept(name: str, dtype: str) -> bool:
    """Whether the rule leaves a tensor as the official code builds it."""
    return "freqs_" in name or not dtype.startswith("float")


def weight(name: str, shape: list[int]) -> Tensor:
    """The value that the rule gives the official floating-point tensor ``name``."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if name.endswith("sampling_offsets.bias"):
        return _directions(shape[0] // (HEADS * POINTS * 2))
    if name.endswith("running_var"):
        return 1 + 0.1 * torch.rand(shape, generator=generator)
    value = torch.randn(shape, generator=generator)
    if len(shape) >= 2:
        if any(part in name for part in ("query_embed", "label_embed", "level_embed")):
            return value
        value /= math.sqrt(math.prod(shape[1:]))
        if name.endswith(("out_proj.weight", "output_proj.weight", "ffns.0.layers.1.weight")):
            value *= 0.3
        if "reg_branches" in name and name.endswith(".4.weight"):
            value *= 0.2
        return value
    if name.endswith((".weight", ".scale")):
        return 1 + 0.02 * value
    return 0.02 * value


def _directions(levels: int) -> Tensor:
    angle = torch.arange(HEADS, dtype=torch.float32) * (2 * math.pi / HEADS)
    towards = torch.stack([angle.cos(), angle.sin()], dim=1)
    towards = towards / towards.abs().amax(dim=1, keepdim=True)
    steps = torch.arange(1, POINTS + 1, dtype=torch.float32)
    points = towards[:, None, None] * steps[:, None]
    return points.expand(HEADS, levels, POINTS, 2).flatten().clone()


def weights(variant: str, *, num_queries: int | None = None) -> dict[str, Tensor]:
    """All tensors that the rule fills, under official names."""
    result = {}
    for name, (shape, dtype) in tables()[variant].items():
        if is_kept(name, dtype):
            continue
        if num_queries is not None and ".query_embed" in name:
            shape = [num_queries, *shape[1:]]
        result[name] = weight(name, shape)
    return result


def images(seed: int, valid_sizes: list[tuple[int, int]], size=(192, 256)) -> Tensor:
    """A normalised batch whose padding is zero."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(len(valid_sizes), 3, *size, generator=generator)
    for image, (height, width) in zip(batch, valid_sizes):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return batch


def recording(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of a file and what it says of itself."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop("meta")))
