"""Figures: the plotted numbers against values worked out by hand."""

import csv
import json
import math

import numpy as np
import pytest

from d2dense.errors import UserError
from fscascade import figures


def write_run(folder, *, stages=3, offset=0.0, scores=()):
    folder.mkdir()
    results = {
        f"stage{k + 1}": {
            "bbox": {
                f"AP@{iou:.2f}": offset + 60 - 50 * iou + k * (iou - 0.7) for iou in figures.IOUS
            }
        }
        for k in range(stages)
    }
    (folder / "results.json").write_text(json.dumps(results))
    rows = "".join(f"{iou},{score}\n" for iou, score in scores)
    (folder / "confidence.csv").write_text("iou,score\n" + rows)
    return figures.Run.read(folder)


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_differences_between_stages_and_to_the_baseline(tmp_path):
    run = write_run(tmp_path / "fs", offset=5.0)
    baseline = write_run(tmp_path / "frcnn", stages=1)
    curves = figures.ap_differences([run], baseline)
    assert list(curves) == ["fs: stage 3 - stage 2", "fs: stage 3 - frcnn"]
    ious = np.array(figures.IOUS)
    np.testing.assert_allclose(curves["fs: stage 3 - stage 2"], ious - 0.7, atol=1e-9)
    np.testing.assert_allclose(curves["fs: stage 3 - frcnn"], 5 + 2 * (ious - 0.7), atol=1e-9)


def test_confidence_bins(tmp_path):
    scores = [(0.5, 0.2), (0.549, 0.4), (0.55, 0.9), (0.74, 0.5), (0.75, 1.0), (0.9, 1.0)]
    bins = figures.confidence(write_run(tmp_path / "run", scores=scores))
    assert [(low, high, count) for low, high, count, _ in bins] == [
        (0.5, 0.55, 2), (0.55, 0.6, 1), (0.6, 0.65, 0), (0.65, 0.7, 0), (0.7, 0.75, 1),
    ]  # fmt: skip
    means = [mean for *_, mean in bins]
    assert means[0] == pytest.approx(0.3)
    assert means[1] == pytest.approx(0.9)
    assert math.isnan(means[2])
    assert means[4] == pytest.approx(0.5)


@pytest.mark.parametrize("scores", [(), [(0.6, 0.7), (0.52, 0.1)]])
def test_drawing_writes_pictures_and_their_numbers(tmp_path, scores):
    runs = [write_run(tmp_path / "a", scores=scores), write_run(tmp_path / "b", offset=1.0)]
    files = figures.draw(runs, tmp_path / "out", baseline=write_run(tmp_path / "base", stages=1))
    names = ["ap_differences", "ap_by_iou", "confidence"]
    drawn = [f"{n}.{kind}" for n in names for kind in ("png", "csv")]
    assert [f.name for f in files] == [*drawn, "summary.json"]
    # stage 1 of "a" has AP 60 - 50 * IoU, at IoU 0.50 to 0.95
    summary = json.loads(files[-1].read_text())["AP"]
    assert summary["a"]["stage1"] == pytest.approx(60 - 50 * 0.725)
    assert list(summary) == ["a", "b", "base"]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files if f.suffix == ".png")
    rows = read_csv(tmp_path / "out" / "ap_by_iou.csv")
    assert [row["iou"] for row in rows] == ["0.50", "0.55", "0.60", "0.65", "0.70", "0.75"]
    assert float(rows[0]["b: stage 2"]) == pytest.approx(61 - 25 - 0.2, abs=1e-4)
    assert len(read_csv(tmp_path / "out" / "ap_differences.csv")) == 10
    assert len(read_csv(tmp_path / "out" / "confidence.csv")) == 10


def test_one_stage_alone_has_no_difference_to_draw(tmp_path):
    files = figures.draw([write_run(tmp_path / "one", stages=1)], tmp_path / "out")
    assert files[0].name == "ap_by_iou.png"


def test_missing_values_and_files(tmp_path):
    (tmp_path / "gap").mkdir()
    values = {f"AP@{iou:.2f}": None for iou in figures.IOUS}
    results = {f"stage{k}": {"bbox": values} for k in (1, 2)}
    (tmp_path / "gap" / "results.json").write_text(json.dumps(results))
    (tmp_path / "gap" / "confidence.csv").write_text("iou,score\n")
    assert np.isnan(figures.Run.read(tmp_path / "gap").last).all()
    assert figures.draw([figures.Run.read(tmp_path / "gap")], tmp_path / "out")
    with pytest.raises(UserError, match="no 'segm' for stage1"):
        figures.Run.read(tmp_path / "gap", task="segm")
    with pytest.raises(UserError, match=r"results\.json does not exist; run evaluate_stages\.py"):
        figures.Run.read(tmp_path / "nowhere")
