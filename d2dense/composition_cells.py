"""What the composition matrix is made of: backbones, heads, and the config lines that put one under
the other, as text.
"""

from d2dense.composition_trial import Head, Source

__all__ = ["HEADS", "IMPORTS", "SOURCES"]

# what the Python lines use
IMPORTS = """\
from detectron2.config import LazyCall as L

from cednet import CEDNet, CEDNetTrunk
from d2dense.config import detectors
from d2dense.modeling import EVA02ViT, TimmBackbone, ViTDet
from d2dense.modeling.necks import ViTPyramid"""


def _same(text, *, keys=("p2-p5", "p2-p6", "p3-p7", "maps")):
    return dict.fromkeys(keys, text)


RESNET = Source(
    name="ResNet",
    maps=["res2", "res3", "res4", "res5"],
    setup={
        "yaml": """\
MODEL:
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, STEM_OUT_CHANNELS: 64, NORM: FrozenBN}
  FPN: {OUT_CHANNELS: 256, NORM: ""}
"""
    },
    lines={
        "lazy": {
            **_same("model.backbone = detectors.resnet_fpn(18)"),
            "p3-p7": 'model.backbone = detectors.resnet_fpn(18, top="p6p7")',
            "maps": """\
model.backbone = detectors.resnet_fpn(18).bottom_up
model.backbone.out_features = {names}""",
        },
        "yaml": {
            **_same(
                """\
MODEL:
  BACKBONE: {NAME: build_resnet_fpn_backbone, FREEZE_AT: 2}
  RESNETS: {STRIDE_IN_1X1: False, OUT_FEATURES: [res2, res3, res4, res5]}
  FPN: {IN_FEATURES: [res2, res3, res4, res5]}"""
            ),
            "p3-p7": """\
MODEL:
  BACKBONE: {NAME: build_retinanet_resnet_fpn_backbone, FREEZE_AT: 2}
  RESNETS: {STRIDE_IN_1X1: False, OUT_FEATURES: [res3, res4, res5]}
  FPN: {IN_FEATURES: [res3, res4, res5]}""",
            "maps": """\
MODEL:
  BACKBONE: {NAME: build_resnet_backbone, FREEZE_AT: 2}
  RESNETS: {STRIDE_IN_1X1: False, OUT_FEATURES: {names}}""",
        },
    },
)
CEDNET = Source(
    name="CEDNet",
    maps=["c2", "c3", "c4", "c5"],
    setup={
        "lazy": """\
trunk = L(CEDNetTrunk)(
    widths=[16, 24, 32, 48], first_blocks=1, blocks=[1, 1, 1], num_stages=2, drop_path=0.0
)""",
        "yaml": """\
MODEL:
  CEDNET:
    WIDTHS: [16, 24, 32, 48]
    FIRST_BLOCKS: 1
    BLOCKS: [1, 1, 1]
    NUM_STAGES: 2
    DROP_PATH_RATE: 0.0
    LAYER_SCALE: 0.000001
    SIZE_DIVISIBILITY: 32
""",
    },
    lines={
        "lazy": _same("model.backbone = L(CEDNet)(trunk=trunk, out_features={names})"),
        "yaml": _same(
            """\
MODEL:
  BACKBONE: {NAME: CEDNet}
  CEDNET: {OUT_FEATURES: {names}}"""
        ),
    },
)
TIMM = Source(
    name="timm",
    maps=["res2", "res3", "res4", "res5"],
    setup={
        "yaml": """\
MODEL:
  TIMM: {NORM: "", NORM_EPS: null, NORM_MOMENTUM: null, SIZE_DIVISIBILITY: null}
  FPN: {OUT_CHANNELS: 256, NORM: ""}
"""
    },
    lines={
        "lazy": {
            **_same('model.backbone = detectors.timm_fpn("test_convnext")'),
            "p3-p7": 'model.backbone = detectors.timm_fpn("test_convnext", top="p6p7")',
            "maps": """\
model.backbone = L(TimmBackbone)(name="test_convnext", out_norm="LN", out_features={names})""",
        },
        "yaml": {
            **_same(
                """\
MODEL:
  BACKBONE: {NAME: build_timm_fpn_backbone}
  TIMM: {NAME: test_convnext, OUT_NORM: LN}
  FPN: {IN_FEATURES: [res2, res3, res4, res5]}"""
            ),
            "p3-p7": """\
MODEL:
  BACKBONE: {NAME: build_retinanet_timm_fpn_backbone}
  TIMM: {NAME: test_convnext, OUT_NORM: LN}""",
            "maps": """\
MODEL:
  BACKBONE: {NAME: TimmBackbone}
  TIMM: {NAME: test_convnext, OUT_NORM: LN, OUT_FEATURES: {names}}""",
        },
    },
)
VIT = Source(
    name="ViT",
    maps=["p2", "p3", "p4", "p5"],
    setup={
        "lazy": """\
vit = L(EVA02ViT)(
    channels=32, depth=2, heads=2, window=3, global_blocks=[1], position_side=4, drop_path_rate=0.0
)""",
        "yaml": """\
MODEL:
  VIT:
    CHANNELS: 32
    DEPTH: 2
    HEADS: 2
    WINDOW: 3
    GLOBAL_BLOCKS: [1]
    POSITION_SIDE: 4
    DROP_PATH: 0.0
  FPN: {OUT_CHANNELS: 256}
""",
    },
    lines={
        "lazy": _same("model.backbone = L(ViTPyramid)(bottom_up=vit, levels={names})"),
        "yaml": _same(
            """\
MODEL:
  BACKBONE: {NAME: ViTPyramid}
  VIT_PYRAMID: {BODY: EVA02ViT, LEVELS: {names}}"""
        ),
    },
)
VITDET = Source(
    name="ViTDet",
    maps=VIT.maps,
    setup={
        "lazy": """\
vit = L(ViTDet)(
    channels=32, depth=2, heads=2, window=3, global_blocks=[1], position_side=4, image_size=64,
    drop_path_rate=0.0,
)""",
        "yaml": VIT.setup["yaml"].replace(
            "DROP_PATH: 0.0", "DROP_PATH: 0.0\n    MLP_RATIO: 4.0\n    IMAGE_SIZE: 64"
        ),
    },
    lines={
        "lazy": VIT.lines["lazy"],
        "yaml": _same(VIT.lines["yaml"]["maps"].replace("EVA02ViT", "ViTDet")),
    },
)
SOURCES = (RESNET, CEDNET, TIMM, VIT, VITDET)

