"""Selecting, writing and drawing predictions."""

from __future__ import annotations

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data.catalog import Metadata
from pycocotools.coco import COCO

from d2dense.errors import UserError
from d2dense.inference import CocoResults, class_indices, draw, select, to_coco


def test_select_by_score_class_and_rank(output, metadata):
    def scores(**choice) -> list[float]:
        return [round(s, 2) for s in select(output, **choice)["instances"].scores.tolist()]

    assert scores() == [0.9, 0.6, 0.3, 0.05]
    assert scores(score_threshold=0.3) == [0.9, 0.6, 0.3]
    assert scores(top_k=2) == [0.9, 0.6]
    assert scores(classes=class_indices(["cat", "bird"], metadata)) == [0.3, 0.05]
    assert scores(classes=class_indices(["dog"], metadata), top_k=1, score_threshold=0.7) == [0.9]
    assert scores(classes=class_indices(["sky"], metadata)) == []
    assert len(output["instances"]) == 4  # the original is as it was


def test_select_panoptic_segments(metadata):
    segments = torch.zeros(2, 2, dtype=torch.int32)
    infos = [
        {"id": 1, "isthing": True, "category_id": 1, "score": 0.4},
        {"id": 2, "isthing": False, "category_id": 1},
    ]
    output = {"panoptic_seg": (segments, infos)}

    def ids(**choice) -> list[int]:
        return [info["id"] for info in select(output, **choice)["panoptic_seg"][1]]

    assert ids() == [1, 2]
    assert ids(score_threshold=0.5) == [2]
    assert ids(classes=class_indices(["dog"], metadata)) == [1]
    assert ids(classes=class_indices(["sea"], metadata)) == [2]


def test_class_names_to_indices(metadata):
    assert class_indices(["bird", "sea"], metadata) == {"thing": {2}, "stuff": {1}}
    with pytest.raises(UserError, match="did you mean 'bird'"):
        class_indices(["brid"], metadata)
    with pytest.raises(UserError, match="there are cat, dog"):
        class_indices(["xyzzy"], metadata)
    with pytest.raises(UserError, match="names of this model are unknown"):
        class_indices(["cat"], Metadata(name="empty"))


# COCO json ----------------------------------------------------------------------------------------


def test_coco_file_is_read_by_pycocotools(output, metadata, tmp_path):
    results = CocoResults(metadata)
    results.add("a.jpg", 20, 30, output)
    results.add("b.jpg", 40, 50, {})
    results.write(tmp_path / "deep" / "predictions.json")
    coco = COCO(str(tmp_path / "deep" / "predictions.json"))
    assert [image["file_name"] for image in coco.loadImgs([1, 2])] == ["a.jpg", "b.jpg"]
    assert {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())} == {
        17: "cat",
        18: "dog",
        90: "bird",
    }
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    assert [a["category_id"] for a in annotations] == [17, 18, 18, 90]
    assert annotations[1]["bbox"] == [5, 5, 20, 10]
    assert annotations[1]["area"] == 200
    assert annotations[1]["score"] == pytest.approx(0.9)
    for annotation, mask in zip(annotations, output["instances"].pred_masks.numpy()):
        assert np.array_equal(coco.annToMask(annotation).astype(bool), mask)
    # the annotations alone are a results list for the evaluation of the same images
    loaded = coco.loadRes(json.loads(json.dumps(annotations)))
    assert len(loaded.getAnnIds()) == 4
    assert mask_util.area(annotations[2]["segmentation"]) == 16


def test_coco_without_names_and_masks(output):
    output["instances"].remove("pred_masks")
    entry = {"file_name": "a.jpg", "height": 20, "width": 30, "output": output}
    content = to_coco([entry], Metadata(name="empty"))
    assert content["categories"][1] == {"id": 2, "name": "class 1"}
    assert content["annotations"][0]["area"] == 100
    assert "segmentation" not in content["annotations"][0]


# Drawing ------------------------------------------------------------------------------------------


@pytest.fixture
def grey() -> np.ndarray:
    return np.full((20, 30, 3), 128, np.uint8)


def test_draw_instances_changes_only_their_boxes(output, metadata, grey):
    before = grey.copy()
    drawn = draw(grey, output, metadata, labels=False)
    assert np.array_equal(grey, before)
    assert drawn.shape == grey.shape
    assert drawn.dtype == np.uint8
    changed = (drawn != grey).any(axis=2)
    inside = output["instances"].pred_masks.numpy().any(axis=0)
    assert changed[inside].mean() > 0.95
    assert not changed[17:, :15].any()
    assert (draw(grey, output, metadata) != drawn).any()  # labels are written


def test_draw_nothing(output, metadata, grey):
    empty = {"instances": output["instances"][[]]}
    assert np.array_equal(draw(grey, empty, metadata), grey)
    assert np.array_equal(draw(grey, {}, metadata), grey)


def test_draw_boxes_without_masks_and_without_names(output, grey):
    output["instances"].remove("pred_masks")
    drawn = draw(grey, output, Metadata(name="empty"), labels=False)
    assert (drawn[5, 5:25] != 128).any(axis=1).all()  # upper edge of the second box
    assert (drawn[8, 13] == 128).all()  # its inside


def test_draw_semantic_colours_every_class(metadata, grey):
    scores = torch.zeros(2, 20, 30)
    scores[1, :, 15:] = 1
    drawn = draw(grey, {"sem_seg": scores}, metadata, labels=False, alpha=1.0)
    left, right = drawn[:, :15].reshape(-1, 3), drawn[:, 15:].reshape(-1, 3)
    assert len(np.unique(left, axis=0)) == len(np.unique(right, axis=0)) == 1
    assert not np.array_equal(left[0], right[0])


def test_draw_panoptic_follows_the_segments(metadata, grey):
    segments = torch.zeros(20, 30, dtype=torch.int32)
    segments[:, :10], segments[:, 20:] = 1, 2
    infos = [{"id": 1, "isthing": False, "category_id": 0}]
    drawn = draw(grey, {"panoptic_seg": (segments, infos)}, metadata, labels=False)
    changed = (drawn != grey).any(axis=(0, 2))
    assert changed[:10].all()
    assert not changed[10:].any()


def test_draw_panoptic_without_segment_list(metadata, grey):
    metadata.label_divisor = 100
    segments = torch.full((20, 30), 102, dtype=torch.int32)
    drawn = draw(grey, {"panoptic_seg": (segments, None)}, metadata)
    assert (drawn != grey).any(axis=2).mean() > 0.9


def test_data_sets_own_colours_are_used(output, metadata, grey):
    metadata.thing_colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    drawn = draw(grey, output, metadata, labels=False, alpha=1.0)
    assert drawn[9, 15].tolist() == [0, 255, 0]
    assert drawn[18, 25].tolist() == [255, 0, 0]  # blue in BGR
