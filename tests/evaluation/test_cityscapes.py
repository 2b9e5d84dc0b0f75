"""Cityscapes' measures against cityscapesScripts' own evaluation of png files."""

import logging

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from d2dense.data import cityscapes as data
from d2dense.errors import UserError
from d2dense.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    build_evaluator,
)
from d2dense.evaluation import cityscapes as measure
from tests.evaluation.samples import (
    cityscapes_images,
    cityscapes_instances,
    cityscapes_semantic,
    make_instances,
    one_hot,
    register,
    truth_file,
    unregister,
)

NAME = "evaluation_test_cityscapes"
LABELS = [label for label, _, _ in data.STUFF]
INSTANCE_LABELS = [label for label, _, _ in data.THINGS]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    # cityscapesScripts uses a name that newer versions of numpy do not have
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    yield
    unregister(NAME)


def draw_scene(folder, stem, seed):
    """Write label and instance maps with everything that is special: groups, caravans, trailers,
    tiny instances, tiny groups, unlabeled areas."""
    rng = np.random.default_rng(seed)
    labels = np.full((120, 160), 7, dtype=np.uint8)
    ids = np.full(labels.shape, 7, dtype=np.uint16)
    kinds = [4, 5, 11, 21, 23, 24, 25, 26, 26, 26, 27, 29, 30, 33, 33, 24, 26, 10, 3, 0]
    for number, label in enumerate([*kinds, *kinds]):
        height, width = rng.integers(4, 40, size=2)
        y, x = rng.integers(0, 110), rng.integers(0, 150)
        area = (slice(y, y + height), slice(x, x + width))
        labels[area] = label
        is_instance = label >= 24 and rng.random() < 0.8
        ids[area] = label * 1000 + number if is_instance else label
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(folder / f"{stem}_gtFine_labelIds.png")
    Image.fromarray(ids).save(folder / f"{stem}_gtFine_instanceIds.png")


@pytest.fixture(params=["drawn", "real"])
def gt_dir(request, tmp_path):
    if request.param == "drawn":
        for k in range(4):
            draw_scene(tmp_path / "gt" / "town", f"town_00000{k}_000019", seed=k)
        return tmp_path / "gt"
    return request.getfixturevalue("shared_data") / "cityscapes_mini" / "gtFine" / "train"


def official_semantic(gt_dir, images, maps, folder):
    """Scores by cityscapesScripts; maps of train ids are written as label ids."""
    script = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    predicted, truth = [], []
    for k, (image, classes) in enumerate(zip(images, maps)):
        predicted.append(str(folder / f"{k}.png"))
        Image.fromarray(np.array(LABELS, dtype=np.uint8)[classes]).save(predicted[-1])
        truth.append(str(truth_file(gt_dir, image, "labelIds")))
    script.args.quiet, script.args.JSONOutput = True, False
    return script.evaluateImgLists(predicted, truth, script.args)


