"""Annotation files: registering, loading, checking, mapping and evaluating them."""

from __future__ import annotations

import json
import logging

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from hypothesis import strategies as st
from PIL import Image
from torch import ones, tensor

from d2dense.data import augmentations as recipes
from d2dense.data import check, coco_format, datasets
from d2dense.data.mappers import DetectionMapper
from d2dense.evaluation.coco import COCOEvaluator
from d2dense.evaluation.lvis import LVISEvaluator
from tests.fuzz.harness import attempt, fuzz
from tests.fuzz.mutations import damaged_bytes, spoiled

SIZE = (24, 32)
NAMES = ("a.jpg", "b.png", "c.jpg")


def _valid() -> dict:
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[4:12, 5:20] = 1
    code = mask_util.encode(mask)
    compressed = {"size": list(SIZE), "counts": code["counts"].decode()}
    runs = {"size": list(SIZE), "counts": [100, 20, 200, 50, SIZE[0] * SIZE[1] - 370]}
    shapes = [[[3, 3, 20, 4, 12.5, 20]], compressed, runs, [[1, 1, 9, 1, 9, 9, 1, 9]]]
    annotations = [
        {
            "id": index + 1,
            "image_id": index % 3 + 1,
            "category_id": (2, 5)[index % 2],
            "bbox": [2.0 + index, 3, 10, 12.5],
            "area": 125.0,
            "iscrowd": int(index == 2),
            "segmentation": shapes[index % 4],
        }
        for index in range(5)
    ]
    images = [
        {"id": i + 1, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
        | {"neg_category_ids": [2], "not_exhaustive_category_ids": []}
        for i, name in enumerate(NAMES)
    ]
    categories = [
        {"id": id_, "name": f"class {id_}", "frequency": "f", "image_count": 3} for id_ in (2, 5)
    ]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


_EXTRA = [
    [0, 0, 10**9, 10**9], [1e308, 0, 1e308, 1], [-1e308, 0, 1.5e308, 9],
    [10**400, -(10**400), 4, 4],
    [10**9, 10**9], [1, 10**9], [10**5, 10**5], [-1, -1], [0, 0], [float("nan")] * 4, ["1"] * 4,
    [True] * 4, [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [[1e30, 0, 0, 1e30, 5, 5]], [[0, 0] * 500],
    [[1e8, 0, 0, 1e8, -1e8, 5]], [[1, 1, float("nan"), 1, 5, 5]], [[1, 1], [2, 2], [3, 3]],
    {"size": [10**9, 10**9], "counts": [10**18]}, {"size": [10**9, 1], "counts": "PP"},
    {"size": [24, 32], "counts": "000000"}, {"size": [24, 32], "counts": [-1, 769]},
    {"size": [24, 32], "counts": [2**32, 768 - 2**32]}, {"size": [24.0, 32.0], "counts": [768]},
    {"size": [10**5, 10**5], "counts": [10**10]}, {"size": [-1, -1], "counts": [1]},
    {"size": [24, 32], "counts": [768] + [0] * 9}, {"size": [24, 32], "counts": "h0é"},
    {"size": [24, 32], "counts": "o" * 20}, {"size": [24, 32], "counts": None},
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for index, name in enumerate(NAMES):
        pixels = np.random.default_rng(index).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    logging.disable(logging.CRITICAL)
    yield folder
    logging.disable(logging.NOTSET)
    for name in ("fuzz_coco", "fuzz_lvis"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def documents():
    whole = spoiled(_valid(), extra=_EXTRA).map(lambda tree: json.dumps(tree).encode())
    # the size of every picture taken away, so that only the masks tell one
    bare = _valid()
    for image in bare["images"]:
        del image["height"], image["width"]
    without_sizes = spoiled(bare["annotations"], extra=_EXTRA).map(
        lambda found: json.dumps({**bare, "annotations": found}).encode()
    )
    return whole | whole | without_sizes


def texts():
    """The file's bytes, cut and altered."""
    tokens = [b"NaN", b"Infinity", b"1e999", b'"', b"{", b"]", b",", b"\xef\xbb\xbf", b"9" * 5000]
    return damaged_bytes([json.dumps(_valid()).encode()], tokens=tokens)


def _spec(path, folder, kind="coco"):
    return datasets.DatasetSpec(kind=kind, json=str(path), images=str(folder))


MAPPERS = [
    {"use_instance_mask": False},
    {"use_instance_mask": True, "instance_mask_format": "polygon"},
    {"use_instance_mask": True, "instance_mask_format": "bitmask", "recompute_boxes": True},
]


def _map(records) -> None:
    steps = recipes.default(is_train=True, min_size=(20,), max_size=40)
    for options in MAPPERS:
        mapper = DetectionMapper(is_train=True, augmentations=steps, **options)
        for record in records:
            sample = attempt(lambda: mapper(record))  # noqa: B023  called at once
            if sample is not None:
                boxes = sample["instances"].gt_boxes.tensor
                assert bool(boxes.isfinite().all())
                assert (sample["instances"].gt_classes < 2**31).all()


@pytest.mark.parametrize("kind", ["coco", "lvis"])
def test_a_file_is_registered_and_mapped_or_refused_in_one_line(profile, pictures, tmp_path, kind):
    path = tmp_path / "annotations.json"
    load = coco_format.load_lvis if kind == "lvis" else coco_format.load_coco

    def read(data: bytes) -> None:
        path.write_bytes(data)
        attempt(lambda: datasets.register(f"fuzz_{kind}", _spec(path, pictures, kind)))
        attempt(lambda: coco_format.metadata(path))
        records = attempt(lambda: load(str(path), str(pictures)))
        if records is not None:
            _map(records)

    fuzz(profile, documents() | texts(), read, name=f"{kind} json: register, load, map", quick=60)


def test_whole_loading_with_its_child_process(profile, pictures, tmp_path):
    path = tmp_path / "annotations.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        spec = _spec(path, pictures)
        if attempt(lambda: datasets.register("fuzz_coco", spec) or True):
            records = attempt(lambda: datasets.load("fuzz_coco"))
            if records is not None:
                assert len(records.is_wide()) == len(records)

    fuzz(profile, documents(), read, name="coco json: datasets.load", quick=20, factor=50)


@pytest.mark.parametrize("kind", ["coco", "lvis"])
def test_a_check_reports_or_refuses_in_one_line(profile, pictures, tmp_path, kind):
    path = tmp_path / "annotations.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        name = f"fuzz_{kind}"

        def run():
            datasets.register(name, _spec(path, pictures, kind))
            report = check.check_dataset(name, decode=False, workers=1)
            report.text().encode()  # printable anywhere
            return report

        report = attempt(run)
        loaded = attempt(lambda: coco_format.load_coco(str(path), str(pictures)))
        if report is not None and report.ok and kind == "coco":
            assert loaded is not None, "the check finds nothing, but loading refuses the file"

    fuzz(profile, documents() | texts(), read, name=f"{kind} json: check_dataset")


def _detections() -> Instances:
    found = Instances(SIZE)
    found.pred_boxes = Boxes(tensor([[2.0, 3.0, 12.0, 15.0], [0.0, 0.0, 32.0, 24.0]]))
    found.scores = tensor([0.9, 0.3])
    found.pred_classes = tensor([0, 0])
    found.pred_masks = ones(2, *SIZE).bool()
    return found


@pytest.mark.parametrize("kind", ["coco", "lvis"])
def test_an_evaluation_gives_numbers_or_refuses_in_one_line(profile, pictures, tmp_path, kind):
    """What was valid when the classes were learned may be anything when it is evaluated."""
    path = tmp_path / "annotations.json"
    evaluators = {"coco": COCOEvaluator, "lvis": LVISEvaluator}

    def read(case: tuple[bytes, bool]) -> None:
        data, learned = case
        path.write_bytes(json.dumps(_valid()).encode() if learned else data)
        spec = _spec(path, pictures, kind)
        if not attempt(lambda: datasets.register(f"fuzz_{kind}", spec) or True):
            return
        path.write_bytes(data)

        def run():
            evaluator = evaluators[kind](f"fuzz_{kind}", tasks=("bbox", "segm"))
            evaluator.process([{"image_id": 1}], [{"instances": _detections()}])
            return evaluator.evaluate()

        attempt(run)

    fuzz(
        profile,
        st.tuples(documents() | texts(), st.booleans()),
        read,
        name=f"{kind} json: evaluation",
    )
