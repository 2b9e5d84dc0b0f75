"""SemanticFPN as the paper has it, and U-SFPN, which goes on to half and to the whole size.

Letters: N images, C channels (256), H and W of the image, Pk the sum at stride 2^k.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from d2dense.errors import UserError

from .layers import ConvNormReLU, HeadNorm, resize

__all__ = ["OUT_STRIDES", "FeaturePyramid"]

OUT_STRIDES = (4, 2, 1)
# 3x3 convolutions of the branches of P2, P3, P4 and P5 at output stride 4; each halving adds one
_BRANCHES = (1, 1, 2, 3)


class FeaturePyramid(nn.Module):
    """Top-down sums, a branch of convolutions and enlargements from each of them to the output's
    size, and the sum of the branches.

    Each enlargement is bilinear with aligned corners, to the exact size of the next finer level;
    below stride 4 these are ceil(H / 2) x ceil(W / 2) and H x W. All 3x3 convolutions of output
    stride 2 still run at stride 4 or coarser.

    Args:
        in_channels: of the backbone's maps at strides 4, 8 and 16.
        channels: C, also of the coarsest map, which has no lateral convolution.
        lateral_kernel: 1 for SemanticFPN, 3 for U-SFPN.
        out_stride: 4, 2 or 1.
        norm: of all convolutions.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        channels: int = 256,
        lateral_kernel: int = 3,
        out_stride: int = 4,
        norm: HeadNorm,
    ):
        super().__init__()
        if out_stride not in OUT_STRIDES:
            raise UserError(
                f"MODEL.HFGD.UPSAMPLER.OUT_STRIDE / out_stride is {out_stride}, expected 4, 2 or 1"
            )
        self.halvings = OUT_STRIDES.index(out_stride)
        self.laterals = nn.ModuleList(
            ConvNormReLU(each, channels, lateral_kernel, norm=norm) for each in in_channels
        )
        self.branches = nn.ModuleList(
            nn.ModuleList(
                ConvNormReLU(channels, channels, 3, norm=norm) for _ in range(count + self.halvings)
            )
            for count in _BRANCHES
        )
        self.end = ConvNormReLU(channels, channels, 1, norm=norm)

    def forward(self, maps: list[Tensor], top: Tensor, size: tuple[int, int]) -> Tensor:
        """Return ``(N, C, h, w)`` of the output stride.

        Args:
            maps: the backbone's at strides 4, 8 and 16.
            top: ``(N, C, H5, W5)`` at stride 32.
            size: (H, W).
        """
        sums = self._top_down(maps, top)
        # where enlargements go, coarse to fine: P5's start at the first, P4's at the second, ...
        steps = [(each.shape[2], each.shape[3]) for each in (sums[2], sums[1], sums[0])]
        if self.halvings > 0:
            steps.append(((size[0] + 1) // 2, (size[1] + 1) // 2))
        if self.halvings > 1:
            steps.append((size[0], size[1]))

        outputs: list[Tensor] = []
        for level, branch in enumerate(self.branches):
            x, first = sums[level], min(3 - level, 2)
            for k, conv in enumerate(branch):
                x = conv(x)
                is_shared = self.halvings > 0 and k == len(branch) - 1
                if (level > 0 or k > 0) and not is_shared:  # P2's first one stays at its size
                    x = resize(x, steps[first + k][0], steps[first + k][1])
            outputs.append(x)
        merged = outputs[0] + outputs[1] + outputs[2] + outputs[3]
        if self.halvings > 0:  # the last enlargement of all branches, which is linear
            merged = resize(merged, steps[-1][0], steps[-1][1])
        return self.end(merged)

    def _top_down(self, maps: list[Tensor], top: Tensor) -> list[Tensor]:
        """Return P2, P3, P4 and P5."""
        laterals: list[Tensor] = []
        for k, lateral in enumerate(self.laterals):
            laterals.append(lateral(maps[k]))
        fourth = laterals[2] + resize(top, laterals[2].shape[2], laterals[2].shape[3])
        third = laterals[1] + resize(fourth, laterals[1].shape[2], laterals[1].shape[3])
        second = laterals[0] + resize(third, laterals[0].shape[2], laterals[0].shape[3])
        return [second, third, fourth, top]
