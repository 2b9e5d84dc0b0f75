"""Configs: yaml equals lazy, and the tiny model trains."""

import json

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from d2dense import config, model_zoo
from d2dense.export.torchscript import to_torchscript
from d2dense.layers import replace_sync_norms
from tests.projects import parity
from tests.projects.parity import KINDS
from tools import analyze_model

NAMES = [  # those with both kinds
    name
    for name in model_zoo.list_models("yaml")
    if name.startswith("CEDNet/") and name in model_zoo.list_models("lazy")
]
TINY = [name for name in NAMES if "tiny" in name]
ONLY_IN_TRAINING = ("use_instance_mask", "min_box_side", "reject_emptied")  # of a mapper
TINY_DETECTORS = [n for n in TINY if "cednet_tiny_shapes" in n and "upernet" not in n]


def test_headline_models_have_both_kinds():
    detectors = ("retinanet", "mask_rcnn", "cascade_mask_rcnn")
    for detector in detectors:
        assert f"CEDNet/{detector}_cednet_next_t" in NAMES
        assert f"CEDNet/{detector}_cednet_tiny_shapes" in TINY_DETECTORS
    for neck in ("fpn", "bifpn", "nas_fpn"):
        assert f"CEDNet/retinanet_convnext_t_{neck}" in NAMES
    assert all(name in model_zoo.list_models("lazy") for name in model_zoo.list_models("yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_both_kinds_give_the_same_model_and_run(name):
    parity.check_model_and_run(name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train", [True, False])
def test_both_kinds_read_data_alike(name, train):
    parity.check_data(name, train=train, ignored=() if train else ONLY_IN_TRAINING)


@pytest.mark.parametrize("name", TINY)
def test_both_kinds_start_from_the_same_values(name):
    parity.check_start(name)


# ------------------------------------------------ the official recipe


def test_the_analysis_tool_prints_the_costs_of_the_paper(tmp_path):
    report = tmp_path / "costs.json"
    argv = ["--config-file", "CEDNet/retinanet_cednet_next_t", "--json", str(report)]
    # a fifth of the sides, which the recipe would fill up to 256 x 256
    analyze_model.main([*argv, "--without-attention", "--input-size", "160", "256"])
    found = json.loads(report.read_text())
    assert found["params"] == 38_635_380
    assert found["macs"] == pytest.approx(254.5e9 / 25, rel=0.01)


# ------------------------------------------------ the tiny models


def boxes_as_masks(boxes: Boxes, height: int, width: int) -> BitMasks:
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    return BitMasks(
        torch.stack(
            [
                (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)
                for x0, y0, x1, y1 in boxes.tensor
            ]
        )
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TINY_DETECTORS)
def test_tiny_models_fit_a_batch(name, kind):
    torch.manual_seed(0)
    model = config.build_model(model_zoo.get_config(name, kind), device="cpu").train()
    replace_sync_norms(model)
    target = Instances((64, 96))
    target.gt_boxes = Boxes(torch.tensor([[10.0, 12.0, 40.0, 50.0], [50.0, 5.0, 90.0, 40.0]]))
    target.gt_classes = torch.tensor([1, 4])
    target.gt_masks = boxes_as_masks(target.gt_boxes, 64, 96)
    image = torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(0))
    batch = [{"image": image.to(torch.uint8), "instances": target}]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    with EventStorage():
        for _ in range(12):
            loss = sum(model(batch).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []
    with torch.no_grad():
        result = model.eval()(batch)[0]["instances"]
    assert result.image_size == (64, 96)


@torch.no_grad()
def test_the_small_cascade_scripts_with_its_synchronised_norms():
    torch.manual_seed(0)
    model = config.build_model(
        model_zoo.get_config("CEDNet/cascade_mask_rcnn_cednet_tiny_shapes"), device="cpu"
    ).eval()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert norms
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    scripted = to_torchscript(model, torch.zeros(3, 64, 64), method="script")
    assert all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
    image = torch.rand(3, 96, 64, generator=torch.Generator().manual_seed(0)) * 255
    boxes, scores, classes = scripted(image)[:3]
    found = model([{"image": image}])[0]["instances"]
    assert len(found)
    torch.testing.assert_close(boxes, found.pred_boxes.tensor, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(scores, found.scores)
    assert torch.equal(classes, found.pred_classes)
