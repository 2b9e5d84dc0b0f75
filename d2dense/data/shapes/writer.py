"""Write scenes to disk as COCO instances, COCO panoptic and semantic label maps."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from d2dense.errors import UserError

from .outlines import CLASSES
from .polygons import mask_to_polygons
from .scene import CLUTTER, MAX_OBJECTS, MIN_SIZE, Scene, make_scene
from .textures import STUFF_CLASSES

__all__ = ["DEFAULT_COUNTS", "SEMANTIC_CLASSES", "ensure", "generate"]

logger = logging.getLogger(__name__)

VERSION = 1
SEMANTIC_CLASSES: tuple[str, ...] = (*CLASSES, *STUFF_CLASSES)
DEFAULT_COUNTS = {"train": 2000, "val": 250}
JPEG_QUALITY = 90
_CLUTTER_ID = len(SEMANTIC_CLASSES) - 1


@dataclass(frozen=True)
class _Job:
    """What a worker needs to write any picture of one split."""

    root: Path
    split: str
    height: int
    width: int
    seed: int
    objects: tuple[int, int]

    def folders(self) -> dict[str, Path]:
        return {
            "images": self.root / "images" / self.split,
            "panoptic": self.root / f"panoptic_{self.split}",
            "semantic": self.root / f"semantic_{self.split}",
        }

    def annotation_file(self, kind: str) -> Path:
        return self.root / "annotations" / f"{kind}_{self.split}.json"

    def scene(self, index: int) -> Scene:
        """Compose picture ``index``; only the job's numbers and the index decide about it."""
        name = zlib.crc32(self.split.encode())
        rng = np.random.default_rng([self.seed, name, self.height, self.width, index])
        return make_scene(rng, height=self.height, width=self.width, objects=self.objects)


def generate(
    *,
    output_dir: str | Path,
    split: str,
    count: int,
    size: int | tuple[int, int] = 256,
    seed: int = 0,
    objects: tuple[int, int] = (1, 8),
    workers: int = 1,
    overwrite: bool = False,
) -> dict:
    """Write one split of the generated set and return its settings.

    Files under ``output_dir``: ``images/<split>/000000.jpg`` ...,
    ``annotations/instances_<split>.json`` with the visible part of every object as exact polygons,
    ``annotations/panoptic_<split>.json`` with ``panoptic_<split>/*.png`` in COCO's panoptic format,
    ``semantic_<split>/*.png`` holding indices into ``SEMANTIC_CLASSES``, and
    ``annotations/settings_<split>.json``, written last. Category ids are 1 + the index into
    ``SEMANTIC_CLASSES``.

    Args:
        output_dir: folder of the set; other splits in it stay.
        split: name of the split, such as ``train``; it is part of the seed.
        count: number of pictures.
        size: side of the square pictures in pixels, or (height, width).
        seed: same seed, split and size: same bytes, whatever the number of workers; a larger count
            only adds pictures.
        objects: smallest and largest number of objects tried per picture.
        workers: processes that draw.
        overwrite: replace the split if it is there.

    Raises:
        UserError: on impossible settings, or if the split exists and ``overwrite`` is not set.
    """
    height, width = (size, size) if isinstance(size, int) else size
    _check(split, count, height, width, seed, objects, workers)
    fewest, most = objects
    job = _Job(Path(output_dir), split, height, width, seed, (fewest, most))
    _prepare_folders(job, overwrite)
    records = list(_records(job, count, workers))
    settings = {
        "generator": "d2dense shapes",
        "version": VERSION,
        "split": split,
        "count": count,
        "size": [height, width],
        "seed": seed,
        "objects": list(objects),
    }
    instances, panoptic = _coco_files(records, settings)
    for kind, content in (("instances", instances), ("panoptic", panoptic), ("settings", settings)):
        # json.dumps takes the C encoder; json.dump would take the Python one, ten times slower.
        job.annotation_file(kind).write_text(json.dumps(content))
    return settings


