"""Models that several test files of this folder use."""

import pytest
import torch

from d2dense import model_zoo


@pytest.fixture
def tiny_model():
    """The tiny FSCascade in eval mode, with weights that give detections without training."""
    torch.manual_seed(0)
    model = model_zoo.get_model("FSCascade/fscascade_tiny_shapes")
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0  # statistics of one batch, or activations would explode
    with torch.no_grad():
        model.backbone(torch.randn(2, 3, 128, 128) * 60)
    for predictor in model.roi_heads.box_predictor:
        predictor.test_score_thresh = 0.0
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.3)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.01)
    return model.eval()
