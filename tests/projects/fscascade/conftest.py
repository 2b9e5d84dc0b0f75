"""Models that several test files of this folder use."""

import pytest
import torch

from d2dense import model_zoo


@pytest.fixture
def tiny_model():
    """The tiny FSCascade in eval mode, with weights that give detections without training."""
    torch.manual_seed(0)
    model = model_zoo.get_model("FSCascade/fscascade_tiny_shapes")
    for predictor in model.roi_heads.box_predictor:
        predictor.test_score_thresh = 0.02
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.3)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.01)
    return model