# ------------------------------------------------ heads

_PROPOSALS_LAZY = """
model.proposal_generator.pre_nms_topk = [50, 30]
model.proposal_generator.post_nms_topk = [30, 5]
model.roi_heads.batch_size_per_image = 4
model.roi_heads.num_classes = 5
"""
_PROPOSALS_YAML = """\
MODEL:
  RPN:
    PRE_NMS_TOPK_TRAIN: 50
    PRE_NMS_TOPK_TEST: 30
    POST_NMS_TOPK_TRAIN: 30
    POST_NMS_TOPK_TEST: 5
  ROI_HEADS: {BATCH_SIZE_PER_IMAGE: 4, NUM_CLASSES: 5}
  ROI_BOX_HEAD: {FC_DIM: 32}
"""
_CASCADE_LAZY = (
    _PROPOSALS_LAZY
    + """
for head, predictor in zip(model.roi_heads.box_heads, model.roi_heads.box_predictors):
    head.fc_dims = [32] * len(head.fc_dims)
    predictor.input_shape.channels = 32
"""
)
_CASCADE = {"lazy": _CASCADE_LAZY, "yaml": _PROPOSALS_YAML}
_TRANSFORMER_LAZY = """
for part in (model.encoder, model.decoder):
    part.update(layers=1, heads=4, feedforward=32)
model.queries.num_queries = 20
model.num_classes = 5
"""
_TRANSFORMER_YAML = """\
MODEL:
  DETR:
    ENCODER_LAYERS: 1
    DECODER_LAYERS: 1
    HEADS: 4
    FEEDFORWARD: 32
    NUM_QUERIES: 20
    NUM_CLASSES: 5
"""
_IN_FEATURES = {
    "lazy": "model.in_features = {names}",
    "yaml": "  DETR: {IN_FEATURES: {names}}",
}
_SEGMENTER_FEATURES = {
    "lazy": "model.sem_seg_head.in_features = {names}",
    "yaml": "  SEM_SEG_HEAD: {IN_FEATURES: {names}}",
}
_HFGD = {
    "lazy": """
model.pad_to = [64, 64]
model.inference.pad_to = None
model.sem_seg_head.update(
    num_classes=5, channels=32, encoder_channels=32, key_channels=16, norm="BN"
)
""",
    "yaml": """\
MODEL:
  SEM_SEG_HEAD: {NUM_CLASSES: 5, CONVS_DIM: 32, NORM: BN, PAD_TO: [64, 64]}
  HFGD: {CAE: {CHANNELS: 32, KEY_CHANNELS: 16}}
TEST: {SEM_SEG: {PAD_TO: []}}
""",
}