def ensure(
    root: str | Path,
    *,
    train_count: int = DEFAULT_COUNTS["train"],
    val_count: int = DEFAULT_COUNTS["val"],
    size: int | tuple[int, int] = 256,
    seed: int = 0,
    workers: int = 1,
) -> Path:
    """Make the set (splits ``train``, ``val``) in ``root`` unless it is there; return ``root``.

    It is written beside and moved into place when complete, so that several processes may ask at
    once and none ever sees half a set. A set made with other settings is kept, with a warning.

    Args:
        train_count, val_count: numbers of pictures.
        size, seed, workers: as in :func:`generate`.
    """
    root = Path(root)
    counts = {"train": train_count, "val": val_count}
    if root.exists() and any(root.iterdir()):
        _check_existing(root, counts, size, seed)
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    logger.info("Generating %d + %d pictures of the shapes set in %s", train_count, val_count, root)
    temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        for split, count in counts.items():
            generate(
                output_dir=temporary,
                split=split,
                count=count,
                size=size,
                seed=seed,
                workers=workers,
            )
        temporary.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was faster; its set has the same bytes
            os.rename(temporary, root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _check_existing(root, counts, size, seed)
    return root


def _check(split, count, height, width, seed, objects, workers) -> None:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(f"shapes: {message}")

    need(
        split.replace("-", "").replace("_", "").isalnum(),
        f"split {split!r} must be a plain name such as train",
    )
    need(count >= 1, f"count is {count}; at least 1 picture is needed")
    need(
        min(height, width) >= 2 * MIN_SIZE,
        f"size is {height}x{width}; each side needs {2 * MIN_SIZE} pixels or more",
    )
    need(
        max(height, width) <= 8192,
        f"size is {height}x{width}; each side may have 8192 pixels at most",
    )
    need(seed >= 0, f"seed is {seed}; it must be 0 or more")
    low, high = objects
    need(
        0 <= low <= high <= MAX_OBJECTS,
        f"objects is {low}..{high}; it must be a range within 0..{MAX_OBJECTS}",
    )
    need(workers >= 1, f"workers is {workers}; at least 1 is needed")


def _check_existing(
    root: Path, counts: dict[str, int], size: int | tuple[int, int], seed: int
) -> None:
    wanted_size = [size, size] if isinstance(size, int) else list(size)
    for split, count in counts.items():
        file = root / "annotations" / f"settings_{split}.json"
        if not file.is_file():
            raise UserError(
                f"{root} is there but holds no complete split {split!r} of the shapes set "
                f"({file.name} is missing); remove the folder, or run "
                f"tools/make_shapes.py --output {root} --overwrite"
            )
        found = json.loads(file.read_text())
        wanted = {"version": VERSION, "count": count, "size": wanted_size, "seed": seed}
        other = {key: found.get(key) for key, value in wanted.items() if found.get(key) != value}
        if other:
            asked = {key: wanted[key] for key in other}
            logger.warning(
                "%s: split %s was made with %s, not %s; it is used as it is",
                root,
                split,
                other,
                asked,
            )


def _prepare_folders(job: _Job, overwrite: bool) -> None:
    folders = [*job.folders().values()]
    files = [job.annotation_file(kind) for kind in ("settings", "instances", "panoptic")]
    present = [path for path in folders + files if path.exists()]
    if present and not overwrite:
        raise UserError(
            f"split {job.split!r} is already in {job.root} ({present[0].name}); "
            "pass overwrite (--overwrite) to replace it"
        )
    for file in files:  # the settings first: without them the split counts as incomplete
        file.unlink(missing_ok=True)
    shutil.rmtree(job.root / "objects" / job.split, ignore_errors=True)  # cut out of the old ones
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    files[0].parent.mkdir(exist_ok=True)


# One picture --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep OpenCV to one thread: the windows it works on here are too small to share out."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _records(job: _Job, count: int, workers: int) -> Iterator[dict]:
    """Write the pictures; yield what the annotation files need about each, in order."""
    if workers == 1:
        with _one_thread():
            yield from (_write_picture(job, index) for index in range(count))
        return
    with multiprocessing.Pool(workers, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield from pool.starmap(
            _write_picture, ((job, index) for index in range(count)), chunksize=16
        )


def _write_picture(job: _Job, index: int) -> dict:
    scene = job.scene(index)
    folders = job.folders()
    name = f"{index:06d}"
    # Classes of the owners' numbers; the background's (number 0) comes from the materials.
    classes = np.zeros(256, dtype=np.uint8)
    classes[1 : len(scene.items) + 1] = [
        _CLUTTER_ID if item.label == CLUTTER else item.label for item in scene.items
    ]
    semantic = np.where(
        scene.owner == 0, scene.material + np.uint8(len(CLASSES)), classes[scene.owner]
    )
    objects = _object_annotations(scene)
    segments, stuff = _segments(scene, semantic)

    _save_jpeg(folders["images"] / f"{name}.jpg", scene.image)
    _save_png(folders["panoptic"] / f"{name}.png", segments)
    _save_png(folders["semantic"] / f"{name}.png", semantic)
    return {"index": index, "file": name, "objects": objects, "stuff": stuff}


def _object_annotations(scene: Scene) -> list[dict]:
    """Visible part of each object: its number, category, box xywh, area and polygons."""
    found = []
    for number, item in enumerate(scene.items, start=1):
        if item.label == CLUTTER:
            continue
        mask = (scene.owner[item.window] == number).view(np.uint8)
        x, y, width, height = cv2.boundingRect(mask)
        mask = mask[y : y + height, x : x + width]
        corner = (item.left + x, item.top + y)
        found.append(
            {
                "number": number,
                "category_id": item.label + 1,
                "bbox": [*corner, width, height],
                "area": cv2.countNonZero(mask),
                "segmentation": mask_to_polygons(mask, offset=corner),
            }
        )
    return found


def _segments(scene: Scene, semantic: np.ndarray) -> tuple[np.ndarray, list[dict]]:
    """Return the panoptic map (H, W, 3) uint8 BGR and the stuff segments in it.

    Segment ids are the owner's number for objects, 256 + category id for stuff: COCO's id = R + 256
    G + 65536 B.
    """
    is_stuff = semantic >= len(CLASSES)
    red = np.where(is_stuff, semantic + np.uint8(1), scene.owner)
    stuff = []
    for index in range(len(CLASSES), len(SEMANTIC_CLASSES)):
        mask = (semantic == index).view(np.uint8)
        area = cv2.countNonZero(mask)
        if area:
            category_id = index + 1
            found = {"category_id": category_id, "bbox": list(cv2.boundingRect(mask)), "area": area}
            stuff.append({"id": 256 + category_id, **found})
    return cv2.merge([np.zeros_like(red), is_stuff.view(np.uint8), red]), stuff


def _save_jpeg(path: Path, image: np.ndarray) -> None:
    """Write a BGR picture."""
    _save(path, image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])


def _save_png(path: Path, array: np.ndarray) -> None:
    """Write a map (H, W) or (H, W, 3) BGR, quickly: label maps are small after any compression."""
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    options += [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT]
    if hasattr(cv2, "IMWRITE_PNG_FILTER"):  # OpenCV >= 4.12 can be kept from trying filters
        options += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    _save(path, array, options)


def _save(path: Path, array: np.ndarray, options: list[int]) -> None:
    done, encoded = cv2.imencode(path.suffix, array, options)
    if not done:
        raise RuntimeError(f"OpenCV could not encode {path.name}")
    path.write_bytes(encoded.tobytes())


# Annotation files ---------------------------------------------------------------------------------


def _coco_files(records: list[dict], settings: dict) -> tuple[dict, dict]:
    """Bring the pictures' records into the contents of the instances and the panoptic file."""
    height, width = settings["size"]
    images, annotations, panoptic = [], [], []
    for record in records:
        image_id = record["index"] + 1
        name = record["file"]
        images.append(
            {"id": image_id, "file_name": f"{name}.jpg", "height": height, "width": width}
        )
        segments = []
        for found in record["objects"]:
            shared = {key: found[key] for key in ("category_id", "bbox", "area")}
            segments.append({"id": found["number"], **shared, "iscrowd": 0})
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    **shared,
                    "segmentation": found["segmentation"],
                    "iscrowd": 0,
                }
            )
        segments += [{**stuff, "iscrowd": 0} for stuff in record["stuff"]]
        panoptic.append(
            {"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments}
        )
    things = [
        {"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES)
    ]
    palette = [[int(v) for v in row] for row in _palette(len(SEMANTIC_CLASSES))]
    segments_categories = [
        {"id": i + 1, "name": name, "isthing": int(i < len(CLASSES)), "color": palette[i]}
        for i, name in enumerate(SEMANTIC_CLASSES)
    ]
    common = {"info": settings, "licenses": [], "images": images}
    return (
        {**common, "annotations": annotations, "categories": things},
        {**common, "annotations": panoptic, "categories": segments_categories},
    )


def _palette(count: int) -> np.ndarray:
    """RGB colours (count, 3) uint8, spread over the hues."""
    hsv = np.array(
        [[[i * 180 // count, 200 - 70 * (i % 2), 230 - 60 * (i % 3)] for i in range(count)]],
        np.uint8,
    )
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0]
