"""How a detector fills up images: with zeros after they are normalised, or with a value before."""

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling.backbone.resnet import BasicStem, ResNet

from d2dense.config import detr
from d2dense.errors import UserError


def detector(**settings):
    backbone = L(ResNet)(
        stem=L(BasicStem)(norm="FrozenBN"),
        stages=L(ResNet.make_default_stages)(depth=18, norm="FrozenBN"),
        out_features=["res5"],
    )
    node = detr.deformable_detr(
        backbone=backbone,
        in_features=["res5"],
        neck=detr.channel_mapper(widths={"res5": 512}, channels=32, levels=2),
        channels=32,
        levels=2,
    )
    for part in (node.encoder, node.decoder):
        part.update(layers=1, feedforward=32)
    node.update(settings)
    return instantiate(node).eval()


def inputs(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)}
        for size in sizes
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_a_square_of_grey(count):
    model, images = detector(square=64, pad_value=114.0), inputs((40, 64), (50, 33))[:count]
    batch = model.preprocess(images)
    assert batch.tensor.shape == (count, 3, 64, 64)
    for each, given, size in zip(batch.tensor, images, batch.image_sizes):
        height, width = given["image"].shape[1:]
        assert tuple(size) == (height, width)
        whole = torch.full((3, 64, 64), 114.0)
        whole[:, :height, :width] = given["image"]
        assert torch.allclose(each, (whole - model.pixel_mean) / model.pixel_std)


def test_zeros_by_default():
    batch = detector().preprocess(inputs((40, 64), (50, 33)))
    assert batch.tensor.shape == (2, 3, 50, 64)
    assert not batch.tensor[0, :, 40:].any()
    assert not batch.tensor[1, :, :, 33:].any()


def test_images_beyond_the_square_are_one_line():
    with pytest.raises(UserError, match=r"side of 65 pixels.*model\.square"):
        detector(square=64).preprocess(inputs((40, 65)))
