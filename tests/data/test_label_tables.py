"""What the values in published label maps mean, value by value, and folders with such maps."""

from __future__ import annotations

import json

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import builtin_meta
from PIL import Image

from d2dense.data import builtin, check, datasets, label_tables
from d2dense.data.mappers import SemanticMapper
from d2dense.data.reading import SampleError, read_sem_seg
from d2dense.errors import UserError
from d2dense.evaluation import build_evaluator
from tools import check_dataset

REMOVED_FROM_COCO = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}


def pascal_context(value):
    return value - 1 if value else 255


def ade20k(value):
    return value - 1 if value else 255


def coco_stuff(value):
    return 255 if value == 255 else value - sum(removed < value for removed in REMOVED_FROM_COCO)


def cityscapes_train_ids(value):
    return value


def cityscapes_label_ids(value):
    labels = pytest.importorskip("cityscapesscripts.helpers.labels")
    return labels.id2label[value].trainId  # 255 or a class


# table: its values, what each means, how many classes
FACTS = {
    "pascal_context": (range(60), pascal_context, 59),
    "ade20k": (range(151), ade20k, 150),
    "coco_stuff": ([*({*range(182)} - REMOVED_FROM_COCO), 255], coco_stuff, 171),
    "cityscapes_train_ids": ([*range(19), 255], cityscapes_train_ids, 19),
    "cityscapes_label_ids": (range(34), cityscapes_label_ids, 19),
}


def test_every_table_is_known():
    assert FACTS.keys() == label_tables.TABLES.keys()


@pytest.mark.parametrize("name", FACTS)
def test_every_value(name):
    known, meaning, count = FACTS[name]
    table = label_tables.get(name)
    assert table.num_classes == len(table.classes) == count
    assert len(set(table.classes)) == count
    seen = set()
    for value in range(256):
        labels = np.full((2, 3), value, np.uint8)
        if value in known:
            found = table.to_classes(labels, ignore_label=255, path="a.png")
            assert found.dtype == np.uint8
            assert (found == meaning(value)).all(), value
            seen.add(int(found[0, 0]))
        else:
            with pytest.raises(label_tables.UnknownValue, match=rf"a\.png has the value {value},"):
                table.to_classes(labels, ignore_label=255, path="a.png")
    assert seen - {255} == set(range(count))


@pytest.mark.parametrize("name", FACTS)
def test_classes_become_values_and_classes_again(name):
    known, meaning, count = FACTS[name]
    table = label_tables.get(name)
    classes = np.arange(count + 1)[None]
    values = table.to_values(classes)
    assert values.dtype == np.uint8
    assert [meaning(int(value)) for value in values[0]] == [*range(count), 255]
    assert set(values[0].tolist()) <= set(known)
    assert np.array_equal(table.to_values(np.array([[-1, 255, 300]])), values[:, [count] * 3])


def test_names_are_in_the_order_of_the_values():
    names = label_tables.get("pascal_context").classes
    assert names == tuple(sorted(names))
    assert (names[0], names[39], names[58]) == ("aeroplane", "pottedplant", "wood")
    table = label_tables.get("coco_stuff")
    # detectron2 has the names of things and, where panoptic stuff was not merged, of stuff
    named = {c["id"] - 1: c["name"] for c in builtin_meta.COCO_CATEGORIES}
    same = {v: n for v, n in named.items() if not n.endswith(("-merged", "-stuff", "-other"))}
    assert len(same) > 80 + 20
    for value, name in same.items():
        assert table.classes[table.values[value]] == name
    assert table.classes[79:82] == ("toothbrush", "banner", "blanket")
    assert table.classes[-1] == "wood"
    train_ids = label_tables.get("cityscapes_train_ids").classes
    assert label_tables.get("cityscapes_label_ids").classes == train_ids
    assert (train_ids[0], train_ids[18]) == ("road", "bicycle")


def test_other_types_of_numbers():
    table = label_tables.get("pascal_context")
    for kind in (np.uint16, np.int32, np.int64):
        found = table.to_classes(np.array([[0, 1, 59]], kind), ignore_label=-1, path="a.png")
        assert found.tolist() == [[-1, 0, 58]]
    for value in (-1, 60, 70_000):
        with pytest.raises(label_tables.UnknownValue, match=f"has the value {value},"):
            table.to_classes(np.array([[value]], np.int64), ignore_label=255, path="a.png")