def official_instances(gt_dir, images, predictions, folder):
    script = pytest.importorskip("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
    lists, truth = [], []
    for k, (image, found) in enumerate(zip(images, predictions)):
        lines = []
        for i in range(len(found)):
            Image.fromarray(found.pred_masks[i].numpy().astype(np.uint8) * 255).save(
                folder / f"{k}_{i}.png"
            )
            label = INSTANCE_LABELS[int(found.pred_classes[i])]
            lines.append(f"{k}_{i}.png {label} {float(found.scores[i])!r}\n")
        (folder / f"{k}.txt").write_text("".join(lines))
        lists.append(str(folder / f"{k}.txt"))
        truth.append(str(truth_file(gt_dir, image, "instanceIds")))
    script.args.quiet, script.args.JSONOutput = True, False
    script.args.predictionPath = str(folder)
    script.args.gtInstancesFile = str(folder / "truth.json")
    return script.evaluateImgLists(lists, truth, script.args)["averages"]


def same(found, expected):
    assert 100 * expected == pytest.approx(found, abs=1e-9, nan_ok=True)


def test_label_maps_equal_cityscapesscripts(gt_dir, tmp_path):
    images, rng = cityscapes_images(gt_dir), np.random.default_rng(3)
    maps = [cityscapes_semantic(gt_dir, image, rng) for image in images]
    register(NAME, gt_dir=str(gt_dir), **data.metadata("semantic"))
    evaluator = build_evaluator(NAME)
    assert type(evaluator) is CityscapesSemSegEvaluator
    for image, classes in zip(images, maps):
        evaluator.process([image], [{"sem_seg": one_hot(classes, 19)}])
    found = evaluator.evaluate()["sem_seg"]
    expected = official_semantic(gt_dir, images, maps, tmp_path)
    assert 0 < found["iIoU"] < 100
    same(found["IoU"], expected["averageScoreClasses"])
    same(found["iIoU"], expected["averageScoreInstClasses"])
    same(found["IoU_sup"], expected["averageScoreCategories"])
    same(found["iIoU_sup"], expected["averageScoreInstCategories"])
    for name in measure.CLASSES:
        same(found[f"IoU-{name}"], expected["classScores"][name])
    for name in measure.INSTANCE_CLASSES:
        same(found[f"iIoU-{name}"], expected["classInstScores"][name])
    for name in measure.CATEGORIES:
        same(found[f"IoU_sup-{name}"], expected["categoryScores"][name])
    for name in ("human", "vehicle"):
        same(found[f"iIoU_sup-{name}"], expected["categoryInstScores"][name])


def test_instances_equal_cityscapesscripts(gt_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # cityscapesScripts leaves matches.json in the current folder
    images, rng = cityscapes_images(gt_dir), np.random.default_rng(5)
    predictions = [cityscapes_instances(gt_dir, image, rng) for image in images]
    register(NAME, gt_dir=str(gt_dir), **data.metadata("instance"))
    evaluator = build_evaluator(NAME)
    assert type(evaluator) is CityscapesInstanceEvaluator
    for image, found in zip(images, predictions):
        evaluator.process([image], [{"instances": found}])
    found = evaluator.evaluate()["segm"]
    expected = official_instances(gt_dir, images, predictions, tmp_path)
    assert 0 < found["AP"] < found["AP50"] < 100
    same(found["AP"], expected["allAp"])
    same(found["AP50"], expected["allAp50%"])
    for name in measure.INSTANCE_CLASSES:
        same(found[f"AP-{name}"], expected["classes"][name]["ap"])
        same(found[f"AP50-{name}"], expected["classes"][name]["ap50%"])


def test_unpredicted_images_count_as_empty(gt_dir, caplog):
    images, rng = cityscapes_images(gt_dir), np.random.default_rng(7)
    first = cityscapes_instances(gt_dir, images[0], rng)
    register(NAME, gt_dir=str(gt_dir), **data.metadata("instance"))
    evaluator = CityscapesInstanceEvaluator(NAME)
    evaluator.process([images[0]], [{"instances": first}])
    with caplog.at_level(logging.WARNING):
        found = evaluator.evaluate()["segm"]
    assert f"{len(images) - 1} of {len(images)} images were not predicted" in caplog.text
    evaluator.process(images[1:], [{"instances": first[:0]}] * (len(images) - 1))
    assert evaluator.evaluate()["segm"] == pytest.approx(found, nan_ok=True)


@pytest.fixture
def one_car(tmp_path):
    """An image of one car, 20x20 px, with a group of cars and void beside it."""
    ids = np.full((60, 60), 7, dtype=np.uint16)
    ids[0:20, 0:20], ids[0:20, 30:60], ids[40:60] = 26001, 26, 4
    folder = tmp_path / "gt" / "town"
    folder.mkdir(parents=True)
    Image.fromarray(ids).save(folder / "town_000000_000000_gtFine_instanceIds.png")
    register(NAME, gt_dir=str(tmp_path / "gt"), **data.metadata("instance"))
    return ids


@pytest.mark.parametrize(
    ("areas", "scores", "expected"),
    [
        ([], [], 0),
        ([(0, 20, 0, 20)], [0.5], 100),
        # a false alarm that scores lower: the curve falls to one half after the object is found
        ([(0, 20, 0, 20), (22, 38, 0, 20)], [0.9, 0.5], 100),
        # and one that scores higher: the area below the line from precision 1 (and 0) to 1/2
        ([(0, 20, 0, 20), (22, 38, 0, 20)], [0.5, 0.9], 25),
        ([(0, 20, 0, 20), (0, 20, 32, 55), (42, 60, 0, 60)], [0.5, 0.9, 0.9], 100),  # group, void
        ([(42, 60, 0, 60)], [0.9], 0),  # nothing but forgiven predictions
        ([(0, 0, 0, 0)], [0.9], 0),  # an empty mask
    ],
)  # fmt: skip
def test_instances_by_hand(one_car, areas, scores, expected):
    masks = np.zeros((len(areas), 60, 60), dtype=bool)
    for mask, (top, bottom, left, right) in zip(masks, areas):
        mask[top:bottom, left:right] = True
    boxes, car = np.tile([0, 0, 1, 1], (len(areas), 1)), [2] * len(areas)
    evaluator = CityscapesInstanceEvaluator(NAME)
    images = cityscapes_images(evaluator.gt_dir)
    prediction = make_instances((60, 60), boxes, scores, car, masks)
    evaluator.process(images, [{"instances": prediction}])
    found = evaluator.evaluate()["segm"]
    assert found["AP50-car"] == pytest.approx(expected)
    assert np.isnan(found["AP-bus"])
    assert found["AP"] == pytest.approx(expected)


def test_nothing_else_is_written(gt_dir, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("TMPDIR", str(here))
    image = cityscapes_images(gt_dir)[0]
    register(NAME, gt_dir=str(gt_dir), **data.metadata("semantic"))
    classes = cityscapes_semantic(gt_dir, image, np.random.default_rng(0))
    for folder, files in ((None, []), ("out", ["confusion_matrix.csv", "confusion_matrix.png"])):
        evaluator = CityscapesSemSegEvaluator(NAME, output_dir=folder)
        evaluator.process([image], [{"sem_seg": torch.as_tensor(classes)}])
        assert evaluator.evaluate()["sem_seg"]["IoU"] > 0
        assert sorted(path.name for path in here.rglob("*.*")) == files


def test_users_mistakes(one_car, tmp_path):
    evaluator = CityscapesInstanceEvaluator(NAME)
    image = cityscapes_images(evaluator.gt_dir)[0]
    boxes_only = Instances((60, 60), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
    with pytest.raises(UserError, match="predicts no masks"):
        evaluator.process([image], [{"instances": boxes_only}])
    small = make_instances((30, 30), [[0, 0, 9, 9]], [0.5], [2], np.ones((1, 30, 30)))
    with pytest.raises(UserError, match=r"30x30 .* 60x60"):
        evaluator.process([image], [{"instances": small}])
    wrong_class = make_instances((60, 60), [[0, 0, 9, 9]], [0.5], [8], np.ones((1, 60, 60)))
    with pytest.raises(UserError, match=r"class 8.*8 classes"):
        evaluator.process([image], [{"instances": wrong_class}])
    with pytest.raises(UserError, match="file names"):
        evaluator.process([{"file_name": "town/picture.png"}], [{"instances": small}])
    register(NAME, gt_dir=str(tmp_path / "gt"), thing_classes=["person", "bicyle"])
    with pytest.raises(UserError, match="did you mean 'bicycle'"):
        CityscapesInstanceEvaluator(NAME)
    register(NAME, gt_dir=str(tmp_path / "absent"), **data.metadata("semantic"))
    with pytest.raises(UserError, match="not a folder"):
        CityscapesSemSegEvaluator(NAME)
