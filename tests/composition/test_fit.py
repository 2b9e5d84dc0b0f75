"""Backbones that do not give what heads take are one clear line when a model is built; parts take
the shapes of another backbone.
"""

from __future__ import annotations

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import Backbone
from torch import nn

from cednet import CEDNet, CEDNetTrunk
from d2dense import composition, config, model_zoo
from d2dense.composition_cells import HEADS, IMPORTS, SOURCES
from d2dense.composition_trial import config_of
from d2dense.config import detectors, detr
from d2dense.errors import UserError
from d2dense.modeling import EVA02ViT, TimmBackbone, ViTDet
from d2dense.modeling.detr import ChannelMapper
from d2dense.modeling.necks import BiFPN, PaddedFPN, ViTPyramid

HEAD = {head.name: head for head in HEADS}
SOURCE = {source.name: source for source in SOURCES}


def cell(head: str, source: str, kind: str):
    return config_of(SOURCE[source], HEAD[head], kind, imports=IMPORTS)


def refusal(cfg) -> str:
    """The one line, which says nothing of exceptions or files."""
    with pytest.raises(UserError) as caught:
        config.build_model(cfg, device="cpu")
    message = str(caught.value)
    assert "Error:" not in message
    assert ".py" not in message
    return message


@pytest.mark.parametrize(
    ("head", "key", "names", "words"),
    [
        ("RetinaNet", "model.head_in_features", ["p2", "p3", "p4", "p5", "p6"], "names 'p2'"),
        ("Mask R-CNN", "model.proposal_generator.in_features", ["p2", "p9"], "names 'p9'"),
        ("FSCascade", "model.roi_heads.box_in_features", ["res2"], "names 'res2'"),
        ("Mask R-CNN", "model.roi_heads.mask_in_features", ["p1"], "names 'p1'"),
        ("DINO", "model.in_features", ["res2"], "'res2'.*c2, c3, c4, c5"),
        ("HFGD", "model.sem_seg_head.in_features", ["c1", "c3", "c4", "c5"], "'c1'"),
        ("UperNet", "model.sem_seg_head.auxiliary_feature", "stage1_c3", "'stage1_c3'"),
    ],
)
def test_lazy_names_that_the_backbone_lacks(head, key, names, words):
    cfg = cell(head, "CEDNet", "lazy")
    node, leaf = key.rsplit(".", 1)
    target = cfg
    for part in node.split("."):
        target = target[part]
    target[leaf] = names
    message = refusal(cfg)
    with pytest.raises(UserError, match=words):
        raise UserError(message)
    assert leaf in message


@pytest.mark.parametrize(
    ("head", "key", "names", "words"),
    [
        ("RetinaNet", "RETINANET", ["p2", "p3"], "names 'p2'"),
        ("Mask R-CNN", "RPN", ["p2", "p9"], "names 'p9'"),
        ("FSCascade", "ROI_HEADS", ["res2"], "names 'res2'"),
        ("Co-DETR", "DETR", ["res2"], "'res2'"),
        ("SemanticFPN", "SEM_SEG_HEAD", ["c1", "c3", "c4", "c5"], "'c1'"),
    ],
)
def test_yaml_names_that_the_backbone_lacks(head, key, names, words):
    cfg = cell(head, "CEDNet", "yaml")
    cfg.MODEL[key].IN_FEATURES = names
    message = refusal(cfg)
    assert words in message
    assert f"MODEL.{key}.IN_FEATURES" in message
    assert "c2" in message or "p3" in message or "p2" in message  # what there is


def test_levels_of_other_strides_than_the_anchors():
    cfg = cell("RetinaNet", "CEDNet", "lazy")
    cfg.model.backbone.out_features = cfg.model.head_in_features = ["p2", "p3", "p4", "p5", "p6"]
    message = refusal(cfg)
    assert "strides [4, 8, 16, 32, 64]" in message
    assert "[8, 16, 32, 64, 128]" in message
    cfg = cell("Faster R-CNN", "CEDNet", "lazy")
    cfg.model.roi_heads.box_in_features = ["p3", "p4", "p5", "p6"]
    assert "strides [8, 16, 32, 64]" in refusal(cfg)