HEADS = (
    Head(
        name="RetinaNet",
        recipe="CEDNet/retinanet_cednet_next_t",
        takes="p3-p7",
        small={
            "lazy": "model.head.conv_dims = [256]\nmodel.num_classes = 5",
            "yaml": "MODEL: {RETINANET: {NUM_CONVS: 1, NUM_CLASSES: 5}}",
        },
    ),
    Head(
        name="Faster R-CNN",
        recipe="CEDNet/faster_rcnn_cednet_next_t",
        takes="p2-p6",
        small={
            "lazy": _PROPOSALS_LAZY
            + """
model.roi_heads.box_head.fc_dims = [32, 32]
model.roi_heads.box_predictor.input_shape.channels = 32
""",
            "yaml": _PROPOSALS_YAML,
        },
    ),
    Head(
        name="Mask R-CNN",
        recipe="CEDNet/mask_rcnn_cednet_next_t",
        takes="p2-p6",
        small={
            "lazy": _PROPOSALS_LAZY
            + """
model.roi_heads.box_head.fc_dims = [32, 32]
model.roi_heads.box_predictor.input_shape.channels = 32
model.roi_heads.mask_head.conv_dims = [32, 32]
""",
            "yaml": _PROPOSALS_YAML + "  ROI_MASK_HEAD: {NUM_CONV: 1, CONV_DIM: 32}\n",
        },
    ),
    Head(
        name="Cascade R-CNN",
        recipe="FSCascade/cascade_rcnn_r50_fpn_1x",
        takes="p2-p6",
        small=_CASCADE,
    ),
    Head(
        name="FSCascade",
        recipe="FSCascade/fscascade_r50_fpn_1x",
        takes="p2-p6",
        small=_CASCADE,
    ),
    Head(
        name="Deformable-DETR",
        recipe="CoDETR/deformable_detr_r50_1x",
        takes="maps",
        first=1,
        renaming=_IN_FEATURES,
        small={"lazy": _TRANSFORMER_LAZY, "yaml": _TRANSFORMER_YAML},
    ),
    Head(
        name="DINO",
        recipe="CoDETR/dino_5scale_r50_1x",
        takes="maps",
        renaming=_IN_FEATURES,
        small={
            "lazy": _TRANSFORMER_LAZY + "model.denoising.num_queries = 4\n",
            "yaml": _TRANSFORMER_YAML + "    DENOISING: {QUERIES: 4}\n",
        },
    ),
    Head(
        name="Co-DETR",
        recipe="CoDETR/co_dino_5scale_r50_1x",
        takes="maps",
        renaming=_IN_FEATURES,
        small={
            "lazy": _TRANSFORMER_LAZY
            + """
model.denoising.num_queries = 4
model.auxiliary_heads[0].update(hidden=32, samples=8)
model.auxiliary_heads[0].rpn.update(
    train_candidates=50, train_proposals=30, test_candidates=30, test_proposals=10
)
""",
            "yaml": _TRANSFORMER_YAML
            + """\
    DENOISING: {QUERIES: 4}
  CODETR:
    RCNN: {HIDDEN: 32, SAMPLES: 8}
    RPN:
      TRAIN_CANDIDATES: 50
      TRAIN_PROPOSALS: 30
      TEST_CANDIDATES: 30
      TEST_PROPOSALS: 10
""",
        },
    ),
    Head(
        name="SemanticFPN",
        recipe="HFGD/semantic_fpn_r50_pascal_context",
        takes="maps",
        semantic=True,
        renaming=_SEGMENTER_FEATURES,
        small=_HFGD,
    ),
    Head(
        name="UperNet",
        recipe="CEDNet/upernet_cednet_next_t",
        takes="maps",
        semantic=True,
        renaming={
            "lazy": _SEGMENTER_FEATURES["lazy"]
            + "\nmodel.sem_seg_head.auxiliary_feature = {names[2]}",
            "yaml": "  SEM_SEG_HEAD: {IN_FEATURES: {names}, AUXILIARY: {FEATURE: {names[2]}}}",
        },
        small={
            "lazy": """
model.pad_to = [64, 64]
model.inference.window = None
model.sem_seg_head.update(num_classes=5, channels=32, auxiliary_channels=16, norm="BN")
""",
            "yaml": """\
MODEL:
  SEM_SEG_HEAD:
    NUM_CLASSES: 5
    CONVS_DIM: 32
    NORM: BN
    PAD_TO: [64, 64]
    AUXILIARY: {CHANNELS: 16}
TEST: {SEM_SEG: {WINDOW: []}}
""",
        },
    ),
    Head(
        name="HFGD",
        recipe="HFGD/hfgd_r50_os4_pascal_context",
        takes="maps",
        semantic=True,
        renaming=_SEGMENTER_FEATURES,
        small=_HFGD,
        idle={
            r"^backbone\.(norms\.res|pyramid\.levels\.p)[234]\.": "the fine loss, which alone sees "
            "the finer maps, is kept from the backbone (stop_grad_features); what makes one of "
            "these maps and no coarser one stays as it is"
        },
    ),
)
