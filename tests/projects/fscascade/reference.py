"""A slow, obvious FSCascade on top of Detectron2's own cascade, to compare with."""

from __future__ import annotations

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads


class SlowCascade(CascadeROIHeads):
    """Detectron2's loop over stages and images; each stage evaluates what it needs alone.

    Takes the modules of the heads under test.
    """

    def __init__(self, heads):
        super().__init__(
            box_in_features=heads.box_in_features,
            box_pooler=heads.box_pooler,
            box_heads=list(heads.box_head),
            box_predictors=list(heads.box_predictor),
            proposal_matchers=[matcher(iou) for iou in heads.iou_thresholds],
            num_classes=heads.num_classes,
            batch_size_per_image=heads.batch_size_per_image,
            positive_fraction=heads.positive_fraction,
        )
        self.cfs, self.loc_head = heads.box_head.sharing, heads.loc_head
        self.relu = heads.loc_head is not None and getattr(heads.loc_head[-1], "relu_after_1x1", 0)
        self.sharing = heads.loc_head is not None and heads.loc_head.recompute

    def _run_stage(self, features, proposals, stage):
        x = self.box_pooler(features, [p.proposal_boxes for p in proposals])
        first = 0 if self.cfs else stage
        class_feature = sum(self.box_head[j](x) for j in range(first, stage + 1))
        box_feature = self.box_head[stage](x) if self.loc_head is None else self.localise(x, stage)
        predictor = self.box_predictor[stage]
        if box_feature.dim() == 4 and predictor.average:
            box_feature = box_feature.mean(3).mean(2)
        logits = torch.nn.functional.linear(
            class_feature, predictor.cls_score.weight, predictor.cls_score.bias
        )
        return logits, predictor.bbox_pred(box_feature.flatten(1))

    def localise(self, x, stage):
        convs = self.loc_head[stage]
        if not self.sharing or stage == 0:
            return convs.conv2(convs.conv1(x).relu()).relu()
        relayed = convs.relay(convs.conv1(self.localise(x, stage - 1)).relu())
        return x + (relayed.relu() if self.relu else relayed)


def matcher(iou: float) -> Matcher:
    return Matcher([iou], [0, 1], allow_low_quality_matches=False)
