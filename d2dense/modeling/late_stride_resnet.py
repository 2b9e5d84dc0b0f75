"""ResNets that halve the size in the last block of a stage instead of the next stage's first.

Letters: N images, C channels, Hi and Wi size of level i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from torch import Tensor, nn

from d2dense.errors import UserError

from .timm_backbone import TimmBackbone

__all__ = ["LateStrideResNet"]

_OUTPUT_STRIDES = (8, 16, 32)


@BACKBONE_REGISTRY.register()
class LateStrideResNet(TimmBackbone):
    """A ResNet of timm with its strides moved: the 3x3 convolution of the last block of stages 1 to
    3 has them, and the map of a stage is taken just before that block.

    The shortcut of such a block takes every second pixel. Parameters have timm's names and shapes,
    so timm's weights fit. The last stage's blocks have dilations. With an output stride of 16 or 8
    the last stages keep their size and are dilated by 2, or by 2 and 4.

    Args:
        name: of a ResNet with bottleneck blocks in timm, such as ``resnet50s`` (deep stem).
        output_stride: of the last map: 32, 16 or 8.
        multi_grid: factors on the dilation of each block of the last stage.
        out_features, drop_path_rate, norm, norm_eps, norm_momentum, size_divisibility, pretrained,
            weights, options: as in :class:`TimmBackbone`.

    Raises:
        UserError: another kind of model, or numbers that do not fit.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str = "resnet50s",
        output_stride: int = 32,
        multi_grid: Sequence[int] = (1, 2, 4),
        out_features: Sequence[str] | None = None,
        drop_path_rate: float = 0.0,
        norm: str = "",
        norm_eps: float | None = None,
        norm_momentum: float | None = None,
        size_divisibility: int | None = None,
        pretrained: bool = False,
        weights: str = "",
        options: Mapping[str, Any] | None = None,
    ):
        if output_stride not in _OUTPUT_STRIDES:
            raise UserError(
                f"output_stride of LateStrideResNet (MODEL.LATE_STRIDE.OUTPUT_STRIDE) is "
                f"{output_stride}, expected 8, 16 or 32"
            )
        super().__init__(
            name=name,
            out_indices=(1, 2, 3, 4),
            out_features=out_features,
            drop_path_rate=drop_path_rate,
            norm=norm,
            norm_eps=norm_eps,
            norm_momentum=norm_momentum,
            size_divisibility=output_stride if size_divisibility is None else size_divisibility,
            pretrained=pretrained,
            weights=weights,
            options=options,
        )
        self.model = _LateStrideNet(self.model, name, output_stride, list(multi_grid))
        for key, shape in self._shapes.items():
            self._shapes[key] = ShapeSpec(
                channels=shape.channels, stride=min(shape.stride, output_stride)
            )

    @classmethod
    def from_config(cls, cfg, input_shape):
        unused = ("out_indices", "out_norm", "same_padding")
        settings = super().from_config(cfg, input_shape)
        return {
            **{key: value for key, value in settings.items() if key not in unused},
            "output_stride": cfg.MODEL.LATE_STRIDE.OUTPUT_STRIDE,
            "multi_grid": list(cfg.MODEL.LATE_STRIDE.MULTI_GRID),
        }


class _LateStrideNet(nn.Module):
    """The parts of a timm ResNet, rearranged."""

    def __init__(self, net: nn.Module, name: str, output_stride: int, multi_grid: list[int]):
        super().__init__()
        parts = dict(net.named_children())
        stages: list[Any] = [parts.get(f"layer{k}") for k in range(1, 5)]
        blocks = [block for stage in stages if stage is not None for block in stage]
        if None in stages or not all(hasattr(block, "conv3") for block in blocks):
            raise UserError(
                f"{name} is no ResNet with bottleneck blocks, which LateStrideResNet takes "
                "(MODEL.TIMM.NAME / name); use resnet50s, or TimmBackbone"
            )
        if len(multi_grid) != len(stages[3]) or min(len(stage) for stage in stages[:3]) < 2:
            raise UserError(
                f"LateStrideResNet: {name} has stages of {[len(stage) for stage in stages]} "
                f"blocks; expected two or more in the first three, and as many in the last as "
                f"there are dilations, {multi_grid} (MODEL.LATE_STRIDE.MULTI_GRID / multi_grid)"
            )
        for child, module in parts.items():
            self.add_module(child, module)
        self._move_strides(stages, output_stride, multi_grid)

    def _move_strides(self, stages: list[nn.Sequential], output_stride: int, grid: list[int]):
        stride, dilation = 4, 1
        for stage in stages:
            is_last = stage is stages[-1]
            for k, block in enumerate(stage):
                _set_stride(block, 1)
                _set_dilation(block, dilation * (grid[k] if is_last else 1))
            if not is_last and stride < output_stride:
                _set_stride(stage[-1], 2)
                stride *= 2
            else:
                dilation *= 2

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        assert not enable, "blocks are recomputed one by one"

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        maps: list[Tensor] = []
        for k, block in enumerate(self.layer1):
            if k == len(self.layer1) - 1:
                maps.append(x)
            x = block(x)
        for k, block in enumerate(self.layer2):
            if k == len(self.layer2) - 1:
                maps.append(x)
            x = block(x)
        for k, block in enumerate(self.layer3):
            if k == len(self.layer3) - 1:
                maps.append(x)
            x = block(x)
        maps.append(self.layer4(x))
        return maps


def _set_stride(block: nn.Module, stride: int) -> None:
    """Set the stride of the 3x3 convolution, and of the shortcut with it."""
    block.conv2.stride = (stride, stride)
    if block.downsample is not None and not isinstance(block.downsample, nn.MaxPool2d):
        if stride != 1:
            raise ValueError("a block with another width keeps the size")
        for part in block.downsample:
            if isinstance(part, nn.Conv2d):
                part.stride = (1, 1)
    elif stride != 1:
        block.downsample = nn.MaxPool2d(1, stride)


def _set_dilation(block: nn.Module, dilation: int) -> None:
    block.conv2.dilation = block.conv2.padding = (dilation, dilation)
