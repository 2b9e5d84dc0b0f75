"""What cannot be exported is said at once, in one line, with what to use instead."""

import pytest
import torch
from torch import nn

from d2dense import model_zoo
from d2dense.errors import UserError
from d2dense.export import refusal, to_torchscript
from d2dense.export.support import WAYS, way
from d2dense.modeling import MultiScaleDetector, TimmBackbone
from d2dense.modeling.necks import BiFPN
from tests.export.exportable import tiny_model


def reasons(model):
    """Return why each way refuses, of those that do."""
    formats = [("torchscript", "trace"), ("torchscript", "script"), ("torch_export", "trace")]
    formats.append(("onnx", "trace"))
    assert [way(*each) for each in formats] == list(WAYS)
    found = {way(*each): refusal(model, *each) for each in formats}
    assert all("\n" not in reason for reason in found.values() if reason)
    return {name: reason for name, reason in found.items() if reason}


@pytest.mark.parametrize(
    "name", ["CoDETR/co_dino_tiny_shapes", "CEDNet/deformable_detr_cednet_tiny_shapes"]
)
def test_transformers_are_not_scripted(name):
    with torch.device("meta"):
        model = model_zoo.get_model(name, device="meta")
    assert "transformer (DeformableDETR) cannot be scripted" in reasons(model)["script"]
    assert "--method trace" in reasons(model)["script"]
    assert "trace" not in reasons(model)


def test_other_families_are():
    assert "script" not in reasons(tiny_model(heads="FlexibleCascadeROIHeads", mask=True))
    assert "script" not in reasons(tiny_model(arch="RetinaNet"))
    assert "script" not in reasons(tiny_model(arch="SemanticSegmentor"))


def test_detectron2s_cascade_names_the_one_that_can_be_scripted():
    model = tiny_model(heads="CascadeROIHeads")
    assert "use FlexibleCascadeROIHeads" in reasons(model)["script"]
    with pytest.raises(UserError, match="use FlexibleCascadeROIHeads"):
        to_torchscript(model, torch.zeros(3, 64, 64), method="script")


def test_timm_models_that_collect_their_maps_in_python():
    segmenter = tiny_model(arch="SemanticSegmentor")
    with torch.device("meta"):
        segmenter.backbone = TimmBackbone(name="vit_tiny_patch16_224", out_indices=(5, 11))
    assert "FeatureGetterNet cannot be scripted" in reasons(segmenter)["script"]
    with torch.device("meta"):
        segmenter.backbone = TimmBackbone(name="efficientnet_b0")
    assert "script" not in reasons(segmenter)


def test_pyramids_that_look_up_their_levels():
    segmenter = tiny_model(arch="SemanticSegmentor")
    with torch.device("meta"):
        bottom_up = TimmBackbone(name="convnext_atto", out_features=("res3", "res4", "res5"))
        segmenter.backbone = BiFPN(bottom_up=bottom_up, out_channels=32)
    assert "BiFPN cannot be scripted" in reasons(segmenter)["script"]
    assert "trace" not in reasons(segmenter)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (nn.Linear(2, 2), "Linear cannot be exported: expected a "),
        (MultiScaleDetector(nn.Linear(2, 2)), "MultiScaleDetector"),
    ],
)
def test_what_has_no_adapter_goes_no_way(model, found):
    assert list(reasons(model)) == list(WAYS)
    assert all(found in reason for reason in reasons(model).values())


def test_keypoints_go_no_way():
    model = tiny_model(heads="StandardROIHeads")
    model.roi_heads.keypoint_on = True
    assert "MODEL.KEYPOINT_ON False" in reasons(model)["onnx"]
