"""Image in, plain tensors out: the exportable face of a Detectron2 model.

Letters: C channels, H and W height and width of the given image, N detections, M side of a mask
    (28), K classes.
"""

# No postponed annotations here: TorchScript reads those of ``forward`` as objects.
import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN, SemanticSegmentor
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList
from torch import Tensor, nn

from d2dense.errors import UserError
from d2dense.layers import fold_for_inference
from d2dense.modeling.classification import ImageClassifier
from d2dense.modeling.detr import DeformableDETR
from d2dense.modeling.mask2former import Mask2Former

from .devices import ANCHOR

__all__ = ["Adapter", "Output", "adapt", "frozen_adapter", "largest_side", "register_adapter"]


@dataclass(frozen=True, kw_only=True)
class Output:
    """One tensor that an exported model returns: its name, shape with letters, type and meaning."""

    name: str
    shape: tuple[str | int, ...]
    dtype: str
    meaning: str

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape)}


BOXES = Output(
    name="boxes",
    shape=("N", 4),
    dtype="float32",
    meaning="x0, y0, x1, y1 in pixels of the given image, best score first",
)
SCORES = Output(name="scores", shape=("N",), dtype="float32", meaning="confidence in [0, 1]")
CLASSES = Output(name="classes", shape=("N",), dtype="int64", meaning="index into the class list")
MASKS = Output(
    name="masks",
    shape=("N", "M", "M"),
    dtype="float32",
    meaning="probability that a point belongs to the object, on a grid over its box",
)
CLASS_CONFIDENCE = Output(
    name="scores",
    shape=("N",),
    dtype="float32",
    meaning="confidence in the class, best first; times the mean probability inside the mask, it "
    "is that in the detection",
)
MASK_LOGITS = Output(
    name="mask_logits",
    shape=("N", "H", "W"),
    dtype="float32",
    meaning="above 0, a pixel of the given image belongs to the object",
)
SEM_SEG = Output(
    name="sem_seg",
    shape=("K", "H", "W"),
    dtype="float32",
    meaning="score of each class at each pixel of the given image; the largest one wins",
)
CLASS_SCORES = Output(
    name="scores",
    shape=("K",),
    dtype="float32",
    meaning="probability of each class for the whole image",
)


class Adapter(nn.Module):
    """Wraps a model in evaluation mode: ``forward(image) -> tuple of tensors``.

    The image is ``(C, H, W)``, uint8 or float32 in [0, 255], with the channel order and the size
    that the model was trained for; it may lie on another device than the model.

    Attributes:
        task: ``detection``, ``semantic`` or ``classification``.
        outputs: what the tuple holds, in order.
        instance_fields: fields of ``Instances`` and their types, which scripting needs.
    """

    task: str = "detection"
    outputs: tuple[Output, ...] = ()
    instance_fields: dict[str, type] = {}  # noqa: RUF012 (ClassVar is unknown to TorchScript)

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        some = next(model.parameters())
        self.register_buffer(ANCHOR, some.new_empty(0), persistent=False)


_DETECTION_FIELDS = {"pred_boxes": Boxes, "scores": Tensor, "pred_classes": Tensor}
_PROPOSAL_FIELDS = {"proposal_boxes": Boxes, "objectness_logits": Tensor}


class _BoxAdapter(Adapter):
    """Two-stage detectors without masks."""

    outputs = (BOXES, SCORES, CLASSES)
    instance_fields = {**_PROPOSAL_FIELDS, **_DETECTION_FIELDS}  # noqa: RUF012

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.model.inference([{"image": image.to(torch.float32)}], None, False)[0]
        return found.pred_boxes.tensor, found.scores, found.pred_classes


class _MaskAdapter(Adapter):
    """Two-stage detectors with masks."""

    outputs = (BOXES, SCORES, CLASSES, MASKS)
    instance_fields = {  # noqa: RUF012
        **_PROPOSAL_FIELDS,
        **_DETECTION_FIELDS,
        "pred_masks": Tensor,
    }

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = self.model.inference([{"image": image.to(torch.float32)}], None, False)[0]
        masks = found.pred_masks[:, 0]
        return found.pred_boxes.tensor, found.scores, found.pred_classes, masks


class _DenseAdapter(Adapter):
    """One-stage detectors (RetinaNet, FCOS)."""

    outputs = (BOXES, SCORES, CLASSES)
    instance_fields = _DETECTION_FIELDS

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = self.model.preprocess_image([{"image": image.to(torch.float32)}])
        by_name = self.model.backbone(images.tensor)
        features = [by_name[name] for name in self.model.head_in_features]
        predictions = self.model.head(features)
        found = self.model.forward_inference(images, features, predictions)[0]
        return found.pred_boxes.tensor, found.scores, found.pred_classes


