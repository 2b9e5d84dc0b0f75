"""Tiny datasets written on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

WIDTH, HEIGHT = 60, 40


def rectangle(x: float, y: float, w: float, h: float) -> list[float]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def annotation(
    number: int, image: int, box: list[float], category: int = 1, mask: bool = True, **more
) -> dict:
    result = {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": 0,
    }
    if mask:
        result["segmentation"] = [rectangle(*box)]
    return result | more


@pytest.fixture
def tiny(tmp_path: Path) -> SimpleNamespace:
    """A COCO json of four 60x40 images (the second tall) with three classes of ids 1, 3, 7.

    ``content`` may be changed and written with ``write()``.
    """
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    entries = []
    for number in range(4):
        width, height = (HEIGHT, WIDTH) if number == 1 else (WIDTH, HEIGHT)
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        name = f"{number}.png"
        Image.fromarray(pixels).save(images / name)
        entries.append({"id": 10 + number, "file_name": name, "width": width, "height": height})
    content = {
        "images": entries,
        "annotations": [
            annotation(1, 10, [5, 6, 20, 10], 1),
            annotation(2, 10, [30, 10, 8, 8], 7),
            annotation(3, 11, [2, 3, 30, 40], 3),
            annotation(4, 12, [0, 0, 60, 40], 1),
        ],
        "categories": [
            {"id": 7, "name": "cherry"},
            {"id": 1, "name": "apple"},
            {"id": 3, "name": "banana"},
        ],
    }
    path = tmp_path / "tiny.json"

    def write() -> str:
        path.write_text(json.dumps(content))
        return str(path)

    write()
    return SimpleNamespace(
        json=str(path), images=str(images), content=content, write=write, root=tmp_path
    )


@pytest.fixture
def tiny_semantic(tmp_path: Path) -> SimpleNamespace:
    """Three 60x40 images with label maps of classes 0, 1, 2 and the ignore label 9."""
    folders = {name: tmp_path / name / "city" for name in ("pictures", "maps")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    for number in range(3):
        labels = np.zeros((HEIGHT, WIDTH), np.uint8)
        labels[10:30, 10:40] = 1
        labels[:, 50:] = 2
        labels[:4] = 9
        Image.fromarray(np.repeat(labels[..., None] * 20, 3, axis=2)).save(
            folders["pictures"] / f"{number}.png"
        )
        Image.fromarray(labels).save(folders["maps"] / f"{number}_label.png")
    names = tmp_path / "names.txt"
    names.write_text("road\ncar\n\nsky\n")
    return SimpleNamespace(
        images=str(tmp_path / "pictures"),
        labels=str(tmp_path / "maps"),
        classes=str(names),
        root=tmp_path,
    )


@pytest.fixture(autouse=True)
def _forget_datasets():
    """Leave the catalogs as they were."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
