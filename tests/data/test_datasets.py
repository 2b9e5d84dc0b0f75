"""Datasets described by a config, against Detectron2's own readers."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, load_sem_seg
from detectron2.data.datasets.cityscapes import load_cityscapes_instances, load_cityscapes_semantic
from detectron2.structures import BoxMode
from PIL import Image

from d2dense.data import builtin, coco_format, datasets, shapes
from d2dense.data.datasets import DatasetSpec, register, register_custom
from d2dense.errors import UserError


def custom(**entries) -> str:
    return register_custom({"train": entries})["train"]


def test_a_json_and_a_folder_are_enough(tiny):
    name = custom(json=tiny.json, images=tiny.images)
    assert name == "custom_train"
    records = datasets.load(name)
    assert [r["image_id"] for r in records] == [10, 11, 12, 13]
    assert (records[1]["width"], records[1]["height"]) == (40, 60)
    assert records[0]["file_name"] == os.path.join(tiny.images, "0.png")
    assert [a["category_id"] for a in records[0]["annotations"]] == [0, 2]
    assert records[0]["annotations"][0]["bbox"] == [5, 6, 20, 10]
    assert records[3]["annotations"] == []
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["apple", "banana", "cherry"]
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 3: 1, 7: 2}
    assert metadata.evaluator_type == "coco"
    assert (metadata.json_file, metadata.image_root) == (tiny.json, tiny.images)


def test_slots_of_any_name_and_case_are_registered_and_empty_ones_are_not(tiny):
    entries = {"JSON": tiny.json, "IMAGES": tiny.images}
    names = register_custom({"TRAIN": entries, "Night": entries, "VAL": {"JSON": ""}, "TEST": {}})
    assert names == {"train": "custom_train", "night": "custom_night"}
    assert register_custom({"TRAIN": entries}) == {"train": "custom_train"}  # again
    other = {"images": tiny.images, "labels": tiny.images, "classes": ["a"]}
    register_custom({"train": other})
    assert MetadataCatalog.get("custom_train").evaluator_type == "sem_seg"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"jsn": "x"},
            r"DATASETS.CUSTOM.TRAIN / .* no entry 'jsn'; did you mean 'json'",
        ),
        ({"json": "x"}, "needs 'images'"),
        ({"images": "x"}, "needs 'json'"),
        ({"images": "x", "labels": "y"}, "needs 'classes'"),
        ({"kind": "cocoa", "json": "x"}, r"kind = 'cocoa'.*did you mean 'coco'"),
        ({"kind": "cityscapes", "images": "x"}, "needs 'labels'"),
        ({"json": "x", "images": "y", "classes": ["a"]}, "only for sem_seg"),
        ({"json": ["x", "y"], "images": "z"}, "expected one value"),
        ({"kind": "cityscapes", "images": "x", "labels": "y", "task": "depth"}, "task = 'depth'"),
        ("x.json", "expected entries such as"),
        ({"kind": ["x"], "json": "x"}, "expected one value"),
        ({"images": "x", "labels": "y", "classes": 3.5, "ignore_label": "x"}, "whole number"),
        ({"images": "x", "labels": "y", "classes": [["a"]]}, "expected names or a file"),
        ({"json": {"a": 1}, "images": "y"}, "expected one value"),
    ],
)
def test_wrong_entries_are_named(entries, message):
    with pytest.raises(UserError, match=message):
        register_custom({"train": entries})


def test_files_that_do_not_exist_are_named_when_they_are_needed(tiny):
    name = custom(json=tiny.json + "x", images=tiny.images)  # no error: a demo needs no data
    with pytest.raises(UserError, match=r"DATASETS.CUSTOM.TRAIN.*tiny.jsonx does not exist"):
        datasets.load(name)
    name = custom(json=tiny.json, images=tiny.images + "x")
    with pytest.raises(UserError, match="imagesx does not exist"):
        datasets.load(name)
    with pytest.raises(UserError, match=r"coco_2017_train.*DETECTRON2_DATASETS"):
        datasets.load("coco_2017_train")
    with pytest.raises(UserError, match=r"'coco_2017_tran' is not registered; did you mean"):
        datasets.load("coco_2017_tran")


def test_masks_of_every_form_are_read(tiny):
    mask = np.zeros((40, 60), np.uint8)
    mask[6:16, 5:25] = 1
    compressed = mask_util.encode(np.asfortranarray(mask))
    flat = mask.flatten(order="F")
    runs = np.diff(np.flatnonzero(np.diff(flat, prepend=1 - flat[0], append=1 - flat[-1])))
    uncompressed = {"size": [40, 60], "counts": [0] * int(flat[0]) + runs.tolist()}
    forms = [
        [[5, 6, 25, 6, 25, 16, 5, 16]],
        compressed | {"counts": compressed["counts"].decode()},
        uncompressed,
        [],
        [[1, 2, 3, 4]],
        None,
    ]
    for form in forms:
        tiny.content["annotations"][0]["segmentation"] = form
        tiny.write()
        first = datasets.load(custom(json=tiny.json, images=tiny.images))[0]["annotations"][0]
        if isinstance(form, dict):
            assert (mask_util.decode(first["segmentation"]) == mask).all()
        elif form in ([], None):  # boxes only
            assert "segmentation" not in first
        else:  # a mask of two points is dropped, which is not the same as none
            assert first["segmentation"] == [p for p in form if len(p) >= 6]


def test_ignored_objects_count_as_crowds(tiny):
    tiny.content["annotations"][0]["ignore"] = 1
    tiny.write()
    records = datasets.load(custom(json=tiny.json, images=tiny.images))
    assert [a["iscrowd"] for a in records[0]["annotations"]] == [1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][1].update(category_id=5), "annotation 2 has category_id 5"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2]), "annotation 2 has bbox"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3, float("nan")]), "has bbox"),
        (lambda c: c["annotations"][1].update(segmentation="x"), "neither polygons nor"),
        (lambda c: c["images"][1].pop("file_name"), "image 11 has no 'file_name'"),
    ],
)
def test_unusable_annotations_are_named(tiny, change, message):
    change(tiny.content)
    tiny.write()
    name = custom(json=tiny.json, images=tiny.images)
    with pytest.raises(UserError, match=message):
        datasets.load(name)


@pytest.mark.parametrize("slots", [None, "x", [1], 3])
def test_slots_that_are_none_are_named(slots):
    with pytest.raises(UserError, match="expected slots such as"):
        register_custom(slots)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid json"),
        ("[]", "no list 'images'"),
        ('{"images": []}', "no list 'categories'"),
        ('{"images": [], "categories": [{"id": 1}]}', "needs an 'id' and a 'name'"),
        ('{"images": [], "categories": []}', "is empty"),
        (
            '{"images": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "share an id",
        ),
    ],
)
def test_files_of_another_layout_are_named(tiny, text, message):
    Path(tiny.json).write_text(text)
    with pytest.raises(UserError, match=message):
        custom(json=tiny.json, images=tiny.images)


def test_categories_are_found_without_parsing_the_file(tiny, monkeypatch):
    expected = coco_format.read_categories(tiny.json)
    assert [c["id"] for c in expected] == [1, 3, 7]
    monkeypatch.setattr(coco_format, "read_json", lambda path: pytest.fail("parsed"))
    assert coco_format.read_categories(tiny.json) == expected
    monkeypatch.undo()
    # a second such key makes the quick way unsure
    Path(tiny.json).write_text(json.dumps({"info": {"categories": [1]}} | tiny.content))
    assert coco_format.read_categories(tiny.json) == expected


SETS = [
    ("coco_mini/annotations/instances_train.json", "coco_mini/images/train"),
    ("coco_mini/annotations/instances_val_from_panoptic.json", "coco_mini/images/val"),
    ("nuclei_mini/annotations/instances_val.json", "nuclei_mini/images/val"),
    ("fruits_nuts/annotations/instances_train.json", "fruits_nuts/images/train"),
    ("bccd/annotations_coco/instances_val.json", "bccd/JPEGImages"),
]


@pytest.mark.parametrize(("json_file", "images"), SETS, ids=[s[0].split("/")[0] for s in SETS])
def test_records_equal_detectron2s(shared_data, json_file, images):
    json_file, images = str(shared_data / json_file), str(shared_data / images)
    ours = datasets.load(custom(json=json_file, images=images))
    theirs = load_coco_json(json_file, images, "compare_with_detectron2")
    MetadataCatalog.remove("compare_with_detectron2")
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        for y in b["annotations"]:
            if not y.get("segmentation"):
                y.pop("segmentation", None)
            y.setdefault("iscrowd", 0)
        assert a == b


@pytest.mark.skipif(importlib.util.find_spec("lvis") is None, reason="the lvis package is missing")
def test_lvis_records_equal_detectron2s(shared_data):
    from detectron2.data.datasets import load_lvis_json

    root = shared_data / "lvis_mini"
    json_file = str(root / "annotations/lvis_v0.5_val_mini.json")
    name = custom(kind="lvis", json=json_file, images=str(root / "images"))
    ours = datasets.load(name)
    theirs = load_lvis_json(json_file, f"{root}/images/", "lvis_v0.5_compare")
    for record in theirs:
        for a in record["annotations"]:
            a["iscrowd"] = 0
    assert list(ours) == theirs
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes[0] == "acorn"
    assert len(metadata.thing_classes) == 1230
    assert metadata.evaluator_type == "lvis"
    assert metadata.class_image_count[1]["id"] == 2
    MetadataCatalog.remove("lvis_v0.5_compare")


def test_lvis_images_are_also_found_by_file_name(tiny):
    for image in tiny.content["images"]:
        image["coco_url"] = f"http://images.example.org/elsewhere/{image['file_name']}"
    tiny.write()
    records = datasets.load(custom(kind="lvis", json=tiny.json, images=tiny.images))
    assert all(os.path.isfile(record["file_name"]) for record in records)
    assert records[0]["neg_category_ids"] == []


def city_folders(shared_data, split="train"):
    root = shared_data / "cityscapes_mini"
    return {"images": str(root / "leftImg8bit" / split), "labels": str(root / "gtFine" / split)}


def test_cityscapes_instances_equal_detectron2s(shared_data):
    folders = city_folders(shared_data)
    ours = datasets.load(custom(kind="cityscapes", **folders))
    theirs = load_cityscapes_instances(*folders.values(), from_json=False, to_polygons=False)
    theirs = sorted(theirs, key=lambda record: record["file_name"])
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs):
        assert a["file_name"] == b["file_name"]
        assert (a["height"], a["width"]) == (b["height"], b["width"])
        # detectron2 drops objects that are one pixel wide or high
        thick = [x for x in a["annotations"] if min(np.subtract(x["bbox"][2:], x["bbox"][:2])) > 1]
        assert len(thick) == len(b["annotations"]) > 5
        for x, y in zip(thick, b["annotations"]):
            assert x["segmentation"] == y["segmentation"]
            assert (x["category_id"], x["iscrowd"]) == (y["category_id"], int(y["iscrowd"]))
            assert x["bbox_mode"] == BoxMode.XYXY_ABS
            # its boxes end on the last pixel, ours behind it
            assert (np.subtract(x["bbox"], y["bbox"]) == [0, 0, 1, 1]).all()


def test_cityscapes_semantic_equals_detectron2s(shared_data):
    folders = city_folders(shared_data)
    name = custom(kind="cityscapes", task="semantic", **folders)
    theirs = load_cityscapes_semantic(*folders.values())
    pairs = {(r["file_name"], r["sem_seg_file_name"]) for r in theirs}
    assert {(r["file_name"], r["sem_seg_file_name"]) for r in datasets.load(name)} == pairs
    metadata = MetadataCatalog.get(name)
    builtin_metadata = MetadataCatalog.get("cityscapes_fine_sem_seg_val")
    assert metadata.stuff_classes == builtin_metadata.stuff_classes
    assert metadata.evaluator_type == "cityscapes_sem_seg"
    assert metadata.gt_dir == folders["labels"]


def test_cityscapes_classes_are_those_of_the_official_table():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    used = sorted((x for x in labels if 0 <= x.trainId < 255), key=lambda x: x.trainId)
    from d2dense.data import cityscapes

    assert [(x.id, x.name, x.color) for x in used] == list(cityscapes.STUFF)
    things = [x for x in labels if x.hasInstances and not x.ignoreInEval]
    assert [x.id for x in things] == [x[0] for x in cityscapes.THINGS]


def test_many_cityscapes_files_are_read_by_several_processes(shared_data, monkeypatch):
    from d2dense.data import cityscapes

    folders = city_folders(shared_data)
    alone = cityscapes.load_instances(*folders.values())
    monkeypatch.setattr(cityscapes, "_MANY_FILES", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert cityscapes.load_instances(*folders.values()) == alone


def test_missing_cityscapes_files_say_what_to_do(tmp_path, shared_data):
    with pytest.raises(UserError, match=r"leftImg8bit\.png"):
        datasets.load(custom(kind="cityscapes", images=str(tmp_path), labels=str(tmp_path)))
    folders = city_folders(shared_data) | {"labels": str(tmp_path)}
    with pytest.raises(UserError, match=r"instanceIds\.png does not exist"):
        datasets.load(custom(kind="cityscapes", **folders))
    with pytest.raises(UserError, match="csCreateTrainIdLabelImgs"):
        datasets.load(custom(kind="cityscapes", task="semantic", **folders))


def test_semantic_folders_are_paired_by_name(tiny_semantic, caplog):
    data = tiny_semantic
    extra = Path(data.images) / "city" / "unlabelled.png"
    Image.new("RGB", (4, 4)).save(extra)
    name = custom(
        images=data.images,
        labels=data.labels,
        classes=data.classes,
        ignore_label=9,
        label_suffix="_label.png",
    )
    records = datasets.load(name)
    assert [r["image_id"] for r in records] == ["city/0", "city/1", "city/2"]
    assert records[2]["sem_seg_file_name"].endswith("maps/city/2_label.png")
    assert records[0]["sem_seg_ignore_label"] == 9
    assert "1 of 4 pictures" in caplog.text
    metadata = MetadataCatalog.get(name)
    assert metadata.stuff_classes == ["road", "car", "sky"]
    assert metadata.ignore_label == 9
    with pytest.raises(UserError, match="no picture in"):
        datasets.load(custom(images=data.images, labels=data.labels, classes=("a",)))


def test_semantic_folders_equal_detectron2s(shared_data):
    root = shared_data / "camvid_mini"
    images, labels = str(root / "images/val"), str(root / "labels/val")
    name = custom(images=images, labels=labels, classes=str(root / "classes.json"), ignore_label=11)
    theirs = load_sem_seg(labels, images)
    ours = [
        {key: r[key] for key in ("file_name", "sem_seg_file_name")} for r in datasets.load(name)
    ]
    assert ours == theirs
    assert len(MetadataCatalog.get(name).stuff_classes) == 11


@pytest.mark.parametrize("form", ["txt", "json", "object", "tuple", "list"])
def test_class_lists_of_every_form(tmp_path, form):
    names = ["road", "traffic light"]
    path = tmp_path / ("names.txt" if form == "txt" else "names.json")
    text = {"txt": "road\ntraffic light\n", "json": json.dumps(names)}
    path.write_text(text.get(form, json.dumps({"classes": names})))
    classes = {"tuple": tuple(names), "list": names}.get(form, str(path))
    name = custom(images=str(tmp_path), labels=str(tmp_path), classes=classes)
    assert MetadataCatalog.get(name).stuff_classes == names


def test_wrong_class_lists_are_named(tmp_path):
    entries = {"images": str(tmp_path), "labels": str(tmp_path)}
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match=r"a.json holds no list of names"):
        custom(classes=str(tmp_path / "a.json"), **entries)
    (tmp_path / "b.json").write_text("[")
    with pytest.raises(UserError, match="not valid json"):
        custom(classes=str(tmp_path / "b.json"), **entries)
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not text in UTF-8"):
        custom(classes=str(tmp_path / "d.txt"), **entries)
    with pytest.raises(UserError, match=r"c\.txt does not exist"):
        datasets.load(custom(classes=str(tmp_path / "c.txt"), **entries))


def test_register_replaces_and_spec_guesses_its_kind(tiny):
    assert DatasetSpec(json="x").kind == "coco"
    assert DatasetSpec(labels="x").kind == "sem_seg"
    register("mine", DatasetSpec(json=tiny.json, images=tiny.images))
    register("mine", DatasetSpec(kind="lvis", json=tiny.json, images=tiny.images))
    assert MetadataCatalog.get("mine").evaluator_type == "lvis"


# Names


def test_detectron2s_names_are_there():
    for name in ("coco_2017_train", "lvis_v1_val", "ade20k_sem_seg_val", "voc_2007_test"):
        assert name in DatasetCatalog
    assert len(MetadataCatalog.get("coco_2017_val").thing_classes) == 80


def test_cityscapes_by_name_needs_no_further_package(shared_data, tmp_path):
    (tmp_path / "cityscapes").symlink_to(shared_data / "cityscapes_mini")
    try:
        builtin.register_cityscapes(tmp_path)
        instances = datasets.load("cityscapes_fine_instance_seg_train")
        assert len(instances) == len(datasets.load("cityscapes_fine_sem_seg_train")) == 2
        assert len(MetadataCatalog.get("cityscapes_fine_instance_seg_train").thing_classes) == 8
    finally:
        builtin.register_cityscapes(builtin.dataset_root())


def test_shapes_are_generated_on_first_use(tmp_path, monkeypatch):
    calls = []

    def small(root):
        calls.append(root)
        for split in ("train", "val"):
            shapes.generate(output_dir=root, split=split, count=3, size=64)

    monkeypatch.setattr(shapes, "ensure", small)
    try:
        builtin.register_shapes(tmp_path / "shapes")
        assert MetadataCatalog.get("shapes_val").thing_classes == list(shapes.CLASSES)
        assert not calls
        objects = datasets.load("shapes_train")
        labels = datasets.load("shapes_val_sem_seg")
        assert (len(objects), len(labels), len(calls)) == (3, 3, 1)
        json_file = MetadataCatalog.get("shapes_train").json_file
        found = coco_format.metadata(json_file)
        for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
            assert found[key] == MetadataCatalog.get("shapes_train").get(key)
        values = np.unique([np.asarray(Image.open(r["sem_seg_file_name"])) for r in labels])
        assert values.max() < len(MetadataCatalog.get("shapes_val_sem_seg").stuff_classes)
    finally:
        builtin.register_shapes(builtin.dataset_root() / "shapes")
