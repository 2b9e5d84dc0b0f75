"""Parameters of the models, exactly as the reference counts them (section 2)."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d

from d2dense import config, model_zoo

# of the whole model, and at inference in millions; a frozen norm's weight and bias count too
MODELS = {
    "co_deformable_detr_r50_1x": (65_129_894, 47.59),
    "co_dino_5scale_r50_1x": (65_204_005, 48.04),
    "co_dino_5scale_swin_l_3x": (235_471_769, 218.3),
    "co_dino_5scale_vit_l_o365_coco": (365_367_657, 347.2),
    "co_dino_5scale_vit_l_o365_lvis": (374_877_868, None),
}
FROZEN = 275_520  # stem, res2 and all norms of ResNet-50


def on_meta(name):
    cfg = model_zoo.get_config(f"CoDETR/{name}")
    with torch.device("meta"):
        return config.build_model(cfg, device="meta")


def count(model):
    norms = (m for m in model.modules() if isinstance(m, FrozenBatchNorm2d))
    of_norms = sum(norm.weight.numel() + norm.bias.numel() for norm in norms)
    return sum(parameter.numel() for parameter in model.parameters()) + of_norms


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    total, used = MODELS[name]
    model = on_meta(name)
    assert count(model) == total
    if "r50" in name:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == total - FROZEN
    if used is not None:
        parts = (model.adapter, model.auxiliary_heads, model.positive_queries, model.denoising)
        inference = total - sum(count(part) for part in parts if part is not None)
        assert round(inference / 1e6, 2 if used < 100 else 1) == used
    if "vit" in name:
        assert round(count(model.backbone) / 1e6, 1) == 304.2