class _QueryAdapter(Adapter):
    """Detection transformers, without the queries that only training has."""

    outputs = (BOXES, SCORES, CLASSES)

    def __init__(self, model: DeformableDETR):
        bare = copy.copy(model)
        bare._modules = {**model._modules, "denoising": None, "one_to_many": None}
        super().__init__(bare)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.model.inference([{"image": image.to(torch.float32)}], False)[0]
        return found.pred_boxes.tensor, found.scores, found.pred_classes


class _MaskQueryAdapter(Adapter):
    """Mask2Former, without its last step: what a mask contains depends on the size it is wanted
    at, see :func:`~d2dense.modeling.mask2former.masked_instances`.
    """

    outputs = (CLASS_CONFIDENCE, CLASSES, MASK_LOGITS)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = self.model.preprocess([{"image": image.to(torch.float32)}])
        logits, masks = self.model.predict(images.tensor)
        size = images.tensor.shape[2:]
        return self.model.select(logits[-1, 0], masks[-1, 0], size, image.shape[1:])


class _SemanticAdapter(Adapter):
    """Semantic segmentation by one pass over the whole image."""

    task = "semantic"
    outputs = (SEM_SEG,)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        # Detectron2's own forward moves the image to a device that tracing would write down.
        normal = (image.to(self.model.pixel_mean) - self.model.pixel_mean) / self.model.pixel_std
        backbone = self.model.backbone
        images = ImageList.from_tensors(
            [normal], backbone.size_divisibility, 0.0, backbone.padding_constraints
        )
        scores = self.model.sem_seg_head(backbone(images.tensor), None)[0]
        assert scores is not None  # TorchScript types it as what training returns too
        return (scores[0, :, : image.shape[1], : image.shape[2]],)


class _ClassAdapter(Adapter):
    """Classifiers of whole images."""

    task = "classification"
    outputs = (CLASS_SCORES,)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        normal = (image.to(self.model.pixel_mean) - self.model.pixel_mean) / self.model.pixel_std
        scores = self.model.network(normal[None])
        assert isinstance(scores, Tensor)  # in training, a network may score several times
        return (scores[0].float().softmax(0),)


def _adapt_rcnn(model: GeneralizedRCNN) -> Adapter:
    if type(model).inference is not GeneralizedRCNN.inference:
        raise UserError(
            f"{type(model).__name__} has its own inference, which export does not know; register "
            "an adapter for it with d2dense.export.register_adapter"
        )
    if model.proposal_generator is None:
        raise UserError("a model that takes proposals from files cannot be exported; use an RPN")
    if getattr(model.roi_heads, "keypoint_on", False):
        raise UserError("keypoints are not exported yet; set MODEL.KEYPOINT_ON False")
    return _MaskAdapter(model) if getattr(model.roi_heads, "mask_on", False) else _BoxAdapter(model)


_ADAPTERS: dict[type, Callable[[Any], Adapter]] = {
    GeneralizedRCNN: _adapt_rcnn,
    DenseDetector: _DenseAdapter,
    DeformableDETR: _QueryAdapter,
    ImageClassifier: _ClassAdapter,
    Mask2Former: _MaskQueryAdapter,
    SemanticSegmentor: _SemanticAdapter,
}


def largest_side(model: nn.Module) -> int | None:
    """Return what side the model fills all images up to; None where there is no limit."""
    constraints = getattr(getattr(model, "backbone", None), "padding_constraints", {})
    return getattr(model, "square", 0) or constraints.get("square_size", 0) or None


def register_adapter(model_class: type, adapter: Callable[[Any], Adapter]) -> None:
    """Let models of ``model_class`` and its subclasses be exported through ``adapter(model)``."""
    _ADAPTERS[model_class] = adapter


def adapt(model: nn.Module) -> Adapter:
    """Return ``model`` behind the adapter of its class; parameters are shared, nothing is copied.

    Raises:
        UserError: no adapter fits.
    """
    for model_class in type(model).__mro__:
        if model_class in _ADAPTERS:
            return _ADAPTERS[model_class](model)
    known = ", ".join(sorted(model_class.__name__ for model_class in _ADAPTERS))
    raise UserError(
        f"{type(model).__name__} cannot be exported: expected a {known}, or a class registered "
        "with d2dense.export.register_adapter"
    )


def frozen_adapter(model: nn.Module) -> Adapter:
    """Return a copy of ``model`` behind its adapter, in evaluation mode, without gradients and
    without what only training needs.

    Raises:
        UserError: no adapter fits.
    """
    adapter = adapt(fold_for_inference(copy.deepcopy(model))).eval()
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    return adapter
