"""What every part of HFGD's head is made of: conv + norm + ReLU, resizing, attention over pixels.

Letters: N images, C channels, H and W of a map.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2dense.layers import build_norm, set_norms

__all__ = [
    "ConvNormReLU",
    "HeadNorm",
    "SelfAttention",
    "at_least_float32",
    "float32_attention",
    "glorot",
    "no_autocast",
    "resize",
    "start_alike",
]


@dataclass(frozen=True, kw_only=True)
class HeadNorm:
    """The norm of every convolution of the head.

    With the paper's momentum 0.0003 running statistics need tens of thousands of iterations: n of
    them move the statistics by 1 - 0.9997^n.

    Attributes:
        name: ``SyncBN``, ``BN`` or another of :data:`d2dense.layers.NORMS`.
        eps: of any of them.
        momentum: of batch norms, the share of the new batch in the running statistics.
    """

    name: str = "SyncBN"
    eps: float = 1e-3
    momentum: float = 3e-4

    def build(self, channels: int) -> nn.Module:
        """Return the norm for ``(N, channels, H, W)``."""
        return set_norms(build_norm(self.name, channels), eps=self.eps, momentum=self.momentum)


def glorot(layer: nn.Conv2d | nn.Linear) -> None:
    """Draw Glorot-uniform weights and set the bias to 0, in place."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def start_alike(query: nn.Linear, key: nn.Linear) -> None:
    """Let keys start from the queries' weights: attention then begins with a peak on the pixel
    itself.
    """
    with torch.no_grad():
        key.weight.copy_(query.weight)


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """``(N, C, H, W)`` to ``(N, C, height, width)``, bilinear with aligned corners."""
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=True)


class ConvNormReLU(nn.Module):
    """CBR(k, o): convolution without bias at stride 1 and the same size, norm, ReLU.

    Args:
        in_channels: of the map.
        out_channels: o.
        kernel_size: k, odd.
        norm: after the convolution.
        dilation: of the convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        norm: HeadNorm,
        dilation: int = 1,
    ):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            bias=False,
        )
        self.norm = norm.build(out_channels)
        glorot(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, o, H, W)``."""
        return F.relu(self.norm(self.conv(x)), inplace=True)


class SelfAttention(nn.Module):
    """One head over all pixels of a map without the usual 1/sqrt(d) and without a residual.

    Args:
        channels: C.
        key_channels: width of queries and keys.
    """

    def __init__(self, *, channels: int, key_channels: int = 64):
        super().__init__()
        self.q = nn.Linear(channels, key_channels)
        self.k = nn.Linear(channels, key_channels)
        self.v = nn.Linear(channels, channels)
        for layer in (self.q, self.k, self.v):
            glorot(layer)
        start_alike(self.q, self.k)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        pixels = x.flatten(2).transpose(1, 2)
        found = float32_attention(self.q(pixels), self.k(pixels), self.v(pixels), 1.0)
        return found.transpose(1, 2).unflatten(2, (x.shape[2], x.shape[3])).to(x.dtype)


def float32_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return softmax(scale q k^T) v in float32 at least, also where autocast is on: scores without
    a scale overflow float16.

    Args:
        query, key: ``(N, T, D)``, ``(N, S, D)``.
        value: ``(N, S, C)``.

    Returns:
        ``(N, T, C)``.
    """
    query, key, value = at_least_float32(query), at_least_float32(key), at_least_float32(value)
    if torch.jit.is_scripting():  # which has no autocast, and cannot compile its switch
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    with no_autocast(query):
        return F.scaled_dot_product_attention(query, key, value, scale=scale)


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32 where it has 16 bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context in which operations on the device of ``x`` keep their inputs' precision."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
