"""What an auxiliary head gives to the detector.

Letters: N images, C channels, A candidates, F feature rows, K classes, Hl and Wl size of level l.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from detectron2.structures import Instances
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2dense.modeling.detr.federated import FederatedClasses

if TYPE_CHECKING:
    from .heads.objects import Objects

__all__ = ["AuxiliaryHead", "Candidates", "recompute"]


class Candidates(NamedTuple):
    """Places that a head has assigned to objects or to the background; queries are made of them.

    Attributes:
        boxes: ``(N, A, 4)``, xyxy in pixels: anchors, proposals, or boxes around points; detached.
        labels: ``(N, A)``, the class of the object, K for the background.
        targets: ``(N, A, 4)``, xyxy in pixels, the object's box; any box for the background.
        usable: ``(N, A)``, False for rows that only fill up.
        features: ``(N, F, C)``, what the head saw at the candidates, not detached.
        rows: ``(A,)``, each candidate's row of ``features``; None: row by row (F = A).
    """

    boxes: Tensor
    labels: Tensor
    targets: Tensor
    usable: Tensor
    features: Tensor
    rows: Tensor | None = None


def recompute(module: nn.Module, method: str, enable: bool = True) -> None:
    """Let ``module`` run a method a second time in backward instead of keeping its activations."""
    own = getattr(type(module), method).__get__(module)
    setattr(module, method, partial(checkpoint, own, use_reentrant=False) if enable else own)


class AuxiliaryHead(nn.Module):
    """A detector's head on the maps of the multi-scale adapter, trained beside the decoder.

    Attributes:
        strides: of the maps that it takes, in pixels.
        num_classes: K.
        federated: chooses the classes that count in the classification loss; None: all.
    """

    strides: tuple[int, ...]
    num_classes: int
    federated: FederatedClasses | None

    def __init__(self):
        super().__init__()
        self.federated = None

    def counted(self, objects: Objects) -> Tensor | None:
        """Return which classes count in a batch with these objects, ``(K,)``; None: all."""
        if self.federated is None:
            return None
        classes = objects.classes.masked_fill(~objects.there, self.num_classes)
        occur = objects.there.new_zeros(self.num_classes + 1)
        return self.federated(occur.scatter(0, classes.flatten(), True)[:-1])

    def predict(self, *inputs):
        """Return raw outputs; what takes the memory in training."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let :meth:`predict` be computed a second time in backward, for less memory."""
        recompute(self, "predict", enable)

    def losses(
        self, maps: Sequence[Tensor], instances: Sequence[Instances]
    ) -> tuple[dict[str, Tensor], Candidates]:
        """Return the losses under names without a suffix, with the head's own weights but not yet
        the detector's weight of auxiliary heads, and the candidates.

        Args:
            maps: ``(N, C, Hl, Wl)`` per level, finest first
            instances: with ``gt_boxes``, ``gt_classes`` and the image's size without padding
        """
        raise NotImplementedError

    def detect(
        self, maps: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Return this head's own detections per image, best first, in pixels of the input.

        Args:
            maps: ``(N, C, Hl, Wl)`` per level, finest first
            image_sizes: height and width without padding
        """
        raise NotImplementedError
