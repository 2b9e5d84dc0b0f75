"""Deformable DETR: detection as a set of queries, matched one to one.

Letters: N images, C channels, Q queries, K classes, D decoder layers, H and W size of the batch, Hl
and Wl size of level l.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torchvision.ops import box_convert

from d2dense.errors import UserError

from .channel_mapper import ChannelMapper
from .criterion import DETRCriterion
from .decoder import DeformableDecoder
from .encoder import DeformableEncoder
from .heads import PredictionHeads
from .matcher import HungarianMatcher
from .memory import Memory
from .queries import LearnedQueries
from .targets import build_targets, image_size_tensor

__all__ = ["NECKS", "DeformableDETR"]

NECKS = ("none", "channel_mapper")


@META_ARCH_REGISTRY.register()
class DeformableDETR(nn.Module):
    """Backbone, neck, encoder, query source, decoder, heads, criterion.

    Args:
        backbone: feature maps by name
        in_features: which of them are used, finest first
        neck: makes the encoder's levels of them; None: they are the levels
        encoder: levels -> :class:`Memory`
        queries: memory -> :class:`Queries`
        decoder: queries and memory -> states and references of each layer
        heads: states and references -> logits and boxes
        criterion: logits, boxes and targets -> losses
        max_detections: per image, the pairs of query and class with the highest scores
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
        max_detections: int = 100,
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
        self.num_classes = num_classes
        self.max_detections = max_detections
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.DETR
        backbone = build_backbone(cfg)
        width = {"channels": node.CHANNELS}
        attention = {"levels": node.LEVELS, "heads": node.HEADS, "points": node.POINTS, **width}
        layers = {**attention, "feedforward": node.FEEDFORWARD, "dropout": node.DROPOUT}
        losses = {
            "class_weight": node.CLASS_WEIGHT,
            "l1_weight": node.L1_WEIGHT,
            "giou_weight": node.GIOU_WEIGHT,
            "alpha": node.FOCAL_ALPHA,
            "gamma": node.FOCAL_GAMMA,
        }
        return {
            "backbone": backbone,
            "in_features": node.IN_FEATURES,
            "neck": _neck(node, backbone.output_shape()),
            "encoder": DeformableEncoder(
                **layers,
                layers=node.ENCODER_LAYERS,
                temperature=node.POSITION_TEMPERATURE,
                offset=node.POSITION_OFFSET,
            ),
            "queries": LearnedQueries(num_queries=node.NUM_QUERIES, **width),
            "decoder": DeformableDecoder(
                **layers, layers=node.DECODER_LAYERS, box_refinement=node.BOX_REFINEMENT
            ),
            "heads": PredictionHeads(
                **width,
                num_classes=node.NUM_CLASSES,
                layers=node.DECODER_LAYERS,
                shared=not node.BOX_REFINEMENT,
            ),
            "criterion": DETRCriterion(
                matcher=HungarianMatcher(**losses), num_classes=node.NUM_CLASSES, **losses
            ),
            "num_classes": node.NUM_CLASSES,
            "max_detections": node.MAX_DETECTIONS,
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
        instances = [each["instances"] for each in batched_inputs]
        memory = self.encode(images)
        logits, boxes = self.decode(memory)
        return self.criterion(logits, boxes, build_targets(instances, self.device))

    def inference(
        self, batched_inputs: list[dict[str, Any]], do_postprocess: bool = True
    ) -> list[dict[str, Instances]] | list[Instances]:
        """Return the detections; without ``do_postprocess`` plain instances at the given size."""
        images = self.preprocess(batched_inputs)
        logits, boxes = self.decode(self.encode(images), all_layers=False)
        found = self.select(logits[-1], boxes[-1], images.image_sizes)
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

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Return the normalised images, filled up with zeros to one size."""
        images = [each["image"].to(self.device) for each in batched_inputs]
        images = [(each - self.pixel_mean) / self.pixel_std for each in images]
        return ImageList.from_tensors(
            images,
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )

    def encode(self, images: ImageList) -> Memory:
        """Return the encoded maps of all levels."""
        features = self.backbone(images.tensor)
        maps = [features[name] for name in self.in_features]
        if self.neck is not None:
            maps = self.neck(maps)
        sizes = image_size_tensor(images.image_sizes, images.tensor.device)
        return self.encoder(maps, sizes, (images.tensor.shape[2], images.tensor.shape[3]))

    def decode(self, memory: Memory, *, all_layers: bool = True) -> tuple[Tensor, Tensor]:
        """Return logits ``(D, N, Q, K)`` and boxes ``(D, N, Q, 4)``, cxcywh relative to the image,
        of all decoder layers or of the last one (D = 1).
        """
        states, references = self.decoder(self.queries(memory), memory, self.heads.predict_boxes)
        first = 0 if all_layers else -1
        return self.heads(states[first:], references[first:])

    def select(
        self, logits: Tensor, boxes: Tensor, image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Return the best pairs of query and class of each image; there is no suppression.

        Args:
            logits: ``(N, Q, K)``
            boxes: ``(N, Q, 4)``, cxcywh relative to the image
            image_sizes: height and width without padding
        """
        scores = logits.float().sigmoid().flatten(1)
        scores, index = scores.topk(min(self.max_detections, scores.shape[1]), dim=1)
        query = (index // self.num_classes)[..., None].expand(-1, -1, 4)
        sizes = image_size_tensor(image_sizes, boxes.device).flip(1).repeat(1, 2)[:, None]
        boxes = box_convert(boxes, "cxcywh", "xyxy").gather(1, query) * sizes
        boxes = torch.minimum(boxes.clamp(min=0), sizes)
        results = []
        for i, size in enumerate(image_sizes):
            found = Instances(size)
            found.pred_boxes = Boxes(boxes[i])
            found.scores = scores[i]
            found.pred_classes = index[i] % self.num_classes
            results.append(found)
        return results


def _neck(node: CfgNode, shapes: dict[str, ShapeSpec]) -> nn.Module | None:
    if node.NECK not in NECKS:
        raise UserError(f"MODEL.DETR.NECK is {node.NECK!r}; expected one of {', '.join(NECKS)}")
    if node.NECK == "none":
        return None
    return ChannelMapper(
        input_shape=shapes,
        in_features=node.IN_FEATURES,
        out_channels=node.CHANNELS,
        levels=node.LEVELS,
    )
