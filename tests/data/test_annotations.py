"""Annotations that contradict themselves end a run before it starts, harmless ones are left out;
check_dataset says the same.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from d2dense.data.annotations import run_total
from d2dense.data.check_coco import check_json
from d2dense.data.datasets import register_custom
from d2dense.data.loaders import build_test_loader, build_train_loader, get_dataset_dicts
from d2dense.data.mappers import DetectionMapper
from d2dense.errors import UserError

NAN, INF = float("nan"), float("inf")
FIRST = [5, 6, 20, 10]
MAPPER = DetectionMapper(is_train=True, augmentations=[])

ERRORS = {
    "unknown category": (lambda a: a.update(category_id=2), "category_id 2"),
    "category of text": (lambda a: a.update(category_id="1"), "category_id '1'"),
    "category of a list": (lambda a: a.update(category_id=[1]), r"category_id \[1\]"),
    "no category": (lambda a: a.pop("category_id"), "category_id None"),
    "NaN box": (lambda a: a.update(bbox=[1, 1, NAN, 2]), r"bbox \[1, 1, nan, 2\]"),
    "infinite box": (lambda a: a.update(bbox=[1, -INF, 5, INF]), "bbox"),
    "three numbers": (lambda a: a.update(bbox=[1, 1, 5]), r"bbox \[1, 1, 5\].*four finite"),
    "numbers as text": (lambda a: a.update(bbox=["1", "1", "5", "5"]), "bbox"),
    "one text": (lambda a: a.update(bbox="1 1 5 5"), "bbox"),
    "no box": (lambda a: a.pop("bbox"), "bbox None"),
    "null in a box": (lambda a: a.update(bbox=[1, None, 5, 5]), "bbox"),
    "huge number": (lambda a: a.update(bbox=[1, 10**400, 5, 5]), "bbox"),
    "huge numbers that cancel": (
        lambda a: a.update(bbox=[10**400, -(10**400), 5, 5]),
        "four finite",
    ),
    "far away": (lambda a: a.update(bbox=[-1e308, 0, 1.5e308, 5]), "bbox"),
    "crowd as text": (lambda a: a.update(iscrowd="0"), "iscrowd '0'"),
    "mask of text": (lambda a: a.update(segmentation="x"), "neither polygons nor"),
    "flat polygon": (lambda a: a.update(segmentation=[1, 1, 9, 1, 9, 9]), "neither polygons nor"),
    "points": (lambda a: a.update(segmentation=[[1, 1], [9, 1], [9, 9]]), "neither polygons nor"),
    "nested points": (lambda a: a.update(segmentation=[[[1, 1], [9, 1], [9, 9]]]), "neither"),
    "polygon of text": (lambda a: a.update(segmentation=[["1", "1", "9", "1"]]), "neither"),
    "NaN polygon": (lambda a: a.update(segmentation=[[1, 1, 5, 1, 5, NAN]]), "NaN"),
    "far polygon": (lambda a: a.update(segmentation=[[1, 1, 1e8, 1, 5, 5]]), "beyond any picture"),
    "RLE of no size": (
        lambda a: a.update(segmentation={"size": [-1, -1], "counts": [1]}),
        "mask of -1x-1",
    ),
    "RLE that asks for memory": (
        lambda a: a.update(segmentation={"size": [10**9, 10**9], "counts": [10**18]}),
        "mask of 1000000000x1000000000",
    ),
    "RLE of another size": (
        lambda a: a.update(segmentation={"size": [9, 9], "counts": [81]}),
        "mask of 9x9 in an image of 60x40",
    ),
    "short RLE": (
        lambda a: a.update(segmentation={"size": [40, 60], "counts": [10, 20]}),
        "do not add up",
    ),
    "negative RLE": (
        lambda a: a.update(segmentation={"size": [40, 60], "counts": [-10, 2410]}),
        "do not add up",
    ),
    "RLE without counts": (lambda a: a.update(segmentation={"size": [40, 60]}), "neither"),
    "RLE of null": (
        lambda a: a.update(segmentation={"size": [40, 60], "counts": None}),
        "do not add up",
    ),
    "no image": (lambda a: a.update(image_id=[1]), "image_id"),
}


def registered(tiny) -> str:
    tiny.write()
    return register_custom({"train": {"json": tiny.json, "images": tiny.images}})["train"]


@pytest.mark.parametrize("case", ERRORS)
def test_a_contradiction_in_the_file_is_an_error_before_the_first_step(tiny, case):
    change, reason = ERRORS[case]
    change(tiny.content["annotations"][0])
    name = registered(tiny)
    messages = []
    for build in (build_train_loader, build_test_loader):
        options = {"total_batch_size": 2} if build is build_train_loader else {}
        with pytest.raises(UserError, match=reason) as caught:
            build(dataset=name, mapper=MAPPER, num_workers=0, **options)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert tiny.json in messages[0]
    assert "\n" not in messages[0]
    if case != "no image":
        assert "annotation 1 " in messages[0]
        assert "image 10, 0.png" in messages[0]
        assert "correct or remove" in messages[0]
    report = check_json(tiny.json, tiny.images)
    assert not report.ok
    assert "training would fail" in report.text()


IMAGES = {
    "two of one id": (lambda c: c["images"][1].update(id=10), "share the id 10"),
    "no id": (lambda c: c["images"][0].pop("id"), "no 'id'"),
    "ids of two kinds": (lambda c: c["images"][0].update(id="a"), "numbers and some are texts"),
    "size as text": (lambda c: c["images"][0].update(width="60"), "width '60'"),
    "negative size": (lambda c: c["images"][0].update(height=-40), "height -40"),
    "NaN size": (lambda c: c["images"][0].update(height=NAN), "height nan"),
    "impossible size": (lambda c: c["images"][0].update(height=10**9), "more than can be read"),
    "truth as id": (lambda c: c["images"][0].update(id=True), "no 'id'"),
    "category id of a list": (lambda c: c["categories"][0].update(id=[1]), "every category"),
    "category ids of two kinds": (
        lambda c: c["categories"].append({"id": "a", "name": "b"}),
        "numbers, some are texts",
    ),
    "file name of a number": (lambda c: c["images"][0].update(file_name=5), "no 'file_name'"),
    "annotation of text": (lambda c: c["annotations"].append("x"), "no object"),
    "annotations of text": (lambda c: c.update(annotations={"1": 2}), "not a list"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_a_contradiction_among_the_images_is_an_error(tiny, case):
    change, reason = IMAGES[case]
    change(tiny.content)
    with pytest.raises(UserError, match=reason):
        get_dataset_dicts(names=registered(tiny))
    assert not check_json(tiny.json, tiny.images).ok


HARMLESS = {
    "no width": (lambda a: a.update(bbox=[1, 1, 0, 5]), "boxes without area"),
    "negative width": (lambda a: a.update(bbox=[9, 1, -5, 5]), "boxes without area"),
    "outside": (lambda a: a.update(bbox=[70, 1, 5, 5]), "wholly outside the image"),
    "left of it": (lambda a: a.update(bbox=[-9, 1, 9, 5]), "wholly outside the image"),
    "unlisted image": (lambda a: a.update(image_id=77), "does not list"),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_harmless_annotations_are_left_out_in_one_line(tiny, caplog, case):
    change, reason = HARMLESS[case]
    change(tiny.content["annotations"][0])
    change(tiny.content["annotations"][2])
    (record, *_) = records = get_dataset_dicts(names=registered(tiny))
    assert [a["category_id"] for a in record["annotations"]] == [2]  # the cherry stays
    assert [r["image_id"] for r in records] == [10, 12]  # of image 11 nothing is left
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 1
    assert re.search(rf"2 .*{reason}.*the first: annotation 1 ", warned[0])
    report = check_json(tiny.json, tiny.images)
    assert report.ok
    assert [f.count for f in report.findings.values() if re.search(reason, f.title)] == [2]


def test_polygons_without_corners_leave_the_box(tiny, caplog):
    tiny.content["annotations"][0]["segmentation"] = [[1, 2, 3, 4], [1, 2, 3]]
    (record, *_) = get_dataset_dicts(names=registered(tiny))
    assert record["annotations"][0]["segmentation"] == []
    assert record["annotations"][0]["bbox"] == FIRST
    assert "fewer than three corners" in caplog.text


def test_check_dataset_tells_replaced_samples_from_errors(tiny):
    (folder := Path(tiny.images)).joinpath("0.png").write_bytes(b"")
    entry = dict(tiny.content["images"][0])
    for number in range(100, 120):
        Image.new("RGB", (60, 40)).save(folder / f"{number}.png")
        tiny.content["images"].append(entry | {"id": number, "file_name": f"{number}.png"})
    report = check_json(tiny.write(), tiny.images)
    assert not report.ok
    assert "would replace 1 of 24 images" in report.text()
    (folder / "1.png").unlink()
    (folder / "2.png").unlink()
    assert "training would fail" in check_json(tiny.json, tiny.images).text()


def test_the_length_of_run_length_codes_is_pycocotools():
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(1, 200, 2)
        run = int(rng.integers(1, 90))
        flat = np.repeat(rng.integers(0, 2, height * width // run + 1), run)[: height * width]
        mask = flat.reshape(height, width, order="F").astype(np.uint8)
        assert run_total(mask_util.encode(np.asfortranarray(mask))) == height * width
    for counts in (b"", b"\xff", "~~", b"o"):
        with pytest.raises(ValueError, match="run-length"):
            run_total({"counts": counts})


def test_a_mask_that_claims_another_size_is_not_decoded(tiny):
    """Its size would decide how much memory is taken, before anything is compared."""
    del tiny.content["images"][0]["height"]
    tiny.content["annotations"][0]["segmentation"] = {"size": [13_000, 13_000], "counts": "PP"}
    record = get_dataset_dicts(names=registered(tiny))[0]
    mapper = DetectionMapper(is_train=True, augmentations=[], use_instance_mask=True)
    with pytest.raises(UserError, match=r"mask of .* is 13000x13000, but the image is"):
        mapper(record)


def test_deep_nesting_is_one_line(tiny):
    Path(tiny.json).write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        check_json(tiny.json, tiny.images)


def test_the_report_of_any_name_can_be_printed(tiny):
    tiny.content["categories"][0]["name"] = "\ud800"
    registered(tiny)
    check_json(tiny.json, tiny.images).text().encode()