# ------------------------------------------------ a table of one's own


def write_table(tmp_path, content):
    path = tmp_path / "table.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    label_tables.get.cache_clear()
    return str(path)


def test_a_json_file_may_merge_values_and_go_beyond_255(tmp_path):
    path = write_table(
        tmp_path, {"classes": ["a", "b"], "values": {"0": None, "7": 1, "300": 0, "301": 0}}
    )
    table = label_tables.get(path)
    labels = np.array([[0, 7, 300, 301]], np.uint16)
    assert table.to_classes(labels, ignore_label=255, path="").tolist() == [[255, 1, 0, 0]]
    values = table.to_values(np.array([[0, 1, 2]]))
    assert values.tolist() == [[300, 7, 0]]
    assert values.dtype == np.uint16


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid json"),
        ([1], "expected"),
        ({"classes": ["a"]}, "expected"),
        ({"values": {}}, "no value with a class"),
        ({"values": {"0": None}}, "no value with a class"),
        ({"values": {"a": 0}}, "value 'a', expected whole numbers from 0"),
        ({"values": {"-1": 0}}, "value '-1'"),
        ({"values": {"99999": 0}}, "value '99999'"),
        ({"values": {"1": 0.5}}, "value 1 has the class 0.5"),
        ({"values": {"1": -1}}, "value 1 has the class -1"),
        ({"values": {"1": True}}, "value 1 has the class True"),
        ({"values": {"1": 0, "2": 2}}, "no value has the class 1"),
        ({"values": {"1": 0}, "classes": ["a", "b"]}, "classes 0 to 0, but names 2"),
    ],
)
def test_files_that_are_no_table(tmp_path, content, words):
    with pytest.raises(UserError, match=words):
        label_tables.get(write_table(tmp_path, content))


def test_unknown_tables_are_named(tmp_path):
    with pytest.raises(UserError, match="did you mean 'coco_stuff'"):
        label_tables.get("coco_stuf")
    with pytest.raises(UserError, match="cannot read label table"):
        label_tables.get(str(tmp_path / "absent.json"))


# ------------------------------------------------ folders


SIZE = (6, 10)


