"""Deformable DETR: detection as a set of queries, matched one to one.

Letters: N images, C channels, Q queries, K classes, D decoder layers, H and W size of the batch, Hl
and Wl size of level l.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from d2dense.errors import UserError

from . import inputs, parts
from .criterion import DETRCriterion, mean_over_processes
from .decoder import DeformableDecoder
from .denoising import ContrastiveDenoising
from .encoder import DeformableEncoder
from .heads import PredictionHeads
from .memory import Memory
from .one_to_many import OneToManyQueries
from .proposals import TwoStageQueries
from .queries import Queries, join
from .selection import Selection
from .targets import Targets, build_targets, image_size_tensor

__all__ = ["DeformableDETR"]


@META_ARCH_REGISTRY.register()
class DeformableDETR(nn.Module):
    """Backbone, neck, encoder, query source, decoder, heads, criterion; perhaps denoising.

    Subclasses that train more than the decoder's queries change :meth:`losses`.

    Args:
        backbone: feature maps by name
        in_features: which of them are used, finest first
        neck: makes the encoder's levels of them; None: they are the levels
        encoder: levels -> :class:`Memory`
        queries: memory -> :class:`Queries`
        decoder: queries and memory -> states and references of each layer
        heads: states and references -> logits and boxes
        criterion: logits, boxes and targets -> losses
        denoising: targets -> noised queries, in training
        one_to_many: proposals -> queries for several copies of each object, in training
        num_classes: K
        max_detections, soft_nms_iou, min_score, by_offset: see :class:`Selection`
        mask_padding: nobody sees the padding of a batch, and boxes are relative to the image; else
            padding is as good as the image, and boxes are relative to both together (Co-DETR's
            models with large-scale jitter)
        square: all batches are filled up to this height and width; 0: to what they need
        pad_value: what images are filled up with, before they are normalised; None: with zeros,
            after
        pixel_mean, pixel_std: per channel, in the order of ``input_format``
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: Sequence[str],
        neck: nn.Module | None,
        encoder: DeformableEncoder,
        queries: nn.Module,
        decoder: DeformableDecoder,
        heads: PredictionHeads,
        criterion: DETRCriterion,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        denoising: ContrastiveDenoising | None = None,
        one_to_many: OneToManyQueries | None = None,
        max_detections: int = 100,
        soft_nms_iou: float | None = None,
        min_score: float = 1e-3,
        by_offset: bool = False,
        mask_padding: bool = True,
        square: int = 0,
        pad_value: float | None = None,
        input_format: str = "BGR",
    ):
        super().__init__()
        self.backbone = backbone
        self.in_features = list(in_features)
        self.neck = neck
        self.encoder = encoder
        self.queries = queries
        self.decoder = decoder
        self.heads = heads
        self.criterion = criterion
        self.denoising = denoising
        if one_to_many is not None and not isinstance(queries, TwoStageQueries):
            raise UserError(
                "one_to_many (MODEL.DETR.ONE_TO_MANY) takes queries of the encoder's proposals, "
                f"these are {type(queries).__name__}; give TwoStageQueries (TWO_STAGE True), or "
                "none of it (ONE_TO_MANY.QUERIES 0)"
            )
        self.one_to_many = one_to_many
        self.num_classes = num_classes
        self.selection = Selection(
            max_detections=max_detections,
            soft_nms_iou=soft_nms_iou,
            min_score=min_score,
            by_offset=by_offset,
        )
        self.mask_padding = mask_padding
        self.square, self.pad_value = square, pad_value
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.DETR
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "in_features": node.IN_FEATURES,
            "neck": parts.neck(node, backbone.output_shape()),
            **parts.transformer(node),
            "criterion": parts.criterion(node, cfg.DATASETS.TRAIN),
            "num_classes": node.NUM_CLASSES,
            "max_detections": node.MAX_DETECTIONS,
            "soft_nms_iou": node.SOFT_NMS.IOU if node.SOFT_NMS.ENABLED else None,
            "min_score": node.SOFT_NMS.MIN_SCORE,
            "by_offset": node.SOFT_NMS.BY_OFFSET,
            "mask_padding": node.MASK_PADDING,
            "square": node.SQUARE,
            "pad_value": node.PAD_VALUE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Return the losses in training, else ``[{"instances": Instances}]`` with the fields
        ``pred_boxes``, ``scores`` and ``pred_classes``, best first, at the size that ``height`` and
        ``width`` of the input say.

        Args:
            batched_inputs: per image ``image``, ``(3, h, w)``, and in training ``instances``
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess(batched_inputs)
        return self.losses(images, [each["instances"] for each in batched_inputs])

    def losses(self, images: ImageList, instances: Sequence[Instances]) -> dict[str, Tensor]:
        """Return all losses of a batch, in training mode or not: scalars, weighted, by name.

        Args:
            images: ``(N, 3, H, W)``, normalised
            instances: per image, with ``gt_boxes``, absolute xyxy, and ``gt_classes``
        """
        memory = self.encode(images)
        return self.main_losses(memory, self.build_targets(images, instances))

    def build_targets(self, images: ImageList, instances: Sequence[Instances]) -> Targets:
        """Return what there is in each image."""
        return build_targets(
            instances,
            self.device,
            image_sizes=self.valid_sizes(images),
            num_classes=self.num_classes,
        )

    def main_losses(self, memory: Memory, targets: Targets) -> dict[str, Tensor]:
        """Return the losses of the queries, of those for copies of objects (``many_loss_cls``,
        ``d0.many_loss_cls``, ...), of noised ones and of the encoder.
        """
        start = queries = self.queries(memory)
        noised = None if self.denoising is None else self.denoising(targets)
        if noised is not None:
            start = noised.join(queries)
        if self.one_to_many is not None:
            start = join([start, self.one_to_many(self.queries, queries.proposals)])
        logits, boxes = self.predict(start, memory)
        count = 0 if noised is None else noised.content.shape[1]
        end = count + queries.content.shape[1]
        encoder, others = None, {}
        if queries.proposals is not None:
            encoder = self.queries.encoder_predictions(queries.proposals)
        if self.one_to_many is not None:
            copies = targets.repeated(self.one_to_many.repeats)
            others["many_"] = logits[:, :, end:], boxes[:, :, end:], copies
        own = logits[:, :, count:end], boxes[:, :, count:end]
        losses = self.criterion(*own, targets, encoder, others)
        for name in losses:
            if self.one_to_many is not None and "many_" in name:
                losses[name] = self.one_to_many.weight * losses[name]
        if noised is not None:
            of_noised = self.criterion.known_losses(
                logits[:, :, :count],
                boxes[:, :, :count],
                labels=noised.labels,
                targets=noised.targets,
                box_weights=noised.box_weights,
                sizes=targets.sizes,
                number=mean_over_processes(noised.number, device=logits.device),
            )
            losses |= {k.replace("loss_", "dn_loss_"): loss for k, loss in of_noised.items()}
        return losses

    def inference(
        self, batched_inputs: list[dict[str, Any]], do_postprocess: bool = True
    ) -> list[dict[str, Instances]] | list[Instances]:
        """Return the detections; without ``do_postprocess`` plain instances at the given size."""
        images = self.preprocess(batched_inputs)
        found = self.detect(images)
        if not do_postprocess:
            return found
        return [
            {
                "instances": detector_postprocess(
                    each, given.get("height", size[0]), given.get("width", size[1])
                )
            }
            for each, given, size in zip(found, batched_inputs, images.image_sizes)
        ]

    def detect(self, images: ImageList) -> list[Instances]:
        """Return the detections of each image, best first, in pixels of the input."""
        logits, boxes = self.decode(self.encode(images), all_layers=False)
        return self.select(logits[-1], boxes[-1], images)

    def preprocess(self, batched_inputs: Sequence[Mapping[str, Any]]) -> ImageList:
        """Return the normalised images, filled up to one size.

        Raises:
            UserError: there is no image, one has other channels or is larger than that size.
        """
        images = [each["image"].to(self.device, non_blocking=True) for each in batched_inputs]
        constraints = dict(self.backbone.padding_constraints)
        if self.square:
            constraints["square_size"] = self.square
        square = constraints.get("square_size", 0)
        if torch.jit.is_tracing():
            images = [inputs.within(each, square) for each in images] if square else images
        else:
            inputs.check_channels(images, len(self.pixel_mean))
            inputs.check_sides(images, square)
        if self.pad_value is None:
            images = [(each - self.pixel_mean) / self.pixel_std for each in images]
        batch = ImageList.from_tensors(
            images,
            self.backbone.size_divisibility,
            pad_value=self.pad_value or 0.0,
            padding_constraints=constraints,
        )
        if self.pad_value is not None:
            batch.tensor = (batch.tensor - self.pixel_mean) / self.pixel_std
        return batch

    def encode(self, images: ImageList) -> Memory:
        """Return the encoded maps of all levels of normalized images ``(N, 3, H, W)``."""
        features = self.backbone(images.tensor)
        maps = [features[name] for name in self.in_features]
        if self.neck is not None:
            maps = self.neck(maps)
        sizes = image_size_tensor(self.valid_sizes(images), images.tensor.device)
        return self.encoder(maps, sizes, (images.tensor.shape[2], images.tensor.shape[3]))

    def valid_sizes(self, images: ImageList) -> Sequence[tuple[int, int]]:
        """Return the heights and widths that boxes are relative to and that are not padding."""
        if self.mask_padding:
            return images.image_sizes
        return [(images.tensor.shape[2], images.tensor.shape[3])] * len(images.image_sizes)

    def decode(self, memory: Memory, *, all_layers: bool = True) -> tuple[Tensor, Tensor]:
        """Return the logits and boxes of :meth:`predict` for the queries that the memory gives."""
        return self.predict(self.queries(memory), memory, all_layers=all_layers)

    def predict(
        self, queries: Queries, memory: Memory, *, all_layers: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return logits ``(D, N, Q, K)`` and boxes ``(D, N, Q, 4)``, cxcywh relative to the image,
        of all decoder layers or of the last one (D = 1).

        Args:
            queries: contents, positions and references ``(N, Q, ...)``
            memory: the encoded maps
        """
        states, references = self.decoder(queries, memory, self.heads.predict_boxes)
        first = 0 if all_layers else -1
        return self.heads(states[first:], references[first:])

    def select(self, logits: Tensor, boxes: Tensor, images: ImageList) -> list[Instances]:
        """Return the detections of each image, boxes in its pixels, best first.

        Args:
            logits: ``(N, Q, K)``
            boxes: ``(N, Q, 4)``, cxcywh relative to the image
        """
        sizes = image_size_tensor(self.valid_sizes(images), boxes.device)
        sizes = sizes.flip(1).repeat(1, 2)[:, None]
        return self.selection(logits, boxes, sizes, images.image_sizes)
