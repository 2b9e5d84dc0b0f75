"""Traced and scripted heads and models equal eager ones at other image sizes."""

import pytest
import torch
from detectron2.export import TracingAdapter
from detectron2.export.torchscript_patch import freeze_training_mode, patch_instances
from detectron2.structures import Boxes, ImageList

from fscascade.roi_heads import test_score_modes as score_modes
from tests.projects.fscascade import builders as b

FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": torch.Tensor,
    "pred_boxes": Boxes,
    "scores": torch.Tensor,
    "pred_classes": torch.Tensor,
    "pred_masks": torch.Tensor,
}


@pytest.mark.parametrize(
    ("mode", "variant"),
    [
        *((mode, {"masks": True}) for mode in score_modes(3)),
        ("ensemble_own_rois", {"cfs": False, "lfs": False}),
        ("last", {"cfs": False, "lfs": False, "conv_head": True}),
        ("last", {"lfs_mode": "cached", "box_predictor": "avgpool"}),
    ],
)
@torch.no_grad()
def test_scripted_heads_equal_eager(mode, variant):
    heads = b.heads(test_scores=mode, **variant).eval()
    fields = {k: v for k, v in FIELDS.items() if variant.get("masks") or k != "pred_masks"}
    eager = b.detections(heads)
    with freeze_training_mode(heads), patch_instances(fields) as scripted_instances:
        scripted = torch.jit.script(heads)
        props = [
            scripted_instances(
                p.image_size, proposal_boxes=p.proposal_boxes, objectness_logits=p.objectness_logits
            )
            for p in b.proposals()
        ]
        images = ImageList(torch.zeros(2, 3, b.SIZE, b.SIZE), [(b.SIZE, b.SIZE)] * 2)
        for _ in range(2):  # the second call runs what the profiling executor has specialised
            found, losses = scripted(images, b.features(), props)
    assert losses == {}
    for x, y in zip(found, eager):
        torch.testing.assert_close(x.pred_boxes.tensor, y.pred_boxes.tensor, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.scores, y.scores)
        assert torch.equal(x.pred_classes, y.pred_classes)
        if variant.get("masks"):
            torch.testing.assert_close(x.pred_masks, y.pred_masks)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("mode", ["last", "stage2", "ensemble_last_rois", "ensemble_own_rois"])
@torch.no_grad()
def test_traced_model_equals_eager_at_other_sizes(mode, tiny_model):
    tiny_model.roi_heads.set_test_scores(mode)

    def batch(height, width):
        torch.manual_seed(height)
        return [{"image": torch.rand(3, height, width) * 255}]

    def detect(model, inputs):
        return model.inference(inputs, do_postprocess=False)

    adapter = TracingAdapter(tiny_model, batch(96, 128), detect)
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    for size in ((128, 96), (160, 192)):
        inputs = batch(*size)
        found = adapter.outputs_schema(traced(inputs[0]["image"]))[0]
        eager = detect(tiny_model, inputs)[0]
        assert len(eager) > 0
        for name, value in eager.get_fields().items():
            got = getattr(found.get(name), "tensor", found.get(name))
            torch.testing.assert_close(got, getattr(value, "tensor", value), rtol=1e-3, atol=1e-3)
