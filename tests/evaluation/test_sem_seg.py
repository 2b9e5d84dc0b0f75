"""mIoU and its companions against a slow loop over pixels."""

import json
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image

from d2dense.data import read_label_map
from d2dense.data.folders import load_semantic_folder
from d2dense.errors import UserError
from d2dense.evaluation import SemSegEvaluator, build_evaluator
from d2dense.evaluation.sem_seg import class_map
from tests.evaluation.samples import feed, noisy_labels, one_hot, register, unregister

NAME = "evaluation_test_sem_seg"


@pytest.fixture(autouse=True)
def clean():
    yield
    unregister(NAME)


def slow_scores(pairs, names, ignore):
    """Scores from pairs of (truth, prediction) maps, pixel by pixel."""
    counts = {}
    for truth, predicted in pairs:
        for t, p in zip(truth.reshape(-1).tolist(), predicted.reshape(-1).tolist()):
            if t != ignore:
                counts[t, p] = counts.get((t, p), 0) + 1
    result, ious, accuracies, weighted, total, right = {}, [], [], 0, sum(counts.values()), 0
    for k, name in enumerate(names):
        same = counts.get((k, k), 0)
        annotated = sum(n for (t, _), n in counts.items() if t == k)
        predicted = sum(n for (_, p), n in counts.items() if p == k)
        right += same
        if not annotated:
            result[f"IoU-{name}"] = result[f"ACC-{name}"] = math.nan
            continue
        ious.append(same / (annotated + predicted - same))
        accuracies.append(same / annotated)
        weighted += ious[-1] * annotated / total
        result[f"IoU-{name}"], result[f"ACC-{name}"] = 100 * ious[-1], 100 * accuracies[-1]
    result["mIoU"], result["mACC"] = 100 * sum(ious) / len(ious), 100 * np.mean(accuracies)
    result["fwIoU"], result["pACC"] = 100 * weighted, 100 * right / total
    return result


def folder_of(shared_data, which):
    """Return (image folder, label folder, class names, ignore label)."""
    if which == "camvid":
        root = shared_data / "camvid_mini"
        names = json.loads((root / "classes.json").read_text())
        names = names["classes"] if isinstance(names, dict) else names
        return root / "images/val", root / "labels/val", names[:11], 11
    root = shared_data / "ade20k_mini" / "ADEChallengeData2016"
    names = [str(k) for k in range(150)]
    return root / "images/validation", root / "annotations_detectron2/validation", names, 255


@pytest.mark.parametrize("which", ["camvid", "ade20k"])
def test_equals_slow_loop(shared_data, which):
    images, labels, names, ignore = folder_of(shared_data, which)
    records = load_semantic_folder(str(images), str(labels), ignore_label=ignore)[:4]
    register(NAME, records, evaluator_type="sem_seg", stuff_classes=names, ignore_label=ignore)
    rng, predictions, pairs = np.random.default_rng(0), {}, []
    for k, record in enumerate(records):
        truth = read_label_map(record["sem_seg_file_name"])
        guess = noisy_labels(truth, len(names), rng)
        pairs.append((truth, guess))
        # scores and integer maps mean the same
        predictions[record["image_id"]] = (
            one_hot(guess, len(names)) if k % 2 else torch.as_tensor(guess, dtype=torch.int32)
        )
    evaluator = build_evaluator(NAME)
    found = feed(evaluator, predictions, "sem_seg")["sem_seg"]
    expected = slow_scores(pairs, names, ignore)
    assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert 20 < found["mIoU"] < 99
    # few enough pairs that an evaluation of thousands of images stays small
    assert all(len(r["confusion"].pairs) < 1000 for r in evaluator._records.values())


def test_equals_detectron2(shared_data, monkeypatch):
    """Where Detectron2's own evaluator can run (its loader needs numpy 1)."""
    from detectron2.evaluation import sem_seg_evaluation

    images, labels, names, ignore = folder_of(shared_data, "camvid")
    records = load_semantic_folder(str(images), str(labels), ignore_label=ignore)[:3]
    register(NAME, records, stuff_classes=names, ignore_label=ignore)
    monkeypatch.setattr(sem_seg_evaluation, "load_image_into_numpy_array", None, raising=False)
    theirs = sem_seg_evaluation.SemSegEvaluator(
        NAME, distributed=False, sem_seg_loading_fn=lambda f, dtype: np.array(Image.open(f), dtype)
    )
    theirs.reset()
    ours, rng = SemSegEvaluator(NAME), np.random.default_rng(1)
    for record in records:
        guess = noisy_labels(read_label_map(record["sem_seg_file_name"]), len(names), rng)
        output = [{"sem_seg": one_hot(guess, len(names))}]
        ours.process([record], output)
        theirs.process([record], output)
    expected = theirs.evaluate()["sem_seg"]
    found = ours.evaluate()["sem_seg"]
    assert {key: expected[key] for key in found} == pytest.approx(found, abs=1e-9, nan_ok=True)


@pytest.fixture
def tiny(tmp_path):
    """Two palette images of 4 x 6 pixels, three classes, 255 ignored; class 2 is absent."""
    records = []
    for k in range(2):
        labels = np.zeros((4, 6), dtype=np.uint8)
        labels[:, 3:], labels[0, 0] = 1, 255
        image = Image.fromarray(labels)
        image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200] + [0] * 3 * 253)
        path = tmp_path / f"{k}.png"
        image.save(path)
        records.append({"file_name": f"{k}.jpg", "sem_seg_file_name": str(path), "image_id": k})
    register(NAME, records, stuff_classes=["road", "sky", "bus"])
    return records


