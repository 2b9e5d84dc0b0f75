"""Pictures in a folder per class: classes and records as torchvision's, messages, mapper, loader,
checks and drawings.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torchvision
from detectron2.data import MetadataCatalog
from PIL import Image
from torchvision.transforms import InterpolationMode

from d2dense.data import classes, classification, datasets, image_folder, loaders, shapes
from d2dense.data.builtin import register_shapes
from d2dense.data.reading import SampleError
from d2dense.errors import UserError
from tools import check_dataset, make_shapes, visualize_data


def write_folders(root, names=("b cat", "a dog", "C"), each=3, size=(40, 30)):
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for k in range(each):
            pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k}.{('png', 'JPEG', 'bmp')[k % 3]}")
    return str(root)


@pytest.fixture
def folder(tmp_path):
    return write_folders(tmp_path / "train")


# ------------------------------------------------ reading


def test_classes_and_pictures_are_torchvisions(folder, tmp_path):
    (tmp_path / "train" / "C" / "deeper").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "C" / "deeper" / "x.png")
    theirs = torchvision.datasets.ImageFolder(folder)
    assert image_folder.class_folders(folder) == theirs.classes
    records = image_folder.load_image_folder(folder)
    assert sorted((r["file_name"], r["label"]) for r in records) == sorted(theirs.samples)
    assert len({r["image_id"] for r in records}) == len(records) == 10


def test_a_picture_of_the_same_name_in_two_classes_counts_twice(folder):
    ids = [r["image_id"] for r in image_folder.load_image_folder(folder)]
    assert "C/0.png" in ids
    assert "a dog/0.png" in ids


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda root: Image.new("RGB", (8, 8)).save(root / "val_1.png"), "1 pictures but no class"),
        (lambda root: None, "no class folder"),
        (lambda root: (root / "a").mkdir(), "no class folder in .* holds a picture"),
    ],
)
def test_folders_without_classes_are_one_clear_error(tmp_path, prepare, words):
    prepare(tmp_path)
    with pytest.raises(UserError, match=words):
        image_folder.load_image_folder(str(tmp_path))


def test_an_empty_class_keeps_its_number(folder, tmp_path, caplog):
    (tmp_path / "train" / "an empty one").mkdir()
    records = image_folder.load_image_folder(folder)
    assert {r["label"] for r in records} == {0, 1, 3}
    assert "1 of 4 class folders" in caplog.text


def test_expected_classes_must_be_there(folder):
    with pytest.raises(UserError, match="3 class folders, expected the dataset's 2: it is with C"):
        image_folder.load_image_folder(folder, classes=["a dog", "b cat"])
    with pytest.raises(UserError, match="without zebra"):
        image_folder.load_image_folder(folder, classes=["C", "a dog", "b cat", "zebra"])


def test_imagenet_is_known_without_its_files(monkeypatch):
    names = classes.dataset_classes(["imagenet_1k_train", "imagenet_1k_val"], "image")
    assert len(names) == 1000
    assert names == sorted(names)
    assert names[0] == "n01440764"
    titles = MetadataCatalog.get("imagenet_1k_val").image_class_titles
    assert titles[0].startswith("tench")
    with pytest.raises(UserError, match="imagenet/val, which does not exist; set DETECTRON2_DATAS"):
        datasets.load("imagenet_1k_val")


# ------------------------------------------------ from a config


def register(**slots):
    entries = {slot: {"kind": "image_folder", "images": path} for slot, path in slots.items()}
    return datasets.register_custom(entries)


def test_slots_of_a_config_become_data_sets(folder, tmp_path, tiny):
    register(train=folder, val=folder)
    assert classes.dataset_classes(["custom_train", "custom_val"], "image") == [
        "C",
        "a dog",
        "b cat",
    ]
    assert len(datasets.load("custom_train")) == 9
    other = write_folders(tmp_path / "val", names=("C", "a dog"))
    register(train=folder, val=other)
    with pytest.raises(UserError, match="different classes"):
        classes.dataset_classes(["custom_train", "custom_val"], "image")
    with pytest.raises(UserError, match="needs 'images'"):
        datasets.register_custom({"train": {"kind": "image_folder", "labels": folder}})
    with pytest.raises(UserError, match=r"has no objects \(thing_classes\)"):
        classes.dataset_classes("custom_train")
    datasets.register("objects", datasets.DatasetSpec(json=tiny.json, images=tiny.images))
    with pytest.raises(UserError, match="has no classes of whole images"):
        classes.dataset_classes("objects", "image")


# ------------------------------------------------ mapper and loader


def test_test_pictures_are_resized_and_cut_as_torchvision_does(folder):
    record = image_folder.load_image_folder(folder)[1]
    steps = classification.imagenet(is_train=False, size=16, test_resize=20)
    mapper = classification.ClassificationMapper(is_train=False, augmentations=steps)
    found = mapper(record)
    picture = Image.open(record["file_name"]).convert("RGB")
    resize = torchvision.transforms.Resize(20, interpolation=InterpolationMode.BICUBIC)
    cut = torchvision.transforms.CenterCrop(16)(resize(picture))
    assert torch.equal(found["image"], torchvision.transforms.functional.pil_to_tensor(cut))
    assert found["label"] == record["label"]


def train_loader(folder, *, start_batch=0, workers=0, seed=3):
    mapper = classification.ClassificationMapper(
        is_train=True, augmentations=classification.imagenet(is_train=True, size=24)
    )
    loader = loaders.build_train_loader(
        dataset=image_folder.load_image_folder(folder),
        mapper=mapper,
        total_batch_size=4,
        num_workers=workers,
        seed=seed,
        aspect_ratio_grouping=False,
        start_batch=start_batch,
    )
    return iter(loader)


def content(batch):
    images = torch.stack([each["image"] for each in batch])
    return images, [(each["image_id"], each["label"]) for each in batch]


def test_draws_depend_on_seed_and_position_alone(folder):
    """RandAugment, the random square, its flip and random erasing use three generators."""
    plain, skipped = train_loader(folder), train_loader(folder, start_batch=2)
    working, other = train_loader(folder, workers=2), train_loader(folder, seed=4)
    batches = [content(next(plain)) for _ in range(4)]
    torch.manual_seed(99), np.random.seed(99)
    for images, names in batches[2:]:
        again = content(next(skipped))
        assert torch.equal(images, again[0])
        assert names == again[1]
    for images, names in batches:
        again = content(next(working))
        assert torch.equal(images, again[0])
        assert names == again[1]
    assert not torch.equal(batches[0][0], content(next(other))[0])
    assert batches[0][0].dtype == torch.uint8
    assert batches[0][0].shape == (4, 3, 24, 24)


def test_erasing_leaves_the_rest_and_draws_noise_of_the_datas_statistics():
    grey = np.full((64, 64, 3), 7, np.uint8)
    step = classification.RandomErasing(probability=1.0)
    torch.manual_seed(0)
    areas, noise = [], []
    for _ in range(40):
        erased = step.apply(grey)
        changed = (erased != 7).any(axis=2)
        areas.append(changed.mean())
        noise.append(erased[changed])
    assert 0.015 < min(areas) <= max(areas) < 0.36  # timm's range, 2 to 33 percent
    mean = np.concatenate(noise).mean(axis=0)
    assert mean == pytest.approx([123.7, 116.3, 103.5], abs=3)
    assert (classification.RandomErasing(probability=0.0).apply(grey) == grey).all()


def test_wrong_settings_are_named(folder):
    with pytest.raises(UserError, match="AUTO_AUGMENT"):
        classification.RandomSquare(auto_augment="nothing-m9")
    with pytest.raises(UserError, match="bicubic"):
        classification.CentralSquare(interpolation="bicubik")
    mapper = classification.ClassificationMapper(is_train=True, augmentations=[])
    record = image_folder.load_image_folder(folder)[0]
    del record["label"]
    with pytest.raises(SampleError, match="no class of its own"):
        mapper(record)


def test_a_broken_picture_is_replaced_in_training_and_named_in_tests(folder, tmp_path, caplog):
    broken = tmp_path / "train" / "C" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    batches = train_loader(folder)
    for _ in range(5):
        assert len(next(batches)) == 4
    assert str(broken) in caplog.text
    steps = classification.imagenet(is_train=False, size=16, test_resize=20)
    loader = loaders.build_test_loader(
        dataset=image_folder.load_image_folder(folder),
        mapper=classification.ClassificationMapper(is_train=False, augmentations=steps),
        num_workers=0,
    )
    with pytest.raises(SampleError, match=r"0\.png"):
        list(loader)


# ------------------------------------------------ tools


def test_check_dataset_counts_and_finds(folder, tmp_path, capsys):
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "C" / "notes.txt").write_text("x")
    (tmp_path / "train" / "labels.csv").write_text("x")
    argv = ["--kind", "image_folder", "--images", folder]
    assert check_dataset.main(argv) == 0
    text = capsys.readouterr().out
    for words in (
        "9 images, 4 classes",
        "classes without a picture (1)",
        "notes.txt",
        "labels.csv",
    ):
        assert words in text
    broken = tmp_path / "train" / "C" / "0.png"
    broken.write_bytes(b"no picture")
    assert check_dataset.main(argv) == 1
    assert "0.png" in capsys.readouterr().out


def test_visualize_data_draws_the_class(folder, tmp_path):
    datasets.register("drawn", datasets.DatasetSpec(kind="image_folder", images=folder))
    out = tmp_path / "drawn"
    assert visualize_data.main(["--dataset", "drawn", "--num", "2", "--output", str(out)]) == 0
    assert len(list(out.iterdir())) == 2


def test_objects_of_the_generated_set(tmp_path, monkeypatch):
    root = tmp_path / "shapes"
    argv = ["--output", str(root), "--train", "6", "--val", "6", "--size", "96", "--crops"]
    assert make_shapes.main(argv) == 0
    register_shapes(root)
    try:
        records = datasets.load("shapes_objects_val")
        instances = json.loads((root / "annotations" / "instances_val.json").read_text())
        large = [a for a in instances["annotations"] if max(a["bbox"][2:]) >= 16]
        assert len(records) == len(large)
        names = classes.dataset_classes("shapes_objects_val", "image")
        assert names == sorted(shapes.CLASSES)
        found = sorted(names[record["label"]] for record in records)
        assert found == sorted(shapes.CLASSES[a["category_id"] - 1] for a in large)
        pictures = {record["file_name"] for record in records}
        assert make_shapes.main([*argv[:-1], "--overwrite"]) == 0
        assert not (root / "objects" / "val").exists()  # they were of the old pictures
        assert {record["file_name"] for record in datasets.load("shapes_objects_val")} == pictures
    finally:
        monkeypatch.undo()
        from d2dense.data import builtin

        register_shapes(builtin.dataset_root() / "shapes")
