"""yacs keys of CEDNet; the defaults equal the constructors'."""

from __future__ import annotations

from detectron2.config import CfgNode

from d2dense.errors import UserError

from .blocks import block_family
from .trunk import CEDNetTrunk

__all__ = ["add_cednet_config", "trunk_from_config"]


def add_cednet_config(cfg: CfgNode) -> None:
    """Add the node ``MODEL.CEDNET``: what the backbone ``CEDNet`` is built from."""
    node = cfg.MODEL.CEDNET = CfgNode()
    node.TOKEN_MIXER = "next"  # next | bottleneck | swin | cswin
    node.STYLE = "fpn"  # fpn | unet | hourglass | fpn_convs: the decoders
    node.WIDTHS = (96, 192, 352, 512)  # channels at strides 4, 8, 16, 32
    node.FIRST_BLOCKS = 3  # blocks at stride 4
    node.BLOCKS = (2, 4, 2)  # at strides 8, 16, 32; or one such triple per stage
    node.NUM_STAGES = 3
    node.LAST_DECODER = "auto"  # auto | yes | no: auto is no for fpn, yes for unet and hourglass
    node.LR_BLOCKS = True  # long-range blocks at stride 32
    node.LR_DILATION = 3  # of their 7x7 convolution; cswin has none
    node.DROP_PATH_RATE = 0.2
    node.OFFICIAL_DROP_PATH = False  # the official code's order of the rates
    node.LAYER_SCALE = 1e-6  # initial value, of the mixer "next" only
    node.NORM = ""  # "" is LN, and BN for the mixer "bottleneck", which alone can have another
    node.LAYER_RULE = "stage"  # stage | half_stage: layers of SOLVER.LAYER_DECAY
    node.LAYER_COUNT = 0  # 0 counts them; fewer leaves the last ones at the full learning rate
    node.OUT_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    node.OUT_CHANNELS = 256  # of the levels p
    node.SIZE_DIVISIBILITY = 32  # to what batches are filled up


def trunk_from_config(node: CfgNode, *, in_channels: int) -> CEDNetTrunk:
    """Build the trunk from ``cfg.MODEL.CEDNET``."""
    options = {}
    if node.TOKEN_MIXER != "cswin":
        options["dilation"] = node.LR_DILATION
    if node.TOKEN_MIXER == "next":
        options["layer_scale"] = node.LAYER_SCALE
    if node.NORM and node.TOKEN_MIXER == "bottleneck":
        options["norm"] = node.NORM
    if node.NORM not in ("", "LN") and node.TOKEN_MIXER != "bottleneck":
        raise UserError(
            f"MODEL.CEDNET.NORM is {node.NORM!r}, but blocks of the token mixer "
            f"{node.TOKEN_MIXER!r} have LN; leave it empty"
        )
    if node.LAST_DECODER not in _LAST_DECODER:
        raise UserError(
            f"MODEL.CEDNET.LAST_DECODER is {node.LAST_DECODER!r}, expected auto, yes or no"
        )
    return CEDNetTrunk(
        family=block_family(node.TOKEN_MIXER, **options),
        style=node.STYLE,
        widths=node.WIDTHS,
        first_blocks=node.FIRST_BLOCKS,
        blocks=node.BLOCKS,
        num_stages=node.NUM_STAGES,
        last_decoder=_LAST_DECODER[node.LAST_DECODER],
        lr_blocks=node.LR_BLOCKS,
        drop_path=node.DROP_PATH_RATE,
        official_drop_path=node.OFFICIAL_DROP_PATH,
        layer_rule=node.LAYER_RULE,
        layer_count=node.LAYER_COUNT or None,
        in_channels=in_channels,
    )


_LAST_DECODER = {"auto": None, "yes": True, "no": False}
