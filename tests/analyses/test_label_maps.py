"""Label maps of models side by side, and similarities of class kernels."""

import csv
import json

import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from PIL import Image
from torch import nn

from d2dense.analyses.kernels import class_kernels, kernel_report
from d2dense.analyses.label_maps import compare_label_maps
from d2dense.errors import UserError
from tests.analyses.tiny import RETINANET, build


def rows_of(path):
    with path.open() as file:
        return list(csv.reader(file))


@pytest.fixture
def record(tmp_path):
    """A picture whose left half is class 0, right half class 1, last row no class."""
    labels = np.zeros((5, 8), np.uint8)
    labels[:, 4:] = 1
    labels[4] = 255
    Image.fromarray(labels).save(tmp_path / "labels.png")
    Image.fromarray(np.full((5, 8, 3), 90, np.uint8)).save(tmp_path / "image.png")
    return {
        "file_name": str(tmp_path / "image.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
    }


def test_a_row_per_image_a_column_and_a_score_per_model(record, tmp_path):
    all_zero = torch.zeros(3, 5, 8)
    all_zero[0] = 1  # scores
    right = torch.zeros(5, 8, dtype=torch.int64)
    right[:, 4:] = 1
    metadata = Metadata(name="halves", stuff_classes=["left", "right", "absent"])
    found = {"zero": [{"sem_seg": all_zero}] * 2, "right": [{"sem_seg": right}] * 2}
    files = compare_label_maps(found, [record, record], metadata, tmp_path / "out")
    picture, table, summary = files
    width, height = Image.open(picture).size
    assert width > height  # four columns, two rows
    header, *rows = rows_of(table)
    assert header == ["image", "model", "mIoU"]
    # of 16 pixels left and 16 right: IoU 1/2 and 0
    assert [(name, float(score)) for _, name, score in rows] == [
        ("zero", 25.0),
        ("right", 100.0),
    ] * 2
    means = json.loads(summary.read_text())
    assert means == {"images": 2, "mean_mIoU": {"zero": 25, "right": 100}}


def test_a_data_set_without_label_maps_is_one_line(record, tmp_path):
    metadata = Metadata(name="boxes", stuff_classes=["a"])
    del record["sem_seg_file_name"]
    with pytest.raises(UserError, match="'boxes' has no label maps"):
        compare_label_maps({}, [record], metadata, tmp_path)


def test_similarity_is_the_cosine_and_names_the_closest_class(tmp_path):
    kernels = torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, -1.0]])
    _, table, summary = kernel_report(kernels, ["a", "b"], tmp_path)
    header, *rows = rows_of(table)
    assert header == ["class", "most alike", "a", "b", "no object"]
    assert [row[:2] for row in rows] == [["a", "b"], ["b", "a"], ["no object", "a"]]
    mean = json.loads(summary.read_text())["mean_similarity"]
    assert mean == pytest.approx((0.6 + 0 - 0.8) / 3)
    found = np.array([row[2:] for row in rows], dtype=float)
    np.testing.assert_allclose(found, [[1, 0.6, 0], [0.6, 1, -0.8], [0, -0.8, 1]], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "layer", "rows"),
    [
        ("CEDNet/mask_rcnn_cednet_tiny_shapes", "roi_heads.box_predictor.cls_score", 11),
        ("FSCascade/fscascade_tiny_shapes", "roi_heads.box_predictor.2.cls_score", 11),
        ("CoDETR/co_dino_tiny_shapes", "heads.classes.1", 10),
        ("CEDNet/mask2former_cednet_tiny_shapes", "decoder.classes", 11),
        ("CEDNet/upernet_cednet_tiny_shapes", "sem_seg_head.classifier", 15),
        ("CEDNet/classifier_cednet_tiny_objects", "network.heads.1.linear", 10),
    ],
)
def test_kernels_of_every_kind_of_model_are_those_of_the_last_layer(name, layer, rows):
    model = build(name)
    expected = model.get_submodule(layer).weight.flatten(1)
    assert len(expected) == rows
    assert torch.equal(class_kernels(model), expected)


def test_kernels_of_anchors_are_joined_by_class():
    model = build(RETINANET)
    weight = model.head.cls_score.weight  # six anchors, anchor after anchor the ten classes
    assert len(weight) == 60
    found = class_kernels(model)
    assert found.shape == (10, 6 * weight[0].numel())
    third = torch.cat([weight[anchor * 10 + 3].flatten() for anchor in range(6)])
    assert torch.equal(found[3], third)


def test_kernels_are_found_at_the_usual_place_or_by_name():
    model = nn.Module()
    model.sem_seg_head = nn.Module()
    model.sem_seg_head.classifier = nn.Conv2d(6, 4, 1)
    model.other = nn.Linear(3, 2)
    assert class_kernels(model).shape == (4, 6)
    assert torch.equal(class_kernels(model, "other"), model.other.weight)
    with pytest.raises(UserError, match="no classifier othr; did you mean 'other'"):
        class_kernels(model, "othr")
