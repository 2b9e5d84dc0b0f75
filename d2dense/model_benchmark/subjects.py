"""What can be measured: models of several libraries behind one interface.

Letters: N images, H and W their height and width.
"""

from __future__ import annotations

import copy
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from d2dense import config, export
from d2dense.errors import UserError
from d2dense.export.torchscript import quiet
from d2dense.layers import fold_for_inference, replace_sync_norms
from d2dense.modeling import SemanticInference

from .fixed_work import fix_work

__all__ = ["BackboneSubject", "Detectron2Subject", "Group", "Subject", "TorchvisionSubject"]

Size = tuple[int, int]
_OBJECTS = 7  # in an image of COCO
_CLASSES = 10  # that the objects have; every head knows more


@dataclass(frozen=True, kw_only=True)
class Subject(ABC):
    """A model that is measured, by itself or as a peer of others.

    Attributes:
        name: in the tables; of ours the name in the model zoo.
        library: whose code it is.
        peer: the model that this one's ratios are to; None for peers.
        min_training_batch: images that a training step needs.
    """

    name: str
    library: str
    peer: str | None = None
    min_training_batch: int = 1

    @abstractmethod
    def create(self, size: Size, device: str) -> nn.Module:
        """Return the model with fresh weights, for images of a size."""

    @abstractmethod
    def inputs(self, batch: int, size: Size, device: str) -> tuple[Any, Any]:
        """Return noise as the model takes it, and targets for :meth:`loss`."""

    @abstractmethod
    def loss(self, model: nn.Module, given: Any, targets: Any) -> Tensor:
        """Return the sum of the losses in training."""

    def build(self, size: Size, device: str, *, training: bool) -> nn.Module:
        """Return the model, the same one each time, with work that does not depend on chance."""
        torch.manual_seed(0)
        model = self.create(size, device).to(device, memory_format=torch.channels_last)
        fix_work(model)
        if device == "cpu":
            replace_sync_norms(model)
        return model.train() if training else fold_for_inference(model.eval())

    def exported(self, model: nn.Module, given: Any, format: str) -> Callable[[], Any]:
        """Return a call of the exported model on one image; ``model`` stays as it is."""
        if format != "torchscript":
            raise UserError(f"of {self.library}'s models, only TorchScript is measured")
        module = self.to_torchscript(model, given)
        return lambda: module(given)

    def to_torchscript(self, model: nn.Module, given: Any) -> Callable:
        """Return the model as its library exports it."""
        return torch.jit.trace(model, (given,), strict=False, check_trace=False)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Models that are compared with each other, in one process.

    Attributes:
        share: of the time, next to other groups'.
    """

    name: str
    subjects: tuple[Subject, ...]
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Detectron2Subject(Subject):
    """A model of Detectron2's interface: one of ours by its name in the zoo, or a peer.

    Attributes:
        builder: builds a peer; None: ours.
    """

    library: str = "d2dense"
    builder: Callable[[str], nn.Module] | None = None

    def create(self, size: Size, device: str) -> nn.Module:
        if self.builder is not None:
            return self.builder(device)
        model = config.build_model(config.load(self.name), device=device)
        if isinstance(getattr(model, "inference", None), SemanticInference):
            model.inference = SemanticInference()  # one pass over the image
            model.pad_to = [0, 0]
        return model

    def inputs(self, batch: int, size: Size, device: str) -> tuple[list[dict[str, Any]], None]:
        height, width = size
        images = []
        for image, boxes, classes, masks in _noise(batch, size, device):
            fields = {"gt_boxes": Boxes(boxes), "gt_classes": classes, "gt_masks": BitMasks(masks)}
            images.append(
                {
                    "image": image,
                    "height": height,
                    "width": width,
                    "instances": Instances(size, **fields),
                    "sem_seg": _label_map(boxes, classes, size),
                }
            )
        return images, None

    def loss(self, model: nn.Module, given: Any, targets: None) -> Tensor:
        return sum(model(given).values())

    def exported(self, model: nn.Module, given: Any, format: str) -> Callable[[], Any]:
        image = given[0]["image"]
        device, kind = image.device, export.FORMATS[format]
        if str(image.dtype).removeprefix("torch.") not in kind.dtypes:
            image = image.float()
        with tempfile.TemporaryDirectory(prefix="d2dense_benchmark_") as folder:
            path = Path(folder, kind.file_name)
            with quiet():
                kind.save(copy.deepcopy(model).cpu(), image.cpu(), path, method="trace")
            run = kind.open(path, device)
        return lambda: run(image)


@dataclass(frozen=True, kw_only=True)
class TorchvisionSubject(Subject):
    """A detector or segmenter of torchvision.

    Attributes:
        builder: takes the size of the images.
        semantic: whether it is a segmenter.
    """

    library: str = "torchvision"
    builder: Callable[[Size], nn.Module]
    semantic: bool = False

    def create(self, size: Size, device: str) -> nn.Module:
        return self.builder(size)

    def inputs(self, batch: int, size: Size, device: str) -> tuple[Any, Any]:
        images, targets = [], []
        for image, boxes, classes, masks in _noise(batch, size, device):
            images.append(image.float() / 255)
            if self.semantic:
                targets.append(_label_map(boxes, classes, size))
            else:  # class 0 is the background
                found = {"boxes": boxes, "labels": classes + 1, "masks": masks.to(torch.uint8)}
                targets.append(found)
        if self.semantic:
            stacked = torch.stack(images).contiguous(memory_format=torch.channels_last)
            return stacked, torch.stack(targets)
        return images, targets

    def loss(self, model: nn.Module, given: Any, targets: Any) -> Tensor:
        if self.semantic:
            return F.cross_entropy(model(given)["out"].float(), targets)
        return sum(model(given, targets).values())

    def to_torchscript(self, model: nn.Module, given: Any) -> Callable:
        return super().to_torchscript(model, given) if self.semantic else torch.jit.script(model)


@dataclass(frozen=True, kw_only=True)
class BackboneSubject(Subject):
    """A backbone by itself: images to feature maps.

    Attributes:
        builder: takes the size of the images.
    """

    library: str = "d2dense"
    builder: Callable[[Size], nn.Module]

    def create(self, size: Size, device: str) -> nn.Module:
        return self.builder(size)

    def inputs(self, batch: int, size: Size, device: str) -> tuple[Tensor, None]:
        draw = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, *size, generator=draw)
        return images.to(device, memory_format=torch.channels_last), None

    def loss(self, model: nn.Module, given: Tensor, targets: None) -> Tensor:
        maps = model(given)
        maps = maps.values() if isinstance(maps, dict) else maps
        return sum(each.float().square().mean() for each in maps)


def _noise(batch: int, size: Size, device: str) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return per image its pixels (3, H, W) uint8, boxes (7, 4), classes (7,) and masks
    (7, H, W).
    """
    height, width = size
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(batch):
        image = torch.randint(0, 256, (3, *size), generator=draw, dtype=torch.uint8)
        corners = torch.rand(_OBJECTS, 2, 2, generator=draw) * torch.tensor([width, height])
        low, high = corners.sort(dim=1).values.unbind(dim=1)
        high = torch.minimum(high + 8, torch.tensor([width, height]))
        boxes = torch.cat([(high - 16).clamp(min=0).minimum(low), high], dim=1)
        classes = torch.randint(0, _CLASSES, (_OBJECTS,), generator=draw)
        found.append(tuple(t.to(device) for t in (image, boxes, classes, _filled(boxes, size))))
    return found


def _filled(boxes: Tensor, size: Size) -> Tensor:
    """Return masks (R, H, W) of what lies within boxes (R, 4)."""
    x0, y0, x1, y1 = boxes[:, :, None, None].unbind(dim=1)
    y = torch.arange(size[0], device=boxes.device)[:, None]
    x = torch.arange(size[1], device=boxes.device)
    return (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)


def _label_map(boxes: Tensor, classes: Tensor, size: Size) -> Tensor:
    """Return a label map (H, W) of objects before class 0."""
    labels = torch.zeros(size, dtype=torch.int64, device=boxes.device)
    for mask, label in zip(_filled(boxes, size), classes):
        labels[mask] = label
    return labels
