"""Co-DETR: a detection transformer whose encoder also feeds auxiliary heads with one-to-many
assignment, and whose decoder also gets what these heads have assigned as queries.

Letters: N images, K auxiliary heads, D decoder layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from d2dense.errors import UserError
from d2dense.export import adapt, register_adapter
from d2dense.modeling.detr import DeformableDETR, Memory, Targets
from d2dense.modeling.detr.queries import join

from . import parts
from .auxiliary import AuxiliaryHead, Candidates
from .heads.dense import average_factor
from .positive_queries import PositiveQueries

__all__ = ["CoDETR"]

_IN_TRAINING = ("adapter", "auxiliary_heads", "positive_queries", "denoising", "one_to_many")


@META_ARCH_REGISTRY.register()
class CoDETR(DeformableDETR):
    """The base detector, and in training K auxiliary heads; without any it is the base detector.

    The loss is main + ``query_weight`` * sum of the queries' losses + ``head_weight`` * D * sum of
    the heads' losses (equation 6). Losses of head h are called ``loss_cls{h}``, ``loss_bbox{h}``,
    ..., those of its queries ``loss_cls_aux{h}``, ``d0.loss_cls_aux{h}``, ...; what a region
    proposal network adds has no number unless there are several. Inference and its cost are the
    base detector's.

    Args:
        adapter: memory -> maps of the auxiliary heads
        auxiliary_heads: in the order of their numbers
        positive_queries: candidates of the heads -> queries; None: the heads are trained alone
        query_weight, head_weight: lambda 1 and lambda 2 of the paper
        federated_heads: where only some classes count in the losses of queries (``federated`` of
            the criterion), the same goes for those of the heads, each with a draw of its own
        train_heads: otherwise the heads only assign: their parameters stay what they are
        one_pass: the queries of all heads go through the decoder together, behind a mask that
            isolates heads; otherwise one after the other, with the same result
        evaluate_branch: number of the auxiliary head whose detections inference returns (Table 11);
            None: the decoder's
        detector: arguments of :class:`DeformableDETR`
    """

    @configurable
    def __init__(
        self,
        *,
        adapter: nn.Module | None = None,
        auxiliary_heads: Sequence[AuxiliaryHead] = (),
        positive_queries: PositiveQueries | None = None,
        query_weight: float = 1.0,
        head_weight: float = 2.0,
        federated_heads: bool = True,
        train_heads: bool = True,
        one_pass: bool = True,
        evaluate_branch: int | None = None,
        **detector: Any,
    ):
        super().__init__(**detector)
        heads = nn.ModuleList(auxiliary_heads)
        _check(len(heads), adapter, positive_queries, train_heads, evaluate_branch)
        self.adapter: Any = adapter if len(heads) else None
        self.auxiliary_heads = heads
        self.positive_queries: Any = positive_queries if len(heads) else None
        self.query_weight, self.head_weight = query_weight, head_weight
        self.train_heads = train_heads
        self.one_pass = one_pass
        self.evaluate_branch = evaluate_branch
        if federated_heads:
            for head in heads:
                head.federated = self.criterion.federated
        if not train_heads:
            heads.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        base = super().from_config(cfg)
        shapes = base["backbone"].output_shape()
        strides = [shapes[name].stride for name in base["in_features"]]
        return {**base, **parts.collaboration(cfg, strides)}

    def losses(self, images: ImageList, instances: Sequence[Instances]) -> dict[str, Tensor]:
        """As in :class:`DeformableDETR`, with those of the collaborative part."""
        memory = self.encode(images)
        targets = self.build_targets(images, instances)
        losses = self.main_losses(memory, targets)
        if len(self.auxiliary_heads):
            framed = _framed(instances, self.valid_sizes(images))
            losses |= self.collaborative_losses(memory, framed, targets)
        return losses

    def collaborative_losses(
        self, memory: Memory, instances: Sequence[Instances], targets: Targets
    ) -> dict[str, Tensor]:
        """Return the losses of the auxiliary heads and of their queries; names as in the class.

        Args:
            instances: per image, with ``gt_boxes``, absolute xyxy, and ``gt_classes``, of the size
                that boxes are relative to
            targets: the same for the decoder
        """
        maps = self.adapter(memory)
        found = [head.losses(maps, instances) for head in self.auxiliary_heads]
        losses = self._head_losses([each for each, _ in found]) if self.train_heads else {}
        if self.positive_queries is not None:
            losses |= self.query_losses([each for _, each in found], memory, targets)
        if not self.train_heads:  # the queries may not reach all of the adapter
            losses["loss_cls_aux0"] = losses["loss_cls_aux0"] + 0.0 * sum(m.mean() for m in maps)
        return losses

    def _head_losses(self, found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        weight = self.head_weight * len(self.decoder.layers)
        names = [name for losses in found for name in losses]
        result = {}
        for head, losses in enumerate(found):
            for name, loss in losses.items():
                alone = name.startswith("loss_rpn") and names.count(name) == 1
                result[name if alone else f"{name}{head}"] = weight * loss
        return result

    def query_losses(
        self, candidates: Sequence[Candidates], memory: Memory, targets: Targets
    ) -> dict[str, Tensor]:
        """Return the losses of the customised positive queries, ``..._aux{h}`` of head h.

        Args:
            candidates: of each head
        """
        selected = self.positive_queries.select(
            candidates, targets.sizes, num_classes=self.num_classes
        )
        groups = self.positive_queries(selected)
        numbers = average_factor(torch.stack([each.positive.sum() for each in selected]))
        if self.one_pass and len(groups) > 1:
            lengths = [each.content.shape[1] for each in groups]
            logits, boxes = self.predict(join(groups), memory)
            predictions: Iterable = zip(logits.split(lengths, dim=2), boxes.split(lengths, dim=2))
        else:
            predictions = (self.predict(each, memory) for each in groups)
        losses = {}
        for head, (each, prediction) in enumerate(zip(selected, predictions)):
            of_head = self.criterion.known_losses(
                *prediction,
                labels=each.labels,
                targets=each.targets,
                box_weights=each.positive.float(),
                label_weights=None if each.full else each.there.float(),
                sizes=targets.sizes,
                number=numbers[head],
            )
            for name, loss in of_head.items():
                losses[f"{name}_aux{head}"] = self.query_weight * loss
        return losses

    def detect(self, images: ImageList) -> list[Instances]:
        """Return the detections of the decoder, or of the head that is to be evaluated."""
        if self.evaluate_branch is None:
            return super().detect(images)
        maps = self.adapter(self.encode(images))
        return self.auxiliary_heads[self.evaluate_branch].detect(maps, self.valid_sizes(images))

    def inference_model(self) -> DeformableDETR:
        """Return the base detector with this one's parts, for export: what has only a use in
        training is not in it.

        Raises:
            UserError: an auxiliary head is to be evaluated.
        """
        if self.evaluate_branch is not None:
            raise UserError(
                f"evaluate_branch (MODEL.CODETR.EVALUATE_BRANCH) is {self.evaluate_branch}; only "
                "the decoder's detections can be exported, set it to None"
            )
        model = DeformableDETR.__new__(DeformableDETR)
        model.__dict__.update(self.__dict__)
        model._modules = {k: v for k, v in self._modules.items() if k not in _IN_TRAINING}
        model.denoising = model.one_to_many = None
        return model


register_adapter(CoDETR, lambda model: adapt(model.inference_model()))


def _framed(
    instances: Sequence[Instances], sizes: Sequence[tuple[int, int]]
) -> Sequence[Instances]:
    """Return the instances as parts of images of these heights and widths."""
    return [
        each if tuple(each.image_size) == tuple(size) else Instances(size, **each.get_fields())
        for each, size in zip(instances, sizes)
    ]


def _check(
    heads: int,
    adapter: nn.Module | None,
    queries: PositiveQueries | None,
    train_heads: bool,
    branch: int | None,
) -> None:
    if heads and adapter is None:
        raise UserError("auxiliary heads need maps; give an adapter (MODEL.CODETR.ADAPTER)")
    if heads and queries is None and not train_heads:
        raise UserError(
            "neither the auxiliary heads nor their queries are trained; switch one of them on "
            "(MODEL.CODETR.TRAIN_HEADS, TRAIN_QUERIES) or give no heads (AUXILIARY_HEADS)"
        )
    if heads and queries is not None and len(queries.embeddings) != heads:
        raise UserError(
            f"positive queries are made for {len(queries.embeddings)} heads, the detector has "
            f"{heads}; give positive_queries.heads the same number"
        )
    if branch is not None and not 0 <= branch < heads:
        raise UserError(
            f"evaluate_branch (MODEL.CODETR.EVALUATE_BRANCH) is {branch}; expected None or the "
            f"number of one of the {heads} auxiliary heads, from 0 on"
        )