def test_palette_images_absent_classes_and_empty_predictions(tiny):
    guess = np.zeros((4, 6), dtype=np.int64)
    guess[:, 3:], guess[3, 0], guess[3, 5] = 1, 2, 255
    found = feed(SemSegEvaluator(NAME), {0: guess}, "sem_seg")["sem_seg"]
    # road: 10 of 11 right; sky: 11 of 12, one without prediction; bus: predicted but not there
    assert found["IoU-road"] == pytest.approx(100 * 10 / 11)
    assert found["IoU-sky"] == found["ACC-sky"] == pytest.approx(100 * 11 / 12)
    assert math.isnan(found["IoU-bus"])
    assert math.isnan(found["ACC-bus"])
    assert found["mIoU"] == pytest.approx(50 * (10 / 11 + 11 / 12))
    assert found["pACC"] == pytest.approx(100 * 21 / 23)


def test_an_image_seen_twice_counts_once(tiny):
    right = torch.as_tensor(np.array(Image.open(tiny[0]["sem_seg_file_name"])))
    wrong = torch.ones(4, 6, dtype=torch.long) - right.long().clamp(max=1)
    evaluator = SemSegEvaluator(NAME)
    once = feed(evaluator, {0: right, 1: wrong}, "sem_seg")
    evaluator.process([{"image_id": 0}], [{"sem_seg": right}])
    again = evaluator.evaluate()
    assert again["sem_seg"] == pytest.approx(once["sem_seg"], nan_ok=True)
    assert 0 < once["sem_seg"]["pACC"] < 100


def test_without_images_everything_is_undefined(tiny):
    found = SemSegEvaluator(NAME).evaluate()["sem_seg"]
    assert all(math.isnan(value) for value in found.values())


def test_predictions_are_written_only_into_an_output_folder(tiny, tmp_path):
    guess = np.zeros((4, 6), dtype=np.int64)
    guess[:2] = 2
    before = sorted(tmp_path.iterdir())
    feed(SemSegEvaluator(NAME), {0: guess}, "sem_seg")
    assert sorted(tmp_path.iterdir()) == before
    evaluator = SemSegEvaluator(NAME, output_dir=str(tmp_path / "out"))
    evaluator.metadata.set(stuff_dataset_id_to_contiguous_id={7: 0, 8: 1, 11: 2})
    evaluator.process([{"image_id": 0, "file_name": "0.jpg"}], [{"sem_seg": guess}])
    evaluator.evaluate()
    segments = json.loads((tmp_path / "out" / "sem_seg_predictions.json").read_text())
    assert [(s["file_name"], s["category_id"]) for s in segments] == [("0.jpg", 7), ("0.jpg", 11)]
    for segment, k in zip(segments, (0, 2)):
        np.testing.assert_array_equal(mask_util.decode(segment["segmentation"]) == 1, guess == k)


def test_scores_of_a_class_that_is_not_annotated_are_predictions_of_it():
    labels = np.array([[0, 1], [2, 0]])
    options = {"no_class": 0, "source": NAME}
    np.testing.assert_array_equal(class_map(one_hot(labels, 3), 3, **options), labels)
    np.testing.assert_array_equal(class_map(labels, 3, **options), [[3, 1], [2, 3]])


def test_users_mistakes(tiny, tmp_path):
    evaluator = SemSegEvaluator(NAME)
    image = [{"image_id": 0}]
    with pytest.raises(UserError, match=r"\(4, 4, 6\).*3 classes"):
        evaluator.process(image, [{"sem_seg": torch.zeros(4, 4, 6)}])
    with pytest.raises(UserError, match="expected scores"):
        evaluator.process(image, [{"sem_seg": torch.zeros(4, 6)}])
    with pytest.raises(UserError, match="predicts class 3"):
        evaluator.process(image, [{"sem_seg": torch.full((4, 6), 3)}])
    with pytest.raises(UserError, match=r"5x4 for .* of 6x4"):
        evaluator.process(image, [{"sem_seg": torch.zeros(3, 4, 5)}])
    with pytest.raises(UserError, match="needs 'sem_seg'"):
        evaluator.process(image, [{"instances": None}])
    with pytest.raises(UserError, match="image 5 was predicted but is not in"):
        evaluator.process([{"image_id": 5}], [{"sem_seg": torch.zeros(3, 4, 6)}])
    register(NAME, tiny, stuff_classes=["road"])
    with pytest.raises(UserError, match=r"has class 1, but .* 1 classes"):
        SemSegEvaluator(NAME).process(image, [{"sem_seg": torch.zeros(1, 4, 6)}])
    register(NAME, [{"file_name": "a.jpg"}], stuff_classes=["road"])
    with pytest.raises(UserError, match="has no label map"):
        SemSegEvaluator(NAME).process(image, [{"sem_seg": torch.zeros(1, 4, 6)}])
    register(NAME, tiny)
    with pytest.raises(UserError, match="no stuff_classes"):
        SemSegEvaluator(NAME)
