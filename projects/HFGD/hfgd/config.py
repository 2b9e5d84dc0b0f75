"""yacs keys of HFGD; the defaults equal the constructors'."""

from __future__ import annotations

from detectron2.config import CfgNode as CN

__all__ = ["add_hfgd_config"]


def add_hfgd_config(cfg: CN) -> None:
    """Add the node ``MODEL.HFGD``: what ``SEM_SEG_HEAD.NAME`` ``HFGDHead`` reads beside
    ``MODEL.SEM_SEG_HEAD`` (IN_FEATURES, NUM_CLASSES, CONVS_DIM, NORM, LOSS_WEIGHT of the fine
    cross entropy, IGNORE_VALUE).
    """
    node = cfg.MODEL.HFGD = CN()
    # The encoder of the coarsest map: identity | aspp | ocr | self_attention | car (the paper's)
    node.CAE = CN({"NAME": "car"})
    node.CAE.CHANNELS = 512  # inside it
    node.CAE.KEY_CHANNELS = 64  # of self-attention
    node.CAE.LEAD_CONVS = 2  # leading convolutions of "car", and their size
    node.CAE.LEAD_KERNEL = 1
    # none | sfpn | usfpn, and the stride of its result: 4 | 2 | 1
    node.UPSAMPLER = CN({"NAME": "usfpn", "OUT_STRIDE": 4})
    node.HFGM = CN({"ENABLED": True})
    node.HFGM.AXIAL_ATTENTION = True
    node.HFGM.AA_HEADS = 4
    node.HFGM.AA_RESIDUAL = True
    node.HFGM.STOP_GRAD_FEATURES = True  # the fine loss does not reach backbone and encoder
    node.HFGM.STOP_GRAD_KERNELS = True  # nor the classifier
    # Class-aware losses, of the encoder "car" only (car_losses.py)
    node.CAR = CN({"INTRA": True, "C2C": True, "C2P": True})
    node.CAR.INTRA_WEIGHT = 1.0
    node.CAR.C2C_WEIGHT = 1.0
    node.CAR.C2P_WEIGHT = 1.0
    node.CAR.C2C_THRESHOLD = 0.5
    node.CAR.C2P_THRESHOLD = 0.25
    node.CAR.C2P_MASK_IGNORED = False  # True: ignored pixels are not pushed away
    node.CAR.GLOBAL_MEANS = True  # False: the means of intra and c2p are each process's own
    node.NORM_EPS = 1e-3  # of the head's norms
    node.NORM_MOMENTUM = 3e-4  # of batch norms; raise it (0.1) in short runs
    node.LOSS_NORMALIZER = "all"  # all | valid: the pixels that cross entropies are divided by
    node.COARSE_WEIGHT = 1.0
    node.AUXILIARY_WEIGHT = 0.4  # of the classifier inside "ocr"
