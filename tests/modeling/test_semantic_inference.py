"""Windows and scales against slow loops over windows, pixels and views."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from d2dense.errors import UserError
from d2dense.modeling.semantic_inference import SemanticInference, scaled_side, window_starts


class Network:
    """Scores that depend on the place within the given image and on all of it, as real ones do."""

    def __init__(self, classes: int = 3):
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(classes, 3, generator=generator)
        self.shapes = []

    def __call__(self, images):
        self.shapes.append(tuple(images.shape))
        rows = torch.linspace(0, 1, images.shape[2])[:, None]
        columns = torch.linspace(0, 1, images.shape[3])
        scores = torch.einsum("kc,nchw->nkhw", self.weight, images)
        tilt = columns * torch.arange(len(self.weight))[:, None, None]
        return scores * (1 + rows) + tilt + images.mean((1, 2, 3), keepdim=True)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def slow_windows(network, image, window, stride):
    """Mean score of each pixel over the windows that hold it, one pixel at a time."""
    height, width = image.shape[1:]
    corners = []
    y = 0
    while True:
        bottom = min(y + window[0], height)
        x = 0
        while True:
            right = min(x + window[1], width)
            corners.append((max(bottom - window[0], 0), max(right - window[1], 0), bottom, right))
            if right == width:
                break
            x += stride[1]
        if bottom == height:
            break
        y += stride[0]
    scores = [network(image[None, :, y:b, x:r])[0] for y, x, b, r in corners]
    result = np.zeros((scores[0].shape[0], height, width))
    for i in range(height):
        for j in range(width):
            seen = [
                s[:, i - y, j - x].numpy()
                for s, (y, x, b, r) in zip(scores, corners)
                if y <= i < b and x <= j < r
            ]
            result[:, i, j] = np.mean(seen, axis=0)
    return torch.from_numpy(result).float(), len(corners)


@pytest.mark.parametrize(
    ("size", "window", "stride", "count"),
    [
        ((12, 30), (12, 12), (8, 8), 4),
        ((13, 31), (12, 12), (8, 8), 8),
        ((9, 25), (12, 12), (8, 8), 3),  # lower than a window
        ((7, 5), (12, 12), (8, 8), 1),  # smaller in both directions
        ((20, 20), (8, 12), (8, 12), 6),  # no overlap, but at the border
        ((21, 17), (6, 5), (1, 2), 16 * 7),
    ],
)
def test_windows_equal_a_loop_over_pixels(size, window, stride, count):
    batch = images(2, 3, *size)
    expected = [slow_windows(Network(), image, window, stride) for image in batch]
    assert expected[0][1] == count
    for at_once in (1, 3, 100):
        network = Network()
        inference = SemanticInference(window=window, stride=stride, max_windows=at_once)
        found = inference(network, batch, size)
        assert torch.allclose(found, torch.stack([e for e, _ in expected]), atol=1e-5)
        assert sum(shape[0] for shape in network.shapes) == 2 * count
        assert max(shape[0] for shape in network.shapes) <= max(at_once, 2)


def test_the_published_protocol_has_three_windows_on_a_usual_image():
    """512 x 683 with windows of 512 every 341 pixels: the second one ends at the border."""
    assert window_starts(683, 512, 341) == [0, 171]
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(2048, 512, 341) == [0, 341, 682, 1023, 1364, 1536]
    assert window_starts(1024, 512, 512) == [0, 512]
    assert SemanticInference(window=[512, 512]).stride == [341, 341]


def test_one_window_is_the_whole_image():
    batch = images(1, 3, 9, 11)
    whole = SemanticInference()(Network(), batch, (9, 11))
    assert torch.equal(whole, Network()(batch))
    assert torch.equal(SemanticInference(window=[9, 11])(Network(), batch, (9, 11)), whole)
    assert torch.equal(SemanticInference(window=[50, 50])(Network(), batch, (9, 11)), whole)


def test_scores_are_resized_to_the_size_asked_for():
    batch = images(1, 3, 9, 11)
    found = SemanticInference()(Network(), batch, (23, 5))
    expected = F.interpolate(Network()(batch), (23, 5), mode="bilinear", align_corners=False)
    assert torch.equal(found, expected)


# ------------------------------------------------ scales


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("window", [None, (12, 12)])
def test_scales_equal_a_loop_over_views(average, flip, window):
    batch, size, ratios = images(2, 3, 16, 21), (30, 41), (0.5, 1.0, 1.75)
    options = {"window": window, "stride": window and (8, 8)}
    inference = SemanticInference(
        multi_scale=True, ratios=ratios, flip=flip, average=average, **options
    )
    found = inference(Network(), batch, size)
    single = SemanticInference(**options)
    views = []
    for ratio in ratios:
        scaled = (math.floor(16 * ratio + 0.5), math.floor(21 * ratio + 0.5))
        view = F.interpolate(
            batch, scaled, mode="bilinear", align_corners=False, antialias=ratio != 1
        )
        for mirrored in (False, True)[: 1 + flip]:
            seen = view.flip(-1) if mirrored else view
            scores = single(Network(), seen, size)
            scores = scores.softmax(1) if average == "probabilities" else scores
            views.append(scores.flip(-1) if mirrored else scores)
    assert torch.allclose(found, torch.stack(views).mean(0), atol=1e-6)
    if average == "probabilities":
        assert torch.allclose(found.sum(1), torch.ones(2, *size), atol=1e-5)


def test_the_two_averages_can_disagree():
    """Two views, one of them very sure: logits follow it, probabilities count each view once."""
    views = iter([[[9.0, 0.0, 0.0]], [[-6.0, 0.1, 0.0]], [[-6.0, 0.1, 0.0]]])

    def network(x):
        return torch.tensor(next(views)).reshape(1, 3, 1, 1)

    found = {}
    for average in ("logits", "probabilities"):
        views = iter([[[20.0, 0.0, 0.0]], [[-6.0, 2.0, 0.0]], [[-6.0, 2.0, 0.0]]])
        inference = SemanticInference(
            multi_scale=True, ratios=(1, 1, 1), flip=False, average=average
        )
        found[average] = int(inference(network, images(1, 3, 1, 1), (1, 1)).argmax())
    assert found == {"logits": 0, "probabilities": 1}


@pytest.mark.parametrize("window", [None, (8, 8)])
def test_a_mirrored_image_gives_mirrored_scores(window):
    """True with flips for any network; without them only for one that is symmetric itself."""
    batch = images(1, 3, 12, 20)  # windows lie symmetrically: (20 - 8) % 6 = 0
    options = {"window": window, "stride": window and (2, 6), "multi_scale": True}
    for flip, equal in ((True, True), (False, False)):
        inference = SemanticInference(ratios=(1.0,), flip=flip, **options)
        found = inference(Network(), batch, (24, 40))
        mirrored = inference(Network(), batch.flip(-1), (24, 40)).flip(-1)
        assert torch.allclose(found, mirrored, atol=1e-6) == equal


def test_scaled_sides():
    assert [scaled_side(683, r, False) for r in (0.5, 0.75, 1.75)] == [342, 512, 1195]
    assert [scaled_side(513, r, True) for r in (0.5, 0.75, 1.0, 1.25, 1.75)] == [
        257, 385, 513, 641, 897
    ]  # fmt: skip
    assert scaled_side(512, 0.75, True) == 384
    assert scaled_side(1, 0.25, False) == scaled_side(1, 0.25, True) == 1


def test_images_of_one_pixel():
    inference = SemanticInference(window=[4, 4], multi_scale=True)
    assert inference(Network(), images(1, 3, 1, 1), (3, 2)).shape == (1, 3, 3, 2)


def test_half_precision_networks_are_averaged_in_single_precision():
    inference = SemanticInference(window=[4, 4], multi_scale=True)
    network = Network()
    found = inference(lambda x: network(x).bfloat16(), images(1, 3, 5, 9), (5, 9))
    assert found.dtype == torch.float32


def test_networks_output_is_not_written_to():
    kept = images(1, 3, 4, 4)
    before = kept.clone()
    options = {"multi_scale": True, "ratios": (1.0, 1.0), "average": "logits", "flip": False}
    SemanticInference(**options)(lambda x: kept, images(1, 3, 4, 4), (4, 4))
    assert torch.equal(kept, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": [512]}, r"window = \[512\], expected height and width"),
        ({"window": [4, 0]}, r"window = \[4, 0\]"),
        ({"stride": [2, 2]}, "there is no window"),
        ({"window": [4, 4], "stride": [4, 5]}, "steps over pixels"),
        ({"window": [4, 4], "max_windows": 0}, "max_windows = 0"),
        ({"ratios": []}, "ratios"),
        ({"ratios": [1, 0]}, "ratios"),
        ({"average": "logit"}, r"average = 'logit'.*logits"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        SemanticInference(**options)


# ------------------------------------------------ filling up


def padded(image, size, value=0.0):
    result = torch.full((*image.shape[:2], *size), value)
    result[:, :, : image.shape[2], : image.shape[3]] = image
    return result


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"pad_to": [9, 13]}, (9, 13)),
        ({"pad_to": [4, 13]}, (8, 13)),  # at least: nothing is cut off
        ({"pad_step": 8}, (9, 17)),
        ({"pad_step": 4, "pad_to": [10, 1]}, (13, 13)),
        ({"pad_step": 4, "window": [5, 5]}, (9, 13)),
    ],
)
def test_whole_images_are_filled_up_before_anything_else(options, size):
    image = images(2, 3, 8, 12)
    plain = {key: value for key, value in options.items() if key == "window"}
    expected = SemanticInference(**plain)(Network(), padded(image, size), size)[:, :, :8, :12]
    found = SemanticInference(**options)(Network(), image, (8, 12))
    assert torch.allclose(found, expected, atol=1e-6)
    # a result of another size is resized after what was filled up has been cut off
    found = SemanticInference(**options)(Network(), image, (16, 20))
    expected = F.interpolate(expected, (16, 20), mode="bilinear", align_corners=False)
    assert torch.allclose(found, expected, atol=1e-6)


def test_filling_up_with_a_value_and_nothing_to_fill_up():
    fill = torch.tensor([0.5, -1.0, 2.0])[:, None, None]
    seen = []

    def network(x):
        seen.append(x)
        return x

    inference = SemanticInference(pad_step=4)
    inference(network, images(1, 3, 8, 13), (8, 13), fill)
    assert torch.equal(seen[0][:, :, :8], images(1, 3, 8, 13))
    assert torch.equal(seen[0][:, :, 8:], fill.expand(1, 3, 1, 13))
    image = images(1, 3, 9, 13)
    inference(network, image, (9, 13), fill)
    assert seen[1] is image


def test_scales_of_the_filled_image_are_odd_and_their_logits_are_averaged():
    network = Network()
    inference = SemanticInference(
        multi_scale=True,
        ratios=[0.5, 1.0, 1.5],
        average="logits",
        keep_odd=True,
        align_corners=True,
        pad_to=[9, 13],
    )
    image = images(1, 3, 8, 12)
    found = inference(network, image, (8, 12))
    # int(4.5) and int(6.5) are even, int(13.5) is odd, int(19.5) too
    sides = [(5, 7), (9, 13), (13, 19)]
    assert network.shapes == [(1, 3, *side) for side in sides for _ in range(2)]
    total, whole = 0, padded(image, (9, 13))
    for side in sides:
        scaled = F.interpolate(
            whole, side, mode="bilinear", align_corners=True, antialias=side != (9, 13)
        )
        for flipped in (False, True):
            scores = network(scaled.flip(3) if flipped else scaled)
            scores = F.interpolate(scores, (9, 13), mode="bilinear", align_corners=True)
            total = total + (scores.flip(3) if flipped else scores)
    assert torch.allclose(found, total[:, :, :8, :12] / 6, atol=1e-5)


@pytest.mark.parametrize("options", [{"pad_to": [9]}, {"pad_to": [0, 9]}, {"pad_step": -1}])
def test_sizes_to_fill_up_to_that_make_no_sense(options):
    with pytest.raises(UserError, match=next(iter(options))):
        SemanticInference(**options)
