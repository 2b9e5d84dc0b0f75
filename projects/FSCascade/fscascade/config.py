"""yacs keys of FSCascade; the defaults equal the constructors'."""

from __future__ import annotations

from detectron2.config import CfgNode

from d2dense.errors import UserError
from d2dense.modeling import check_first_iou, check_per_stage

__all__ = ["add_fscascade_config", "check_config"]


def add_fscascade_config(cfg: CfgNode) -> None:
    """Add the node ``MODEL.FSCASCADE``. Stages, IoUs and box weights are
    ``MODEL.ROI_BOX_CASCADE_HEAD``'s.
    """
    node = cfg.MODEL.FSCASCADE = CfgNode()
    node.CFS = True  # classification feature sharing
    node.LFS = True  # localisation feature sharing (convolutional localisation head)
    node.CONV_HEAD = False  # with LFS off: a convolutional localisation head of each stage's own
    node.LFS_MODE = "recompute"  # recompute | cached
    node.LFS_RELU_AFTER_1X1 = True
    node.BOX_PREDICTOR = (
        "flatten"  # flatten | avgpool: what the box layer does with the convolutional feature
    )
    node.STAGE_LOSS_WEIGHTS = [1.0, 0.5, 0.25]  # one per stage
    node.SCALE_GRADIENTS = (
        False  # Detectron2's scheme: gradient at pooled features / number of stages
    )
    # last | stage1 | stage2 | ... | ensemble_last_rois | ensemble_own_rois
    node.TEST_SCORES = "last"


def check_config(cfg: CfgNode) -> None:
    """Raise a ``UserError`` for yacs settings that no cascade can be built from."""
    cascade, box_head = cfg.MODEL.ROI_BOX_CASCADE_HEAD, cfg.MODEL.ROI_BOX_HEAD
    num_stages = len(cascade.IOUS)
    check_per_stage(
        num_stages,
        **{
            "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": cascade.BBOX_REG_WEIGHTS,
            "MODEL.FSCASCADE.STAGE_LOSS_WEIGHTS": cfg.MODEL.FSCASCADE.STAGE_LOSS_WEIGHTS,
        },
    )
    if num_stages > 1 and not box_head.CLS_AGNOSTIC_BBOX_REG:
        raise UserError(
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is False, but each stage of a cascade hands "
            "one box per region on: set it to True"
        )
    check_first_iou(cfg)