def test_maps_of_other_strides_than_a_segmenter_takes():
    cfg = cell("HFGD", "ViT", "lazy")
    cfg.model.backbone.levels = cfg.model.sem_seg_head.in_features = ["p3", "p4", "p5", "p6"]
    assert "maps from stride 4 on, but 'p3' has stride 8" in refusal(cfg)
    cfg = cell("SemanticFPN", "CEDNet", "yaml")
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["c2", "c3", "c4"]
    assert "strides 4, 8, 16 and 32, found c2, c3, c4" in refusal(cfg)


def test_levels_of_another_width_than_the_head():
    for name in ("RetinaNet", "Cascade R-CNN", "FSCascade"):
        cfg = cell(name, "ViT", "lazy")
        cfg.model.backbone.out_channels = 64
        message = refusal(cfg)
        assert "[64, 64, 64, 64, 64] channels, but the head takes [256, 256" in message
    cfg = cell("Deformable-DETR", "CEDNet", "lazy")
    cfg.model.neck = None
    cfg.model.in_features = cfg.model.backbone.out_features = ["c3", "c4", "c5"]
    assert "4 levels" in refusal(cfg)
    cfg.model.in_features = cfg.model.backbone.out_features = ["c2", "c3", "c4", "c5"]
    assert "[16, 24, 32, 48] channels, but the head takes [256, 256, 256, 256]" in refusal(cfg)


def test_maps_of_several_widths_want_a_pyramid():
    cfg = cell("Faster R-CNN", "timm", "yaml")
    cfg.MODEL.BACKBONE.NAME = "TimmBackbone"
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    for node in (cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS):
        node.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    assert "build_timm_fpn_backbone / PaddedFPN" in refusal(cfg)


def test_what_stands_below_a_pyramid():
    cfg = cell("Faster R-CNN", "ResNet", "yaml")
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    assert "MODEL.FPN.IN_FEATURES names 'res2'" in refusal(cfg)
    cfg = cell("Faster R-CNN", "timm", "yaml")
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res7"]
    assert "res7" in refusal(cfg)
    cfg = cell("Faster R-CNN", "ViT", "yaml")
    cfg.MODEL.VIT_PYRAMID.BODY = "EVA02VIT"
    assert "EVA02ViT" in refusal(cfg)
    cfg.MODEL.VIT_PYRAMID.BODY = "CEDNet"
    cfg.MODEL.CEDNET.OUT_FEATURES = ["c5"]
    assert "stride 16, but c5 of CEDNet has 32" in refusal(cfg)
    body = TimmBackbone(name="test_convnext")
    for pyramid, names in ((PaddedFPN, ["res2", "res4"]), (PaddedFPN, []), (BiFPN, ["res9"])):
        with pytest.raises(UserError, match="cannot stand on"):
            pyramid(bottom_up=body, in_features=names, out_channels=8)


def test_more_maps_than_levels():
    cfg = cell("Deformable-DETR", "ViT", "lazy")
    cfg.model.in_features = cfg.model.backbone.levels = ["p2", "p3", "p4", "p5", "p6"]
    assert "makes 4 levels of the maps p2, p3, p4, p5, p6" in refusal(cfg)
    with pytest.raises(UserError, match="one map or more"):
        ChannelMapper(input_shape={}, in_features=[])


def test_other_mistakes_are_told_as_before():
    cfg = cell("Mask R-CNN", "CEDNet", "yaml")
    cfg.MODEL.BACKBONE.NAME = "CEDNett"
    with pytest.raises(UserError, match="'CEDNett', which is not in the registry"):
        config.build_model(cfg)


# ------------------------------------------------ shapes come from the backbone