def write_pair(root, name, values, *, images="images", labels="labels", size=SIZE):
    """Write a picture and the label map of ``values``, from left to right."""
    for folder in (images, labels):
        (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
    row = np.resize(np.array(values, np.uint8), size[1])
    Image.fromarray(np.tile(row, (size[0], 1))).save(root / labels / f"{name}.png")
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(root / images / f"{name}.jpg")


def custom(root, **entries):
    folders = {"images": str(root / "images"), "labels": str(root / "labels")}
    return datasets.register_custom({"val": folders | entries})["val"]


@pytest.fixture
def published(tmp_path):
    """Pascal Context and COCO-Stuff in their usual layouts: two images for training, one to
    test.
    """
    voc = tmp_path / "VOCdevkit" / "VOC2010"
    lists = voc / "ImageSets" / "SegmentationContext"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2008_000002\n2008_000003\n")
    (lists / "val.txt").write_text("2010_000001\n\n")
    folders = {"images": "JPEGImages", "labels": "SegmentationClassContext"}
    for name in ("2008_000002", "2008_000003", "2010_000001"):
        write_pair(voc, name, [0, 1, 40, 59], **folders)
    write_pair(voc, "2009_000009", [0, 1], **folders)  # in no list
    for split, name in (("train", "000000000009"), ("train", "000000000025"), ("val", "1")):
        folders = {"images": f"{split}2017", "labels": f"stuffthingmaps/{split}2017"}
        write_pair(tmp_path / "coco", name, [0, 10, 12, 181, 255], **folders)
    builtin.register_pascal_context(tmp_path)
    builtin.register_coco_stuff(tmp_path)
    yield tmp_path
    builtin.register_pascal_context(builtin.dataset_root())
    builtin.register_coco_stuff(builtin.dataset_root())


@pytest.mark.parametrize(
    ("name", "classes", "values", "meaning"),
    [
        ("pascal_context_sem_seg", 59, [0, 1, 40, 59], [255, 0, 39, 58]),
        ("coco_stuff_164k_sem_seg", 171, [0, 10, 12, 181, 255], [0, 10, 11, 170, 255]),
    ],
)
def test_published_data_sets(published, tmp_path, name, classes, values, meaning):
    train, val = (datasets.load(f"{name}_{split}") for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 1)
    metadata = MetadataCatalog.get(f"{name}_val")
    assert len(metadata.stuff_classes) == classes
    assert metadata.ignore_label == 255
    mapper = SemanticMapper(is_train=True, augmentations=[])
    expected = np.tile(np.resize(meaning, SIZE[1]), (SIZE[0], 1))
    assert np.array_equal(mapper(dict(train[0]))["sem_seg"].numpy(), expected)
    report = check.check_dataset(f"{name}_train")
    assert report.ok, report.text()
    # a right prediction is a perfect one, and is submitted as the dataset's own label map
    out = tmp_path / "out"
    evaluator = build_evaluator(f"{name}_val", output_dir=str(out), submission=True)
    guess = np.where(expected == 255, 7, expected)
    evaluator.process([val[0]], [{"sem_seg": np.eye(classes)[guess].transpose(2, 0, 1)}])
    assert evaluator.evaluate()["sem_seg"]["pACC"] == 100
    submitted = np.asarray(Image.open(out / "submission" / f"{val[0]['image_id']}.png"))
    truth = np.asarray(Image.open(val[0]["sem_seg_file_name"]))
    assert np.array_equal(submitted[expected != 255], truth[expected != 255])
    wrong = Image.fromarray(np.full(SIZE, 60 if classes == 59 else 11, np.uint8))
    wrong.save(val[0]["sem_seg_file_name"])
    report = check.check_dataset(f"{name}_val")
    assert "does not list" in report.text()
    with pytest.raises(SampleError, match="does not list"):
        build_evaluator(f"{name}_val").process([val[0]], [{"sem_seg": guess}])


def test_coco_segments_have_coco_ids(published, tmp_path):
    evaluator = build_evaluator("coco_stuff_164k_sem_seg_val", output_dir=str(tmp_path / "out"))
    record = datasets.load("coco_stuff_164k_sem_seg_val")[0]
    evaluator.process([record], [{"sem_seg": np.tile([[0, 11, 170, 79, 80]], (6, 2))}])
    evaluator.evaluate()
    segments = json.loads((tmp_path / "out" / "sem_seg_predictions.json").read_text())
    # person, stop sign (its id is 13), toothbrush, banner, wood
    assert [s["category_id"] for s in segments] == [1, 13, 90, 92, 182]
    assert all(s["image_id"] == 1 for s in segments)


def test_lists_that_do_not_fit(published):
    lists = published / "VOCdevkit" / "VOC2010" / "ImageSets" / "SegmentationContext"
    (lists / "val.txt").write_text("2010_000001\n2011_000001\n2012_1\n")
    with pytest.raises(UserError, match=r"val\.txt lists 2011_000001 \(2 of 3 such names\)"):
        datasets.load("pascal_context_sem_seg_val")
    (lists / "val.txt").unlink()
    with pytest.raises(UserError, match=r"pascal_context_sem_seg_val.*val\.txt, which does not"):
        datasets.load("pascal_context_sem_seg_val")


def test_a_folder_by_config_may_use_any_table(tmp_path):
    write_pair(tmp_path, "a", [0, 1, 59])
    write_pair(tmp_path, "sub/b", [2])
    (tmp_path / "list.txt").write_text("sub/b\n")
    name = custom(tmp_path, label_table="pascal_context")
    assert MetadataCatalog.get(name).stuff_classes[58] == "wood"
    labels = [read_sem_seg(r, np.zeros((*SIZE, 3)), 255) for r in datasets.load(name)]
    assert [np.unique(each).tolist() for each in labels] == [[0, 58, 255], [1]]
    name = custom(tmp_path, label_table="pascal_context", split=str(tmp_path / "list.txt"))
    assert [record["image_id"] for record in datasets.load(name)] == ["sub/b"]
    assert len(check.check_dataset(name).rows) == 59
    own = write_table(tmp_path, {"values": {"0": None, "1": 0, "2": 1, "59": 1}})
    name = custom(tmp_path, label_table=own, classes=["some", "other"])
    labels = [read_sem_seg(r, np.zeros((*SIZE, 3)), 9) for r in datasets.load(name)]
    assert [np.unique(each).tolist() for each in labels] == [[0, 1, 9], [1]]


def test_the_checking_tool_knows_tables_and_lists(tmp_path, capsys):
    write_pair(tmp_path, "a", [0, 1, 59])
    write_pair(tmp_path, "b", [60])
    (tmp_path / "list.txt").write_text("a\n")
    folders = [f"--{name}={tmp_path / name}" for name in ("images", "labels")]
    argv = [*folders, "--label-table", "pascal_context"]
    assert check_dataset.main([*argv, "--split", str(tmp_path / "list.txt")]) == 0
    assert "wood" in capsys.readouterr().out
    assert check_dataset.main(argv) == 1
    assert "has the value 60" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"label_table": "pascal"}, r"datasets\.val.*did you mean 'pascal_context'"),
        ({"label_table": "pascal_context", "classes": ["a", "b"]}, "2 class names.*59 classes"),
        ({"label_table": "ade20k", "reduce_zero_label": True}, "set one of them"),
        ({"label_table": "ade20k", "kind": "cityscapes"}, "only for sem_seg"),
        ({"split": "a.txt", "kind": "cityscapes"}, "only for sem_seg"),
        ({}, "needs 'classes'"),
        ({"classes": ["a"], "split": "absent.txt"}, r"absent\.txt does not exist"),
    ],
)
def test_entries_that_contradict_each_other(tmp_path, entries, words):
    write_pair(tmp_path, "a", [0])
    with pytest.raises(UserError, match=words):
        datasets.load(custom(tmp_path, **entries))


