"""Official names of the model with masks: those of the model without, and mmdetection's of the
mask branch (its list of tensors is not among the recorded ones).
"""

import re

import pytest
import torch

from d2dense import checkpoint
from d2dense.errors import UserError
from tests.projects.codetr import official_weights as rules
from tests.projects.parity import on_meta

pytestmark = pytest.mark.skipif(not rules.NAMES.is_file(), reason=f"no {rules.NAMES}")
NAME = "CoDETR/co_deformable_detr_r50_mask_1x"
MASKS = {
    **{f"convs.{i}.conv.weight": (256, 256, 3, 3) for i in range(4)},
    **{f"convs.{i}.conv.bias": (256,) for i in range(4)},
    "upsample.weight": (256, 256, 2, 2),
    "upsample.bias": (256,),
    "conv_logits.weight": (80, 256, 1, 1),
    "conv_logits.bias": (80,),
}


def official():
    names = rules.tables()["co_deformable_detr_r50_1x"]
    shapes = {name: shape for name, (shape, _) in names.items()}
    shapes |= {f"roi_head.0.mask_head.{name}": shape for name, shape in MASKS.items()}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_every_tensor_of_a_file_is_used():
    model, file = on_meta(NAME), official()
    weights = checkpoint.convert(file, "codetr", model)
    assert weights.keys() == model.state_dict().keys()
    assert {k: v.shape for k, v in weights.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert checkpoint.convert_back(model, "codetr").keys() == file.keys()


def test_layers_of_the_mask_branch_are_in_order():
    file = official()
    for name in file:
        if "mask_head" in name:
            file[name] = torch.zeros(file[name].shape)
    for i in range(4):
        file[f"roi_head.0.mask_head.convs.{i}.conv.bias"] += i
    weights = checkpoint.convert(file, "codetr", on_meta(NAME))
    own = {k: float(v[0]) for k, v in weights.items() if re.search(r"mask_fcn\d\.bias", k)}
    expected = {f"auxiliary_heads.0.mask_head.mask_fcn{i + 1}.bias": i for i in range(4)}
    assert own == expected


def test_a_file_without_masks():
    file = {k: v for k, v in official().items() if "mask_head" not in k}
    with pytest.raises(UserError, match="mask_fcn1"):
        checkpoint.convert(file, "codetr", on_meta(NAME))
