"""What the recipes do to images, counted and measured against section 8.1's numbers."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import BitMasks, Boxes, Instances

from d2dense import model_zoo
from d2dense.data.reading import SampleError

CROPPED = "CoDETR/co_dino_5scale_r50_1x"
JITTERED = "CoDETR/co_dino_5scale_r50_lsj_1x"
SIZES = list(range(480, 801, 32))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A picture whose red and green say where a pixel was, with an object at its left end."""
    path = tmp_path_factory.mktemp("picture") / "place.png"
    rows, columns = np.mgrid[:240, :320].astype(np.float32)
    image = np.stack([np.full_like(rows, 60), rows * 255 / 239, columns * 255 / 319], axis=2)
    cv2.imwrite(str(path), image.round().astype(np.uint8))
    box = {"bbox": [2, 90, 40, 60], "bbox_mode": 1, "category_id": 3, "iscrowd": 0}
    box["segmentation"] = [[2, 90, 42, 90, 42, 150, 2, 150]]
    record = {"file_name": str(path), "height": 240, "width": 320, "image_id": 1}
    return record | {"annotations": [box]}


def mapper_of(name):
    return instantiate(model_zoo.get_config(name).dataloader.train.mapper)


def mapped(mapper, record, seed):
    np.random.seed(seed)
    return mapper(json.loads(json.dumps(record)))


def seen(image):
    """Return how much of the picture's height and width an image shows, and whether mirrored."""
    places = image.float()[:2]  # columns, rows
    across, down = places[0].mean(dim=0) / 255 * 320, places[1].mean(dim=1) / 255 * 240
    return float(down[-1] - down[0]), float((across[-1] - across[0]).abs()), across[0] > across[-1]


def test_multi_scale_crops(record):
    mapper = mapper_of(CROPPED)
    whole, cropped, mirrored, empty = [], [], 0, 0
    for seed in range(240):
        sample = mapped(mapper, record, seed)
        height, width, is_mirrored = seen(sample["image"])
        mirrored += bool(is_mirrored)
        shape = tuple(sample["image"].shape[1:])
        assert min(shape) in SIZES or max(shape) == 1333
        if height > 235 and width > 315:
            whole.append(shape)
            assert shape == (min(shape), round(min(shape) * 320 / 240))
        else:
            cropped.append((height, width))
            empty += len(sample["instances"]) == 0
    assert 90 < mirrored < 150
    assert 90 < len(whole) < 150  # half
    assert {min(shape) for shape in whole} == set(SIZES)
    assert empty > 5  # crops without objects are kept
    # the picture has a shorter side of 400, 500 or 600 then, and crops of 384 to 600 pixels
    heights = np.array([height for height, _ in cropped])
    widths = np.array([width for _, width in cropped])
    assert heights.min() > 240 * 384 / 600 - 3
    assert heights.max() > 230  # no more than there is
    assert widths.min() > 240 * 384 / 600 - 3
    assert widths.max() < 320 * 600 / (400 * 320 / 240) + 3
    assert abs(np.corrcoef(heights, widths)[0, 1]) < 0.75  # each has a draw of its own


def test_crops_are_drawn_evenly(record):
    """From a shorter side of 600 pixels, which leaves room for all sizes."""
    step = mapper_of(CROPPED).augmentations.augs[1]
    crop = step.aug.augs[1]
    image = np.zeros((600, 800, 3), np.uint8)
    np.random.seed(0)
    sizes = np.array([crop.get_crop_size(image.shape[:2]) for _ in range(4000)])
    assert sizes.min() == 384
    assert sizes.max() == 600
    shares = [np.mean(sizes < 384 + 217 * k / 4) for k in (1, 2, 3)]
    assert shares == pytest.approx([0.25, 0.5, 0.75], abs=0.03)
    assert step.prob == 0.5


def test_jittered_squares(record):
    mapper, ratios, sides = mapper_of(JITTERED), [], []
    for seed in range(60):
        sample = mapped(mapper, record, seed)
        image = sample["image"]
        assert image.shape == (3, 1024, 1024)
        content = (image[2] != 114).int()  # the picture's blue is 60
        height, width = int(content[:, 0].sum()), int(content[0].sum())
        assert (image[:, height:] == 114).all()
        assert (image[:, :, width:] == 114).all()
        ratios.append(max(height, width) / 1024)
        sides.append((height, width))
        for box, kept in zip(sample["instances"].gt_boxes, sample["instances"].gt_masks.polygons):
            assert (box[2:] - box[:2]).min() > 0.01
            assert kept
    # the longer side is 0.1 to 2 times the square, of which 1024 pixels are left at most
    assert 0.1 <= min(ratios) < 0.3
    assert 0.3 < np.mean(np.array(ratios) == 1) < 0.75  # 10 of 19 parts
    small = [(h, w) for h, w in sides if w < 1024]
    assert all(abs(h - w * 240 / 320) <= 1 for h, w in small)


