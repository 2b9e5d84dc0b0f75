"""check_dataset and visualize_data: faults put in on purpose are found, clean sets pass."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2dense.data import check
from d2dense.data.check_coco import check_json
from d2dense.data.check_semantic import check_folders
from d2dense.data.datasets import load, register_custom
from d2dense.data.loaders import build_train_loader
from d2dense.data.mappers import DetectionMapper
from d2dense.errors import UserError
from tests.commands import Command
from tools import check_dataset as check_tool
from tools import visualize_data as visualize_tool


def report_of(tiny, **options) -> check.Report:
    return check_json(tiny.write(), tiny.images, **options)


def test_a_clean_set_passes_with_its_table(tiny):
    report = report_of(tiny)
    assert report.ok
    assert {finding.level for finding in report.findings.values()} == {"note"}
    # boxes 20x10 and 8x8 are small, 30x40 and 60x40 medium
    assert report.header == ("class", "instances", "images", "small", "medium", "large", "crowds")
    assert report.rows == [
        ("apple", 2, 2, 1, 1, 0, 0),
        ("banana", 1, 1, 0, 1, 0, 0),
        ("cherry", 1, 1, 1, 0, 0, 0),
    ]
    assert report.counts["images"] == 4
    assert report.counts["objects"] == 4
    assert report.count("category ids have gaps or do not start at 1 (handled)") == 1
    assert report.count("images without an object (left out of training unless asked for)") == 1
    assert "training can start" in report.text()
    assert "apple" in report.text()


def first(content) -> dict:
    return content["annotations"][0]


NAN = float("nan")
BAD_RLE = {"size": [40, 60], "counts": [10, 20]}
FAULTS = [
    ("error", "category ids that the file does not list", lambda c: first(c).update(category_id=2)),
    (
        "error",
        "boxes with NaN or infinity",
        lambda c: first(c).update(bbox=[1, 1, NAN, 2]),
    ),
    ("error", "boxes that are not four numbers", lambda c: first(c).update(bbox=[1, 1, 5])),
    ("error", "boxes that are not four numbers", lambda c: first(c).pop("bbox")),
    ("error", "image ids used twice", lambda c: c["images"].append(c["images"][0])),
    (
        "error",
        "category ids used twice",
        lambda c: c["categories"].append({"id": 1, "name": "x"}),
    ),
    ("error", "the file has no categories", lambda c: c["categories"].clear()),
    ("error", "the file lists no images", lambda c: c["images"].clear()),
    ("error", "no image has an object to train on", lambda c: c["annotations"].clear()),
    ("error", "images without id or file_name", lambda c: c["images"][0].pop("file_name")),
    ("error", "segmentations of an unknown form", lambda c: first(c).update(segmentation="x")),
    (
        "error",
        "run-length masks that cannot be decoded",
        lambda c: first(c).update(segmentation=BAD_RLE),
    ),
    (
        "error",
        "run-length masks of another size than the image",
        lambda c: first(c).update(segmentation={"size": [9, 9], "counts": [81]}),
    ),
    (
        "error",
        "segmentations with NaN or infinity",
        lambda c: first(c).update(segmentation=[[1, 1, 5, 1, 5, float("inf")]]),
    ),
    ("error", "image size differs from the annotation", lambda c: c["images"][0].update(width=61)),
    ("warning", "boxes without area (left out)", lambda c: first(c).update(bbox=[1, 1, 0, 5])),
    ("warning", "boxes without area (left out)", lambda c: first(c).update(bbox=[1, 1, 5, -5])),
    (
        "warning",
        "boxes wholly outside the image (left out)",
        lambda c: first(c).update(bbox=[70, 1, 5, 5]),
    ),
    (
        "warning",
        "boxes partly outside the image (clipped)",
        lambda c: first(c).update(bbox=[50, 1, 20, 5]),
    ),
    (
        "warning",
        "polygons with fewer than three corners (left out)",
        lambda c: first(c).update(segmentation=[[1, 2, 3, 4]]),
    ),
    (
        "warning",
        "masks without a pixel (left out)",
        lambda c: first(c).update(segmentation={"size": [40, 60], "counts": [2400]}),
    ),
    (
        "warning",
        "objects without a mask (training masks would fail)",
        lambda c: first(c).pop("segmentation"),
    ),
    ("warning", "identical annotations", lambda c: c["annotations"].append(first(c) | {"id": 99})),
    (
        "warning",
        "annotation ids used more than once",
        lambda c: c["annotations"][1].update(id=1),
    ),
    (
        "warning",
        "annotations of images that the file does not list (left out)",
        lambda c: first(c).update(image_id=77),
    ),
    (
        "warning",
        "image files listed more than once",
        lambda c: c["images"].append(c["images"][0] | {"id": 55}),
    ),
    (
        "warning",
        "category names used twice",
        lambda c: c["categories"].append({"id": 9, "name": "apple"}),
    ),
    ("warning", "images without height or width", lambda c: c["images"][0].pop("width")),
    (
        "note",
        "crowds (not trained on, ignored in evaluation)",
        lambda c: first(c).update(iscrowd=1),
    ),
    (
        "note",
        "classes without an instance",
        lambda c: c["categories"].append({"id": 9, "name": "plum"}),
    ),
]


@pytest.mark.parametrize(("level", "title", "change"), FAULTS, ids=[f[1] for f in FAULTS])
def test_every_fault_is_found(tiny, level, title, change):
    assert report_of(tiny).count(title) == 0
    change(tiny.content)
    report = report_of(tiny)
    assert report.count(title) >= 1
    assert report.findings[title].level == level
    assert report.ok == (level != "error")


def test_warnings_are_survived_by_training(tiny):
    """What the report calls a warning is indeed handled by the reader, mapper and loader."""
    for level, _, change in FAULTS:
        if level == "warning" and "without a mask" not in _:
            change(tiny.content)
    tiny.write()
    name = register_custom({"train": {"json": tiny.json, "images": tiny.images}})["train"]
    mapper = DetectionMapper(is_train=True, augmentations=[])
    loader = iter(
        build_train_loader(dataset=name, mapper=mapper, total_batch_size=2, num_workers=0)
    )
    for _ in range(6):
        assert len(next(loader)) == 2


def test_broken_missing_and_turned_images(tiny):
    folder = Path(tiny.images)
    (folder / "0.png").unlink()
    data = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(data[: len(data) // 2])
    report = report_of(tiny)
    assert report.count("missing image files") == 1
    assert report.count("unreadable or truncated images") == 1
    assert not report.ok
    fast = report_of(tiny, decode=False)  # the header alone is whole
    assert fast.count("unreadable or truncated images") == 0
    assert fast.count("missing image files") == 1
    assert "0.png" in report.text()
    assert "training would fail" in report.text()


def test_exif_turned_images_are_compared_as_they_are_read(tiny):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 60)).save(Path(tiny.images) / "0.png", exif=exif)
    assert report_of(tiny).ok
    assert report_of(tiny, decode=False).ok


def test_masks_are_errors_only_where_they_are_wanted(tiny):
    title = "objects without a mask (training masks would fail)"
    for annotation in tiny.content["annotations"]:
        del annotation["segmentation"]
    assert report_of(tiny).count("no masks: for box detectors only") == 1
    assert report_of(tiny, masks=False).ok
    wanted = report_of(tiny, masks=True)
    assert (wanted.count(title), wanted.ok) == (4, False)


def test_many_examples_and_classes_are_cut_short(tiny):
    tiny.content["categories"] += [{"id": 100 + i, "name": f"c{i}"} for i in range(300)]
    text = report_of(tiny).text()
    assert "and 295 more" in text
    assert "(300 classes do not occur)" in text


def semantic_report(data, **options) -> check.Report:
    options = {"classes": ["road", "car", "sky"], "ignore_label": 9} | options
    return check_folders(data.images, data.labels, label_suffix="_label.png", **options)


def test_semantic_folders(tiny_semantic):
    data = tiny_semantic
    report = semantic_report(data)
    assert report.ok
    labels = np.asarray(Image.open(Path(data.labels) / "city" / "0_label.png"))
    share = {name: 100 * (labels == i).mean() for i, name in enumerate(("road", "car", "sky"))}
    for name, percent, images in report.rows[:3]:
        assert (percent, images) == (pytest.approx(share[name]), 3)
    assert not semantic_report(data, ignore_label=255).ok
    outside = semantic_report(data, classes=["road", "car"])
    assert outside.count("labels outside 0 to 1 that are not the ignore label 9") == 3
    assert semantic_report(data, classes=["a", "b", "c", "d"]).count("classes without a pixel") == 1


def test_faulty_semantic_folders(tiny_semantic):
    pictures, maps = (Path(p) / "city" for p in (tiny_semantic.images, tiny_semantic.labels))
    Image.new("RGB", (9, 9)).save(pictures / "new.png")
    Image.new("L", (9, 9)).save(maps / "other_label.png")
    report = semantic_report(tiny_semantic)
    assert report.count("images without a label map (left out)") == 1
    assert report.count("label maps without an image (left out)") == 1
    assert report.ok
    Image.new("L", (9, 9)).save(maps / "0_label.png")
    Image.new("RGB", (60, 40)).save(maps / "1_label.png")
    Image.new("L", (60, 40), 9).save(maps / "2_label.png")
    report = semantic_report(tiny_semantic)
    assert report.count("label map and image differ in size") == 1
    assert report.count("label maps that cannot be read") == 1
    assert report.count("label maps without a labelled pixel") == 1
    assert not report.ok
    for path in maps.iterdir():
        path.unlink()
    assert semantic_report(tiny_semantic).count("no image has a label map") == 1


CLEAN = {
    "coco": ("coco_mini/annotations/instances_train.json", "coco_mini/images/train", "coco"),
    "boxes": ("bccd/annotations_coco/instances_val.json", "bccd/JPEGImages", "coco"),
    "lvis": ("lvis_mini/annotations/lvis_v0.5_val_mini.json", "lvis_mini/images", "lvis"),
}


@pytest.mark.parametrize("key", CLEAN)
def test_real_json_sets_pass(shared_data, key):
    json_file, images, kind = CLEAN[key]
    entries = {"kind": kind, "json": shared_data / json_file, "images": shared_data / images}
    name = register_custom({"set": {k: str(v) for k, v in entries.items()}})["set"]
    report = check.check_dataset(name)
    assert report.ok, report.text()
    content = json.loads((shared_data / json_file).read_text())
    objects = [a for a in content["annotations"] if not a.get("iscrowd")]
    assert report.counts["objects"] == len(objects)
    assert sum(row[1] for row in report.rows) == len(objects)
    assert report.counts["crowds"] == len(content["annotations"]) - len(objects)


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_cityscapes_is_checked_through_its_records(shared_data, task):
    root = shared_data / "cityscapes_mini"
    folders = {"images": str(root / "leftImg8bit/val"), "labels": str(root / "gtFine/val")}
    entries = {"kind": "cityscapes", "task": task, **folders}
    report = check.check_dataset(register_custom({"city": entries})["city"])
    assert report.ok
    assert report.counts["images"] == 1
    if task == "instance":
        objects = [a for a in load("custom_city")[0]["annotations"] if not a["iscrowd"]]
        assert sum(row[1] for row in report.rows) == len(objects) > 5
    else:
        assert sum(row[1] for row in report.rows) == pytest.approx(100)


# The command lines


def test_exit_codes(tiny, capsys):
    arguments = ["--json", tiny.json, "--images", tiny.images]
    assert check_tool.main(arguments) == 0
    assert "apple" in capsys.readouterr().out
    assert check_tool.main([*arguments, "--masks"]) == 0
    del tiny.content["annotations"][0]["segmentation"]
    tiny.write()
    assert check_tool.main([*arguments, "--masks"]) == 1
    Path(tiny.images, "0.png").unlink()
    assert check_tool.main([*arguments, "--fast"]) == 1
    assert "missing image files" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to check"),
        (["--json", "absent.json", "--images", "."], "absent.json does not exist"),
        (["--dataset", "coco_2017_vall"], "did you mean 'coco_2017_val'"),
        (["--json", "a.json", "--images", ".", "A.B", "1"], "need --config-file"),
        (["--images", ".", "--labels", "."], "needs 'classes'"),
    ],
)
def test_wrong_commands_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        check_tool.main(arguments)


def test_overrides_after_a_list_of_datasets():
    flags = ["--config-file", "f", "--dataset", "coco_2017_val"]
    for words in (["dataloader.train.batch_size=1"], ["SOLVER.IMS_PER_BATCH", "2"]):
        args = check_tool.parse([*flags, *words])
        assert (args.dataset, args.overrides) == (["coco_2017_val"], words)


def test_the_class_file_names_the_ignore_label(tmp_path, capsys):
    folder = tmp_path / "flat"
    for name, values in (("images", np.zeros((4, 5, 3))), ("labels", np.full((4, 5), 9))):
        (folder / name).mkdir(parents=True)
        values[0] = 1
        Image.fromarray(values.astype(np.uint8)).save(folder / name / "a.png")
    classes = folder / "classes.json"
    classes.write_text(json.dumps({"classes": ["road", "car"], "ignore_label": 9}))
    flags = [f"--{name}={folder / name}" for name in ("images", "labels")]
    assert check_tool.main([*flags, "--classes", str(classes)]) == 0
    assert "(ignored: 9)" in capsys.readouterr().out
    assert check_tool.main([*flags, "--classes", str(classes), "--ignore-label", "8"]) == 1
    classes.write_text(json.dumps({"classes": ["road", "car"]}))
    assert check_tool.main([*flags, "--classes", str(classes)]) == 1
    classes.write_text(json.dumps({"classes": ["road", "car"], "ignore_label": "x"}))
    with pytest.raises(UserError, match=r"ignore_label in .* is 'x'"):
        check_tool.main([*flags, "--classes", str(classes)])


def test_real_label_maps_pass_with_their_class_file(shared_data):
    root = shared_data / "camvid_mini"
    flags = ["--images", root / "images", "--labels", root / "labels"]
    assert check_tool.main([*map(str, flags), "--classes", str(root / "classes.json")]) == 0


@pytest.mark.parametrize("number", ["0", "-3"])
def test_no_picture_to_draw_is_a_mistake(number):
    with pytest.raises(UserError, match=f"--num: '{number}' is not a whole number of 1 or more"):
        visualize_tool.main(["--dataset", "coco_2017_val", "--num", number])


def test_the_command_line_ends_without_a_traceback(tiny, repo_root, tmp_path):
    words = [repo_root / "tools/check_dataset.py", "--images", tiny.images, "--json", "absent.json"]
    log = tmp_path / "log"
    assert Command(words, log=log, environ=os.environ, cwd=repo_root).wait() == 2
    line = "error: the command line: absent.json does not exist; correct the path\n"
    assert log.read_text() == line


def yaml_config(folder: Path, text: str = "") -> str:
    path = folder / "config.yaml"
    path.write_text(
        "MODEL:\n  META_ARCHITECTURE: GeneralizedRCNN\n  MASK_ON: True\nSEED: 1\n"
        "DATALOADER:\n  NUM_WORKERS: 0\nINPUT:\n  MAPPER: lsj\n  LSJ:\n    IMAGE_SIZE: 96\n"
        f"SOLVER:\n  IMS_PER_BATCH: 2\n{text}"
    )
    return str(path)


def lazy_config(folder: Path) -> str:
    path = folder / "config.py"
    path.write_text(
        "from detectron2.config import LazyCall as L\n"
        "from torch import nn\n"
        "from d2dense.config import common\n"
        "from d2dense.data import augmentations\n"
        "model = dict(head=dict(num_classes='auto'))\n"
        "train = common.train(seed=1)\n"
        "dataloader = common.detection_loader(\n"
        "    train_augmentations=L(augmentations.lsj)(image_size=96), masks=True,\n"
        "    batch_size=2, workers=0)\n"
    )
    return str(path)


def overrides(tiny, kind: str) -> list[str]:
    if kind == "lazy":
        return [
            f"datasets.{slot}.{key}={getattr(tiny, key)}"
            for slot in ("train", "val")
            for key in ("json", "images")
        ]
    return [
        word
        for slot in ("TRAIN", "VAL")
        for key in ("JSON", "IMAGES")
        for word in (f"DATASETS.CUSTOM.{slot}.{key}", getattr(tiny, key.lower()))
    ] + ["MODEL.ROI_HEADS.NUM_CLASSES", "auto"]


@pytest.mark.parametrize("kind", ["yaml", "lazy"])
def test_both_kinds_of_config_are_checked_and_drawn(tiny, tmp_path, kind, capsys):
    config_file = (yaml_config if kind == "yaml" else lazy_config)(tmp_path)
    arguments = ["--config-file", config_file, *overrides(tiny, kind)]
    assert check_tool.main(arguments) == 0
    out = capsys.readouterr().out
    assert "custom_train" in out
    assert "custom_val" in out
    folder = tmp_path / "pictures"
    options = ["--num", "5", "--output", str(folder)]
    assert visualize_tool.main([*arguments[:2], *options, *arguments[2:]]) == 0
    pictures = sorted(folder.iterdir())
    assert len(pictures) == 5
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.size == (96, 96)
            assert len(np.unique(np.asarray(picture))) > 20
    # masks are asked for by both configs
    del tiny.content["annotations"][0]["segmentation"]
    tiny.write()
    assert check_tool.main(arguments) == 1


def test_registered_sets_are_drawn_as_annotated(tiny, tiny_semantic, tmp_path):
    stuff = {
        "images": tiny_semantic.images,
        "labels": tiny_semantic.labels,
        "classes": tiny_semantic.classes,
        "label_suffix": "_label.png",
        "ignore_label": 9,
    }
    things = {"json": tiny.json, "images": tiny.images}
    for name in register_custom({"things": things, "stuff": stuff}).values():
        folder = tmp_path / name
        arguments = ["--dataset", name, "--output", str(folder), "--scale", "8"]
        assert visualize_tool.main(arguments) == 0
        assert len(list(folder.iterdir())) == (4 if name == "custom_things" else 3)
    with Image.open(tmp_path / "custom_stuff" / "0000_0.jpg") as drawn:
        pixels = np.asarray(drawn).astype(int)
    # classes are painted in colour over a grey picture; the ignored rows on top are not
    color = np.ptp(pixels, axis=2)
    assert pixels.shape == (320, 480, 3)
    assert color[96:224, 96:304].mean() > 30
    assert color[:28].mean() < 3


def test_drawn_boxes_lie_on_the_objects(tmp_path):
    from detectron2.data import MetadataCatalog

    from d2dense.data.visualize import draw_sample

    Image.new("RGB", (60, 40)).save(tmp_path / "x.png")
    record = {
        "file_name": str(tmp_path / "x.png"),
        "annotations": [{"bbox": [20, 10, 50, 30], "bbox_mode": 0, "category_id": 0, "iscrowd": 0}],
    }
    sample = DetectionMapper(is_train=True, augmentations=[])(record)
    metadata = MetadataCatalog.get("drawing").set(thing_classes=["a"])
    drawn = draw_sample(sample, metadata, scale=4).max(axis=2)
    MetadataCatalog.remove("drawing")
    assert drawn.shape == (160, 240)
    # a bright frame along x = 20, 50 and y = 10, 30 (times 4), nothing far from it but the label
    assert drawn[60:120, 76:84].max() > 60
    assert drawn[60:120, 196:204].max() > 60
    assert drawn[116:124, 100:180].max() > 60
    assert drawn[130:, :].max() < 30
    assert drawn[:, :70].max() < 30
