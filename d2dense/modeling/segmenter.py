"""Semantic segmentation of images of any size, by any backbone and any of Detectron2's heads.

Letters: N images, K classes, H and W of an image, H0 and W0 of the image before the data pipeline
resized it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, SemanticSegmentor
from detectron2.modeling.backbone import Backbone
from detectron2.structures import ImageList
from torch import Tensor, nn

from d2dense.errors import UserError

from .semantic_inference import SemanticInference

__all__ = ["Segmenter", "inference_of"]


@META_ARCH_REGISTRY.register()
class Segmenter(SemanticSegmentor):
    """Detectron2's segmentor, with windows and several scales in evaluation, training images filled
    up to a fixed size, and results that do not depend on the other images of a batch.

    Images are normalised and then filled up with zeros at the right and the bottom; labels with the
    head's ``ignore_value``.

    Args:
        backbone: of Detectron2's interface.
        sem_seg_head: of Detectron2's interface: in training ``(None, losses)``, else scores
            ``(N, K, >= H, >= W)`` and nothing.
        pixel_mean, pixel_std: of each channel.
        inference: how evaluation goes over an image; None: at once.
        pad_to: (height, width) that training images are at least filled up to (``inference`` says
            it for evaluation).
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        inference: SemanticInference | None = None,
        pad_to: Sequence[int] | None = None,
    ):
        super().__init__(
            backbone=backbone,
            sem_seg_head=sem_seg_head,
            pixel_mean=list(pixel_mean),
            pixel_std=list(pixel_std),
        )
        self.inference = SemanticInference() if inference is None else inference
        self.pad_to = _size("MODEL.SEM_SEG_HEAD.PAD_TO / model.pad_to", pad_to)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            **super().from_config(cfg),
            "inference": inference_of(cfg),
            "pad_to": list(cfg.MODEL.SEM_SEG_HEAD.PAD_TO) or None,
        }

    @torch.jit.unused
    def forward(
        self, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Detectron2's interface.

        Args:
            batched_inputs: dicts with ``image`` (3, H, W); in training ``sem_seg`` (H, W), else
                ``height`` and ``width`` (H0, W0; by default H, W).

        Returns:
            in training the losses, else a dict per image with ``sem_seg``, scores (K, H0, W0) of
            which the largest wins.

        Raises:
            UserError: training without labels, or with labels of another size than the image; or,
                where labels are on the CPU and the head says its ``num_classes``, of no class.
        """
        images = [self._normalised(each["image"]) for each in batched_inputs]
        if not self.training:
            return self._predict(images, batched_inputs)
        if any("sem_seg" not in each for each in batched_inputs):
            raise UserError(
                "training a segmenter needs label maps; use a dataset with them and "
                "INPUT.MAPPER semantic / common.semantic_loader"
            )
        for each in batched_inputs:
            _check_labels(each, self.sem_seg_head)
        labels = [each["sem_seg"].to(self.device) for each in batched_inputs]
        features = self.backbone(self._batch(images, 0.0, self.pad_to))
        targets = self._batch(labels, self.sem_seg_head.ignore_value, self.pad_to)
        return self.sem_seg_head(features, targets)[1]

    def _normalised(self, image: Tensor) -> Tensor:
        return (image.to(self.device) - self.pixel_mean) / self.pixel_std

    def _batch(self, maps: list[Tensor], value: float, least: Sequence[int] = (0, 0)) -> Tensor:
        """Return (..., H, W) of several sizes as one batch of one size, at least ``least``."""
        height, width = least
        filled = [
            F.pad(
                each,
                (0, max(0, width - each.shape[-1]), 0, max(0, height - each.shape[-2])),
                value=value,
            )
            for each in maps
        ]
        return ImageList.from_tensors(
            filled, self.backbone.size_divisibility, value, self.backbone.padding_constraints
        ).tensor

    def _predict(
        self, images: list[Tensor], inputs: list[dict[str, Any]]
    ) -> list[dict[str, Tensor]]:
        """Predict images of equal sizes together."""
        groups: dict[tuple, list[int]] = defaultdict(list)
        for index, (image, each) in enumerate(zip(images, inputs)):
            height, width = image.shape[1:]
            size = int(each.get("height", height)), int(each.get("width", width))
            groups[tuple(image.shape), size].append(index)
        fill = None
        if self.inference.pad_value is not None:
            fill = (self.inference.pad_value - self.pixel_mean) / self.pixel_std
        results: list[dict[str, Tensor]] = [{} for _ in images]
        for (_, size), members in groups.items():
            stacked = torch.stack([images[index] for index in members])
            scores = self.inference(self._scores, stacked, size, fill)
            for index, each in zip(members, scores):
                results[index] = {"sem_seg": each}
        return results

    def _scores(self, images: Tensor) -> Tensor:
        """Return scores (N, K, H, W) of normalised images (N, 3, H, W)."""
        batch = self._batch(list(images), 0.0)
        scores, _ = self.sem_seg_head(self.backbone(batch), None)
        return scores[:, :, : images.shape[2], : images.shape[3]]


def inference_of(cfg: CfgNode) -> SemanticInference:
    """Return how ``TEST.SEM_SEG`` says that evaluation goes over an image."""
    test = cfg.TEST.SEM_SEG
    return SemanticInference(
        window=list(test.WINDOW) or None,
        stride=list(test.STRIDE) or None,
        max_windows=test.MAX_WINDOWS,
        multi_scale=test.MULTI_SCALE,
        ratios=test.RATIOS,
        flip=test.FLIP,
        average=test.AVERAGE,
        keep_odd=test.KEEP_ODD,
        align_corners=test.ALIGN_CORNERS,
        pad_to=list(test.PAD_TO) or None,
        pad_step=test.PAD_STEP,
        pad_value=test.PAD_VALUE,
    )


def _size(key: str, value: Sequence[int] | None) -> list[int]:
    size = [0, 0] if value is None else [int(side) for side in value]
    if len(size) != 2:
        raise UserError(f"{key} = {size}, expected height and width in pixels")
    return size


def _check_labels(sample: dict[str, Any], head: nn.Module) -> None:
    """Raise a ``UserError`` for labels that no loss can use; on a GPU they would be read out of
    bounds, which ends the process without a name.
    """
    labels, size = sample["sem_seg"], tuple(sample["image"].shape[-2:])
    name = sample.get("file_name", "an image")
    if tuple(labels.shape) != size:
        raise UserError(
            f"the label map of {name} is {tuple(labels.shape)}, but the image is {size} (height, "
            "width); give both the same augmentations"
        )
    count, ignored = getattr(head, "num_classes", None), head.ignore_value
    if count is None or labels.device.type != "cpu":
        return
    wrong = labels[((labels < 0) | (labels >= count)) & (labels != ignored)]
    if len(wrong):
        raise UserError(
            f"the label map of {name} has class {int(wrong[0])}, but the head has the classes 0 to "
            f"{count - 1} and ignores {ignored}; correct the labels, "
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES / model.sem_seg_head.num_classes, or the ignored value"
        )
