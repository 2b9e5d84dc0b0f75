"""CEDNet as a Detectron2 backbone: names of maps, and the levels that detectors need.

Letters: N images, H and W of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from d2dense.errors import UserError, nearest
from d2dense.layers import LayerNorm2d

from .blocks import ConvNormAct
from .config import trunk_from_config
from .trunk import CEDNetTrunk, init_weights

__all__ = ["CEDNet", "FinestLevel", "Pyramid"]

_STRIDES = {"c2": 4, "c3": 8, "c4": 16, "c5": 32} | {f"p{k}": 2**k for k in range(2, 9)}


class FinestLevel(nn.Module):
    """p2 from p3 and from C2, which no stage holds; always with layer norm.

    Args:
        in_channels: of C2.
        out_channels: of p3 and p2.
    """

    def __init__(self, *, in_channels: int, out_channels: int):
        super().__init__()
        self.lateral = ConvNormAct(in_channels, out_channels, 1, norm="LN", activation="none")
        self.norm = LayerNorm2d(out_channels)
        self.conv = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, c2: Tensor, p3: Tensor) -> Tensor:
        """Return p2 ``(N, out_channels, 2 H, 2 W)`` of C2 ``(N, in_channels, 2 H, 2 W)`` and p3
        ``(N, out_channels, H, W)``.
        """
        up = F.interpolate(p3, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.conv(self.norm(up + self.lateral(c2)))


class Pyramid(nn.Module):
    """Levels of one width from C2 .. C5: p3 .. p5 by 1x1 convolutions, coarser ones by strided
    convolutions from the level before, p2 by :class:`FinestLevel`. It fuses nothing else.

    Args:
        in_channels: of C2, C3, C4, C5.
        out_channels: of all levels.
        norm: after every convolution.
        extra_levels: how many coarser levels than p5.
        finest_level: whether there is a p2.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        out_channels: int,
        norm: str,
        extra_levels: int,
        finest_level: bool,
    ):
        super().__init__()
        c2, *others = in_channels
        options: dict[str, Any] = {"norm": norm, "activation": "none"}
        self.lateral = nn.ModuleList(
            ConvNormAct(channels, out_channels, 1, **options) for channels in others
        )
        self.extra = nn.ModuleList(
            ConvNormAct(out_channels, out_channels, 3, stride=2, **options)
            for _ in range(extra_levels)
        )
        self.finest = (
            FinestLevel(in_channels=c2, out_channels=out_channels) if finest_level else None
        )

    def forward(self, c2: Tensor, c3: Tensor, c4: Tensor, c5: Tensor) -> dict[str, Tensor]:
        """Return the levels by name, ``p<k>`` of ``(N, out_channels, H / 2^k, W / 2^k)``, from maps
        ``c<k>`` of ``(N, Ck, H / 2^k, W / 2^k)``.
        """
        p3, p4, p5 = self.lateral[0](c3), self.lateral[1](c4), self.lateral[2](c5)
        levels = {"p3": p3, "p4": p4, "p5": p5}
        if self.finest is not None:
            levels["p2"] = self.finest(c2, p3)
        level, last = 5, p5
        for conv in self.extra:
            level, last = level + 1, conv(last)
            levels["p" + str(level)] = last
        return levels


@BACKBONE_REGISTRY.register()
class CEDNet(Backbone):
    """The trunk with named outputs, ``(N, C, ceil(H / stride), ceil(W / stride))`` for any H, W.

    Args:
        trunk: the network.
        out_features: what to return. ``c2`` .. ``c5``: the trunk's maps as they are, of the last
            stage. ``stage1_c3``, ``stage2_c3``, ...: those of earlier stages, at stride 8.
            ``p2`` .. ``p8``: levels of one width, see :class:`Pyramid`. RetinaNet: p3 .. p7;
            two-stage detectors: p2 .. p6; Deformable DETR: p3 .. p6; Mask2Former: c2 .. c5.
        out_channels: width of the levels p.
        norm: of the levels p; None: the trunk's.
        size_divisibility: to what multiple Detectron2 fills batches up (1 also works).

    Raises:
        UserError: an unknown feature, or none.
    """

    @configurable
    def __init__(
        self,
        *,
        trunk: CEDNetTrunk,
        out_features: Sequence[str] = ("p3", "p4", "p5", "p6", "p7"),
        out_channels: int = 256,
        norm: str | None = None,
        size_divisibility: int = 32,
    ):
        super().__init__()
        strides = _STRIDES | {f"stage{k}_c3": 8 for k in range(1, len(trunk.stages))}
        if not out_features:
            raise UserError(
                f"CEDNet's out_features are empty, expected some of {', '.join(strides)}; change "
                "MODEL.CEDNET.OUT_FEATURES (yaml) or out_features (lazy)"
            )
        for name in out_features:
            if name not in strides:
                raise UserError(
                    f"CEDNet has no feature {name!r}, expected some of {', '.join(strides)}"
                    f"{nearest(name, strides)}; change MODEL.CEDNET.OUT_FEATURES (yaml) or "
                    "out_features (lazy)"
                )
        levels = [int(name[1:]) for name in out_features if name[0] == "p"]
        self.trunk = trunk
        self.pyramid = None
        if levels:
            self.pyramid = Pyramid(
                in_channels=trunk.widths,
                out_channels=out_channels,
                norm=norm or trunk.norm,
                extra_levels=max(max(levels) - 5, 0),
                finest_level=2 in levels,
            )
            self.pyramid.apply(init_weights)
        own = dict(zip(("c2", "c3", "c4", "c5"), trunk.widths))
        self._out_features = list(out_features)
        self._out_feature_strides = {name: strides[name] for name in out_features}
        self._out_feature_channels = {
            name: out_channels if name[0] == "p" else own[name[-2:]] for name in out_features
        }
        self._size_divisibility = size_divisibility

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        node = cfg.MODEL.CEDNET
        trunk = trunk_from_config(node, in_channels=input_shape.channels)
        return {
            "trunk": trunk,
            "out_features": list(node.OUT_FEATURES),
            "out_channels": node.OUT_CHANNELS,
            "size_divisibility": node.SIZE_DIVISIBILITY,
        }

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the features by name.

        Args:
            x: ``(N, 3, H, W)``, normalised.
        """
        height, width = x.shape[-2], x.shape[-1]
        c2, stages = self.trunk(x)
        c3, c4, c5 = stages[-1]
        maps = {"c2": c2, "c3": c3, "c4": c4, "c5": c5}
        for k in range(len(stages) - 1):
            maps["stage" + str(k + 1) + "_c3"] = stages[k][0]
        if self.pyramid is not None:
            maps.update(self.pyramid(c2, c3, c4, c5))
        features: dict[str, Tensor] = {}
        for name in self._out_features:
            stride = self._out_feature_strides[name]
            rows, columns = (height + stride - 1) // stride, (width + stride - 1) // stride
            features[name] = maps[name][:, :, :rows, :columns]
        return features
