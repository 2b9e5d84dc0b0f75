"""Small detectors and a segmenter on a CEDNet whose outputs depend on every pixel."""

import torch
from detectron2.config import instantiate
from torch import nn

from cednet import CEDNet, CEDNetClassifier
from d2dense.config import detectors
from d2dense.modeling import Segmenter, UperNetHead
from tests.projects.cednet import tiny

NUM_CLASSES = 5
CHANNELS = 16


def backbone(mixer="next", features=tiny.RETINA, **options) -> CEDNet:
    options = {"num_stages": 2, "blocks": (1, 1, 1), "first_blocks": 1, "drop_path": 0.0} | options
    return CEDNet(trunk=tiny.trunk(mixer, **options), out_features=features, out_channels=CHANNELS)


def _detector(node) -> nn.Module:
    """The node's model with a backbone of its own levels and last layers that find something."""
    model = instantiate(node)
    for name, parameter in model.named_parameters():
        if name.endswith(("cls_score.weight", "bbox_pred.weight", "mask_fcn_logits.weight")):
            nn.init.normal_(parameter, std=0.1 if "cls" in name else 0.05)
    return model


def retinanet(**options) -> nn.Module:
    node = detectors.retinanet(
        backbone=backbone(**options), num_classes=NUM_CLASSES, channels=CHANNELS
    )
    node.head.conv_dims = [CHANNELS]
    node.test_score_thresh = 0.0
    return _detector(node)


def mask_rcnn(**options) -> nn.Module:
    node = detectors.mask_rcnn(
        backbone=backbone(features=tiny.TWO_STAGE, **options),
        num_classes=NUM_CLASSES,
        channels=CHANNELS,
    )
    return _detector(_smaller(node))


def cascade_mask_rcnn(norm="BN", **options) -> nn.Module:
    node = detectors.cascade_mask_rcnn(
        backbone=backbone(features=tiny.TWO_STAGE, **options),
        num_classes=NUM_CLASSES,
        channels=CHANNELS,
        norm=norm,
    )
    return _detector(_smaller(node))


def _smaller(node):
    """Fewer proposals and sampled regions."""
    node.proposal_generator.post_nms_topk = [40, 30]
    node.roi_heads.batch_size_per_image = 32
    return node


def upernet(norm="BN", **options) -> nn.Module:
    torch.manual_seed(0)
    features = ("c2", "c3", "c4", "c5", "stage1_c3")
    net = backbone(features=features, **options)
    head = UperNetHead(
        input_shape=net.output_shape(),
        in_features=features[:4],
        num_classes=NUM_CLASSES,
        channels=CHANNELS,
        norm=norm,
        auxiliary_feature="stage1_c3",
        auxiliary_channels=CHANNELS,
    )
    return Segmenter(
        backbone=net,
        sem_seg_head=head,
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )


def classifier(mixer="next", **options) -> nn.Module:
    trunk = tiny.trunk(mixer, drop_path=0.0, **options)
    return CEDNetClassifier(trunk=trunk, num_classes=NUM_CLASSES)


MODELS = {
    "retinanet": retinanet,
    "mask_rcnn": mask_rcnn,
    "cascade_mask_rcnn": cascade_mask_rcnn,
    "upernet": upernet,
}
