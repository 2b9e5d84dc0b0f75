"""The objects of the generated set as pictures of their own, in a folder per class: a small set for
image classifiers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import cv2

from .outlines import CLASSES

__all__ = ["ensure_crops"]

_MARGIN = 1.2  # side of a picture, in longer sides of its object's box
_LEAST = 16  # pixels; smaller objects cannot be told apart
JPEG_QUALITY = 95


def ensure_crops(root: str | Path, split: str) -> Path:
    """Make ``root/objects/<split>/<class>/*.jpg`` from the set in ``root`` unless it is there, and
    return the folder. Objects of fewer than 16 pixels are left out.

    It is written beside and moved into place when complete, as the set itself is.
    """
    folder = Path(root, "objects", split)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(Path(root, "annotations", f"instances_{split}.json").read_text())
    temporary = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder.parent))
    try:
        _write(content, Path(root, "images", split), temporary)
        temporary.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was faster; its pictures are the same
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write(content: dict[str, Any], images: Path, folder: Path) -> None:
    for name in CLASSES:
        (folder / name).mkdir()
    names = {category["id"]: category["name"] for category in content["categories"]}
    objects: dict[int, list[dict]] = {}
    for each in content["annotations"]:
        if max(each["bbox"][2:]) >= _LEAST and names[each["category_id"]] in CLASSES:
            objects.setdefault(each["image_id"], []).append(each)
    for image in content["images"]:
        found = objects.get(image["id"], ())
        pixels = cv2.imread(str(images / image["file_name"])) if found else None
        for number, each in enumerate(found):
            name = f"{Path(image['file_name']).stem}_{number}.jpg"
            path = folder / names[each["category_id"]] / name
            quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
            cv2.imwrite(str(path), _square(pixels, each["bbox"]), quality)


def _square(pixels, box: list[float]):
    """Return the part of the picture around the box (x, y, width, height)."""
    x, y, w, h = box
    side = _MARGIN * max(w, h)
    left, top = max(int(x + w / 2 - side / 2), 0), max(int(y + h / 2 - side / 2), 0)
    return pixels[top : int(y + h / 2 + side / 2) + 1, left : int(x + w / 2 + side / 2) + 1]
