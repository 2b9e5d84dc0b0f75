"""Saved predictions and annotations come back as outputs, and are drawn."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2dense.errors import UserError
from d2dense.inference import annotated, read_outputs
from tools import visualize_predictions


def code(mask: np.ndarray) -> dict:
    encoded = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {**encoded, "counts": encoded["counts"].decode()}


@pytest.fixture
def dataset(tmp_path):
    """Two black pictures of 120 x 300, one with a box of class 1; the category ids are 3 and 9."""
    for number in (5, 6):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.zeros((120, 300, 3), dtype=np.uint8))
    labels = np.full((120, 300), 255, dtype=np.uint8)
    labels[:5] = 1
    cv2.imwrite(str(tmp_path / "labels.png"), labels)
    size = {"height": 120, "width": 300}
    thing = {"bbox": [20, 60, 60, 100], "bbox_mode": 0, "category_id": 1}
    records = {
        "saved_things": [
            {"file_name": f"{tmp_path}/5.png", "image_id": 5, "annotations": [thing], **size},
            {"file_name": f"{tmp_path}/6.png", "image_id": 6, "annotations": [], **size},
        ],
        "saved_stuff": [
            {"file_name": f"{tmp_path}/5.png", "sem_seg_file_name": f"{tmp_path}/labels.png"}
        ],
    }
    for name, rows in records.items():
        DatasetCatalog.register(name, lambda rows=rows: rows)
        kind = name.removeprefix("saved_").rstrip("s")
        ids = {f"{kind}_dataset_id_to_contiguous_id": {3: 0, 9: 1}}
        MetadataCatalog.get(name).set(**{f"{kind}_classes": ["a", "b"]}, **ids)
    yield records
    for name in records:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_boxes_and_masks(dataset, tmp_path):
    mask = np.zeros((120, 300), dtype=bool)
    mask[4:9, 3:7] = True
    row = {"image_id": 5, "category_id": 9, "bbox": [3, 4, 4, 5], "score": 0.75}
    path = tmp_path / "results.json"
    polygon = [[3, 4, 7, 4, 7, 9, 3, 9]]
    rows = [{**row, "segmentation": code(mask)}, {**row, "segmentation": polygon, "score": 0.5}]
    path.write_text(json.dumps(rows))
    (image,) = read_outputs(path, "saved_things", {5: (120, 300), 6: (120, 300)}).items()
    assert image[0] == 5
    found = image[1]["instances"]
    assert found.pred_boxes.tensor.tolist() == [[3, 4, 7, 9]] * 2
    assert found.pred_classes.tolist() == [1, 1]
    assert found.scores.tolist() == [0.75, 0.5]
    assert (found.pred_masks.numpy() == mask).all()


def test_label_maps(dataset, tmp_path):
    mask = np.zeros((120, 300), dtype=bool)
    mask[:, :4] = True
    name = dataset["saved_stuff"][0]["file_name"]
    row = {"image_id": name, "file_name": name, "category_id": 9, "segmentation": code(mask)}
    path = tmp_path / "sem_seg_predictions.json"
    path.write_text(json.dumps([row]))
    ((_, output),) = read_outputs(path, "saved_stuff", {name: (120, 300)}).items()
    assert (output["sem_seg"].numpy() == np.where(mask, 1, -1)).all()
    with pytest.raises(UserError, match="120 x 300, its image 10 x 30"):
        read_outputs(path, "saved_stuff", {name: (10, 30)})
    nameless = {key: row[key] for key in ("category_id", "segmentation")}
    for wrong in ({**row, "segmentation": 1}, nameless):
        path.write_text(json.dumps([wrong]))
        with pytest.raises(UserError, match="expected image_id or file_name"):
            read_outputs(path, "saved_stuff", {name: (120, 300)})


def test_annotations(dataset):
    picture = np.zeros((120, 300, 3), dtype=np.uint8)
    truth = annotated(dataset["saved_things"][0], picture)["instances"]
    assert truth.pred_boxes.tensor.tolist() == [[20, 60, 60, 100]]
    assert truth.pred_classes.tolist() == [1]
    labels = annotated(dataset["saved_stuff"][0], picture)["sem_seg"].numpy()
    assert (labels[:5] == 1).all()
    assert (labels[5:] == -1).all()


def test_the_command_draws_both(dataset, tmp_path, capsys):
    path, out = tmp_path / "results.json", tmp_path / "drawn"
    row = {"image_id": 5, "category_id": 3, "bbox": [200, 60, 50, 40], "score": 0.75}
    path.write_text(json.dumps([row, {**row, "image_id": 6, "score": 0.25}]))
    arguments = ["--predictions", str(path), "--dataset", "saved_things", "--output", str(out)]
    assert visualize_predictions.main(arguments) == 0
    assert "2 of 2 pictures" in capsys.readouterr().out
    sheet = cv2.imread(str(out / "5.jpg"))
    assert sheet.shape == (120, 608, 3)
    left, right = sheet[:, :300].astype(int), sheet[:, 308:].astype(int)
    edges = {"predicted": np.s_[70:90, 198:203], "annotated": np.s_[70:90, 18:23]}
    shown = {key: (left[e].max() > 100, right[e].max() > 100) for key, e in edges.items()}
    assert shown == {"predicted": (True, False), "annotated": (False, True)}
    empty = cv2.imread(str(out / "6.jpg")).astype(int)
    assert empty[:, :298].max() < 30  # below the threshold, and no annotation


def test_one_line_without_a_data_set(tmp_path):
    with pytest.raises(UserError, match="which dataset"):
        visualize_predictions.main(["--predictions", "x.json", "--output", str(tmp_path)])
