"""CEDNet without heads: stem, first blocks and the cascade of stages.

Letters: N images, H and W of the image, C2 .. C5 maps of strides 4 .. 32 and also their widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2dense.errors import UserError, nearest
from d2dense.layers import missing

from .blocks import BlockFamily, ConvNormAct, NextFamily
from .drop_paths import drop_path_rates, plan_stages
from .layer_ids import LAYER_RULES, layer_id
from .stages import BlockSequence, Decoder, Encoder, Stage, downsampling

__all__ = ["STYLES", "CEDNetTrunk", "pad_to_multiple"]

# The paper's three; "fpn_convs" is an unpublished one of the official code, with 3x3 convolutions
# after the fusion and all scales handed on.
STYLES = ("fpn", "unet", "hourglass", "fpn_convs")
_STEM_WIDTH = 32


class CEDNetTrunk(nn.Module):
    """The cascade encoder-decoder network.

    Args:
        family: makes the blocks of the token mixer; None for ``NextFamily()``.
        style: of the decoders, one of :data:`STYLES`.
        widths: channels at strides 4, 8, 16, 32.
        first_blocks: blocks at stride 4, before the stages.
        blocks: numbers of blocks at strides 8, 16, 32; or one such triple per stage.
        num_stages: stages where ``blocks`` is one triple; None: 3, or as many as there are triples.
        last_decoder: whether the last stage has a decoder. None: only in U-Net- and
            Hourglass-style, which is what the published costs of detectors belong to.
        lr_blocks: long-range blocks at stride 32 (else ordinary ones).
        drop_path: rate of the last block; see :func:`~cednet.drop_paths.drop_path_rates`.
        official_drop_path: the official code's order of the rates.
        layer_rule: how :meth:`layer_id` numbers layers, ``stage`` or ``half_stage``.
        layer_count: ``num_layers``; None counts them. Fewer than there are leaves the last ones at
            the full learning rate.
        in_channels: of the image.

    Raises:
        UserError: an unknown style or rule, or numbers of blocks that do not fit the stages.
    """

    def __init__(
        self,
        *,
        family: BlockFamily | None = None,
        style: str = "fpn",
        widths: Sequence[int] = (96, 192, 352, 512),
        first_blocks: int = 3,
        blocks: Sequence[int] | Sequence[Sequence[int]] = (2, 4, 2),
        num_stages: int | None = None,
        last_decoder: bool | None = None,
        lr_blocks: bool = True,
        drop_path: float = 0.2,
        official_drop_path: bool = False,
        layer_rule: str = "stage",
        layer_count: int | None = None,
        in_channels: int = 3,
    ):
        super().__init__()
        family = NextFamily() if family is None else family
        _check_choice("style", style, STYLES)
        _check_choice("layer_rule", layer_rule, LAYER_RULES)
        counts = _blocks_per_stage(blocks, num_stages)
        if first_blocks < 0:
            raise UserError(
                f"CEDNet's first_blocks is {first_blocks}, expected 0 or more; change "
                "MODEL.CEDNET.FIRST_BLOCKS (yaml) or first_blocks (lazy)"
            )
        c2, *stage_widths = _checked_widths(widths)
        split = style in ("unet", "hourglass")
        if last_decoder is None:
            last_decoder = split
        plans = plan_stages(counts, split=split, last_decoder=last_decoder)
        first_rates, rates = drop_path_rates(
            plans, first=first_blocks, rate=drop_path, official=official_drop_path
        )

        self.widths = (c2, *stage_widths)
        self.norm = family.norm
        self.activation = family.activation
        self.layer_rule = layer_rule
        per_stage = 1 if layer_rule == "stage" else 2
        self.num_layers = 1 + per_stage * len(plans) if layer_count is None else layer_count

        names: dict[str, Any] = {"norm": family.norm, "activation": family.activation}
        self.stem = nn.Sequential(
            ConvNormAct(in_channels, _STEM_WIDTH, 3, stride=2, **names),
            ConvNormAct(_STEM_WIDTH, c2, 3, stride=2, **names),
        )
        self.first = _sequence(family, c2, 2, first_rates)
        self.down = downsampling(c2, stage_widths[0], family.norm)
        self.stages = nn.ModuleList()
        for k, (encoder_rates, decoder_rates) in enumerate(rates):
            encoder = Encoder(
                levels=[
                    _sequence(family, width, level, part, long_range=lr_blocks and level == 5)
                    for level, width, part in zip((3, 4, 5), stage_widths, encoder_rates)
                ],
                widths=stage_widths,
                norm=family.norm,
                takes_pyramid=style == "fpn_convs",
            )
            decoder = None
            if last_decoder or k < len(rates) - 1:
                decoder = _decoder(style, family, stage_widths, decoder_rates)
            self.stages.append(Stage(encoder=encoder, decoder=decoder))
        self.apply(init_weights)

    def forward(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """Return C2 and, of every stage, C3, C4, C5 (after its decoder).

        An image whose sides are no multiples of 32 is filled up with zeros at the right and the
        bottom, and the maps are those of the larger image.

        Args:
            x: ``(N, 3, H, W)``, normalised, N >= 0; computed in the type of the weights.

        Raises:
            UserError: another number of channels or axes, no pixel, or integers.
        """
        weight = self.stem[0].conv.weight
        if not torch.jit.is_scripting() and not torch.jit.is_tracing():
            _check_images(x, weight.shape[1])
        x = pad_to_multiple(x.to(weight.dtype), 32)
        # The order of the pixels in memory that convolutions, norms and linear layers all work on
        # without copies; everything below keeps it.
        x = x.contiguous(memory_format=torch.channels_last)
        c2 = self.first(self.stem(x))
        c3 = self.down(c2)
        outputs: list[tuple[Tensor, Tensor, Tensor]] = []
        before: tuple[Tensor, Tensor] | None = None
        for stage in self.stages:
            c3, c4, c5 = stage(c3, before)
            before = (c4, c5)
            outputs.append((c3, c4, c5))
        return c2, outputs

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let every block recompute its activations in backward; see :class:`BlockSequence`."""
        for module in self.modules():
            if isinstance(module, BlockSequence):
                module.set_grad_checkpointing(enable)

    def layer_id(self, name: str) -> int | None:
        """Return the layer of a parameter for layer-wise learning rates; 0 is the stem.

        Layers after ``num_layers`` share the full rate.
        """
        found = layer_id(name, self.layer_rule)
        return None if found is None else min(found, self.num_layers + 1)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Fill ``(N, C, H, W)`` up with zeros at the right and the bottom."""
    h, w = x.shape[-2], x.shape[-1]
    # also by nothing: what is recorded here is used at other sizes
    return F.pad(x, (0, missing(w, multiple), 0, missing(h, multiple)))


@torch.jit.unused
def _check_images(x: Tensor, channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels or min(x.shape[-2:]) < 1:
        raise UserError(
            f"CEDNet takes images as (N, {channels}, H, W) with at least one pixel, found "
            f"{tuple(x.shape)}; the number of channels is that of MODEL.PIXEL_MEAN (yaml) or the "
            "trunk's in_channels (lazy)"
        )
    if not x.is_floating_point():
        raise UserError(
            f"CEDNet takes normalised images of floating-point numbers, found {x.dtype}"
        )


def init_weights(module: nn.Module) -> None:
    """Draw a convolution's or linear layer's weights as the official code does: normal with
    variance 1 / (outputs * kernel area), for depth-wise ones too.
    """
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="linear")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _decoder(style: str, family: BlockFamily, widths: Sequence[int], rates) -> Decoder:
    w3, w4, _ = widths
    before = after = smooth = None
    if style in ("unet", "hourglass"):
        after = [_sequence(family, w4, 4, rates[0]), _sequence(family, w3, 3, rates[1])]
    if style == "hourglass":
        before = [
            family.block(w4, level=4, index=0, drop_path=0.0),
            family.block(w3, level=3, index=0, drop_path=0.0),
        ]
    if style == "fpn_convs":
        smooth = [ConvNormAct(w, w, 3, norm=family.norm, activation="none") for w in widths]
    return Decoder(widths=widths, norm=family.norm, before=before, after=after, smooth=smooth)


def _sequence(
    family: BlockFamily,
    channels: int,
    level: int,
    rates: Sequence[float],
    *,
    long_range: bool = False,
) -> BlockSequence:
    make = family.lr_block if long_range else family.block
    return BlockSequence(
        make(channels, level=level, index=i, drop_path=rate) for i, rate in enumerate(rates)
    )


def _blocks_per_stage(blocks: Sequence[Any], num_stages: int | None) -> list[tuple[int, ...]]:
    if len(blocks) and isinstance(blocks[0], int):
        counts = [tuple(blocks)] * (3 if num_stages is None else num_stages)
    else:
        counts = [tuple(each) for each in blocks]
    if num_stages is not None and num_stages < 1:
        raise UserError(
            f"CEDNet has {num_stages} stages, expected one or more; change MODEL.CEDNET.NUM_STAGES "
            "(yaml) or num_stages (lazy)"
        )
    if not counts or any(len(each) != 3 or min(each) < 0 for each in counts):
        raise UserError(
            f"CEDNet's blocks are {blocks}, expected three numbers (strides 8, 16, 32) or such a "
            "triple for each stage; change MODEL.CEDNET.BLOCKS (yaml) or blocks (lazy)"
        )
    if num_stages is not None and num_stages != len(counts):
        raise UserError(
            f"CEDNet has {num_stages} stages but blocks for {len(counts)}; make "
            "MODEL.CEDNET.NUM_STAGES and BLOCKS (yaml) or num_stages and blocks (lazy) agree"
        )
    return counts


def _checked_widths(widths: Sequence[int]) -> list[int]:
    if len(widths) != 4 or min(widths) < 1:
        raise UserError(
            f"CEDNet's widths are {list(widths)}, expected four numbers (strides 4, 8, 16, 32); "
            "change MODEL.CEDNET.WIDTHS (yaml) or widths (lazy)"
        )
    return list(widths)


def _check_choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(
            f"CEDNet's {key} is {value!r}, expected one of {', '.join(known)}"
            f"{nearest(value, known)}; change MODEL.CEDNET.{key.upper()} (yaml) or {key} (lazy)"
        )
