"""``torch.ops.d2dense.deformable_sampling``: the fast ways of each device as one operator with a
gradient, which torch.compile calls as it is.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from packaging.version import Version
from torch import Tensor, library

from . import deformable_cpu

__all__ = ["is_supported", "sample"]

Shapes = Sequence[tuple[int, int]]

_NAME = "d2dense::deformable_sampling"
_BACKWARD = f"{_NAME}_backward"
_KINDS = {"cpu": {torch.float64, torch.float32}, "cuda": {torch.float32}}
_16_BITS = {torch.float16, torch.bfloat16}
# on the CPU they are MKL's, which PyTorch has on x86 only; asked here, as torch.compile cannot ask
_HAS_SPARSE_PRODUCTS = torch.backends.mkl.is_available()
_MAX_LEVELS = {"cpu": sys.maxsize, "cuda": 8}


def sample(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Do what ``deformable_sampling`` does where :func:`is_supported`. Values may have 16 bits;
    locations and weights are float32, or float64 with such values.
    """
    sizes = [side for shape in shapes for side in shape]
    return torch.ops.d2dense.deformable_sampling(value, sizes, locations, weights)


def is_supported(value: Tensor, shapes: Shapes) -> bool:
    """Return whether there is a fast way for such values.

    Args:
        value: ``(N, S, M, D)``; its device and type decide
        shapes: (Hl, Wl) per level; their number decides
    """
    device = value.device.type
    if device not in _KINDS or len(shapes) > _MAX_LEVELS[device]:
        return False
    if value.dtype not in _KINDS[device] | _16_BITS:
        return False
    if device == "cpu":
        return _HAS_SPARSE_PRODUCTS
    # torch.compile cannot ask, and needs the same things on CUDA itself
    return torch.compiler.is_compiling() or _triton_works(value.device)


@functools.lru_cache
def _triton_works(device: torch.device) -> bool:
    """Return whether Triton is here, with the compiler and headers it needs to start a kernel."""
    try:
        import triton
    except ImportError:
        return False
    if Version(triton.__version__) < Version("3.3"):  # tuples in kernels
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    new_enough = torch.cuda.get_device_capability(device) >= (7, 5)
    return bool(compiler) and headers.is_file() and new_enough


def _way(value: Tensor):
    if value.device.type == "cpu":
        return deformable_cpu
    from . import deformable_triton

    return deformable_triton


def _pairs(sizes: list[int]) -> list[tuple[int, int]]:
    return list(zip(sizes[::2], sizes[1::2]))


def _forward(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    if weights.numel() == 0 or value.numel() == 0:
        return torch.zeros_like(_like_result(value, sizes, locations, weights))
    return _way(value).forward(value, _pairs(sizes), locations, weights)


def _backward(
    grad: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if weights.numel() == 0 or value.numel() == 0:
        return tuple(map(torch.zeros_like, _like_inputs(grad, value, sizes, locations, weights)))
    return _way(value).backward(grad, value, _pairs(sizes), locations, weights)


def _like_result(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    n, _, m, d = value.shape
    return value.new_empty(n, weights.shape[1], m * d)


def _like_inputs(
    grad: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = {"memory_format": torch.contiguous_format}
    return tuple(torch.empty_like(x, **contiguous) for x in (value, locations, weights))


def _keep(ctx, inputs, output) -> None:
    value, ctx.sizes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _gradients(ctx, grad: Tensor):
    value, locations, weights = ctx.saved_tensors
    to_value, to_locations, to_weights = torch.ops.d2dense.deformable_sampling_backward(
        grad, value, ctx.sizes, locations, weights
    )
    return to_value, None, to_locations, to_weights


# register_kernel of custom_op would import the whole compiler at the first call
_ARGUMENTS = "Tensor value, SymInt[] sizes, Tensor locations, Tensor weights"
library.define(_NAME, f"({_ARGUMENTS}) -> Tensor")
library.define(_BACKWARD, f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
library.impl(_NAME, tuple(_KINDS), _forward)
library.impl(_BACKWARD, tuple(_KINDS), _backward)
library.register_fake(_NAME, _like_result)
library.register_fake(_BACKWARD, _like_inputs)
library.register_autograd(_NAME, _gradients, setup_context=_keep)
