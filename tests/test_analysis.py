"""Parameters and multiply-accumulates against closed forms."""

from __future__ import annotations

import json

from torch import nn

from d2dense import analysis, model_zoo
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
    params = analysis.count_parameters(model)
    assert params["conv"] == 3 * 8 * 9 + 8
    assert params[""] == params["conv"] + 8 * 5 + 5 + 2 * 8
    macs = analysis.count_macs(model, analysis.detection_input(32, 48))
    assert macs["conv"] == 16 * 24 * 8 * 3 * 9
    assert macs["fc"] == 8 * 5
    assert macs[""] == macs["conv"] + macs["fc"]
    assert model.training


def test_second_stage_is_counted_for_all_its_proposals_whatever_the_weights():
    model = model_zoo.get_model("FSCascade/cascade_rcnn_r50_fpn_1x")
    macs = analysis.count_macs(model, analysis.detection_input(64, 64))
    fc_pair = 12544 * 1024 + 1024 * 1024
    assert macs["roi_heads.box_head"] == 1000 * 3 * fc_pair
    # the last stage alone classifies, every stage moves the boxes
    assert macs["roi_heads.box_predictor"] == 1000 * (1024 * 81 + 3 * 1024 * 4)
    assert macs["roi_heads"] == macs["roi_heads.box_head"] + macs["roi_heads.box_predictor"]


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