def sample_of(boxes, *, masks=True, value=0, size=1024):
    instances = Instances((size, size))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.arange(len(boxes))
    if masks:
        planes = torch.zeros(len(boxes), size, size, dtype=torch.bool)
        for plane, (x0, y0, x1, y1) in zip(planes, boxes):
            plane[y0:y1, x0:x1] = True
        instances.gt_masks = BitMasks(planes)
    image = torch.full((3, size, size), value, dtype=torch.uint8)
    return {"image": image, "instances": instances}


@pytest.fixture(scope="module")
def paste():
    return instantiate(model_zoo.get_config(JITTERED).dataloader.train.copy_paste)


def test_any_number_of_objects_is_pasted_up_to_a_hundred(paste):
    target = sample_of([[0, 0, 60, 60]], size=64)
    few = sample_of([[4 * i, 4, 4 * i + 3, 8] for i in range(4)], size=64)
    np.random.seed(0)
    counts = [len(paste(target, few)["instances"]) - 1 for _ in range(300)]
    assert all(35 <= counts.count(k) <= 85 for k in range(5))
    many = sample_of([[k % 60, k // 60, k % 60 + 1, k // 60 + 1] for k in range(150)], size=64)
    counts = [len(paste(target, many)["instances"]) - 1 for _ in range(200)]
    assert 90 < max(counts) <= 100
    assert min(counts) < 10


def test_objects_stay_that_moved_little_or_are_large(paste):
    """Dropped is what moved by more than 10 pixels and has no more than 300 pixels left."""
    cover = [100, 0, 200, 1000]
    cases = {
        (80, 10, 140, 25): False,  # 20 x 15 = 300 pixels left, its side moved by 40
        (79, 50, 140, 65): True,  # 315 pixels
        (95, 100, 110, 105): True,  # 25 pixels, but it moved by 10
        (94, 150, 111, 155): False,  # 30 pixels, it moved by 11
        (300, 10, 310, 20): True,  # nothing covers it
        (120, 300, 150, 310): False,  # nothing is left
    }
    target, source = sample_of(list(cases)), sample_of([cover], value=9)
    for seed in range(20):
        np.random.seed(seed)
        found = paste(target, source)
        if len(found["instances"]) > 5:
            continue
        kept = [tuple(box) for box, stays in cases.items() if stays]
        assert found["instances"].gt_classes.tolist()[:-1] == [
            index for index, stays in enumerate(cases.values()) if stays
        ]
        assert found["instances"].gt_boxes.tensor[1].tolist() == [95, 100, 100, 105]
        assert len(kept) == len(found["instances"]) - 1
        assert (found["image"][:, :1000, 100:200] == 9).all()
        return
    raise AssertionError("nothing was ever pasted")


def test_equal_boxes_are_no_obstacle_and_images_without_objects_get_some(paste):
    source = sample_of([[0, 0, 64, 64]], value=9, size=64)
    for target in (sample_of([[0, 0, 64, 64]], size=64), sample_of([], size=64)):
        np.random.seed(0)
        assert paste.is_due(target)
        pasted = [paste(target, source) for _ in range(20)]
        assert any((each["image"] == 9).all() for each in pasted)
        assert {len(each["instances"]) for each in pasted} <= {0, 1}


def test_without_masks_nothing_is_pasted(paste, record):
    target, source = (sample_of([[1, 1, 9, 9]], masks=False, size=64) for _ in range(2))
    assert not paste.is_due(target)
    assert paste(target, source) is target
    whole = sample_of([[1, 1, 9, 9]], size=64)
    assert paste(whole, source) is whole

    node = model_zoo.get_config(JITTERED).dataloader.train.mapper
    boxes = [{k: v for k, v in a.items() if k != "segmentation"} for a in record["annotations"]]
    with pytest.raises(SampleError, match=r"use_instance_mask=False"):
        mapped(instantiate(node), record | {"annotations": boxes}, 0)
    node.use_instance_mask = False
    sample = mapped(instantiate(node), record | {"annotations": boxes}, 0)
    assert not paste.is_due(sample)


@pytest.mark.parametrize("name", [CROPPED, JITTERED])
def test_images_without_boxes_are_kept(name, record):
    sample = mapped(mapper_of(name), record | {"annotations": []}, 0)
    assert len(sample["instances"]) == 0
    assert sample["instances"].gt_boxes.tensor.shape == (0, 4)
