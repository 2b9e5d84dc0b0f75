"""Recipes and the augmentations of our own."""

from __future__ import annotations

import colorsys

import cv2
import numpy as np
import pytest
from detectron2.data import transforms as T

from d2dense.data import augmentations
from d2dense.data.augmentations import PhotometricDistortion, RandomCropPad, ScaleJitter
from d2dense.data.colors import ColorTransform
from d2dense.data.geometry import transform_mask, transform_polygons
from d2dense.errors import UserError


def run(steps, height: int, width: int, seed: int = 0) -> T.AugInput:
    np.random.seed(seed)
    inputs = T.AugInput(np.zeros((height, width, 3), np.uint8))
    T.AugmentationList(steps)(inputs)
    return inputs


def sizes(steps, height: int, width: int, count: int = 60) -> set[tuple[int, int]]:
    return {run(steps, height, width, seed).image.shape[:2] for seed in range(count)}


def test_default_resizes_the_shorter_side_within_the_limit():
    steps = augmentations.default(is_train=True, min_size=(40, 60), max_size=100)
    assert sizes(steps, 20, 30) == {(40, 60), (60, 90)}
    assert sizes(steps, 20, 80) == {(25, 100)}
    spread = augmentations.default(is_train=True, min_size=(40, 50), sample_style="range")
    assert len(sizes(spread, 20, 30)) > 5
    assert sizes(augmentations.default(is_train=False, min_size=0), 20, 30) == {(20, 30)}


def test_detr_crops_half_of_the_time_and_ends_at_a_listed_size():
    steps = augmentations.detr(
        min_size=(50, 70), max_size=1000, crop_min_sizes=(100,), crop_range=(40, 80)
    )
    found = [run(steps, 200, 300, seed).image.shape[:2] for seed in range(200)]
    assert {min(size) for size in found} == {50, 70}
    uncropped = sum(size in ((50, 75), (70, 105)) for size in found)
    assert 70 < uncropped < 130


def test_evaluation_has_nothing_random():
    for recipe in (augmentations.default, augmentations.detr, augmentations.lsj):
        assert len(sizes(recipe(is_train=False), 100, 150, count=3)) == 1
    semantic = augmentations.semantic(is_train=False, min_size=50)
    assert sizes(semantic, 100, 150, count=3) == {(50, 75)}
    assert sizes(augmentations.lsj(is_train=False, image_size=60), 100, 150, 2) == {(40, 60)}


def test_flip_is_chosen_by_name():
    with pytest.raises(UserError, match="flip = 'sideways'"):
        augmentations.default(is_train=True, flip="sideways")
    image = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for flip, expected in (("horizontal", image[:, ::-1]), ("vertical", image[::-1])):
        steps = augmentations.default(is_train=True, min_size=0, flip=flip)
        results = []
        for seed in range(20):
            np.random.seed(seed)
            inputs = T.AugInput(image)
            T.AugmentationList(steps)(inputs)
            results.append(inputs.image)
        assert any((r == expected).all() for r in results)
        assert any((r == image).all() for r in results)
    assert len(augmentations.default(is_train=True, flip="none")) == 1


def test_scale_jitter_fits_the_scaled_square():
    jitter = ScaleJitter(image_size=100, min_scale=0.5, max_scale=1.5)
    ratios = []
    for seed in range(200):
        np.random.seed(seed)
        step = jitter.get_transform(np.zeros((40, 80, 3), np.uint8))
        assert step.new_w == pytest.approx(2 * step.new_h, abs=1)
        ratios.append(step.new_w / 100)
    assert min(ratios) == pytest.approx(0.5, abs=0.03)
    assert max(ratios) == pytest.approx(1.5, abs=0.03)
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.06)


def test_scale_jitter_never_makes_an_empty_image():
    steps = augmentations.lsj(image_size=50, min_scale=0.1, max_scale=0.1)
    assert run(steps, 2, 900).image.shape == (50, 50, 3)


