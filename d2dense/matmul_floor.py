"""What a machine needs at least for a network: its multiply-accumulates as plain products of
matrices of the same shapes, without anything in between.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Product", "collect_products", "floor", "macs"]

_aten = torch.ops.aten


class Product(NamedTuple):
    """``batch`` products ``(rows, inner) @ (inner, columns)``."""

    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def macs(self) -> int:
        return math.prod(self)


def _of_matrices(left: Tensor, right: Tensor) -> list[Product]:
    rows, inner = left.shape
    return [Product(1, rows, inner, right.shape[1])]


def _of_batches(left: Tensor, right: Tensor) -> list[Product]:
    batch, rows, inner = left.shape
    return [Product(batch, rows, inner, right.shape[2])]


def _of_convolution(image: Tensor, weight: Tensor, output: Tensor, groups: int) -> list[Product]:
    """Positions by what they see, times the filters: the product after im2col."""
    positions = output.numel() // output.shape[1]
    return [Product(groups, positions, weight[0].numel(), weight.shape[0] // groups)]


def _of_attention(query: Tensor, key: Tensor, value: Tensor) -> list[Product]:
    batch = math.prod(query.shape[:-2])
    q, d = query.shape[-2:]
    k, e = value.shape[-2:]
    return [Product(batch, q, d, k), Product(batch, q, k, e)]


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found: Counter[Product] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket
        if name is _aten.mm:
            self.found.update(_of_matrices(*args[:2]))
        elif name is _aten.addmm:
            self.found.update(_of_matrices(*args[1:3]))
        elif str(name) == "mkldnn._linear_pointwise":
            self.found.update(_of_matrices(args[0], args[1].t()))
        elif name is _aten.bmm:
            self.found.update(_of_batches(*args[:2]))
        elif name is _aten.baddbmm:
            self.found.update(_of_batches(*args[1:3]))
        elif name is _aten.convolution:
            self.found.update(_of_convolution(args[0], args[1], result, args[8]))
        elif name in (
            _aten._scaled_dot_product_flash_attention_for_cpu,
            _aten._scaled_dot_product_flash_attention,
            _aten._scaled_dot_product_efficient_attention,
        ):
            self.found.update(_of_attention(*args[:3]))
        return result


def collect_products(call: Callable[[], Any]) -> Counter[Product]:
    """Return the products of matrices that ``call`` computes, and how often each shape: those of
    convolutions (not transposed ones), of linear layers and of attention.
    """
    with _Recorder() as recorder:
        call()
    return recorder.found


def macs(products: Mapping[Product, int]) -> int:
    """Return their multiply-accumulates."""
    return sum(product.macs * count for product, count in products.items())


def floor(products: Mapping[Product, int], *, device: str = "cpu") -> Callable[[], None]:
    """Return a call that computes them all, on random matrices."""
    matrices = []
    for (batch, rows, inner, columns), count in products.items():
        left = torch.rand(batch, rows, inner, device=device)
        right = torch.rand(batch, columns, inner, device=device).transpose(1, 2)
        if batch == 1:
            matrices.append((torch.mm, left[0], right[0], count))
        else:
            matrices.append((torch.bmm, left, right, count))

    @torch.no_grad()
    def call() -> None:
        for multiply, left, right, count in matrices:
            for _ in range(count):
                multiply(left, right)

    return call
