"""Parameters and multiply-accumulates against closed forms."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.config import instantiate
from torch import nn

from d2dense import costs, model_zoo
from d2dense.config import detectors
from tools import analyze_model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8, 5)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, batch):
        x = self.norm(self.conv(batch[0]["image"].float()[None]))
        return self.fc(x.mean((2, 3)))


def test_counts_equal_closed_forms():
    model = Net().train()
    params = costs.count_parameters(model)
    assert params["conv"] == 3 * 8 * 9 + 8
    assert params[""] == params["conv"] + 8 * 5 + 5 + 2 * 8
    macs = costs.count_macs(model, costs.detection_input(32, 48))
    assert macs["conv"] == 16 * 24 * 8 * 3 * 9
    assert macs["fc"] == 8 * 5
    assert macs[""] == macs["conv"] + macs["fc"]
    assert model.training


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, batch):
        x = batch[0]["image"].float().reshape(1, 6, 8)
        q, k, v = self.qkv(x).chunk(3, -1)
        fused = nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])
        return fused + (q @ k.transpose(1, 2)) @ v


def test_attention_is_counted_as_products_with_and_without_a_fused_operator():
    image = [{"image": torch.ones(3, 4, 4)}]
    linear, products = 6 * 8 * 24, 2 * (6 * 8 * 6)
    assert costs.count_macs(Attending(), image)[""] == linear + 2 * products
    assert costs.count_macs(Attending(), image, attention=False)[""] == linear


def test_second_stage_is_counted_for_all_its_proposals_whatever_the_weights():
    model = model_zoo.get_model("FSCascade/cascade_rcnn_r50_fpn_1x")
    macs = costs.count_macs(model, costs.detection_input(64, 64))
    fc_pair = 12544 * 1024 + 1024 * 1024
    assert macs["roi_heads.box_head"] == 1000 * 3 * fc_pair
    # the last stage alone classifies, every stage moves the boxes
    assert macs["roi_heads.box_predictor"] == 1000 * (1024 * 81 + 3 * 1024 * 4)
    assert macs["roi_heads"] == macs["roi_heads.box_head"] + macs["roi_heads.box_predictor"]


@pytest.mark.parametrize("detector", ["mask_rcnn", "cascade_mask_rcnn"])
def test_masks_are_counted_for_all_detections_whatever_the_weights(detector):
    pyramid = detectors.timm_fpn("test_convnext", channels=16)
    model = instantiate(getattr(detectors, detector)(backbone=pyramid, channels=16))
    macs = costs.count_macs(model, costs.detection_input(64, 64))
    per_box = 14 * 14 * (4 * 16 * 16 * 9 + 16 * 16 * 4) + 28 * 28 * 16 * 80
    heads = 3 if detector == "cascade_mask_rcnn" else 1
    assert macs["roi_heads.mask_head"] == heads * 100 * per_box
    assert "forward_with_given_boxes" not in vars(model.roi_heads)


@pytest.mark.parametrize(
    ("depth", "names"),
    [(0, ["(whole model)"]), (1, ["(whole model)", "a"]), (2, ["(whole model)", "a", "a.b"])],
)
def test_modules_are_printed_down_to_a_depth(depth, names):
    modules = {name: {"params": 3, "macs": 5} for name in ("", "a", "a.b", "a.b.c")}
    text = costs.format_report({"modules": modules, "input_size": (8, 9)}, depth=depth)
    assert [line.split("  ")[0] for line in text.splitlines()[2:]] == names


def test_tool_writes_json_for_both_kinds(tmp_path, capsys):
    path = tmp_path / "r.json"
    totals = []
    for kind in ("yaml", "py"):
        name = f"projects/FSCascade/configs/cascade_rcnn_tiny_shapes.{kind}"
        argv = ["--config-file", name, "--tasks", "params", "flops", "structure"]
        analyze_model.main([*argv, "--input-size", "64", "96", "--json", str(path)])
        report = json.loads(path.read_text())
        assert report["modules"][""]["params"] == report["params"]
        assert "backbone" in report["structure"]
        totals.append((report["params"], report["macs"]))
    assert totals[0] == totals[1]
    assert "whole model" in capsys.readouterr().out


def test_overrides_after_the_list_of_tasks(tmp_path):
    path = tmp_path / "report.json"
    name = "projects/FSCascade/configs/cascade_rcnn_tiny_shapes.yaml"
    counts = []
    for change in (["MODEL.ROI_HEADS.NUM_CLASSES", "7"], ["MODEL.ROI_HEADS.NUM_CLASSES=8"]):
        argv = ["--config-file", name, "--json", str(path), "--tasks", "params", *change]
        analyze_model.main(argv)
        counts.append(json.loads(path.read_text())["params"])
    assert counts[0] < counts[1]
