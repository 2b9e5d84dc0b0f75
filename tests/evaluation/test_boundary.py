"""Boundary IoU and the files of a semantic evaluation, against slow or independent code."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import binary_erosion

from d2dense.data import cityscapes
from d2dense.errors import UserError
from d2dense.evaluation import SemSegEvaluator, build_evaluator
from d2dense.evaluation.boundary import BoundaryCounts, boundary_iou, near_contour
from d2dense.evaluation.label_files import write_confusion
from tests.evaluation.samples import (
    cityscapes_images,
    cityscapes_semantic,
    feed,
    noisy_labels,
    one_hot,
    register,
)

NAME = "boundary_test"


def slow_boundary(mask, distance):
    """What a mask loses when it is eroded by 3x3 pixels ``distance`` times; outside is empty."""
    eroded = binary_erosion(mask, np.ones((3, 3)), iterations=distance, border_value=0)
    return mask & ~eroded


def slow_counts(truth, predicted, num_classes, ratio=0.02):
    """One mask at a time: agreement, truth, prediction (3, K)."""
    height, width = truth.shape
    distance = max(1, round(ratio * (height**2 + width**2) ** 0.5))
    valid = (truth >= 0) & (truth < num_classes)
    counts = np.zeros((3, num_classes), int)
    for k in range(num_classes):
        ours = slow_boundary((truth == k) & valid, distance)
        theirs = slow_boundary((predicted == k) & valid, distance)
        counts[:, k] = (ours & theirs).sum(), ours.sum(), theirs.sum()
    return counts


def blobs(rng, height, width, num_classes, void=0.1):
    """A map of rectangles of classes, some of them -1."""
    labels = np.zeros((height, width), int)
    for _ in range(15):
        y, x = rng.integers(0, height), rng.integers(0, width)
        h, w = rng.integers(1, height // 2), rng.integers(1, width // 2)
        labels[y : y + h, x : x + w] = rng.integers(0, num_classes)
        if rng.random() < void * 3:
            labels[y : y + h // 2, x : x + w // 2] = -1
    return labels


@pytest.mark.parametrize("size", [(40, 60), (63, 33), (5, 7), (1, 9), (150, 200)])
@pytest.mark.parametrize("seed", range(3))
def test_counts_equal_erosion_class_by_class(size, seed):
    rng = np.random.default_rng(seed)
    truth = blobs(rng, max(size[0], 4), max(size[1], 4), 6)[: size[0], : size[1]]
    predicted = noisy_labels(np.maximum(truth, 0), 6, rng)
    predicted[rng.random(size) < 0.02] = 6  # no class
    found = BoundaryCounts(truth, predicted, 6).counts
    np.testing.assert_array_equal(found, slow_counts(truth, predicted, 6))
    assert found[1].sum() > 0


def test_a_square_by_hand():
    labels = np.zeros((20, 20), int)
    labels[5:15, 5:15] = 1
    near = near_contour(labels, 2)
    assert near[5:15, 5:15].sum() == 100 - 36
    assert near[2, 10] == 0
    assert near[3, 10] == near[4, 10] == 1  # outside the square, near it
    assert near[0, 0] == near[1, 19] == near[19, 10] == 1  # the image's border
    assert near[2, 2] == 0


def test_scores_of_classes_that_are_absent_or_wrong():
    counts = np.array([[3, 0, 0], [4, 5, 0], [5, 0, 7]])
    np.testing.assert_array_equal(boundary_iou(counts), [0.5, 0.0, np.nan])


@pytest.fixture
def maps(tmp_path):
    rng, records = np.random.default_rng(3), []
    for k in range(3):
        labels = blobs(rng, 50 + k, 70, 4)
        path = tmp_path / f"{k}.png"
        Image.fromarray(np.where(labels < 0, 255, labels).astype(np.uint8)).save(path)
        record = {"file_name": f"{k}.jpg", "sem_seg_file_name": str(path), "image_id": f"town/{k}"}
        records.append((record, labels, noisy_labels(np.maximum(labels, 0), 4, rng)))
    names = ["road", "sky", "bus", "tree"]
    register(NAME, [r for r, *_ in records], stuff_classes=names, evaluator_type="sem_seg")
    return records


def test_the_metric_is_the_mean_over_classes_of_summed_counts(maps):
    evaluator = build_evaluator(NAME, boundary_iou=True)
    found = feed(evaluator, {r["image_id"]: guess for r, _, guess in maps}, "sem_seg")["sem_seg"]
    both, truth, predicted = sum(slow_counts(labels, guess, 4) for _, labels, guess in maps)
    expected = 100 * both / (truth + predicted - both)
    assert [found[f"bIoU-{n}"] for n in ("road", "sky", "bus", "tree")] == pytest.approx(expected)
    assert found["bIoU"] == pytest.approx(expected.mean())
    assert 0 < found["bIoU"] < found["mIoU"] < 100
    perfect = feed(evaluator, {r["image_id"]: np.maximum(t, 0) for r, t, _ in maps}, "sem_seg")
    assert perfect["sem_seg"]["bIoU"] == 100
    plain = feed(build_evaluator(NAME), {"town/0": maps[0][2]}, "sem_seg")["sem_seg"]
    assert not any(key.startswith("bIoU") for key in plain)


def test_the_confusion_matrix_as_table_and_picture(maps, tmp_path):
    evaluator = SemSegEvaluator(NAME, output_dir=str(tmp_path / "out"))
    for record, _, guess in maps:
        evaluator.process([record], [{"sem_seg": one_hot(guess, 4)}])
    found = evaluator.evaluate()["sem_seg"]
    with (tmp_path / "out" / "confusion_matrix.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header[1:] == ["road", "sky", "bus", "tree", "(none)"]
    assert [row[0] for row in rows] == header[1:5]
    counts = np.array([row[1:] for row in rows], int)
    expected = np.zeros((4, 5), int)
    for _, labels, guess in maps:
        for t, p in zip(labels.ravel(), guess.ravel()):
            expected[t, p] += t >= 0
    np.testing.assert_array_equal(counts, expected)
    right = counts.diagonal()
    union = counts.sum(1) + counts[:, :4].sum(0) - right
    assert [found[f"IoU-{name}"] for name in header[1:5]] == pytest.approx(100 * right / union)
    with Image.open(tmp_path / "out" / "confusion_matrix.png") as picture:
        assert min(picture.size) > 300
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_a_picture_of_many_classes_and_of_none_that_occur(tmp_path):
    write_confusion(tmp_path, np.zeros((40, 41), int), [f"class {k}" for k in range(40)])
    with Image.open(tmp_path / "confusion_matrix.png") as picture:
        assert 600 < max(picture.size) < 2000


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, [0, 1, 2, 3, 255]),
        ({"ignore_label": 11}, [0, 1, 2, 3, 11]),
        ({"reduce_zero_label": True}, [1, 2, 3, 4, 0]),
    ],
)
def test_submitted_maps_have_the_values_of_the_data_set(tmp_path, metadata, expected):
    truth = tmp_path / "truth.png"
    Image.fromarray(np.array([expected], np.uint8)).save(truth)
    record = {"file_name": "a.jpg", "sem_seg_file_name": str(truth), "image_id": "town/a"}
    register(NAME, [record], stuff_classes=list("abcd"), evaluator_type="sem_seg", **metadata)
    evaluator = build_evaluator(NAME, output_dir=str(tmp_path / "out"), submission=True)
    ignore = metadata.get("ignore_label", 255)
    evaluator.process([record], [{"sem_seg": torch.tensor([[0, 1, 2, 3, ignore]])}])
    found = np.asarray(Image.open(tmp_path / "out" / "submission" / "town" / "a.png"))
    assert found.tolist() == [expected]
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == 100
    assert sorted(path.name for path in (tmp_path / "out" / "submission" / "town").iterdir()) == [
        "a.png"
    ]


def test_cityscapes_submissions_are_what_its_own_tool_reads(shared_data, tmp_path, monkeypatch):
    gt_dir = shared_data / "cityscapes_mini" / "gtFine" / "train"
    register(NAME, gt_dir=str(gt_dir), **cityscapes.metadata("semantic"))
    out = tmp_path / "out"
    evaluator = build_evaluator(NAME, output_dir=str(out), boundary_iou=True, submission=True)
    images, rng = cityscapes_images(gt_dir), np.random.default_rng(0)
    guesses = [cityscapes_semantic(gt_dir, image, rng) for image in images]
    for image, guess in zip(images, guesses):
        evaluator.process([image], [{"sem_seg": one_hot(guess, 19)}])
    found = evaluator.evaluate()["sem_seg"]
    assert 0 < found["bIoU"] < 100
    assert sum(path.suffix == ".png" for path in (out / "submission").iterdir()) == len(images)
    assert (out / "confusion_matrix.csv").is_file()

    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    monkeypatch.setattr(official.args, "predictionPath", str(out / "submission"))
    monkeypatch.setattr(official.args, "predictionWalk", None)
    monkeypatch.setattr(official.args, "quiet", True)
    monkeypatch.setattr(official.args, "JSONOutput", False)
    truths = sorted(str(path) for path in gt_dir.glob("*/*_labelIds.png"))
    predictions = [official.getPrediction(official.args, path) for path in truths]
    scores = official.evaluateImgLists(predictions, truths, official.args)
    assert 100 * scores["averageScoreClasses"] == pytest.approx(found["IoU"])


def test_options_for_label_maps_only():
    register(NAME, evaluator_type="coco", json_file="a.json")
    for option in ("boundary_iou", "submission"):
        with pytest.raises(UserError, match=f"{option} is for label maps"):
            build_evaluator(NAME, **{option: True})
