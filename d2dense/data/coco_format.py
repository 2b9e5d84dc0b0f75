"""Annotation files in COCO's and LVIS's json layout, read into Detectron2's dataset format."""

from __future__ import annotations

import gc
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from d2dense.errors import UserError

from .annotations import AnnotationReader, image_size

__all__ = [
    "is_category",
    "is_image",
    "load_coco",
    "load_lvis",
    "metadata",
    "read_categories",
    "read_json",
]

Record = dict[str, Any]

_BLOCK = 1 << 24


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the content of an annotation file.

    Raises:
        UserError: no such file, not json, or without the lists that COCO's layout has.
    """
    try:
        content = _parse(path)
    except OSError as error:
        raise UserError(f"cannot read annotation file {path}: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"annotation file {path} is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"annotation file {path} is not valid json: {error}") from None
    for key in ("images", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(
                f"annotation file {path} has no list {key!r}; expected COCO's layout with 'images',"
                " 'annotations' and 'categories'"
            )
    return content


def _parse(path: str | Path) -> Any:
    """Parse json without the pauses of the garbage collector, which finds nothing among millions of
    new objects, and without keeping the bytes beside the text.
    """
    content = Path(path).read_bytes()
    text = content.decode(json.detect_encoding(content), "surrogatepass")
    del content
    enabled = gc.isenabled()
    gc.disable()
    try:
        return json.loads(text)
    finally:
        if enabled:
            gc.enable()


def read_categories(path: str | Path) -> list[dict[str, Any]]:
    """Return the categories of an annotation file, sorted by id.

    The list is looked for in the file's bytes first, since parsing all of COCO's annotations for
    it takes many seconds.

    Raises:
        UserError: as :func:`read_json`, or categories without id and name.
    """
    categories = _scan_categories(path) or read_json(path)["categories"]
    for category in categories:
        if not is_category(category):
            raise UserError(
                f"annotation file {path}: every category needs an 'id' and a 'name', not "
                f"{str(category)[:80]}"
            )
    ids = [category["id"] for category in categories]
    if len({type(id_) for id_ in ids}) > 1:
        raise UserError(f"annotation file {path}: some category ids are numbers, some are texts")
    if len(set(ids)) != len(ids):
        raise UserError(f"annotation file {path}: two categories share an id; make ids unique")
    if not categories:
        raise UserError(f"annotation file {path}: the list 'categories' is empty")
    return sorted(categories, key=lambda category: category["id"])


def is_category(entry: Any) -> bool:
    """Whether an entry of ``categories`` has an id and a name."""
    return (
        isinstance(entry, dict)
        and type(entry.get("id")) in (int, str)
        and isinstance(entry.get("name"), (str, int, float))
    )


def is_image(entry: Any) -> bool:
    """Whether an entry of ``images`` has an id; other parts may be missing."""
    return isinstance(entry, dict) and type(entry.get("id")) in (int, str)


def _scan_categories(path: str | Path) -> list[dict[str, Any]] | None:
    """Return the list after the file's only ``"categories"`` key; None where that is unclear."""
    key = b'"categories"'
    try:
        with open(path, "rb") as file:
            places = list(itertools.islice(_places(file, key), 2))
            if len(places) != 1:
                return None
            file.seek(places[0] + len(key))
            rest = file.read(4_000_000)
    except OSError:
        return None
    text = rest.decode("utf-8", errors="ignore").lstrip(" \t\r\n:")
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _places(file: BinaryIO, key: bytes) -> Iterator[int]:
    """Yield where ``key`` is in a file, of which little is in memory at a time."""
    end, tail = 0, b""
    while block := file.read(_BLOCK):
        end += len(block)
        window = tail + block
        start = window.find(key)
        while start >= 0:
            yield end - len(window) + start
            start = window.find(key, start + 1)
        tail = window[1 - len(key) :]


def metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata that a file's categories give: names, ids, and LVIS's image counts."""
    categories = read_categories(path)
    found = {
        "thing_classes": [str(category["name"]) for category in categories],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(categories)},
    }
    if all("image_count" in category for category in categories):
        found["class_image_count"] = [
            {"id": c["id"], "image_count": c["image_count"]} for c in categories
        ]
    return found


def load_coco(json_file: str, image_root: str) -> list[Record]:
    """Return the records of a COCO json, in the order of the image ids.

    Category ids become contiguous in the order of the ids. Objects marked ``ignore`` count as
    crowds. What is left out, and what is an error, says :mod:`d2dense.data.annotations`.

    Raises:
        UserError: a file that is not COCO's layout, naming the entry.
    """
    return _load(json_file, image_root, is_lvis=False)


def load_lvis(json_file: str, image_root: str) -> list[Record]:
    """Return the records of an LVIS json; as :func:`load_coco`, with LVIS's lists of categories
    that were checked. Images are found by ``file_name``, or by split folder and name as their
    ``coco_url`` ends.
    """
    return _load(json_file, image_root, is_lvis=True)


def _load(json_file: str, image_root: str, *, is_lvis: bool) -> list[Record]:
    content = read_json(json_file)
    contiguous = {c["id"]: index for index, c in enumerate(read_categories(json_file))}
    objects = _by_image(content.pop("annotations", None) or (), json_file)
    reader = AnnotationReader(json_file, contiguous)
    images = _sorted_images(content["images"], json_file)
    in_split = is_lvis and bool(images) and not _exists(image_root, images[0].get("file_name"))
    records = []
    for image in images:
        record = {
            "file_name": os.path.join(image_root, _file_name(image, in_split, json_file)),
            "image_id": image["id"],
        }
        size = _size(image, json_file)
        if size is not None:
            record["height"], record["width"] = size
        if is_lvis:
            for key in ("not_exhaustive_category_ids", "neg_category_ids"):
                record[key] = image.get(key, [])
        found = (reader.read(a, image, size) for a in objects.pop(image["id"], ()))
        record["annotations"] = [each for each in found if each is not None]
        records.append(record)
    for unlisted in objects.values():
        reader.note_unlisted(unlisted)
    reader.warn()
    return records


def _by_image(annotations: Any, json_file: str) -> dict[Hashable, list[dict[str, Any]]]:
    """Return the annotations of each image id, listed images or not."""
    result = defaultdict(list)
    if not isinstance(annotations, Sequence):
        raise UserError(f"{json_file}: 'annotations' is {type(annotations).__name__}, not a list")
    for annotation in annotations:
        try:
            result[annotation.get("image_id")].append(annotation)
        except (AttributeError, TypeError):
            raise UserError(
                f"{json_file}: an annotation is no object with an image_id: {str(annotation)[:80]}"
            ) from None
    return result


def _sorted_images(images: list[Any], json_file: str) -> list[dict[str, Any]]:
    """Return the images in the order of their ids, which are there, of one kind and unique."""
    for image in images:
        if not is_image(image):
            raise UserError(f"{json_file}: an image has no 'id': {str(image)[:80]}")
    try:
        images = sorted(images, key=lambda image: image["id"])
    except TypeError:
        raise UserError(f"{json_file}: some image ids are numbers and some are texts") from None
    for one, other in itertools.pairwise(images):
        if one["id"] == other["id"]:
            raise UserError(
                f"{json_file}: two images share the id {one['id']} ({one.get('file_name')} and "
                f"{other.get('file_name')}); make image ids unique"
            )
    return images


def _size(image: dict[str, Any], json_file: str) -> tuple[int, int] | None:
    try:
        return image_size(image)
    except ValueError as error:
        raise UserError(f"{json_file}: image {image['id']} {error}; correct it") from None


def _exists(root: str, name: Any) -> bool:
    return isinstance(name, str) and bool(name) and os.path.isfile(os.path.join(root, name))


def _file_name(image: dict[str, Any], in_split: bool, json_file: str) -> str:
    if in_split and isinstance(image.get("coco_url"), str):
        return "/".join(image["coco_url"].split("/")[-2:])
    if not image.get("file_name") or not isinstance(image["file_name"], str):
        raise UserError(f"{json_file}: image {image.get('id')} has no 'file_name'")
    return image["file_name"]