def test_random_crop_reaches_every_corner_and_pads_right_and_below():
    crop = RandomCropPad(crop_size=10, pad_value=7, ignore_label=9)
    origins = set()
    for seed in range(300):
        np.random.seed(seed)
        first, _ = crop.get_transform(np.zeros((12, 13, 3), np.uint8)).transforms
        origins.add((first.x0, first.y0))
    assert origins == {(x, y) for x in range(4) for y in range(3)}
    inputs = T.AugInput(np.ones((6, 20, 3), np.uint8), sem_seg=np.ones((6, 20), np.uint8))
    crop(inputs)
    assert inputs.image.shape == (10, 10, 3)
    assert (inputs.image[:6] == 1).all()
    assert (inputs.image[6:] == 7).all()
    assert (inputs.sem_seg[6:] == 9).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_lsj_makes_the_pixels_of_a_resize_followed_by_a_crop(channels, dtype):
    rng = np.random.default_rng(0)
    jitter = ScaleJitter(image_size=50, min_scale=0.2, max_scale=2.5)
    crop = RandomCropPad(crop_size=50, pad_value=7, ignore_label=9)
    both = augmentations.JitterAndCrop(jitter=jitter, crop=crop)
    differ, total = 0, 0
    for seed in range(120):
        height, width = rng.integers(20, 90, 2)
        image = rng.integers(0, 256, (height, width, channels)).astype(dtype)
        labels = rng.integers(0, 5, (height, width)).astype(np.uint8)
        boxes = np.sort(rng.uniform(0, (width, height), (4, 2, 2)), axis=1).reshape(4, 4)
        triangle = rng.uniform(0, (width, height), (3, 2))
        results = []
        for steps in ([jitter, crop], [both]):
            np.random.seed(seed)
            inputs = T.AugInput(image, boxes=boxes, sem_seg=labels)
            transforms = T.AugmentationList(steps)(inputs)
            polygons = transform_polygons(transforms, [triangle])
            results.append((inputs, transform_mask(transforms, labels % 2), polygons))
        (one, one_mask, one_pieces), (two, two_mask, two_pieces) = results
        for first, second in zip(one_pieces, two_pieces, strict=True):
            assert (first == second).all()
        assert (one.boxes == two.boxes).all()
        assert (one.sem_seg == two.sem_seg).all()
        assert (one_mask == two_mask).all()
        assert two.image.shape == (50, 50, channels)
        assert two.image.dtype == dtype
        gap = np.abs(one.image.astype(float) - two.image)
        # PIL takes the borders of the crop as float32, and rounds after each of two passes
        assert gap.max() <= 2
        differ, total = differ + np.count_nonzero(gap), total + gap.size
    assert differ / total < 0.01


def test_semantic_crop_avoids_one_class():
    labels = np.zeros((40, 80), np.uint8)
    labels[:, 60:] = 1
    steps = augmentations.semantic(
        min_size=0, crop_size=(20, 20), single_category_max_area=0.75, color_distortion=False
    )
    mixed = 0
    for seed in range(60):
        np.random.seed(seed)
        inputs = T.AugInput(np.zeros((40, 80, 3), np.uint8), sem_seg=labels)
        T.AugmentationList(steps)(inputs)
        mixed += len(np.unique(inputs.sem_seg)) == 2
    assert mixed > 40  # about a fifth without the constraint


def distort(image: np.ndarray, image_format: str = "RGB", **options) -> np.ndarray:
    """The distortion with every part used, at the values given as degenerate ranges."""
    parts = {"brightness": 0.0, "contrast": (1, 1), "saturation": (1, 1), "hue": 0.0} | options
    augmentation = PhotometricDistortion(image_format=image_format, **parts)
    for seed in range(1000):
        np.random.seed(seed)
        if (np.random.uniform(size=4) < 0.5).all():
            np.random.seed(seed)
            return augmentation.get_transform(image).apply_image(image)
    raise AssertionError("no seed uses all parts")


def test_contrast_is_a_clipped_factor():
    image = np.array([[[10, 100, 200]]], np.uint8)
    assert distort(image, contrast=(1.5, 1.5)).tolist() == [[[15, 150, 255]]]


def test_hue_and_saturation_match_the_textbook():
    image = np.array([[[200, 80, 40]]], np.uint8)
    hue, saturation, value = colorsys.rgb_to_hsv(*(image[0, 0] / 255))
    grey = distort(image, saturation=(0.5, 0.5))
    expected = np.array(colorsys.hsv_to_rgb(hue, saturation / 2, value)) * 255
    assert grey[0, 0] == pytest.approx(expected, abs=3)
    bgr = distort(image[..., ::-1].copy(), "BGR", saturation=(0.5, 0.5))
    assert (bgr[..., ::-1] == grey).all()


def test_distortion_is_repeatable_random_and_leaves_geometry():
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    augmentation = PhotometricDistortion()
    results = []
    for seed in range(30):
        np.random.seed(seed)
        transform = augmentation.get_transform(image)
        first = transform.apply_image(image)
        assert first.dtype == np.uint8
        assert (transform.apply_image(image) == first).all()
        results.append(first.tobytes())
    assert len(set(results)) > 20
    points = np.array([[1.0, 2.0]])
    assert (transform.apply_coords(points) == points).all()
    assert transform.apply_segmentation(image) is image
    with pytest.raises(UserError, match=r"INPUT.FORMAT"):
        PhotometricDistortion(image_format="L")


def test_recipes_print_and_their_order_is_a_plain_list():
    steps = augmentations.lsj(image_size=64)
    assert isinstance(steps, list)
    assert "ScaleJitter" in str(T.AugmentationList(steps))