def test_another_backbone_is_one_line_of_a_recipe():
    cfg = model_zoo.get_config("HFGD/hfgd_tiny_shapes")
    cfg.model.backbone = L(TimmBackbone)(name="test_convnext")
    model = config.build_model(cfg, device="cpu")
    widths = [each.channels for each in model.backbone.output_shape().values()]
    first = [next(m for m in lateral.modules() if isinstance(m, nn.Conv2d)) for lateral in
             model.sem_seg_head.upsampler.laterals]  # fmt: skip
    assert [conv.in_channels for conv in first] == widths[:3]


def test_an_override_of_the_backbone_reaches_the_neck():
    cfg = config.load(
        "CEDNet/deformable_detr_convnext_t",
        ["model.backbone.name=test_convnext", "model.in_features=[res4,res5]"],
    )
    model = config.build_model(cfg, device="cpu")
    shapes = model.backbone.output_shape()
    assert [conv.in_channels for conv in model.neck.convs] == [
        shapes[name].channels for name in ("res4", "res5")
    ]
    assert len(model.neck.extra_convs) == 2


class Body(Backbone):
    made = 0

    def __init__(self):
        super().__init__()
        Body.made += 1

    def output_shape(self):
        return {"a": ShapeSpec(channels=3, stride=4)}

    def forward(self, x):
        return {"a": x}


class Whole(nn.Module):
    def __init__(self, *, backbone, part, other=None):
        super().__init__()
        self.backbone, self.part, self.other = backbone, part, other


class Part(nn.Module):
    def __init__(self, *, input_shape, inner=None):
        super().__init__()
        self.input_shape, self.inner = input_shape, inner


def test_which_parts_take_their_shapes():
    Body.made = 0
    single = L(ShapeSpec)(channels=7)
    node = L(Whole)(
        backbone=L(Body)(),
        part=L(Part)(input_shape=None, inner=L(Part)(input_shape={"b": single})),
        other=L(Part)(input_shape=single, inner=L(Part)(input_shape=[single])),
    )
    whole = composition.instantiate_model(node)
    assert Body.made == 1
    for part in (whole.part, whole.part.inner):
        assert list(part.input_shape) == ["a"]
        assert (part.input_shape["a"].channels, part.input_shape["a"].stride) == (3, 4)
    assert whole.other.input_shape.channels == 7  # the shape of one map, not of a backbone's
    assert whole.other.inner.input_shape[0].channels == 7
    assert node.part.input_shape is None  # the config stays as it was


def test_the_neck_names_its_maps_once():
    node = detr.deformable_detr(
        backbone=L(CEDNet)(trunk=L(CEDNetTrunk)(), out_features=["c4", "c5"]),
        in_features=["c4", "c5"],
        neck=detr.channel_mapper(levels=4),
    )
    assert list(node.neck.in_features) == ["c4", "c5"]
    with torch.device("meta"):
        model = composition.instantiate_model(node)
    assert [conv.in_channels for conv in model.neck.convs] == [352, 512]


# ------------------------------------------------ backbones give what they declare

