"""The context-augmented encoder (CAE) and what the paper compares it with, on the coarsest map.

Letters: N images, C channels of the backbone's map, D of the result (256), E inside (512), K
classes, H and W of the map.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from d2dense.errors import UserError, nearest

from .layers import (
    ConvNormReLU,
    HeadNorm,
    SelfAttention,
    at_least_float32,
    float32_attention,
    glorot,
)

__all__ = [
    "ASPP",
    "ENCODERS",
    "OCR",
    "CAREncoder",
    "Encoder",
    "IdentityEncoder",
    "SelfAttentionEncoder",
    "build_encoder",
]


class Encoder(nn.Module):
    """Base of the encoders: ``(N, C, H, W)`` to the representation ``(N, D, H, W)``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)[0]

    def encode(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the representation, and what losses of its own need: ``car_features`` (N, E, H, W)
        or ``auxiliary_scores`` (N, K, H, W).
        """
        raise NotImplementedError


class IdentityEncoder(Encoder):
    """No context: CBR(1) to the width of the decoder.

    Args:
        in_channels: C.
        out_channels: D.
        norm: of all convolutions.
    """

    def __init__(self, *, in_channels: int, out_channels: int = 256, norm: HeadNorm):
        super().__init__()
        self.project = ConvNormReLU(in_channels, out_channels, 1, norm=norm)

    def encode(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        extra: dict[str, Tensor] = {}
        return self.project(x), extra


class ASPP(Encoder):
    """Atrous spatial pyramid pooling: the map's mean, a 1x1 and three dilated convolutions.

    Args:
        in_channels, out_channels, norm: see :class:`IdentityEncoder`.
        stride: of the map; dilations are 3, 6 and 9 at 32, and more where the map is finer.
    """

    def __init__(
        self, *, in_channels: int, out_channels: int = 256, stride: int = 32, norm: HeadNorm
    ):
        super().__init__()
        rates = [rate * 32 // stride for rate in (3, 6, 9)]
        self.pool = ConvNormReLU(in_channels, out_channels, 1, norm=norm)
        self.branches = nn.ModuleList([ConvNormReLU(in_channels, out_channels, 1, norm=norm)])
        for rate in rates:
            self.branches.append(
                ConvNormReLU(in_channels, out_channels, 3, norm=norm, dilation=rate)
            )
        self.project = ConvNormReLU(5 * out_channels, out_channels, 1, norm=norm)

    def encode(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        parts = [self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, x.shape[2], x.shape[3])]
        for branch in self.branches:
            parts.append(branch(x))
        extra: dict[str, Tensor] = {}
        return self.project(torch.cat(parts, 1)), extra


class SelfAttentionEncoder(Encoder):
    """Attention over all pixels between two 3x3 convolutions.

    Args:
        in_channels, out_channels, norm: see :class:`IdentityEncoder`.
        channels: E.
        key_channels: of queries and keys.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int = 256,
        channels: int = 512,
        key_channels: int = 64,
        norm: HeadNorm,
    ):
        super().__init__()
        self.lead = ConvNormReLU(in_channels, channels, 3, norm=norm)
        self.attention = SelfAttention(channels=channels, key_channels=key_channels)
        self.mix = ConvNormReLU(channels, channels, 3, norm=norm)
        self.project = ConvNormReLU(channels, out_channels, 1, norm=norm)

    def encode(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.lead(x)
        extra: dict[str, Tensor] = {}
        return self.project(self.mix(x + self.attention(x))), extra


class OCR(Encoder):
    """Object-contextual representations: pixels attend to the centres of the classes, which scores
    of its own give.

    Args:
        in_channels, out_channels, norm: see :class:`IdentityEncoder`.
        channels: E.
        num_classes: K.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int = 256,
        channels: int = 512,
        num_classes: int,
        norm: HeadNorm,
    ):
        super().__init__()
        inner = channels // 2
        self.pixels = ConvNormReLU(in_channels, channels, 3, norm=norm)
        self.auxiliary = nn.Sequential(
            ConvNormReLU(in_channels, in_channels, 3, norm=norm),
            nn.Conv2d(in_channels, num_classes, 1),
        )
        glorot(self.auxiliary[1])
        self.query = _two(channels, inner, norm)
        self.key = _two(channels, inner, norm)
        self.value = ConvNormReLU(channels, inner, 1, norm=norm)
        self.context = ConvNormReLU(inner, channels, 1, norm=norm)
        self.merge = ConvNormReLU(2 * channels, channels, 1, norm=norm)
        self.project = ConvNormReLU(channels, out_channels, 1, norm=norm)
        self.scale = inner**-0.5

    def encode(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        scores, pixels = self.auxiliary(x), self.pixels(x)
        shares = at_least_float32(scores.flatten(2)).softmax(2).to(pixels.dtype)
        centres = torch.matmul(pixels.flatten(2), shares.transpose(1, 2)).unsqueeze(3)
        found = float32_attention(
            self.query(pixels).flatten(2).transpose(1, 2),
            self.key(centres).flatten(2).transpose(1, 2),
            self.value(centres).flatten(2).transpose(1, 2),
            self.scale,
        )
        context = found.transpose(1, 2).unflatten(2, (x.shape[2], x.shape[3])).to(pixels.dtype)
        merged = self.merge(torch.cat([self.context(context), pixels], 1))
        return self.project(merged), {"auxiliary_scores": scores}


def _two(channels: int, inner: int, norm: HeadNorm) -> nn.Sequential:
    return nn.Sequential(
        ConvNormReLU(channels, inner, 1, norm=norm), ConvNormReLU(inner, inner, 1, norm=norm)
    )


class CAREncoder(Encoder):
    """The paper's CAE: leading convolutions, self-attention, the linear features that the
    class-aware regularisations act on, and a trailing convolution.

    Args:
        in_channels, out_channels, norm: see :class:`IdentityEncoder`.
        channels: E.
        key_channels: of the attention's queries and keys.
        lead_convs, lead_kernel: how many leading convolutions there are, and their size.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int = 256,
        channels: int = 512,
        key_channels: int = 64,
        lead_convs: int = 2,
        lead_kernel: int = 1,
        norm: HeadNorm,
    ):
        super().__init__()
        widths = [in_channels, *[channels] * lead_convs]
        self.lead = nn.Sequential(
            *(ConvNormReLU(a, b, lead_kernel, norm=norm) for a, b in pairwise(widths))
        )
        self.attention = SelfAttention(channels=channels, key_channels=key_channels)
        self.feature: nn.Module = nn.Conv2d(channels, channels, 1)
        glorot(self.feature)
        self.trailing = ConvNormReLU(channels, out_channels, 1, norm=norm)

    def encode(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.lead(x)
        features = self.feature(x + self.attention(x))
        return self.trailing(features), {"car_features": features}

    @torch.jit.unused
    def fold_for_inference(self) -> None:
        """Put the linear feature convolution into the trailing one, in place. There are no
        ``car_features`` to train on any more.
        """
        if isinstance(self.feature, nn.Identity):
            return
        first, second, norm = self.feature, self.trailing.conv, self.trailing.norm
        outer, inner = (conv.weight.detach().double().flatten(1) for conv in (second, first))
        shift = outer @ first.bias.detach().double()
        has_mean = getattr(norm, "running_mean", None) is not None
        folded = nn.Conv2d(
            first.in_channels,
            second.out_channels,
            1,
            bias=not has_mean,
            device=second.weight.device,
            dtype=second.weight.dtype,
        )
        with torch.no_grad():
            folded.weight.copy_((outer @ inner)[:, :, None, None])
            if has_mean:  # a batch norm takes a mean off, so it takes the bias in
                norm.running_mean.sub_(shift)
            else:
                folded.bias.copy_(shift)
        self.feature, self.trailing.conv = nn.Identity(), folded


ENCODERS = {
    "identity": IdentityEncoder,
    "aspp": ASPP,
    "ocr": OCR,
    "self_attention": SelfAttentionEncoder,
    "car": CAREncoder,
}
_INNER = ("ocr", "self_attention", "car")  # those with channels of their own


def build_encoder(
    name: str,
    *,
    in_channels: int,
    out_channels: int,
    channels: int,
    key_channels: int,
    lead_convs: int,
    lead_kernel: int,
    stride: int,
    num_classes: int,
    norm: HeadNorm,
) -> Encoder:
    """Return the encoder ``name`` of :data:`ENCODERS`, with those of the arguments that it has.

    Raises:
        UserError: an unknown name.
    """
    if name not in ENCODERS:
        raise UserError(
            f"MODEL.HFGD.CAE.NAME / encoder is {name!r}, expected one of {', '.join(ENCODERS)}"
            f"{nearest(name, ENCODERS)}"
        )
    options: dict[str, int] = {"channels": channels} if name in _INNER else {}
    if name in ("self_attention", "car"):
        options["key_channels"] = key_channels
    if name == "car":
        options.update(lead_convs=lead_convs, lead_kernel=lead_kernel)
    if name == "aspp":
        options["stride"] = stride
    if name == "ocr":
        options["num_classes"] = num_classes
    return ENCODERS[name](in_channels=in_channels, out_channels=out_channels, norm=norm, **options)