@pytest.mark.parametrize("view", ["whole", "mirrored", "upside down", "crop", "channels reversed"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64])
def test_resize_and_flip_give_detectron2s_values(view, dtype):
    whole = np.random.default_rng(0).integers(0, 255, (31, 47, 3)).astype(dtype)
    image = {
        "whole": whole,
        "mirrored": whole[:, ::-1],
        "upside down": whole[::-1],
        "crop": whole[3:20, 5:40],
        "channels reversed": whole[..., ::-1],
    }[view]
    pairs = [(augmentations.RandomFlip(prob=1.0), T.RandomFlip(prob=1.0))]
    if dtype != np.int64:  # torch cannot interpolate whole numbers
        options = {"short_edge_length": [52], "sample_style": "choice"}
        pairs.append((augmentations.ResizeShortestEdge(**options), T.ResizeShortestEdge(**options)))
    for ours, theirs in pairs:
        for part in (image, image[..., :1], image[..., 0]):
            transforms = [step.get_transform(part) for step in (ours, theirs)]
            labels = [t.apply_segmentation(part) for t in transforms]
            assert np.array_equal(*labels)
            if part.ndim == 3:
                assert np.array_equal(*(t.apply_image(part) for t in transforms))
        assert np.array_equal(*(t.apply_box([[1.0, 2, 8, 9]]) for t in transforms))
        assert isinstance(transforms[0], type(transforms[1]))


def test_a_size_of_zero_still_keeps_the_image():
    image = np.zeros((4, 5, 3), np.uint8)
    steps = augmentations.default(is_train=False, min_size=0)
    assert steps[0].get_transform(image).apply_image(image) is image


def test_distortion_equals_its_formula_pixel_by_pixel():
    image = np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + 18) % 180
    hsv[..., 1] = np.clip(hsv[..., 1] * np.float32(1.3), 0, 255).astype(np.uint8)
    expected = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    transform = ColorTransform(
        brightness=0.0, contrast=1.0, saturation=1.3, hue=36.0, contrast_last=False, is_rgb=True
    )
    assert np.array_equal(transform.apply_image(image), expected)
    transform = ColorTransform(
        brightness=-20.0, contrast=1.4, saturation=1.0, hue=0.0, contrast_last=True, is_rgb=True
    )
    darker = np.clip(image.astype(np.float32) - 20, 0, 255).astype(np.uint8)
    brighter = np.clip(darker * np.float32(1.4), 0, 255).astype(np.uint8)
    assert np.array_equal(transform.apply_image(image), brighter)
    # what is clipped in one step is not restored by the next one
    transform = ColorTransform(
        brightness=30.0, contrast=0.5, saturation=1.0, hue=0.0, contrast_last=False, is_rgb=True
    )
    brighter = np.clip(image.astype(np.float32) + 30, 0, 255).astype(np.uint8)
    flatter = (brighter * np.float32(0.5)).astype(np.uint8)
    assert np.array_equal(transform.apply_image(image), flatter)


def test_random_scale_fits_a_multiple_of_the_frame():
    step = augmentations.RandomScale(min_size=50, max_size=80, scale_range=(0.5, 2.0))
    found = sizes([step], 100, 120, count=400)
    assert all(abs(120 * h - 100 * w) <= 120 for h, w in found)
    shorter = sorted(h for h, _ in found)
    assert shorter[0] in (25, 26)
    assert shorter[-1] in (99, 100)
    assert np.median(shorter) == pytest.approx(62.5, abs=3)  # uniform in the scale, not its log
    wide = sizes([step], 100, 400, count=400)  # the longer side decides
    assert max(w for _, w in wide) in (158, 159, 160)
    assert all(abs(w - 4 * h) <= 4 for h, w in wide)


def test_random_scale_in_steps_of_the_images_own_size():
    step = augmentations.RandomScale(
        min_size=0, max_size=0, scale_range=(0.5, 2.0), scale_step=0.25
    )
    assert sizes([step], 8, 101, count=300) == {
        (4, 51), (6, 76), (8, 101), (10, 126), (12, 152), (14, 177), (16, 202)
    }  # fmt: skip


@pytest.mark.parametrize("wrong", [{"scale_range": (2, 1)}, {"scale_range": (1,)}])
def test_random_scale_refuses_what_is_no_range(wrong):
    with pytest.raises(UserError, match=r"INPUT.SCALE_RANGE / scale_range"):
        augmentations.semantic(min_size=(512,), **wrong)
    with pytest.raises(UserError, match=r"INPUT.MIN_SIZE_TRAIN / min_size = \[5, 6\]"):
        augmentations.semantic(min_size=(5, 6), scale_range=(0.5, 2))


def test_semantic_recipe_bounds_the_share_of_one_class():
    """Nine in ten pixels are of one class: crops with at most 75 % of it lie at the border."""
    labels = np.zeros((200, 200), np.uint8)
    labels[:, :20] = 3
    steps = augmentations.semantic(
        min_size=0,
        crop_size=(20, 20),
        single_category_max_area=0.75,
        color_distortion=False,
        flip="none",
    )
    shares = []
    for seed in range(200):
        np.random.seed(seed)
        inputs = T.AugInput(np.zeros((200, 200, 3), np.uint8), sem_seg=labels)
        T.AugmentationList(steps)(inputs)
        assert inputs.image.shape == (20, 20, 3)
        shares.append(max(np.unique(inputs.sem_seg, return_counts=True)[1]) / 400)
    # 9 of the 181 columns do; of ten attempts at least one with probability 1 - (172/181)^10
    assert np.mean(np.array(shares) < 0.75) == pytest.approx(0.4, abs=0.1)
