"""Label maps that count classes from 1: ADE20K, and folders by config."""

from __future__ import annotations

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from PIL import Image

from d2dense.data import builtin, check, datasets, mappers
from d2dense.data.reading import SampleError, read_sem_seg, reduce_zero_label
from d2dense.errors import UserError
from d2dense.evaluation import build_evaluator

NAMES = ("ade20k_sem_seg_train", "ade20k_sem_seg_val")


@pytest.fixture
def ade20k(shared_data):
    builtin.register_ade20k(shared_data / "ade20k_mini")
    yield shared_data / "ade20k_mini" / "ADEChallengeData2016"
    builtin.register_ade20k(builtin.dataset_root())


def test_every_label_by_hand():
    labels = np.array([[0, 1, 2], [150, 254, 255]], np.uint8)
    assert reduce_zero_label(labels, 255).tolist() == [[255, 0, 1], [149, 253, 255]]
    assert reduce_zero_label(labels, 255).dtype == np.uint8
    assert reduce_zero_label(labels.astype(np.int32), -1).tolist() == [[-1, 0, 1], [149, 253, 254]]


def test_original_ade20k_equals_detectron2s_converted_labels(ade20k):
    records = datasets.load("ade20k_sem_seg_val")
    assert len(records) == 2
    for record in records:
        image = np.asarray(Image.open(record["file_name"]))
        found = read_sem_seg(record, image, 255)
        name = record["sem_seg_file_name"].replace("annotations", "annotations_detectron2")
        assert np.array_equal(found, np.asarray(Image.open(name)))
        assert found.min() >= 0
        assert sorted(np.unique(found))[-2] < 150


def test_ade20k_has_its_150_names(ade20k):
    lines = (ade20k / "objectInfo150.txt").read_text().splitlines()[1:]
    synonyms = [line.split("\t")[-1] for line in lines if line.strip()]
    found = MetadataCatalog.get("ade20k_sem_seg_val").stuff_classes
    assert len(found) == len(synonyms) == len(set(found)) == 150
    for name, line in zip(found, synonyms):
        assert name.split(",")[0] in line


def test_right_predictions_on_ade20k_score_100_percent(ade20k):
    evaluator = build_evaluator("ade20k_sem_seg_val")
    for record in datasets.load("ade20k_sem_seg_val"):
        labels = np.asarray(Image.open(record["sem_seg_file_name"])).astype(np.int64)
        guess = np.where(labels == 0, 7, labels - 1)  # what is predicted at 0 does not count
        scores = np.eye(150, dtype=np.float32)[guess].transpose(2, 0, 1)
        evaluator.process([record], [{"sem_seg": scores}])
    results = evaluator.evaluate()["sem_seg"]
    assert results["mIoU"] == results["pACC"] == 100
    assert check.check_dataset("ade20k_sem_seg_val").ok


def test_without_the_files_the_message_names_the_folder():
    with pytest.raises(UserError, match=r"ade20k_sem_seg_train.*DETECTRON2_DATASETS"):
        datasets.load("ade20k_sem_seg_train")


@pytest.fixture
def folder(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    labels = np.tile(np.array([0, 1, 2, 3], np.uint8), (4, 1))
    Image.fromarray(labels).save(tmp_path / "labels" / "a.png")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "images" / "a.jpg")
    return {
        "images": str(tmp_path / "images"),
        "labels": str(tmp_path / "labels"),
        "classes": ["x", "y", "z"],
        "reduce_zero_label": True,
    }


def test_folder_by_config(folder):
    name = datasets.register_custom({"VAL": {k.upper(): v for k, v in folder.items()}})["val"]
    record = datasets.load(name)[0]
    mapper = mappers.SemanticMapper(is_train=True, augmentations=[])
    assert mapper(record)["sem_seg"][0].tolist() == [255, 0, 1, 2]
    report = check.check_dataset(name)
    assert report.ok, report.text()
    evaluator = build_evaluator(name)
    evaluator.process([record], [{"sem_seg": np.tile([0, 0, 1, 1], (4, 1))}])
    found = evaluator.evaluate()["sem_seg"]
    assert found["pACC"] == pytest.approx(100 * 2 / 3)


def test_labels_beyond_the_classes_are_named(folder):
    name = datasets.register_custom({"val": {**folder, "classes": ["x", "y"]}})["val"]
    mapper = mappers.SemanticMapper(is_train=True, augmentations=[])
    with pytest.raises(SampleError, match="has class 2, but its dataset has the classes 0 to 1"):
        mapper(datasets.load(name)[0])


def test_entries_that_contradict_each_other(folder):
    with pytest.raises(UserError, match="reduce_zero_label = 'yes', expected true or false"):
        datasets.register_custom({"val": {**folder, "reduce_zero_label": "yes"}})
    with pytest.raises(UserError, match="'reduce_zero_label' is only for sem_seg"):
        datasets.register_custom(
            {"val": {"json": "a.json", "images": "b", "reduce_zero_label": True}}
        )
