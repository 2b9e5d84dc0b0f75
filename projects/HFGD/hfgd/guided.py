"""The high-level feature guided module (HFGM): axial attention on the upsampled map, and class
kernels that two paths share.

Letters: N images, C channels, K classes, h and w of a map.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .axial_attention import AxialAttention
from .layers import ConvNormReLU, HeadNorm, glorot

__all__ = ["HFGM", "ClassKernels"]


class ClassKernels(nn.Conv2d):
    """The classifier, a 1x1 convolution with bias.

    The fine path reads the same weights as constants: high-level features alone form them, and the
    upsampled ones must come to fit.
    """

    def __init__(self, channels: int, num_classes: int):
        super().__init__(channels, num_classes, 1)
        glorot(self)

    def forward(self, x: Tensor, constant: bool = False) -> Tensor:
        """Return scores ``(N, K, h, w)`` of ``(N, C, h, w)``.

        Args:
            constant: give no gradient to weight and bias.
        """
        weight, bias = self.weight, self.bias
        assert bias is not None  # as TorchScript types it
        if constant:
            weight, bias = weight.detach(), bias.detach()
        return F.conv2d(x, weight, bias)


class HFGM(nn.Module):
    """What turns the upsampled map S into U, to which the class kernels are applied.

    Args:
        channels: C.
        axial_attention: column and row attention and an output convolution; without it U is S, and
            the module consists of the stop-gradients and the shared kernels alone.
        heads, residual: see :class:`~hfgd.axial_attention.AxialAttention`.
        norm: of the output convolution.
    """

    def __init__(
        self,
        *,
        channels: int = 256,
        axial_attention: bool = True,
        heads: int = 4,
        residual: bool = True,
        norm: HeadNorm,
    ):
        super().__init__()
        self.attention: nn.Module = nn.Identity()
        self.output: nn.Module = nn.Identity()
        if axial_attention:
            self.attention = AxialAttention(channels=channels, heads=heads, residual=residual)
            self.output = ConvNormReLU(channels, channels, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, h, w)`` to the same shape."""
        return self.output(self.attention(x))