TRUNK = {"widths": [16, 24, 32, 48], "first_blocks": 1, "blocks": [1, 1, 1], "num_stages": 2}
VIT = {"channels": 32, "depth": 2, "heads": 2, "window": 3, "global_blocks": [1]}
LEVELS = ["p2", "p3", "p4", "p5", "p6", "p7"]
BACKBONES = {
    **{
        f"CEDNet {style}": lambda style=style: CEDNet(
            trunk=CEDNetTrunk(style=style, **TRUNK),
            out_features=["c2", "c3", "c4", "c5", "stage1_c3", *LEVELS],
            out_channels=8,
        )
        for style in ("fpn", "unet", "hourglass", "fpn_convs")
    },
    "timm ResNet": lambda: TimmBackbone(name="test_resnet"),
    "timm EfficientNet": lambda: TimmBackbone(name="test_efficientnet"),
    "timm Swin": lambda: TimmBackbone(
        name="swin_tiny_patch4_window7_224",
        options={"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    ),
    "timm ViT": lambda: ViTPyramid(
        bottom_up=TimmBackbone(
            name="test_vit", out_indices=[-1], options={"dynamic_img_size": True}
        ),
        levels=LEVELS,
        out_channels=8,
    ),
    "EVA02ViT": lambda: ViTPyramid(bottom_up=EVA02ViT(**VIT), levels=LEVELS, out_channels=8),
    "ViTDet": lambda: ViTPyramid(bottom_up=ViTDet(**VIT), levels=LEVELS[1:], out_channels=8),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_maps_have_the_declared_widths_and_strides(name):
    """Heads see nothing else of a backbone."""
    backbone = BACKBONES[name]().eval()
    shapes = backbone.output_shape()
    side = max(backbone.size_divisibility, 32)
    for height, width in ((2 * side, 3 * side), (4 * side, side)):
        with torch.no_grad():
            maps = backbone(torch.randn(1, 3, height, width))
        assert set(maps) == set(shapes)
        for key, shape in shapes.items():
            rows, columns = -(-height // shape.stride), -(-width // shape.stride)
            assert tuple(maps[key].shape) == (1, shape.channels, rows, columns), key


def test_vision_transformers_by_yaml_and_lazy_start_alike():
    for body, kind in (("EVA02ViT", EVA02ViT), ("ViTDet", ViTDet)):
        cfg = config.get_cfg()
        cfg.MODEL.BACKBONE.NAME = "ViTPyramid"
        cfg.MODEL.VIT_PYRAMID.merge_from_list(["BODY", body, "LEVELS", LEVELS])
        cfg.MODEL.FPN.OUT_CHANNELS = 8
        for key, value in VIT.items():
            cfg.MODEL.VIT[key.upper()] = value
        cfg.MODEL.VIT.POSITION_SIDE, cfg.MODEL.VIT.IMAGE_SIZE = 4, 96
        torch.manual_seed(0)
        yaml = build_backbone(cfg).state_dict()
        settings = {**VIT, "mlp_ratio": 8 / 3, "position_side": 4, "drop_path_rate": 0.4}
        if body == "ViTDet":
            settings["image_size"] = 96
        torch.manual_seed(0)
        lazy = ViTPyramid(bottom_up=kind(**settings), levels=LEVELS, out_channels=8).state_dict()
        assert yaml.keys() == lazy.keys()
        assert all(torch.equal(yaml[key], lazy[key]) for key in lazy)


@pytest.mark.parametrize("changes", [{"heads": 5}, {"global_blocks": [2]}])
def test_vision_transformers_that_cannot_be(changes):
    with pytest.raises(UserError, match="ViTDet of 32 channels"):
        ViTDet(**{**VIT, **changes})


def test_vitdet_is_detectron2s():
    """ViT-B of ViTDet: 85.8 M of ViT-B/16 without its head, and relative positions."""
    vit = ViTDet()
    names = [name for name, _ in vit.named_parameters() if "rel_pos" in name]
    assert len(names) == 24
    relative = sum(p.numel() for n, p in vit.named_parameters() if "rel_pos" in n)
    # per block and axis 2 * side - 1 positions of 64 channels: 8 windows of 14, 4 maps of 64
    assert relative == 64 * 2 * (8 * 27 + 4 * 127)
    plain = sum(p.numel() for p in vit.parameters()) - relative
    assert plain == 768 * 768 + 768 + 197 * 768 + 12 * (12 * 768**2 + 13 * 768)
    windows = [block.window_size for block in vit.blocks]
    assert windows == [14, 14, 0] * 4


def test_resnet_fpn_is_detectron2s():
    with torch.device("meta"):
        fpn = instantiate(detectors.resnet_fpn(50))
    assert sum(p.numel() for p in fpn.parameters()) == 23_454_912 + 3_344_384
    with pytest.raises(UserError, match="maxpool or p6p7"):
        detectors.resnet_fpn(50, top="p6")