def test_a_table_without_names_needs_them(tmp_path):
    own = write_table(tmp_path, {"values": {"0": 0}})
    with pytest.raises(UserError, match="needs 'classes'"):
        custom(tmp_path, label_table=own)


def test_metadata_whose_names_disagree_with_the_table(tmp_path):
    write_pair(tmp_path, "a", [0])
    name = custom(tmp_path, label_table="pascal_context")
    metadata = MetadataCatalog.get(name).as_dict() | {"stuff_classes": ["a", "b"]}
    MetadataCatalog.remove(name)
    MetadataCatalog.get(name).set(**metadata)
    with pytest.raises(UserError, match=r"2 class names.*59 classes"):
        build_evaluator(name)


@pytest.mark.parametrize("table", ["", "pascal_context"])
def test_bad_maps_name_the_file(tmp_path, table):
    """Values of no class, and maps of another size than their image, in training and before it."""
    write_pair(tmp_path, "a", [1, 60])
    write_pair(tmp_path, "b", [1, 2], size=(6, 12))
    classes = {"label_table": table} if table else {"classes": [str(k) for k in range(60)]}
    name = custom(tmp_path, **classes)
    mapper = SemanticMapper(is_train=True, augmentations=[])
    first, second = datasets.load(name)
    with pytest.raises(SampleError, match=r"a\.png has (the value|class) 60") as error:
        mapper(dict(first))
    assert error.value.file_name.endswith("a.png")
    with pytest.raises(SampleError, match=r"b\.png is 12x6, but its image is 10x6"):
        mapper(dict(second))
    text = check.check_dataset(name).text()
    assert "60" in text
    assert "label map and image differ in size" in text


def test_cityscapes_label_ids_are_read_where_train_ids_are_missing(shared_data, tmp_path):
    root = shared_data / "cityscapes_mini"
    folders = {"images": str(root / "leftImg8bit" / "train"), "kind": "cityscapes"}
    folders |= {"labels": str(root / "gtFine" / "train"), "task": "semantic"}
    converted = datasets.load(datasets.register_custom({"a": folders})["a"])
    copy = tmp_path / "train"
    for path in (root / "gtFine" / "train").glob("*/*_labelIds.png"):
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / path.parent.name / path.name).symlink_to(path)
    name = datasets.register_custom({"b": folders | {"labels": str(copy)}})["b"]
    original = datasets.load(name)
    assert len(original) == len(converted) == 2
    for ours, theirs in zip(original, converted):
        assert ours["sem_seg_file_name"].endswith("labelIds.png")
        assert theirs["sem_seg_file_name"].endswith("labelTrainIds.png")
        image = np.asarray(Image.open(ours["file_name"]))
        assert np.array_equal(read_sem_seg(ours, image, 255), read_sem_seg(theirs, image, 255))
    assert check.check_dataset(name).ok
