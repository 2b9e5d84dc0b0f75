"""Padded crops: every step against its definition, the order, the draws, both kinds of config."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.data.transforms import AugInput, AugmentationList

from d2dense.config.defaults import get_cfg
from d2dense.data import mappers
from d2dense.data.augmentations import RandomCropPad, RandomScale
from d2dense.data.samples import StreamDataset
from d2dense.data.semantic_augmentations import (
    BrightnessShift,
    BrightnessTransform,
    ContrastJitter,
    ContrastTransform,
    DistortAndCrop,
    SaturationJitter,
    SaturationTransform,
    padded_crops,
)
from d2dense.errors import UserError


def picture(height=20, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_contrast_stretches_each_channel_about_its_mean():
    image = picture()
    mean = image.reshape(-1, 3).mean(axis=0)
    for factor in (0.5, 1.0, 1.5):
        found = ContrastTransform(factor=factor, mean=mean).apply_image(image)
        expected = np.clip((image - mean) * factor + mean, 0, 256)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("is_rgb", [True, False])
def test_saturation_is_that_of_hsv(is_rgb):
    image = picture(6, 7).astype(np.float32) + 0.5
    for factor in (0.5, 1.5):
        found = SaturationTransform(factor=factor, is_rgb=is_rgb).apply_image(image)
        for y, x in np.ndindex(6, 7):
            rgb = image[y, x] if is_rgb else image[y, x, ::-1]
            hue, saturation, value = colorsys.rgb_to_hsv(*rgb.astype(float) / 256)
            changed = colorsys.hsv_to_rgb(hue, min(saturation * factor, 1), value)
            expected = 256 * np.array(changed if is_rgb else changed[::-1])
            np.testing.assert_allclose(found[y, x], expected, atol=2e-3)


def test_brightness_is_added_and_clipped_at_0_and_256():
    image = picture()
    for shift in (-31.7, 0.25, 32.0):
        found = BrightnessTransform(shift=shift).apply_image(image)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, np.clip(image + shift, 0, 256), atol=1e-4)
    white = np.full((2, 2, 3), 255, np.uint8)
    assert BrightnessTransform(shift=9.0).apply_image(white).max() == 256


@pytest.mark.parametrize(
    ("augmentation", "name", "least", "most"),
    [
        (ContrastJitter(factors=(0.5, 1.5)), "factor", 0.5, 1.5),
        (SaturationJitter(factors=(0.5, 1.5)), "factor", 0.5, 1.5),
        (BrightnessShift(largest=32.0), "shift", -32.0, 32.0),
    ],
)
def test_each_is_applied_half_of_the_time_with_uniform_numbers(augmentation, name, least, most):
    image, drawn = picture(4, 4), []
    for _ in range(4000):
        transform = augmentation.get_transform(image)
        if not isinstance(transform, T.NoOpTransform):
            drawn.append(getattr(transform, name))
    assert abs(len(drawn) / 4000 - 0.5) < 0.04  # five standard deviations
    assert least <= min(drawn) < max(drawn) <= most
    quarters, _ = np.histogram(drawn, bins=4, range=(least, most))
    assert quarters.min() > 0.2 * len(drawn)


def test_seven_scales_are_equally_likely():
    scale = RandomScale(min_size=0, max_size=0, scale_range=(0.5, 2.0), scale_step=0.25)
    image = np.zeros((40, 80, 3), np.uint8)
    sizes = Counter(
        (found.new_h, found.new_w) for found in (scale.get_transform(image) for _ in range(4000))
    )
    assert set(sizes) == {(int(40 * s), int(80 * s)) for s in (0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)}
    assert min(sizes.values()) > 4000 / 7 * 0.8


def test_distorting_what_stays_equals_distorting_padding_and_cropping_in_turn():
    """The literal order: contrast, saturation, brightness on the whole image; padding on the right
    and bottom with 127.5 and the ignore label; a crop.
    """
    image, labels = picture(20, 30), np.arange(600).reshape(20, 30).astype(np.uint8) % 7
    steps = [
        ContrastJitter(factors=(0.5, 1.5), prob=1.0),
        SaturationJitter(factors=(0.5, 1.5), prob=1.0),
        BrightnessShift(prob=1.0),
    ]
    crop = RandomCropPad(crop_size=(24, 16), pad_value=127.5, ignore_label=200)
    both = DistortAndCrop(distortions=steps, crop=crop)
    seen = set()
    for seed in range(8):
        np.random.seed(seed)
        found = AugInput(image, sem_seg=labels)
        both(found)
        np.random.seed(seed)
        whole = image
        # each number is drawn before any is used
        for transform in [step.get_transform(image) for step in steps]:
            whole = transform.apply_image(whole)
        canvas = np.full((24, 30, 3), 127.5, np.float32)
        canvas[:20] = whole
        map_ = np.full((24, 30), 200, np.uint8)
        map_[:20] = labels
        np.random.randint(20 - 20 + 1)  # the crop's y, which has one possible value
        x = np.random.randint(30 - 16 + 1)
        seen.add(x)
        assert found.image.dtype == np.float32
        # float32's last bits: OpenCV treats the ends of rows of other lengths one by one
        np.testing.assert_allclose(found.image, canvas[:, x : x + 16], rtol=2e-6, atol=1e-4)
        np.testing.assert_array_equal(found.sem_seg, map_[:, x : x + 16])
    assert len(seen) > 4


def test_crops_are_anywhere_and_of_their_size():
    steps = padded_crops(scale_range=(1.0, 1.0), brightness=0, crop_size=(3, 5), flip="none")
    image = np.arange(6 * 8, dtype=np.uint8).reshape(6, 8, 1).repeat(3, 2)
    corners = set()
    for _ in range(400):
        inputs = AugInput(image, sem_seg=image[..., 0])
        AugmentationList(steps)(inputs)
        assert inputs.image.shape == (3, 5, 3)
        np.testing.assert_array_equal(inputs.image[..., 0], inputs.sem_seg)
        corners.add(int(inputs.sem_seg[0, 0]))
    assert corners == {8 * y + x for y in range(4) for x in range(4)}


def test_the_recipe_has_its_steps_in_the_papers_order():
    plain, distorted = padded_crops(), padded_crops(color_distortion=True)
    assert [type(step).__name__ for step in plain] == [
        "RandomScale",
        "DistortAndCrop",
        "RandomFlip",
    ]
    assert [type(step) for step in plain[1].distortions] == [BrightnessShift]
    assert [type(step) for step in distorted[1].distortions] == [
        ContrastJitter,
        SaturationJitter,
        BrightnessShift,
    ]
    assert plain[2].prob == 0.5
    assert plain[1].crop.sides == [513, 513]
    assert plain[1].crop.pad_value == 127.5
    assert padded_crops(is_train=False) == []


def test_samples_depend_on_seed_and_position_alone(shared_data):
    """One image of the real data, drawn twice at one place, and elsewhere."""
    root = shared_data / "camvid_mini"
    path = sorted((root / "images").rglob("*.jpg"))[0]
    label = next((root / "labels").rglob(f"{path.stem}.png"))
    record = {"file_name": str(path), "sem_seg_file_name": str(label)}
    steps = padded_crops(color_distortion=True, crop_size=(65, 97), ignore_label=255)
    mapper = mappers.SemanticMapper(is_train=True, augmentations=steps, image_format="RGB")
    stream = StreamDataset([record], mapper, seed=3)
    np.random.seed(1)
    first = stream[0, 0].sample
    np.random.seed(2)
    again, other = stream[0, 0].sample, stream[1, 0].sample
    assert first["image"].dtype == torch.float32
    assert first["image"].shape == (3, 65, 97)
    assert first["sem_seg"].shape == (65, 97)
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["sem_seg"], again["sem_seg"])
    assert not torch.equal(first["image"], other["image"])


def everything(augmentation):
    """Return the type and the plain attributes of an augmentation and of those inside it."""
    if isinstance(augmentation, T.Augmentation):
        found = {k: everything(v) for k, v in vars(augmentation).items() if k[0] != "_"}
        return type(augmentation).__name__, found
    if isinstance(augmentation, Sequence) and not isinstance(augmentation, str):
        return [everything(each) for each in augmentation]
    return augmentation


def test_every_yaml_key_reaches_its_step():
    cfg = get_cfg()
    cfg.INPUT.MAPPER, cfg.INPUT.FORMAT = "padded_crops", "BGR"
    cfg.INPUT.SCALE_RANGE, cfg.INPUT.SCALE_STEP = (0.25, 1.0), 0.125
    cfg.INPUT.COLOR_DISTORTION, cfg.INPUT.RANDOM_FLIP = True, "vertical"
    cfg.INPUT.CROP.SIZE, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = [65, 97], 9
    node = cfg.INPUT.PADDED_CROPS
    node.PAD_VALUE, node.BRIGHTNESS = (1.0, 2.0, 3.0), 16.0
    node.CONTRAST, node.SATURATION = (0.75, 1.25), (0.25, 2.0)
    expected = padded_crops(
        scale_range=(0.25, 1.0),
        scale_step=0.125,
        color_distortion=True,
        contrast=(0.75, 1.25),
        saturation=(0.25, 2.0),
        brightness=16.0,
        crop_size=[65, 97],
        pad_value=[1.0, 2.0, 3.0],
        ignore_label=9,
        flip="vertical",
        image_format="BGR",
    )
    found = mappers.from_cfg(cfg, True)
    assert isinstance(found, mappers.SemanticMapper)
    assert everything(found.augmentations.augs) == everything(expected)
    default = get_cfg().INPUT.PADDED_CROPS
    for name, step in zip(
        ("contrast", "saturation"), padded_crops(color_distortion=True)[1].distortions
    ):
        assert tuple(getattr(default, name.upper())) == tuple(step.factors)
    assert padded_crops()[1].distortions[0].largest == default.BRIGHTNESS
    assert list(default.PAD_VALUE) == [padded_crops()[1].crop.pad_value]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"crop_size": [513]}, r"crop_size = \[513\]"),
        ({"crop_size": [0, 5]}, r"crop_size = \[0, 5\]"),
        ({"scale_range": [0, 1]}, "scale_range"),
        ({"contrast": [1.5, 0.5], "color_distortion": True}, "ContrastJitter"),
        ({"image_format": "L", "color_distortion": True}, "BGR or RGB"),
        ({"flip": "both"}, "expected 'horizontal'"),
    ],
)
def test_mistakes_are_named(options, words):
    with pytest.raises(UserError, match=words):
        padded_crops(**options)
