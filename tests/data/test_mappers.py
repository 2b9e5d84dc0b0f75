"""Mappers: what comes out lies where the picture says it lies."""

from __future__ import annotations

import copy
import pickle

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, PolygonMasks, polygons_to_bitmask
from fvcore.transforms.transform import CropTransform, PadTransform
from PIL import Image

from d2dense.config import get_cfg
from d2dense.data import augmentations, mappers
from d2dense.data.mappers import DetectionMapper, SemanticMapper
from d2dense.data.reading import SampleError, read_image, read_label_map
from d2dense.errors import UserError

WIDTH, HEIGHT = 60, 40
OUTLINES = {
    0: [[8, 6], [28, 6], [28, 26], [22, 26], [22, 14], [14, 14], [14, 26], [8, 26]],  # two legs
    2: [[35, 20], [52, 20], [52, 34], [35, 34]],
}


def mask_of(points) -> np.ndarray:
    return polygons_to_bitmask([np.array(points, float).reshape(-1)], HEIGHT, WIDTH)


def encode(mask: np.ndarray) -> dict:
    return mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))


@pytest.fixture
def record(tmp_path) -> dict:
    """An image whose objects are painted: class 0 red, class 2 green, on black."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    annotations = []
    for category, points in OUTLINES.items():
        pixels[mask_of(points), category // 2] = 255
        low, high = np.min(points, axis=0), np.max(points, axis=0)
        annotations.append(
            {
                "bbox": [*low.tolist(), *(high - low).tolist()],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": category,
                "iscrowd": 0,
                "segmentation": [[float(v) for point in points for v in point]],
            }
        )
    path = tmp_path / "scene.png"
    Image.fromarray(pixels).save(path)
    return {
        "file_name": str(path),
        "image_id": 1,
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": annotations,
    }


def mapper(*steps, **options) -> DetectionMapper:
    options = {"use_instance_mask": True, "image_format": "RGB"} | options
    return DetectionMapper(is_train=True, augmentations=list(steps), **options)


def boxes(sample) -> list[list[float]]:
    return sample["instances"].gt_boxes.tensor.tolist()


def bits(masks: PolygonMasks | BitMasks, size) -> np.ndarray:
    if isinstance(masks, BitMasks):
        return masks.tensor.numpy()
    drawn = [polygons_to_bitmask(polygons, *size) for polygons in masks.polygons]
    return np.stack(drawn) if drawn else np.zeros((0, *size), bool)


def test_without_augmentation_annotations_stay(record):
    before = copy.deepcopy(record)
    sample = mapper()(record)
    assert record == before
    assert sample["image"].shape == (3, HEIGHT, WIDTH)
    assert sample["image"].dtype == torch.uint8
    assert boxes(sample) == [[8, 6, 28, 26], [35, 20, 52, 34]]
    assert sample["instances"].gt_classes.tolist() == [0, 2]
    assert "annotations" not in sample
    assert sample["image_id"] == 1


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (T.HFlipTransform(WIDTH), [[32, 6, 52, 26], [8, 20, 25, 34]]),
        (T.VFlipTransform(HEIGHT), [[8, 14, 28, 34], [35, 6, 52, 20]]),
        (T.ResizeTransform(HEIGHT, WIDTH, 80, 180), [[24, 12, 84, 52], [105, 40, 156, 68]]),
        (CropTransform(20, 10, 30, 20), [[0, 0, 8, 16], [15, 10, 30, 20]]),
        (PadTransform(0, 0, 9, 7), [[8, 6, 28, 26], [35, 20, 52, 34]]),
    ],
)
def test_boxes_move_exactly(record, step, expected):
    assert boxes(mapper(step)(record)) == expected


def test_objects_cropped_away_are_dropped(record):
    sample = mapper(CropTransform(30, 0, 30, 40))(record)
    assert boxes(sample) == [[5, 20, 22, 34]]
    assert sample["instances"].gt_classes.tolist() == [2]
    assert len(sample["instances"].gt_masks) == 1


def test_an_object_whose_box_stays_but_whose_mask_is_cropped_away_is_dropped(record):
    crop = CropTransform(15, 15, 6, 8)  # between the legs: inside the box, outside the mask
    assert len(mapper(crop, use_instance_mask=False)(record)["instances"]) == 1
    assert len(mapper(crop)(record)["instances"]) == 0


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_recomputed_boxes_hug_the_cropped_mask(record, mask_format):
    # of the object with two legs only the right one stays
    crop = CropTransform(18, 17, 30, 20)
    options = {"instance_mask_format": mask_format}
    assert boxes(mapper(crop, **options)(record))[0] == [0, 0, 10, 9]
    tight = mapper(crop, recompute_boxes=True, **options)(record)
    assert boxes(tight)[0] == [4, 0, 10, 9]


RECIPES = {
    "default": augmentations.default(is_train=True, min_size=(30, 70), max_size=140),
    "crop": augmentations.default(
        is_train=True, min_size=(60,), crop_type="relative_range", crop_size=(0.5, 0.5)
    ),
    "detr": augmentations.detr(
        min_size=(60, 80), max_size=150, crop_min_sizes=(60, 70), crop_range=(30, 60)
    ),
    "lsj": augmentations.lsj(image_size=96, min_scale=0.4, max_scale=2.0, pad_value=0),
}


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask", "rle"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_masks_and_boxes_follow_the_painted_objects(record, recipe, mask_format):
    if mask_format == "rle":
        for a in record["annotations"]:
            a["segmentation"] = encode(mask_of(OUTLINES[a["category_id"]]))
    map_sample = mapper(
        *RECIPES[recipe],
        instance_mask_format="polygon" if mask_format == "rle" else mask_format,
        recompute_boxes=True,
    )
    seen = 0
    for seed in range(12):
        np.random.seed(seed)
        sample = map_sample(record)
        size = sample["image"].shape[1:]
        instances = sample["instances"]
        assert isinstance(
            instances.gt_masks, PolygonMasks if mask_format == "polygon" else BitMasks
        )
        drawn = bits(instances.gt_masks, size)
        for category, box, mask in zip(instances.gt_classes, boxes(sample), drawn):
            painted = sample["image"][int(category) // 2].numpy() > 127
            if painted.sum() < 60:
                continue
            seen += 1
            assert (painted & mask).sum() / (painted | mask).sum() > 0.8
            rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
            expected = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert box == pytest.approx(expected, abs=2.5)
    assert seen >= 12


def test_lsj_has_a_fixed_size_and_boxes_stay_out_of_the_padding(record):
    record["annotations"][1]["bbox"] = [35, 20, 300, 300]  # annotated beyond the image
    map_sample = mapper(*augmentations.lsj(image_size=64, min_scale=0.2, max_scale=0.6))
    for seed in range(10):
        np.random.seed(seed)
        sample = map_sample(record)
        assert sample["image"].shape == (3, 64, 64)
        padding = (sample["image"] == 128).all(dim=0)
        inner_height = int((~padding.all(dim=1)).sum())
        inner_width = int((~padding.all(dim=0)).sum())
        assert inner_height < 64
        limit = torch.tensor([inner_width, inner_height] * 2)
        assert (sample["instances"].gt_boxes.tensor <= limit + 1e-4).all()


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_images_without_boxes_have_empty_fields(record, recipe, mask_format):
    record["annotations"] = []
    sample = mapper(*RECIPES[recipe], instance_mask_format=mask_format)(record)
    instances = sample["instances"]
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.dtype == torch.int64
    assert len(instances.gt_masks) == 0
    assert instances.image_size == tuple(sample["image"].shape[1:])


def test_crowds_and_impossible_boxes_are_left_out(record):
    record["annotations"][0]["iscrowd"] = 1
    for box in ([1, 1, 0, 5], [70, 1, 5, 5], [1, -9, 5, 5], [float("nan"), 1, 5, 5]):
        record["annotations"].append(record["annotations"][1] | {"bbox": box})
    sample = mapper(use_instance_mask=False)(record)
    assert boxes(sample) == [[35, 20, 52, 34]]


def test_evaluation_gives_the_image_alone(record):
    map_sample = DetectionMapper(
        is_train=False, augmentations=augmentations.default(is_train=False, min_size=20)
    )
    sample = map_sample(record)
    assert sample["image"].shape == (3, 20, 30)
    assert (sample["height"], sample["width"]) == (HEIGHT, WIDTH)
    assert "instances" not in sample
    assert "annotations" not in sample


def test_masks_that_are_wanted_but_missing_are_named(record):
    del record["annotations"][0]["segmentation"]
    with pytest.raises(SampleError, match=r"1 of 2 objects in .*scene.png .*MODEL.MASK_ON"):
        mapper()(record)


def test_sizes_that_disagree_are_named(record):
    with pytest.raises(SampleError, match=r"scene.png is 60x40, .* says 99x40"):
        mapper()(record | {"width": 99})
    rle = encode(np.ones((HEIGHT, WIDTH + 1)))
    record["annotations"][0]["segmentation"] = rle
    with pytest.raises(SampleError, match=r"mask of .*scene.png is 61x40"):
        mapper()(record)


def test_broken_and_missing_files_are_named(record, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    whole = tmp_path / "whole.jpg"
    Image.fromarray(noise).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("not a picture")
    for name in ("cut.jpg", "text.png", "absent.jpg"):
        with pytest.raises(SampleError, match=name) as caught:
            mapper()({"file_name": str(tmp_path / name), "annotations": []})
        assert caught.value.file_name.endswith(name)


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10] = 255
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6  # stored lying, to be turned clockwise
    path = tmp_path / "turned.jpg"
    image.save(path, exif=exif, quality=95)
    sample = mapper()({"file_name": str(path), "height": 40, "width": 20, "annotations": []})
    assert sample["image"].shape == (3, 40, 20)
    assert sample["image"][:, :, 12:].float().mean() > 245
    assert sample["image"][:, :, :8].float().mean() < 10


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_every_kind_of_picture_becomes_three_channels(tmp_path, mode):
    pixels = np.zeros((8, 10, 3), np.uint8)
    pixels[:, 5:] = 255
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.fromarray(pixels).convert(mode).save(path)
    sample = mapper(image_format="BGR")({"file_name": str(path), "annotations": []})
    assert sample["image"].shape == (3, 8, 10)
    assert sample["image"][:, 0, 9].tolist() == [255] * 3
    assert (sample["height"], sample["width"]) == (8, 10)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm", "colour.png"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, name):
    ramp = np.linspace(0, 65535, 8 * 10).astype(np.uint16).reshape(8, 10)
    pixels = (
        ramp if name.startswith("grey") else np.dstack([ramp, ramp[::-1], ramp.T.reshape(8, 10)])
    )
    path = str(tmp_path / name)
    assert cv2.imwrite(path, pixels)
    image = read_image({"file_name": path}, "BGR")
    assert image.dtype == np.uint8
    expected = np.broadcast_to(pixels.reshape(8, 10, -1) / 257, (8, 10, 3))
    # in colour PIL takes the upper byte, at most one less
    np.testing.assert_allclose(image, expected, atol=0.51 if name.startswith("grey") else 1)
    sample = mapper(image_format="BGR")({"file_name": path, "annotations": []})
    np.testing.assert_array_equal(sample["image"].numpy().transpose(1, 2, 0), image)


def test_sixteen_bits_keep_their_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((4, 9), np.uint16)).save(tmp_path / "a.png", exif=exif)
    assert read_image({"file_name": str(tmp_path / "a.png")}, "BGR").shape == (9, 4, 3)


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        (np.float32, 0.5, "floats"),
        (np.int32, 70000, "outside 0 to 65535"),
        (np.int32, -1, "outside"),
    ],
)
def test_pictures_of_unknown_range_are_named(tmp_path, dtype, value, message):
    path = tmp_path / "deep.tif"
    Image.fromarray(np.full((4, 5), value, dtype)).save(path)
    with pytest.raises(SampleError, match=rf"deep\.tif: it holds .*{message}") as caught:
        read_image({"file_name": str(path)}, "BGR")
    again = pickle.loads(pickle.dumps(caught.value))  # as between a loader's processes
    assert (str(again), again.file_name) == (str(caught.value), str(path))


def test_bgr_is_the_reverse_of_rgb(record):
    rgb = mapper()(record)["image"]
    bgr = mapper(image_format="BGR")(record)["image"]
    assert torch.equal(bgr.flip(0), rgb)
    assert rgb[0].float().mean() != rgb[2].float().mean()


# Semantic segmentation


@pytest.fixture
def labelled(tmp_path) -> tuple[dict, np.ndarray]:
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[5:25, 5:35] = 1
    labels[20:, 40:] = 4
    labels[:3] = 11
    Image.fromarray(np.repeat(labels[..., None] * 20, 3, axis=2)).save(tmp_path / "image.png")
    Image.fromarray(labels).save(tmp_path / "labels.png")
    record = {
        "file_name": str(tmp_path / "image.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "sem_seg_ignore_label": 11,
    }
    return record, labels


def test_the_datasets_ignore_label_becomes_the_models(labelled):
    record, labels = labelled
    sample = SemanticMapper(is_train=True, augmentations=[])(record)
    assert sample["sem_seg"].dtype == torch.int64
    expected = np.where(labels == 11, 255, labels)
    assert (sample["sem_seg"].numpy() == expected).all()
    assert (sample["height"], sample["width"]) == (HEIGHT, WIDTH)


def test_labels_follow_the_image(labelled):
    record, _ = labelled
    steps = augmentations.semantic(
        min_size=(40, 80), crop_size=(32, 48), color_distortion=False, single_category_max_area=0.9
    )
    map_sample = SemanticMapper(is_train=True, augmentations=steps)
    for seed in range(10):
        np.random.seed(seed)
        sample = map_sample(record)
        assert sample["image"].shape == (3, 32, 48)
        labels = sample["sem_seg"].numpy()
        painted = np.round(sample["image"][0].numpy() / 20).astype(int)
        painted[painted == 11] = 255
        assert (labels == painted).mean() > 0.9  # outlines are blurred in the picture


def test_a_detection_mapper_takes_label_maps_along(labelled):
    record, _ = labelled
    steps = augmentations.lsj(image_size=96, min_scale=0.5, max_scale=0.6, flip="none")
    sample = mapper(*steps, use_instance_mask=False)(record | {"annotations": []})
    assert sample["sem_seg"].shape == (96, 96)
    assert (sample["sem_seg"][-10:] == 255).all()  # the padding
    assert sample["sem_seg"].unique().tolist() == [0, 1, 4, 255]


def test_palette_label_maps_give_indices_and_sixteen_bits_are_kept(tmp_path):
    indices = np.array([[0, 1], [2, 2]], np.uint8)
    palette = Image.fromarray(indices, mode="P")
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    palette.save(tmp_path / "p.png")
    assert read_label_map(tmp_path / "p.png").tolist() == indices.tolist()
    wide = np.array([[0, 300], [65535, 7]], np.uint16)
    Image.fromarray(wide).save(tmp_path / "w.png")
    assert read_label_map(tmp_path / "w.png").tolist() == wide.tolist()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "c.png")
    with pytest.raises(SampleError, match=r"c.png has 3 channels"):
        read_label_map(str(tmp_path / "c.png"))


def test_wide_label_numbers_survive_augmentation(tmp_path):
    labels = np.zeros((20, 30), np.uint16)
    labels[:, 15:] = 700
    Image.fromarray(labels).save(tmp_path / "labels.png")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "image.png")
    record = {
        "file_name": str(tmp_path / "image.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
    }
    steps = augmentations.semantic(min_size=(40,), crop_size=None, flip="none")
    sample = SemanticMapper(is_train=True, augmentations=steps)(record)
    assert (sample["sem_seg"][:, :30] == 0).all()
    assert (sample["sem_seg"][:, 30:] == 700).all()


def test_a_label_map_of_another_size_is_named(labelled, tmp_path):
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "labels.png")
    with pytest.raises(SampleError, match=r"labels.png is 9x9, but its image is 60x40"):
        SemanticMapper(is_train=True, augmentations=[])(labelled[0])


# From yacs


@pytest.mark.parametrize("name", ["default", "detr", "lsj", "semantic"])
def test_every_recipe_can_be_named_in_yaml(record, labelled, name):
    cfg = get_cfg()
    cfg.INPUT.MAPPER = name
    cfg.INPUT.MIN_SIZE_TRAIN = (50,)
    cfg.INPUT.MIN_SIZE_TEST = 30
    cfg.INPUT.LSJ.IMAGE_SIZE = 72
    cfg.INPUT.DETR.CROP_MIN_SIZES, cfg.INPUT.DETR.CROP_RANGE = (50,), (20, 40)
    cfg.INPUT.CROP.ENABLED = name == "semantic"
    cfg.INPUT.CROP.SIZE = [24, 32]
    source = labelled[0] if name == "semantic" else record
    sample = mappers.from_cfg(cfg, is_train=True)(source)
    size = tuple(sample["image"].shape[1:])
    if name in ("lsj", "semantic"):
        assert size == {"lsj": (72, 72), "semantic": (24, 32)}[name]
    else:
        assert min(size) == 50
    test = mappers.from_cfg(cfg, is_train=False)(source)
    assert test["image"].shape == (3, 30, 45)
    assert "instances" not in test
    assert "sem_seg" not in test


def test_an_unknown_recipe_is_an_error():
    cfg = get_cfg()
    cfg.INPUT.MAPPER = "ljs"
    with pytest.raises(UserError, match=r"INPUT.MAPPER = 'ljs'.*did you mean 'lsj'"):
        mappers.from_cfg(cfg, is_train=True)


def test_yaml_keys_that_cannot_work_are_errors():
    cfg = get_cfg()
    cfg.INPUT.MAPPER, cfg.INPUT.CROP.ENABLED = "semantic", True
    with pytest.raises(UserError, match=r"crop_size = \[0.9, 0.9\].* needs pixels"):
        mappers.from_cfg(cfg, is_train=True)
    cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(UserError, match=r"MODEL\.KEYPOINT_ON"):
        mappers.from_cfg(cfg, is_train=True)


def test_yaml_crops_recompute_boxes_from_masks():
    cfg = get_cfg()
    found = {}
    for key in ("off", "crop", "masks", "asked"):
        cfg.INPUT.CROP.ENABLED |= key == "crop"
        cfg.MODEL.MASK_ON |= key == "masks"
        if key == "asked":
            cfg.INPUT.CROP.ENABLED, cfg.INPUT.RECOMPUTE_BOXES = False, True
        found[key] = mappers.from_cfg(cfg, is_train=True).recompute_boxes
    assert found == {"off": False, "crop": False, "masks": True, "asked": True}


def test_wrong_arguments_are_errors():
    with pytest.raises(UserError, match="MASK_FORMAT"):
        mapper(instance_mask_format="polygons")
    with pytest.raises(UserError, match="need masks"):
        mapper(use_instance_mask=False, recompute_boxes=True)
