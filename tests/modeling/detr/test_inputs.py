"""Batches that no detector can take: one clear line; and what is recorded of models refuses too."""

import pytest
import torch

from d2dense.errors import UserError
from d2dense.export import adapt
from tests.modeling.detr.test_two_stage import build
from tests.modeling.detr.whole import image

KIND = "deformable_detr_plus_plus"
SHAPES = {"grey": (1, 20, 30), "transparent": (4, 20, 30), "flat": (20, 30), "two": (2, 3, 9, 9)}


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch(training):
    with pytest.raises(UserError, match=r"without an image; expected at least one$"):
        build(KIND).train(training)([])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_images_of_other_channels(shape, training):
    wrong = {**image(20, 30), "image": torch.zeros(shape)}
    with pytest.raises(UserError) as error:
        build(KIND).train(training)([image(20, 30), wrong])
    message = str(error.value)
    assert f"image 1 of the batch has the shape {shape}; expected (3, height, width)" in message
    assert "MODEL.PIXEL_MEAN" in message
    assert "model.pixel_mean" in message
    assert "\n" not in message


@pytest.mark.parametrize("size", [(65, 20), (20, 65)])
def test_images_larger_than_the_square(size):
    model = build(KIND, square=64).eval()
    with pytest.raises(
        UserError, match=r"side of 65 pixels, batches one of 64 \(MODEL.DETR.SQUARE"
    ):
        model([image(30, 40), image(*size)])


def test_images_larger_than_the_square_of_the_backbone():
    model = build(KIND).eval()
    model.backbone.__class__ = type(
        "Squares",
        (type(model.backbone),),
        {"padding_constraints": property(lambda _: {"square_size": 64})},
    )
    assert model.preprocess([image(30, 40)]).tensor.shape[2:] == (64, 64)
    with pytest.raises(UserError, match="side of 70 pixels, batches one of 64"):
        model([image(70, 20)])


def test_traces_refuse_images_larger_than_the_square():
    """Others are detected in as by the model."""
    model = build(KIND, square=64).eval()
    adapter = adapt(model)
    with torch.no_grad():
        traced = torch.jit.trace(adapter, image(40, 50)["image"], check_trace=False)
        for size in ((64, 33), (64, 64)):
            given = image(*size, seed=1)["image"]
            for ours, theirs in zip(traced(given), adapter(given), strict=True):
                assert torch.allclose(ours, theirs, atol=1e-3)
        for size in ((65, 20), (20, 128)):
            with pytest.raises(Exception, match=f"side of {max(size)} pixels.*up to 64; resize it"):
                traced(image(*size)["image"])
