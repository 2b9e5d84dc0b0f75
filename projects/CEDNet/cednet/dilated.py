"""Dilated depth-wise convolution that is as fast as a dense one on the CPU.

Letters: N images, C channels, H and W of the map, D dilation.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from d2dense.layers import is_recorded

__all__ = ["DilatedDepthwiseConv2d"]


class DilatedDepthwiseConv2d(nn.Conv2d):
    """One filter per channel with gaps of D - 1 pixels, keeping the size of the map.

    Every D-th row and column form a map of their own, on which the filter has no gaps. CPU
    libraries are ten times faster at that than at gaps; the results are the same.

    Args:
        channels: C.
        kernel_size: odd.
        dilation: D.
        bias: add a learned number per channel.
    """

    def __init__(self, channels: int, kernel_size: int, *, dilation: int, bias: bool = True):
        super().__init__(
            channels,
            channels,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=channels,
            bias=bias,
        )

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        # an exported trace may run elsewhere, so it holds the plain convolution
        if self.dilation[0] == 1 or input.device.type != "cpu" or is_recorded():
            return self._conv_forward(input, self.weight, self.bias)
        d, half = self.dilation[0], self.kernel_size[0] // 2
        n, c, h, w = input.shape
        x = F.pad(input, (0, (d - w % d) % d, 0, (d - h % d) % d))
        rows, columns = x.shape[2] // d, x.shape[3] // d
        x = x.permute(0, 2, 3, 1).reshape(n, rows, d, columns, d, c)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(n * d * d, rows, columns, c).permute(0, 3, 1, 2)
        x = F.conv2d(x, self.weight, self.bias, padding=half, groups=c)
        x = x.permute(0, 2, 3, 1).reshape(n, d, d, rows, columns, c)
        x = x.permute(0, 3, 1, 4, 2, 5).reshape(n, rows * d, columns * d, c).permute(0, 3, 1, 2)
        return x[:, :, :h, :w]
