"""A CEDNet stage: an encoder from stride 8 to 32, then a decoder back to 8 (paper, figure 3).

Letters: N images, C3, C4, C5 maps of strides 8, 16, 32 and also their widths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from d2dense.errors import UserError
from d2dense.layers import build_norm

from .blocks import ConvNormAct

__all__ = ["BlockSequence", "Decoder", "Encoder", "Stage", "downsampling"]


class BlockSequence(nn.Sequential):
    """Blocks one after the other; each can recompute its activations in backward."""

    def __init__(self, blocks: Iterable[nn.Module] = ()):
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let each block run its forward again in backward instead of keeping activations.

        Raises:
            UserError: blocks with batch norm, whose statistics would move twice.
        """
        if enable and any(isinstance(part, _BatchNorm) for part in self.modules()):
            raise UserError(
                "set_grad_checkpointing would update batch norms twice; use the trainer's "
                "TRAIN.ACTIVATION_CHECKPOINTING or train.activation_checkpointing instead"
            )
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


def downsampling(in_channels: int, out_channels: int, norm: str) -> ConvNormAct:
    """Return the 2x2 convolution of stride 2 with norm that leads to the next scale,
    ``(N, in_channels, H, W)`` to ``(N, out_channels, H / 2, W / 2)``.
    """
    return ConvNormAct(
        in_channels, out_channels, 2, stride=2, padding=0, norm=norm, activation="none"
    )


class Encoder(nn.Module):
    """Blocks at strides 8, 16 and 32.

    Args:
        levels: three modules that keep shapes, for C3, C4, C5.
        widths: channels of the three.
        norm: of the two down-samplings.
        takes_pyramid: also add the C4 and C5 of the stage before, where there is one.
    """

    def __init__(
        self,
        *,
        levels: Sequence[nn.Module],
        widths: Sequence[int],
        norm: str,
        takes_pyramid: bool = False,
    ):
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.down = nn.ModuleList(
            downsampling(fine, coarse, norm) for fine, coarse in pairwise(widths)
        )
        self.takes_pyramid = takes_pyramid

    def forward(
        self, x: Tensor, before: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return C3, C4, C5.

        Args:
            x: ``(N, C3, H / 8, W / 8)``.
            before: C4 and C5 of the stage before.
        """
        c3 = self.levels[0](x)
        c4 = self.down[0](c3)
        if self.takes_pyramid and before is not None:
            c4 = c4 + before[0]
        c4 = self.levels[1](c4)
        c5 = self.down[1](c4)
        if self.takes_pyramid and before is not None:
            c5 = c5 + before[1]
        return c3, c4, self.levels[2](c5)


class Decoder(nn.Module):
    """Fusion from coarse to fine: C4, then C3, take the coarser map up-sampled by two, in
    ``after(norm(before(map) + up(coarser)))``.

    The paper's styles differ in what surrounds the sum. *FPN-style* has nothing there,
    *U-Net-style* has blocks ``after`` it, *Hourglass-style* also a block ``before`` it, on the
    lateral path.

    Args:
        widths: channels of C3, C4, C5.
        norm: name of the norm after each sum.
        before: modules for C4 and C3 that keep shapes; None for none.
        after: likewise.
        smooth: modules for C3, C4 and C5 at the very end; None for none.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        norm: str,
        before: Sequence[nn.Module] | None = None,
        after: Sequence[nn.Module] | None = None,
        smooth: Sequence[nn.Module] | None = None,
    ):
        super().__init__()
        w3, w4, w5 = widths
        self.up = nn.ModuleList([nn.Conv2d(w5, w4, 1), nn.Conv2d(w4, w3, 1)])
        self.norm = nn.ModuleList([build_norm(norm, w4), build_norm(norm, w3)])
        self.before = nn.ModuleList(before or [nn.Identity(), nn.Identity()])
        self.after = nn.ModuleList(after or [nn.Identity(), nn.Identity()])
        self.smooth = nn.ModuleList(smooth or [nn.Identity(), nn.Identity(), nn.Identity()])

    def forward(self, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the fused C3, C4, C5, each of its own shape ``(N, Ci, Hi, Wi)``."""
        c4 = self.after[0](self.norm[0](self.before[0](c4) + _doubled(self.up[0](c5))))
        c3 = self.after[1](self.norm[1](self.before[1](c3) + _doubled(self.up[1](c4))))
        return self.smooth[0](c3), self.smooth[1](c4), self.smooth[2](c5)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class Stage(nn.Module):
    """An encoder and, unless it is None, a decoder: arguments of the first, maps of the last."""

    def __init__(self, *, encoder: Encoder, decoder: Decoder | None):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(
        self, x: Tensor, before: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        c3, c4, c5 = self.encoder(x, before)
        if self.decoder is not None:
            c3, c4, c5 = self.decoder(c3, c4, c5)
        return c3, c4, c5
