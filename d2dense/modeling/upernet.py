"""UperNet: semantic segmentation by pyramid pooling and a feature pyramid (arXiv 1807.10221).

Letters: N images, K classes, H and W of the image, Hi and Wi of level i, C width of the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from d2dense.errors import UserError, nearest

__all__ = ["PyramidPooling", "UperNetHead"]


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: str) -> Conv2d:
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=kernel_size // 2,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=nn.ReLU(),
    )
    c2_msra_fill(conv)
    return conv


def _classifier(in_channels: int, num_classes: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


def _resized(x: Tensor, like: Tensor) -> Tensor:
    size = (like.shape[-2], like.shape[-1])
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class PyramidPooling(nn.Module):
    """Means over grids of several sizes, beside the map itself.

    Args:
        in_channels: of the map.
        channels: C, of each mean and of the output.
        scales: sides of the grids.
        norm: after every convolution.
    """

    def __init__(
        self, *, in_channels: int, channels: int, scales: Sequence[int] = (1, 2, 3, 6), norm: str
    ):
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), _conv(in_channels, channels, 1, norm))
            for scale in scales
        )
        self.fuse = _conv(in_channels + len(scales) * channels, channels, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, Hi, Wi)`` to ``(N, C, Hi, Wi)``."""
        parts = [x]
        for pool in self.pools:
            parts.append(_resized(pool(x), x))
        return self.fuse(torch.cat(parts, 1))


@SEM_SEG_HEADS_REGISTRY.register()
class UperNetHead(nn.Module):
    """Pyramid pooling on the coarsest map, top-down sums, and all levels at the finest one's size.

    Args:
        input_shape: of the backbone's maps, by name.
        in_features: the maps to fuse, fine to coarse.
        num_classes: K.
        channels: C.
        pool_scales: see :class:`PyramidPooling`.
        norm: after every convolution.
        dropout: before the classifier, of whole channels.
        auxiliary_feature: a map that gets a small classifier of its own in training; None for none.
        auxiliary_channels: its width.
        loss_weight, auxiliary_loss_weight: factors on the two losses.
        ignore_value: label that counts in no loss.

    Raises:
        UserError: a map that the backbone does not have.
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: Mapping[str, ShapeSpec],
        in_features: Sequence[str],
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        norm: str = "SyncBN",
        dropout: float = 0.1,
        auxiliary_feature: str | None = None,
        auxiliary_channels: int = 256,
        loss_weight: float = 1.0,
        auxiliary_loss_weight: float = 0.4,
        ignore_value: int = 255,
    ):
        super().__init__()
        for name in [*in_features, *([auxiliary_feature] if auxiliary_feature else [])]:
            if name not in input_shape:
                raise UserError(
                    f"UperNetHead takes the map {name!r}, but the backbone has "
                    f"{', '.join(input_shape)}{nearest(name, input_shape)}; change "
                    "MODEL.SEM_SEG_HEAD.IN_FEATURES and AUXILIARY.FEATURE / in_features and "
                    "auxiliary_feature of the head, or the backbone's maps"
                )
        *fine, coarsest = in_features
        self.in_features = list(in_features)
        self.auxiliary_feature = auxiliary_feature
        self.loss_weight = loss_weight
        self.auxiliary_loss_weight = auxiliary_loss_weight
        self.ignore_value = ignore_value
        self.stride = input_shape[in_features[0]].stride

        self.pooling = PyramidPooling(
            in_channels=input_shape[coarsest].channels,
            channels=channels,
            scales=pool_scales,
            norm=norm,
        )
        self.lateral = nn.ModuleList(
            _conv(input_shape[name].channels, channels, 1, norm) for name in fine
        )
        self.output = nn.ModuleList(_conv(channels, channels, 3, norm) for _ in fine)
        self.fuse = _conv(len(in_features) * channels, channels, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(channels, num_classes)
        self.auxiliary = None
        if auxiliary_feature is not None:
            self.auxiliary = nn.Sequential(
                _conv(input_shape[auxiliary_feature].channels, auxiliary_channels, 3, norm),
                nn.Dropout2d(dropout),
                _classifier(auxiliary_channels, num_classes),
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict:
        node = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": input_shape,
            "in_features": list(node.IN_FEATURES),
            "num_classes": node.NUM_CLASSES,
            "channels": node.CONVS_DIM,
            "pool_scales": list(node.POOL_SCALES),
            "norm": node.NORM,
            "dropout": node.DROPOUT,
            "auxiliary_feature": node.AUXILIARY.FEATURE or None,
            "auxiliary_channels": node.AUXILIARY.CHANNELS,
            "loss_weight": node.LOSS_WEIGHT,
            "auxiliary_loss_weight": node.AUXILIARY.LOSS_WEIGHT,
            "ignore_value": node.IGNORE_VALUE,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Detectron2's interface of a segmentation head.

        Args:
            features: the backbone's maps.
            targets: labels ``(N, H, W)``, in training.

        Returns:
            in training None and the losses, else scores ``(N, K, H, W)`` (H, W rounded up to the
            finest map's stride) and no losses.
        """
        scores = self.scores(features)
        if not self.training:
            return self._enlarged(scores, self.stride), {}
        if targets is None:
            raise ValueError("training needs the labels of every pixel")
        losses = {"loss_sem_seg": self.loss_weight * self._loss(scores, targets)}
        if self.auxiliary is not None:
            losses["loss_sem_seg_aux"] = self.auxiliary_loss_weight * self._loss(
                self.auxiliary_scores(features), targets
            )
        return None, losses

    def scores(self, features: dict[str, Tensor]) -> Tensor:
        """Return scores ``(N, K, H0, W0)`` of the finest map's size."""
        maps: list[Tensor] = []
        for i, conv in enumerate(self.lateral):
            maps.append(conv(features[self.in_features[i]]))
        maps.append(self.pooling(features[self.in_features[-1]]))
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + _resized(maps[i], maps[i - 1])
        levels: list[Tensor] = []
        for i, conv in enumerate(self.output):
            levels.append(_resized(conv(maps[i]), maps[0]))
        levels.append(_resized(maps[-1], maps[0]))
        return self.classifier(self.dropout(self.fuse(torch.cat(levels, 1))))

    def auxiliary_scores(self, features: dict[str, Tensor]) -> Tensor:
        """Return the auxiliary classifier's scores ``(N, K, h, w)``, of its map's size."""
        assert self.auxiliary is not None
        assert self.auxiliary_feature is not None
        return self.auxiliary(features[self.auxiliary_feature])

    def _enlarged(self, scores: Tensor, stride: int) -> Tensor:
        return F.interpolate(
            scores, scale_factor=float(stride), mode="bilinear", align_corners=False
        )

    def _loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy over the pixels with a label; 0 where there is none."""
        height, width = targets.shape[-2:]
        scores = F.interpolate(
            scores.float(), size=(height, width), mode="bilinear", align_corners=False
        )
        total = F.cross_entropy(
            scores, targets.long(), ignore_index=self.ignore_value, reduction="sum"
        )
        return total / (targets != self.ignore_value).sum().clamp(min=1)
