"""The two kinds of blocks that CEDNet stacks, for every token mixer.

A CED block mixes neighbours, then channels; a long-range (LR) CED block, used at the coarsest
scale, also mixes far pixels, by a 7x7 depth-wise convolution of dilation 3. What a block looks like
depends on the token mixer; a *family* makes the blocks of one mixer.

All blocks map ``(N, C, H, W)`` to the same shape and compute on ``(N, H, W, C)`` inside, which is
free of copies in ``channels_last`` memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from d2dense.errors import UserError, nearest
from d2dense.layers import LayerNorm2d, MLP2d, Residual, build_norm

from .cross_shaped import CrossShapedAttention, GlobalAttention
from .dilated import DilatedDepthwiseConv2d
from .window import WindowAttention

__all__ = [
    "TOKEN_MIXERS",
    "AttentionBlock",
    "BlockFamily",
    "BottleneckBlock",
    "BottleneckFamily",
    "CSwinFamily",
    "ConvNormAct",
    "DepthwiseConvNormAct",
    "LRBottleneckBlock",
    "LRNextBlock",
    "LRWindowBlock",
    "NextBlock",
    "NextFamily",
    "SwinFamily",
    "block_family",
]

_EPS = 1e-6


_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "none": nn.Identity}


class ConvNormAct(nn.Module):
    """Convolution, norm and activation.

    Args:
        in_channels, out_channels, kernel_size, stride, bias: of the convolution.
        padding: None keeps the size at stride 1.
        norm: a name of :data:`d2dense.layers.NORMS`.
        activation: ``gelu`` (exact), ``relu`` or ``none``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        norm: str,
        activation: str,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = True,
    ):
        super().__init__()
        if padding is None:
            padding = kernel_size // 2
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias
        )
        self.norm = build_norm(norm, out_channels)
        self.act = _ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class DepthwiseConvNormAct(nn.Module):
    """A 7x7 filter per channel, norm and activation; the size stays.

    Args:
        channels: C.
        dilation: 1 mixes neighbours, more mixes far pixels.
        norm, activation: see :class:`ConvNormAct`.
    """

    def __init__(self, channels: int, *, dilation: int = 1, norm: str, activation: str):
        super().__init__()
        self.conv = DilatedDepthwiseConv2d(channels, 7, dilation=dilation)
        self.norm = build_norm(norm, channels)
        self.act = _ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class NextBlock(nn.Module):
    """ConvNeXt's block: 7x7 depth-wise convolution, norm, MLP, layer scale.

    Args:
        channels: C.
        drop_path, layer_scale: see :class:`~d2dense.layers.Residual`.
    """

    def __init__(
        self,
        channels: int,
        *,
        drop_path: float = 0.0,
        layer_scale: float | None = 1e-6,
    ):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = LayerNorm2d(channels, eps=_EPS)
        self.mlp = MLP2d(channels)
        self.residual = Residual(channels=channels, layer_scale=layer_scale, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x, self.mlp(self.norm(self.conv(x))))


class LRNextBlock(nn.Module):
    """Near, then far pixels, each by a depth-wise convolution with norm, activation and a skip of
    its own; then the MLP. The outer skip starts at the input.

    Args:
        channels, drop_path, layer_scale: see :class:`NextBlock`.
        dilation: of the far convolution.
    """

    def __init__(
        self,
        channels: int,
        *,
        drop_path: float = 0.0,
        layer_scale: float | None = 1e-6,
        dilation: int = 3,
    ):
        super().__init__()
        options: dict[str, Any] = {"norm": "LN", "activation": "gelu"}
        self.near = DepthwiseConvNormAct(channels, **options)
        self.far = DepthwiseConvNormAct(channels, dilation=dilation, **options)
        self.mlp = MLP2d(channels)
        self.residual = Residual(channels=channels, layer_scale=layer_scale, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        z = x + self.near(x)
        z = z + self.far(z)
        return self.residual(x, self.mlp(z))


class BottleneckBlock(nn.Module):
    """ResNet's bottleneck turned round: 3x3 first, then four times the width and back.

    Args:
        channels: C.
        drop_path: see :class:`~d2dense.layers.Residual`.
        norm: a name of :data:`d2dense.layers.NORMS`.
    """

    def __init__(self, channels: int, *, drop_path: float = 0.0, norm: str = "BN"):
        super().__init__()
        options: dict[str, Any] = {"norm": norm, "bias": False}
        wide = 4 * channels
        self.near = ConvNormAct(channels, channels, 3, activation="relu", **options)
        self.expand = ConvNormAct(channels, wide, 1, activation="relu", **options)
        self.reduce = ConvNormAct(wide, channels, 1, activation="none", **options)
        self.residual = Residual(channels=channels, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x, self.reduce(self.expand(self.near(x)))))


