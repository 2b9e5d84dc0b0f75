"""Label maps of models side by side, and similarities of class kernels."""

import csv

import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from PIL import Image
from torch import nn

from d2dense.analyses.kernels import class_kernels, kernel_report
from d2dense.analyses.label_maps import compare_label_maps
from d2dense.errors import UserError


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
    def all_zero(image):
        scores = torch.zeros(3, *image.shape[:2])
        scores[0] = 1
        return {"sem_seg": scores}

    def right(image):
        labels = torch.zeros(image.shape[:2], dtype=torch.int64)
        labels[:, 4:] = 1
        return {"sem_seg": labels}

    metadata = Metadata(name="halves", stuff_classes=["left", "right", "absent"])
    models = {"zero": all_zero, "right": right}
    picture, table = compare_label_maps(models, [record, record], metadata, tmp_path / "out")
    width, height = Image.open(picture).size
    assert width > height  # four columns, two rows
    header, *rows = rows_of(table)
    assert header == ["image", "model", "mIoU"]
    # of 16 pixels left and 16 right: IoU 1/2 and 0
    assert [(name, float(score)) for _, name, score in rows] == [
        ("zero", 25.0),
        ("right", 100.0),
    ] * 2


def test_a_data_set_without_label_maps_is_one_line(record, tmp_path):
    metadata = Metadata(name="boxes", stuff_classes=["a"])
    del record["sem_seg_file_name"]
    with pytest.raises(UserError, match="'boxes' has no label maps"):
        compare_label_maps({}, [record], metadata, tmp_path)


def test_similarity_is_the_cosine_and_names_the_closest_class(tmp_path):
    kernels = torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, -1.0]])
    _, table = kernel_report(kernels, ["a", "b"], tmp_path)
    header, *rows = rows_of(table)
    assert header == ["class", "most alike", "a", "b", "2"]
    assert [row[:2] for row in rows] == [["a", "b"], ["b", "a"], ["2", "a"]]
    found = np.array([row[2:] for row in rows], dtype=float)
    np.testing.assert_allclose(found, [[1, 0.6, 0], [0.6, 1, -0.8], [0, -0.8, 1]], atol=1e-4)


def test_kernels_are_found_at_the_usual_place_or_by_name():
    model = nn.Module()
    model.sem_seg_head = nn.Module()
    model.sem_seg_head.classifier = nn.Conv2d(6, 4, 1)
    model.other = nn.Linear(3, 2)
    assert class_kernels(model).shape == (4, 6)
    assert torch.equal(class_kernels(model, "other"), model.other.weight)
    with pytest.raises(UserError, match="no classifier othr; did you mean 'other'"):
        class_kernels(model, "othr")
