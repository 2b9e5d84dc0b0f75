"""yacs keys of Co-DETR; the defaults equal the constructors'."""

from __future__ import annotations

from detectron2.config import CfgNode as CN

__all__ = ["add_codetr_config"]


def add_codetr_config(cfg: CN) -> None:
    """Add the node ``MODEL.CODETR``; what the base detector is, ``MODEL.DETR`` says."""
    node = cfg.MODEL.CODETR = CN()
    # META_ARCHITECTURE "CoDETR": names from codetr.heads.HEADS, in the order of their numbers,
    node.AUXILIARY_HEADS = ["faster_rcnn", "atss"]
    # what makes their maps of the memory: "multi_scale", or of one level "single_scale",
    node.ADAPTER = "multi_scale"
    # the weights lambda 1 and lambda 2,
    node.QUERY_WEIGHT = 1.0
    node.HEAD_WEIGHT = 2.0
    # whether MODEL.DETR.FEDERATED goes for the heads too,
    node.FEDERATED_HEADS = True
    # what of both is trained (Table 9),
    node.TRAIN_HEADS = True
    node.TRAIN_QUERIES = True
    # whether the queries of all heads go through the decoder together,
    node.ONE_PASS = True
    # and the head whose detections inference returns (Table 11); None is the decoder.
    node.EVALUATE_BRANCH = None
    # Positive queries: whether contents have the candidates' features, what is added to positions
    # ("channels", "scalar" or "none"), bounds of their number per head, whether they are drawn at
    # random, and whether negatives fill up.
    node.QUERIES = CN({"FEATURES": True, "HEAD_EMBEDDING": "channels", "LEAST": 9, "MOST": 300})
    node.QUERIES.RANDOM = True
    node.QUERIES.NEGATIVES = True
    _add_region_keys(node)
    # Dense heads: convolutions of a tower, and detection.
    for name, threshold, suppression in (
        ("ATSS", 0.0, 0.6),
        ("RETINANET", 0.05, 0.5),
        ("FCOS", 0.05, 0.5),
        ("PAA", 0.05, 0.6),
        ("GFL", 0.05, 0.6),
    ):
        node[name] = CN({"CONVS": 1, "SCORE_THRESHOLD": threshold, "NMS_THRESHOLD": suppression})
        node[name].CANDIDATES_PER_LEVEL = 1000
        node[name].MAX_DETECTIONS = 100


def _add_region_keys(node: CN) -> None:
    # Region proposals: anchors with a loss, and per level and image before and after suppression.
    node.RPN = CN({"SAMPLES": 256, "TRAIN_CANDIDATES": 4000, "TRAIN_PROPOSALS": 1000})
    node.RPN.TEST_CANDIDATES = 1000
    node.RPN.TEST_PROPOSALS = 1000
    node.RPN.NMS_THRESHOLD = 0.7
    node.RPN.TEST_NMS_THRESHOLD = None  # None: the same
    # Faster R-CNN: how many maps it pools from, its convolutions and linear layers, whether all
    # classes share a box, the box coder, regions with a loss, and detection.
    node.RCNN = CN({"LEVELS": 4, "CONVS": 0, "FCS": 2, "HIDDEN": 1024, "CLASS_AGNOSTIC": False})
    node.RCNN.STDS = [0.1, 0.1, 0.2, 0.2]
    node.RCNN.SAMPLES = 512
    node.RCNN.SCORE_THRESHOLD = 0.0
    node.RCNN.NMS_THRESHOLD = 0.5
    node.RCNN.MAX_DETECTIONS = 100