class LRBottleneckBlock(BottleneckBlock):
    """A bottleneck whose 3x3 convolution and a dilated one each have a skip of their own.

    Args:
        channels, drop_path, norm: see :class:`BottleneckBlock`.
        dilation: of the far convolution.
    """

    def __init__(
        self, channels: int, *, drop_path: float = 0.0, norm: str = "BN", dilation: int = 3
    ):
        super().__init__(channels, drop_path=drop_path, norm=norm)
        self.far = DepthwiseConvNormAct(channels, dilation=dilation, norm=norm, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        z = x + self.near(x)
        z = z + self.far(z)
        return F.relu(self.residual(x, self.reduce(self.expand(z))))


class AttentionBlock(nn.Module):
    """A pre-norm transformer block around any token mixer.

    Args:
        channels: C.
        mixer: maps ``(N, H, W, C)`` to the same shape.
        drop_path: of each of the two halves.
    """

    def __init__(self, channels: int, *, mixer: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=_EPS)
        self.mixer = mixer
        self.residual1 = Residual(channels=channels, drop_path=drop_path)
        self.norm2 = LayerNorm2d(channels, eps=_EPS)
        self.mlp = MLP2d(channels)
        self.residual2 = Residual(channels=channels, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer(self.norm1(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        x = self.residual1(x, mixed)
        return self.residual2(x, self.mlp(self.norm2(x)))


class LRWindowBlock(nn.Module):
    """A transformer block whose first half attends within windows, then convolves far pixels.

    Both have norm, activation and a skip of their own, and start from the *normalised* input.

    Args:
        channels, mixer, drop_path: see :class:`AttentionBlock`.
        dilation: of the far convolution.
    """

    def __init__(
        self, channels: int, *, mixer: nn.Module, drop_path: float = 0.0, dilation: int = 3
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=_EPS)
        self.mixer = mixer
        self.mixer_norm = nn.LayerNorm(channels, eps=_EPS)
        self.far = DepthwiseConvNormAct(channels, dilation=dilation, norm="LN", activation="gelu")
        self.residual1 = Residual(channels=channels, drop_path=drop_path)
        self.norm2 = LayerNorm2d(channels, eps=_EPS)
        self.mlp = MLP2d(channels)
        self.residual2 = Residual(channels=channels, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm1(x.permute(0, 2, 3, 1))
        u = (u + F.gelu(self.mixer_norm(self.mixer(u)))).permute(0, 3, 1, 2)
        x = self.residual1(x, u + self.far(u))
        return self.residual2(x, self.mlp(self.norm2(x)))


class BlockFamily(Protocol):
    """Makes the blocks of one token mixer."""

    @property
    def norm(self) -> str:
        """Name of the norm around the blocks (stem, down-sampling, decoder)."""

    @property
    def activation(self) -> str:
        """Name of the activation there."""

    def block(self, channels: int, *, level: int, index: int, drop_path: float) -> nn.Module:
        """Return a CED block for stride ``2 ** level``, the ``index``-th of its sequence."""

    def lr_block(self, channels: int, *, level: int, index: int, drop_path: float) -> nn.Module:
        """Return a long-range CED block."""


@dataclass(frozen=True, kw_only=True)
class NextFamily:
    """7x7 depth-wise convolutions, as in ConvNeXt."""

    layer_scale: float | None = 1e-6
    dilation: int = 3
    norm: str = "LN"
    activation: str = "gelu"

    def block(self, channels: int, *, level: int, index: int, drop_path: float) -> nn.Module:
        return NextBlock(channels, drop_path=drop_path, layer_scale=self.layer_scale)

    def lr_block(self, channels: int, *, level: int, index: int, drop_path: float) -> nn.Module:
        return LRNextBlock(
            channels, drop_path=drop_path, layer_scale=self.layer_scale, dilation=self.dilation
        )


@dataclass(frozen=True, kw_only=True)
class BottleneckFamily:
    """3x3 convolutions in inverted bottlenecks, with batch norm and ReLU, as in ResNet."""

    dilation: int = 3
    norm: str = "BN"
    activation: str = "relu"

    def block(self, channels: int, *, level: int, index: int, drop_path: float) -> nn.Module:
        return BottleneckBlock(channels, drop_path=drop_path, norm=self.norm)

    def lr_block(self, channels: int, *, level: int, index: int, drop_path: float) -> nn.Module:
        return LRBottleneckBlock(
            channels, drop_path=drop_path, norm=self.norm, dilation=self.dilation
        )


@dataclass(frozen=True, kw_only=True)
class SwinFamily:
    """Attention within windows; every second block of a sequence moves them by half a window.

    Args:
        roll_back_unshifted: see :class:`~cednet.window.WindowAttention`.
    """

    window: int = 7
    head_channels: int = 32
    dilation: int = 3
    roll_back_unshifted: bool = False
    norm: str = "LN"
    activation: str = "gelu"

    def block(self, channels: int, *, level: int, index: int, drop_path: float) -> nn.Module:
        return AttentionBlock(channels, mixer=self._mixer(channels, index), drop_path=drop_path)

    def lr_block(self, channels: int, *, level: int, index: int, drop_path: float) -> nn.Module:
        return LRWindowBlock(
            channels,
            mixer=self._mixer(channels, index),
            drop_path=drop_path,
            dilation=self.dilation,
        )

    def _mixer(self, channels: int, index: int) -> nn.Module:
        return WindowAttention(
            channels,
            heads=_heads(channels, self.head_channels),
            window=self.window,
            shift=self.window // 2 if index % 2 else 0,
            roll_back_unshifted=self.roll_back_unshifted,
        )


@dataclass(frozen=True, kw_only=True)
class CSwinFamily:
    """Attention within vertical and horizontal stripes; long-range blocks see the whole map.

    Args:
        stripes: widths of the stripes at strides 4, 8, 16 and 32.
    """

    stripes: tuple[int, int, int, int] = (1, 2, 7, 7)
    head_channels: int = 32
    norm: str = "LN"
    activation: str = "gelu"

    def block(self, channels: int, *, level: int, index: int, drop_path: float) -> nn.Module:
        heads = _heads(channels, self.head_channels, even=True)
        mixer = CrossShapedAttention(channels, heads=heads, stripe=self.stripes[level - 2])
        return AttentionBlock(channels, mixer=mixer, drop_path=drop_path)

    def lr_block(self, channels: int, *, level: int, index: int, drop_path: float) -> nn.Module:
        mixer = GlobalAttention(channels, heads=_heads(channels, self.head_channels))
        return AttentionBlock(channels, mixer=mixer, drop_path=drop_path)


def _heads(channels: int, head_channels: int, even: bool = False) -> int:
    unit = 2 * head_channels if even else head_channels
    if channels % unit:
        raise UserError(
            f"a CEDNet width of {channels} is no multiple of {unit}, which the heads of its "
            "attention need; change MODEL.CEDNET.WIDTHS (yaml) or widths (lazy)"
        )
    return channels // head_channels


TOKEN_MIXERS: dict[str, type] = {
    "next": NextFamily,
    "bottleneck": BottleneckFamily,
    "swin": SwinFamily,
    "cswin": CSwinFamily,
}


def block_family(token_mixer: str, **options) -> BlockFamily:
    """Return the family of a token mixer's name with its ``options``, such as ``dilation``.

    Raises:
        UserError: an unknown name.
    """
    if token_mixer not in TOKEN_MIXERS:
        raise UserError(
            f"unknown token mixer {token_mixer!r}, expected one of {', '.join(TOKEN_MIXERS)}"
            f"{nearest(token_mixer, TOKEN_MIXERS)}"
        )
    return TOKEN_MIXERS[token_mixer](**options)
