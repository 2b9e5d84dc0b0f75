"""Top-1 and top-5 against sorted scores; files; mistakes."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog

from d2dense.errors import UserError
from d2dense.evaluation import build_evaluator
from d2dense.evaluation.classification import rank_of


@pytest.fixture
def dataset():
    names = []

    def make(count):
        name = f"cls_{count}"
        names.append(name)
        classes = [f"class {k}" for k in range(count)]
        MetadataCatalog.get(name).set(evaluator_type="classification", image_classes=classes)
        return name

    yield make
    for name in set(names):
        MetadataCatalog.remove(name)


def sample(count, classes, seed=0):
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.random((count, classes), dtype=np.float32))
    labels = rng.integers(0, classes, count)
    images = [{"image_id": f"{k}.jpg", "label": int(label)} for k, label in enumerate(labels)]
    return images, [{"class_scores": each} for each in scores], scores.numpy(), labels


def test_accuracies_are_those_of_sorting(dataset, tmp_path):
    images, outputs, scores, labels = sample(200, 12)
    evaluator = build_evaluator(dataset(12), output_dir=str(tmp_path))
    for start in range(0, 200, 7):
        evaluator.process(images[start : start + 7], outputs[start : start + 7])
    evaluator.process(images[:5], outputs[:5])  # images that a sampler handed out twice
    found = evaluator.evaluate()["classification"]
    order = np.argsort(-scores, axis=1)
    top1 = order[:, 0] == labels
    assert found["top1"] == pytest.approx(100 * top1.mean())
    top5 = (order[:, :5] == labels[:, None]).any(1)
    assert found["top5"] == pytest.approx(100 * top5.mean())
    by_class = [top1[labels == k].mean() for k in range(12) if (labels == k).any()]
    assert found["mean_class_top1"] == pytest.approx(100 * np.mean(by_class))

    rows = list(csv.DictReader((tmp_path / "classification_classes.csv").open()))
    assert [row["class"] for row in rows] == [f"class {k}" for k in range(12)]
    assert sum(int(row["images"]) for row in rows) == 200
    assert float(rows[3]["top5"]) == pytest.approx(100 * top5[labels == 3].mean(), abs=0.006)
    predictions = json.loads((tmp_path / "classification_predictions.json").read_text())
    assert len(predictions) == 200
    one = next(each for each in predictions if each["image_id"] == "17.jpg")
    assert one["classes"] == [f"class {k}" for k in order[17, :5]]
    assert one["scores"] == pytest.approx(scores[17, order[17, :5]].tolist())
    assert one["label"] == f"class {labels[17]}"


def test_top5_says_nothing_of_five_classes(dataset, caplog):
    caplog.set_level("INFO")
    images, outputs, _, _ = sample(10, 5)
    evaluator = build_evaluator(dataset(5))
    evaluator.process(images, outputs)
    assert set(evaluator.evaluate()["classification"]) == {"top1", "mean_class_top1"}
    assert "5 classes: no top-5" in caplog.text


def test_ranks_of_equal_scores_and_of_none():
    scores = torch.tensor([0.2, 0.5, 0.5, 0.1])
    assert [rank_of(scores, k) for k in range(4)] == [2, 0, 1, 3]
    constant = torch.zeros(7)
    assert [rank_of(constant, k) for k in range(7)] == list(range(7))  # no class wins for nothing
    assert rank_of(torch.tensor([float("nan"), 1.0, 2.0]), 2) == 3


def test_mistakes_are_one_line(dataset):
    evaluator = build_evaluator(dataset(12))
    images, outputs, _, _ = sample(2, 12)
    with pytest.raises(UserError, match="class_scores"):
        evaluator.process(images, [{"instances": 1}] * 2)
    with pytest.raises(UserError, match=r"scores \(3,\) classes"):
        evaluator.process(images, [{"class_scores": torch.zeros(3)}] * 2)
    with pytest.raises(UserError, match="without its label"):
        evaluator.process([{"image_id": 1}], outputs[:1])
    with pytest.raises(UserError, match="tasks"):
        build_evaluator(dataset(12), tasks=["bbox"])
