"""Image classification: any network that scores classes, its losses and its mixing of images.

Letters: N images, K classes, M heads (of which evaluation sees the last).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from d2dense.errors import UserError, nearest

__all__ = ["CLASSIFIER_REGISTRY", "ImageClassifier", "timm_classifier"]

CLASSIFIER_REGISTRY = Registry("CLASSIFIER")
CLASSIFIER_REGISTRY.__doc__ = """
Networks of image classifiers: callables that take a yacs config and return a module, which maps
normalised images (N, 3, H, W) to scores (N, K), or in training to a list of such of M heads.
"""


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """A network with its losses, for batches of ``{"image": (3, H, W), "label": int}`` of one size.

    Args:
        network: see :data:`CLASSIFIER_REGISTRY`.
        num_classes: K.
        pixel_mean, pixel_std: of the images' channels, in the order of ``input_format``.
        input_format: channel order of the images; the data's mapper must have the same.
        head_weights: factors on the losses of the M heads; none given: 1 / M each.
        label_smoothing: share of the target that is spread over all classes.
        mixup, cutmix: alpha of the two ways to mix pairs of images and their targets (a batch is
            paired with its reverse, and all pairs are mixed alike); 0 is off.
        mix_prob: how often a batch is mixed.
        mix_switch_prob: where both are on, how often it is CutMix.

    Raises:
        UserError: a probability, smoothing or alpha out of its range.
    """

    @configurable
    def __init__(
        self,
        *,
        network: nn.Module,
        num_classes: int = 1000,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        input_format: str = "RGB",
        head_weights: Sequence[float] = (),
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        mix_switch_prob: float = 0.5,
    ):
        super().__init__()
        for name, value, largest in (
            ("label_smoothing", label_smoothing, 1),
            ("mix_prob", mix_prob, 1),
            ("mix_switch_prob", mix_switch_prob, 1),
            ("mixup", mixup, float("inf")),
            ("cutmix", cutmix, float("inf")),
        ):
            if not 0 <= value <= largest:
                raise UserError(
                    f"MODEL.CLASSIFIER.{name.upper()} / {name} of ImageClassifier is {value}, "
                    f"expected a number from 0 to {largest}"
                )
        self.network = network
        self.num_classes = num_classes
        self.input_format = input_format
        self.head_weights = tuple(head_weights)
        self.mixing: Callable | None = None
        if mixup > 0 or cutmix > 0:
            self.mixing = _mixing(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                prob=mix_prob,
                switch_prob=mix_switch_prob,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )
        self.criterion = _criterion(label_smoothing, soft=self.mixing is not None)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.CLASSIFIER
        return {
            "network": CLASSIFIER_REGISTRY.get(node.NAME)(cfg),
            "num_classes": node.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "head_weights": node.HEAD_WEIGHTS,
            "label_smoothing": node.LABEL_SMOOTHING,
            "mixup": node.MIXUP,
            "cutmix": node.CUTMIX,
            "mix_prob": node.MIX_PROB,
            "mix_switch_prob": node.MIX_SWITCH_PROB,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @torch.jit.unused  # exported files hold the network alone
    def forward(
        self, batched_inputs: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return in training the losses: ``loss_cls`` of a network with one head, else
        ``loss_cls_stage1`` and so on; in evaluation per image ``class_scores`` (K,), probabilities
        of the last head in float32.

        Raises:
            UserError: images of different sizes or without label, an odd batch that is to be mixed,
                or weights for another number of heads.
        """
        images = self._images(batched_inputs)
        if not self.training:
            scores = _heads(self.network(images))[-1]
            return [{"class_scores": each} for each in scores.float().softmax(dim=1)]
        targets = self._labels(batched_inputs)
        if self.mixing is not None:
            images, targets = self._mixed(images, targets)
        return self._losses(_heads(self.network(images)), targets)

    def _images(self, batched_inputs: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the normalised images (N, 3, H, W)."""
        shapes = {tuple(each["image"].shape) for each in batched_inputs}
        if len(shapes) > 1:
            raise UserError(
                f"a classifier's batch holds images of {' and '.join(map(str, sorted(shapes)))}; "
                "let the mapper's last step give all the same size"
            )
        images = torch.stack([each["image"] for each in batched_inputs])
        images = images.to(self.device, non_blocking=True)
        return (images - self.pixel_mean) / self.pixel_std

    def _labels(self, batched_inputs: Sequence[Mapping[str, Any]]) -> Tensor:
        if any("label" not in each for each in batched_inputs):
            raise UserError(
                "an image of the batch has no label; a classifier is trained with INPUT.MAPPER "
                "classification / ClassificationMapper on datasets of the kind image_folder"
            )
        labels = torch.tensor([each["label"] for each in batched_inputs])
        return labels.to(self.device, non_blocking=True)

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images and soft targets (N, K); drawn from numpy's global generator."""
        if len(images) % 2:
            raise UserError(
                f"mixup and CutMix mix pairs, but a batch has {len(images)} images; make "
                "SOLVER.IMS_PER_BATCH / dataloader.train.total_batch_size an even multiple of "
                "processes and accumulation steps, or set MODEL.CLASSIFIER.MIXUP and CUTMIX / "
                "model.mixup and model.cutmix to 0"
            )
        assert self.mixing is not None
        return self.mixing(images, labels)

    def _losses(self, heads: Sequence[Tensor], targets: Tensor) -> dict[str, Tensor]:
        weights = self.head_weights or (1 / len(heads),) * len(heads)
        if len(weights) != len(heads):
            raise UserError(
                f"MODEL.CLASSIFIER.HEAD_WEIGHTS / model.head_weights has {len(weights)} numbers "
                f"for {len(heads)} heads; give one for each, or none for their mean"
            )
        names = ["loss_cls"]
        if len(heads) > 1:
            names = [f"loss_cls_stage{k + 1}" for k in range(len(heads))]
        return {
            name: weight * self.criterion(scores.float(), targets)
            for name, weight, scores in zip(names, weights, heads)
        }


def _heads(scores: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [scores] if isinstance(scores, Tensor) else scores


def _mixing(**options: Any):
    from timm.data import Mixup

    return Mixup(mode="batch", **options)


def _criterion(label_smoothing: float, *, soft: bool) -> nn.Module:
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    if soft:  # smoothed as the targets are mixed
        return SoftTargetCrossEntropy()
    if label_smoothing:
        return LabelSmoothingCrossEntropy(label_smoothing)
    return nn.CrossEntropyLoss()


def _from_timm_keys(cfg: CfgNode) -> dict[str, Any]:
    node = cfg.MODEL.TIMM
    return {
        "name": node.NAME,
        "num_classes": cfg.MODEL.CLASSIFIER.NUM_CLASSES,
        "drop_path_rate": node.DROP_PATH,
        "pretrained": node.PRETRAINED,
        "options": {key.lower(): value for key, value in node.OPTIONS.items()},
    }


@CLASSIFIER_REGISTRY.register()
@configurable(from_config=_from_timm_keys)
def timm_classifier(
    *,
    name: str,
    num_classes: int = 1000,
    drop_path_rate: float = 0.0,
    pretrained: bool = False,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return timm's model ``name`` with a classifier of ``num_classes``.

    Args:
        drop_path_rate: of the last block.
        pretrained: start from timm's weights of this name (downloaded).
        options: further arguments of timm's constructor.

    Raises:
        UserError: an unknown name, or arguments that the model does not have.
    """
    import timm

    if not timm.is_model(name):
        raise UserError(
            f"timm has no model {name!r} (MODEL.TIMM.NAME / name of timm_classifier)"
            f"{nearest(name, timm.list_models())}"
        )
    arguments: dict[str, Any] = {"num_classes": num_classes}
    for key, value in (options or {}).items():  # timm takes no lists of a config
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        arguments[key] = tuple(value) if is_list else value
    if drop_path_rate:
        arguments["drop_path_rate"] = drop_path_rate
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise UserError(f"timm cannot build {name} with {arguments}: {error}") from error
