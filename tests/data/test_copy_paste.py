"""Copy-paste: the official one against golden cases, the corrected one against slow loops."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from d2dense.data.copy_paste import CopyPaste


def sample_of(image, boxes, classes=None, masks=None, size=None) -> dict:
    """A mapped sample of (C, H, W) ``image``; masks are (N, H, W) or polygons."""
    image = torch.as_tensor(image)
    instances = Instances(tuple(image.shape[1:]))
    instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    count = len(instances.gt_boxes)
    instances.gt_classes = torch.as_tensor(range(count) if classes is None else classes)
    if isinstance(masks, list):
        instances.gt_masks = PolygonMasks(masks)
    elif masks is not None:
        instances.gt_masks = BitMasks(torch.as_tensor(np.asarray(masks)).bool())
    return {"image": image, "instances": instances}


def flat(value: int, height: int = 40, width: int = 60) -> torch.Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8)


def box_mask(box, height: int = 40, width: int = 60) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = True
    return mask


# Official


def golden_cases(shared_data):
    path = shared_data.parent / "reference" / "golden" / "cednet" / "copy_paste.npz"
    if not path.is_file():
        pytest.skip(f"no golden cases of copy-paste in {path}")
    file = np.load(path)
    for number, case in enumerate(json.loads(str(file["meta"]))["cases"]):
        values = {k.partition("_")[2]: file[k] for k in file if k.startswith(f"case{number}_")}
        yield case, values


def golden_sample(values: dict, part: str) -> dict:
    image = np.ascontiguousarray(values[f"{part}_img"].transpose(2, 0, 1))
    boxes, labels = values[f"{part}_gt_bboxes"], values[f"{part}_gt_labels"]
    return sample_of(image, boxes, labels, values.get(f"{part}_masks"))


def test_golden_cases_are_matched_bit_by_bit(shared_data):
    paste = CopyPaste(prob=1.0)
    for case, values in golden_cases(shared_data):
        if not case["masks"]:
            values = {name: value for name, value in values.items() if "masks" not in name}
        np.random.seed(case["np_seed"])
        target, source = golden_sample(values, "tgt"), golden_sample(values, "src")
        assert paste.is_due(target)
        found, expected = paste(target, source), golden_sample(values, "out")
        assert torch.equal(found["image"], expected["image"])
        found, expected = found["instances"], expected["instances"]
        assert torch.equal(found.gt_boxes.tensor, expected.gt_boxes.tensor)
        assert torch.equal(found.gt_classes, expected.gt_classes)
        assert found.has("gt_masks") == expected.has("gt_masks") == case["masks"]
        if case["masks"]:
            assert torch.equal(found.gt_masks.tensor, expected.gt_masks.tensor)


def test_official_pastes_stay_inside_rectangles_and_change_no_input():
    target = sample_of(flat(10), [[0, 0, 12, 12]])
    source = sample_of(
        flat(200), [[20.7, 10.2, 35.9, 25.6], [1, 1, 12, 12], [52, 30, 60, 40]], [7, 8, 9]
    )
    before = target["image"].clone(), source["image"].clone()
    seen = set()
    for seed in range(60):
        np.random.seed(seed)
        found = CopyPaste(margin=4, max_objects=1)(target, source)
        assert len(found["instances"]) == 2
        category = int(found["instances"].gt_classes[1])
        seen.add(category)
        ys, xs = torch.nonzero(found["image"][0] == 200, as_tuple=True)
        edges = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
        box = {7: [20, 10, 35, 25], 9: [52, 30, 59, 39]}[category]
        outside = np.array([-1, -1, 1, 1]) * (np.array(edges) - box)
        assert (outside >= 0).all()
        assert (outside <= 4).all()
    assert seen == {7, 9}  # the other one overlaps the target's too much
    assert torch.equal(target["image"], before[0])
    assert torch.equal(source["image"], before[1])
    assert len(target["instances"]) == 1


def test_overlap_is_measured_by_iou_and_objects_may_come_twice():
    target = sample_of(flat(0), [[0, 0, 20, 20]])
    # two boxes of 20x20, one moved to the right: the IoU is 0.2 at 13.33
    for offset, pasted in ((14.0, True), (13.4, True), (13.2, False), (5.0, False)):
        source = sample_of(flat(1), [[offset, 0, offset + 20, 20]])
        found = CopyPaste(max_iou=0.2)(target, source)
        assert (len(found["instances"]) == 2) == pasted, offset
    source = sample_of(flat(1), [[30, 0, 40, 10], [30, 20, 40, 30], [45, 20, 50, 30]])
    chosen = []
    for seed in range(30):
        np.random.seed(seed)
        chosen.append(tuple(CopyPaste()(target, source)["instances"].gt_classes[1:].tolist()))
        assert len(chosen[-1]) == 3
    assert any(len(set(each)) < 3 for each in chosen)


def test_probability_and_images_without_objects():
    full, empty = sample_of(flat(0), [[0, 0, 9, 9]]), sample_of(flat(0), [])
    np.random.seed(0)
    assert np.mean([CopyPaste(prob=0.3).is_due(full) for _ in range(2000)]) == pytest.approx(
        0.3, abs=0.04
    )
    assert not CopyPaste(prob=1.0).is_due(empty)
    paste = CopyPaste(prob=1.0)
    assert paste(full, empty) is full
    covering = sample_of(flat(3), [[0, 0, 9, 9]])
    assert paste(full, covering) is full


def test_label_maps_are_pasted_too():
    target, source = (
        sample_of(flat(v), b) for v, b in ((0, [[0, 0, 9, 9]]), (1, [[30, 9, 40, 19]]))
    )
    target["sem_seg"], source["sem_seg"] = (
        torch.zeros(40, 60, dtype=torch.int64),
        torch.ones(40, 60).long(),
    )
    found = CopyPaste()(target, source)
    assert torch.equal(found["sem_seg"], found["image"][0].long())
    assert found["sem_seg"].sum() >= 100


@pytest.mark.parametrize("corrected", [False, True])
def test_a_source_of_another_size_gives_what_lies_within_the_target(corrected):
    target = sample_of(flat(0), [[0, 0, 9, 9]], masks=box_mask((0, 0, 9, 9))[None])
    for height, width in ((30, 90), (80, 40), (90, 90)):
        boxes = [[20, 12, 30, 22], [55, 20, 80, 28], [10, 35, 20, 70]]
        inside = [b for b in boxes if b[2] <= width and b[3] <= height]
        masks = np.stack([box_mask(b, height, width) for b in inside])
        source = sample_of(flat(5, height, width), inside, masks=masks)
        np.random.seed(1)
        found = CopyPaste(corrected=corrected)(target, source)
        assert found["image"].shape == (3, 40, 60)
        assert set(found["instances"].gt_boxes.tensor[1:].unique(dim=0)[:, 0].tolist()) == {20.0}
        assert found["instances"].gt_masks.tensor.shape[1:] == (40, 60)
        assert found["instances"].gt_masks.tensor[1].sum() == 100
        assert (found["image"][:, 12:22, 20:30] == 5).all()


def polygon(box) -> list[np.ndarray]:
    x0, y0, x1, y1 = box
    return [np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=np.float64)]


def test_polygons_stay_polygons_where_both_have_them():
    boxes = [(0, 0, 9, 9)], [(30, 9, 40, 19), (30, 25, 36, 33)]
    polygons = [sample_of(flat(0), b, masks=[polygon(each) for each in b]) for b in boxes]
    bits = [sample_of(flat(0), b, masks=np.stack([box_mask(each) for each in b])) for b in boxes]
    kinds = {}
    for name, pair in {
        "polygons": polygons,
        "bits": bits,
        "mixed": (polygons[0], bits[1]),
        "mixed again": (bits[0], polygons[1]),
    }.items():
        np.random.seed(0)
        found = CopyPaste()(*pair)["instances"]
        kinds[name] = type(found.gt_masks)
        drawn = found.gt_masks
        if isinstance(drawn, PolygonMasks):
            drawn = BitMasks.from_polygon_masks(drawn, 40, 60)
        expected = [box_mask([int(v) for v in box]) for box in found.gt_boxes.tensor]
        assert np.array_equal(drawn.tensor.numpy(), np.stack(expected))
    assert kinds.pop("polygons") is PolygonMasks
    assert set(kinds.values()) == {BitMasks}


# Corrected


def blobs(rng, count: int, height: int, width: int):
    """Ragged masks with tight boxes."""
    masks = []
    for _ in range(count):
        w, h = rng.integers(6, 25, 2)
        x, y = rng.integers(0, width - w), rng.integers(0, height - h)
        mask = np.zeros((height, width), bool)
        mask[y : y + h, x : x + w] = rng.random((h, w)) < 0.7
        masks.append(mask)
    return np.stack(masks), np.array([tight(mask) for mask in masks], np.float32)


def tight(mask: np.ndarray) -> list[int]:
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


@pytest.mark.parametrize("seed", range(8))
def test_corrected_masks_say_what_is_to_be_seen(seed):
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 255, (3, 50, 70), dtype=np.uint8) for _ in "ab"]
    (old_masks, old_boxes), (new_masks, new_boxes) = (blobs(rng, n, 50, 70) for n in (6, 9))
    target = sample_of(images[0], old_boxes, range(6), old_masks)
    source = sample_of(images[1], new_boxes, range(10, 19), new_masks)
    np.random.seed(seed)
    paste = CopyPaste(corrected=True, max_iou=0.3, min_visible=0.6)
    found = paste(target, source)
    classes = found["instances"].gt_classes.tolist()
    pasted = [c - 10 for c in classes if c >= 10]
    assert 1 <= len(pasted) <= 7
    assert len(set(pasted)) == len(pasted)
    covered = new_masks[pasted].any(axis=0)
    assert np.array_equal(found["image"].numpy(), np.where(covered, images[1], images[0]))
    rows = zip(
        classes, found["instances"].gt_masks.tensor.numpy(), found["instances"].gt_boxes.tensor
    )
    kept = []
    for category, mask, box in rows:
        if category >= 10:
            assert np.array_equal(mask, new_masks[category - 10])
        else:
            kept.append(category)
            assert np.array_equal(mask, old_masks[category] & ~covered)
        assert box.tolist() == tight(mask)
    shares = [(mask & ~covered).sum() / mask.sum() for mask in old_masks]
    assert kept == [index for index, share in enumerate(shares) if share >= 0.6]
    assert np.array_equal(target["instances"].gt_masks.tensor.numpy(), old_masks)


def test_corrected_boxes_shrink_to_what_is_to_be_seen():
    # the source's only object covers columns 20 to 39 of rows 10 to 29
    source = sample_of(flat(9), [[20, 10, 40, 30]], [5])
    cases = {
        (2.5, 12.25, 23.5, 27.75): (2.5, 12.25, 20, 27.75),  # its right end
        (37.5, 5.5, 58.25, 33.5): (37.5, 5.5, 58.25, 33.5),  # a corner of it sticks out all around
        (21.5, 2.5, 38.5, 13): (21.5, 2.5, 38.5, 10),  # its lower end
        (25, 12, 39, 28): None,  # all of it
        (22, 22, 42, 28): None,  # nine tenths
        (45, 1, 55, 9): (45, 1, 55, 9),
    }
    target = sample_of(flat(0), list(cases))
    paste = CopyPaste(corrected=True, max_iou=1.0, margin=0, min_visible=0.2)
    found = paste(target, source)["instances"]
    expected = [index for index, box in enumerate(cases.values()) if box is not None]
    assert found.gt_classes.tolist() == [*expected, 5]
    boxes = [box for box in cases.values() if box is not None]
    assert found.gt_boxes.tensor[:-1].tolist() == [list(box) for box in boxes]


def test_the_rule_of_pixels_drops_what_is_small_and_moved():
    # the source's only object covers columns 20 to 39 of rows 10 to 29
    source = sample_of(flat(9), [[20, 10, 40, 30]], [5])
    stays = {
        (25, 12, 39, 28): False,  # nothing is left
        (22, 12, 46, 28): False,  # 96 pixels, 18 away from its left side
        (12, 12, 29, 28): True,  # 128 pixels, but its right side moves by 9 only
        (12, 2, 44, 38): True,  # sticks out all around
        (2, 2, 30, 36): True,  # 722 pixels are left
        (2, 12, 32, 28): False,  # 288 of 480 pixels, but its right side moves by 12
        (0, 12, 32, 28): True,  # 320 pixels
    }
    target = sample_of(flat(0), list(stays))
    paste = CopyPaste(corrected=True, max_iou=1.0, margin=0, min_pixels=300)
    found = paste(target, source)["instances"]
    expected = [index for index, kept in enumerate(stays.values()) if kept]
    assert found.gt_classes.tolist() == [*expected, 5]


def test_any_number_is_drawn_evenly_from_none_to_all():
    target = sample_of(flat(0), [[0, 0, 2, 2]])
    source = sample_of(flat(9), [[10 * i + 1, 10, 10 * i + 8, 20] for i in range(4)])
    paste = CopyPaste(corrected=True, max_iou=1.0, margin=0, any_number=True)
    np.random.seed(0)
    counts = [len(paste(target, source)["instances"]) - 1 for _ in range(500)]
    assert all(70 <= counts.count(k) <= 130 for k in range(5))
    assert sum(counts.count(k) for k in range(5)) == 500


def test_corrected_polygons_become_bit_masks_that_are_cut():
    target = sample_of(flat(0), [[0, 0, 30, 20]], masks=[polygon((0, 0, 30, 20))])
    source = sample_of(flat(1), [[20, 0, 50, 8]], [3], masks=[polygon((20, 0, 50, 8))])
    found = CopyPaste(corrected=True)(target, source)
    expected = box_mask((0, 0, 30, 20)) & ~box_mask((20, 0, 50, 8))
    assert np.array_equal(found["instances"].gt_masks.tensor[0].numpy(), expected)
    assert found["instances"].gt_boxes.tensor[0].tolist() == [
        0,
        0,
        30,
        20,
    ]  # an L reaches all sides
    assert np.array_equal(found["image"][0].bool().numpy(), box_mask((20, 0, 50, 8)))


def test_polygons_are_drawn_as_detectron2_draws_them():
    """Ragged ones, of several parts, with corners on the borders of pixels and of the image."""
    rng = np.random.default_rng(0)
    polygons = []
    for number in range(60):
        parts = []
        for _ in range(rng.integers(1, 3)):
            centre, reach = rng.uniform(0, (60, 40)), rng.uniform(0.3, 25, 2)
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
            corners = centre + reach * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            corners = np.clip(corners, 0, (60, 40))
            parts.append((np.round(corners * 2) / 2 if number % 2 else corners).reshape(-1))
        polygons.append(parts)
    expected = BitMasks.from_polygon_masks(PolygonMasks(polygons), 40, 60).tensor
    keep = expected.any(dim=2).any(dim=1)
    boxes = BitMasks(expected).get_bounding_boxes().tensor[keep]
    target = sample_of(
        flat(0), boxes, masks=[p for p, kept in zip(polygons, keep.tolist()) if kept]
    )
    corner = (59, 39, 60, 40)
    source = sample_of(flat(1), [corner], masks=[polygon(corner)])
    paste = CopyPaste(corrected=True, max_iou=1.0, min_visible=0.0)
    found = paste(target, source)["instances"].gt_masks.tensor
    uncovered = torch.from_numpy(~box_mask(corner))
    kept = [mask & uncovered for mask in expected[keep] if (mask & uncovered).any()]
    assert torch.equal(found[:-1], torch.stack(kept))


# In the loader
