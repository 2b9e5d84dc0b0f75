"""CAR: golden numbers, properties of the official code, label sizes, switches."""

import pytest
import torch

from hfgd import CARLosses
from hfgd.car_losses import nearest_labels

IGNORE = 255
LABELS = torch.tensor([0, 0, 1, 2, IGNORE, 1]).view(1, 2, 3)


def golden_features(scale):
    """f[p, c] = s sin(p + 0.5 c) of six pixels as a map (1, 4, 2, 3)."""
    p, c = torch.meshgrid(torch.arange(6.0), torch.arange(4.0), indexing="ij")
    return (scale * torch.sin(p + 0.5 * c)).t().reshape(1, 4, 2, 3)


def losses(features, classes, labels=LABELS, **options):
    found = CARLosses(**options)(features, labels, classes, IGNORE)
    return {name.removeprefix("loss_car_"): value for name, value in found.items()}


@pytest.mark.parametrize(
    ("scale", "classes", "c2c", "c2p", "intra"),
    [
        (1, 3, 0.0041984, 0.0942749, 0.0621892),
        (4, 3, 0.0205059, 0.1462391, 0.9950271),
        (1, 5, 0.0522874, 0.2066111, 0.0621892),
    ],
)
def test_golden_losses(scale, classes, c2c, c2p, intra):
    found = losses(golden_features(scale), classes)
    assert float(found["c2c"]) == pytest.approx(c2c, abs=1.5e-7)
    assert float(found["c2p"]) == pytest.approx(c2p, abs=1.5e-7)
    assert float(found["intra"]) == pytest.approx(intra, abs=1.5e-7)


def golden_gradient(name):
    features = golden_features(1).requires_grad_()
    losses(features, 3)[name].backward()
    return features.grad[0].flatten(1).t()  # (6, 4)


@pytest.mark.parametrize(
    ("name", "total"), [("c2c", 0.0092026), ("c2p", 0.0425649), ("intra", 0.3325035)]
)
def test_golden_gradients(name, total):
    assert float(golden_gradient(name).abs().sum()) == pytest.approx(total, abs=1.5e-6)


def test_golden_gradients_of_pixels():
    c2c, c2p, intra = map(golden_gradient, ("c2c", "c2p", "intra"))
    assert not c2c[4].any()
    assert not intra[4].any()
    expected = torch.tensor([-0.0012590, -0.0037484, -0.0053200, -0.0055891])
    torch.testing.assert_close(c2p[4], expected, rtol=0, atol=1.5e-7)
    assert not c2c[0].any()
    expected = torch.tensor([-1, -1, -1, 1]) * 0.0207815
    torch.testing.assert_close(intra[0], expected, rtol=0, atol=1.5e-7)


def test_ignored_pixels_are_left_out_of_c2p_where_that_is_asked_for():
    features = golden_features(1).requires_grad_()
    losses(features, 3, c2p_mask_ignored=True)["c2p"].backward()
    by_pixel = features.grad[0].flatten(1).t()
    assert not by_pixel[4].any()
    assert by_pixel[5].any()
    # the mean is over the five others
    five = features.detach()[..., [0, 0, 0, 1, 1], [0, 1, 2, 0, 2]].view(1, 4, 1, 5)
    of_five = losses(five, 3, LABELS[:, [0, 0, 0, 1, 1], [0, 1, 2, 0, 2]].view(1, 1, 5))
    masked = losses(features.detach(), 3, c2p_mask_ignored=True)
    torch.testing.assert_close(masked["c2p"], of_five["c2p"])


def test_labels_all_ignored_are_finite_and_give_no_gradient():
    features = golden_features(1).requires_grad_()
    found = losses(features, 3, torch.full_like(LABELS, IGNORE))
    sum(found.values()).backward()
    assert all(each.isfinite() for each in found.values())
    assert not features.grad.any()
    assert found["intra"].item() == pytest.approx(1e-5)


def test_switches_weights_and_thresholds():
    features = golden_features(1)
    full = losses(features, 3)
    for name in full:
        off = losses(features, 3, **{name: False})
        assert set(off) == set(full) - {name}
        assert all(torch.equal(value, full[key]) for key, value in off.items())
        weighted = losses(features, 3, **{f"{name}_weight": 0.25})
        assert float(weighted[name]) == pytest.approx(0.25 * float(full[name]))
    assert losses(features, 3, intra=False, c2c=False, c2p=False) == {}
    # with nothing allowed, excesses are the shares of the other classes
    assert losses(features, 3, c2c_threshold=0.0)["c2c"] > full["c2c"]
    assert losses(features, 3, c2p_threshold=0.0)["c2p"] > full["c2p"]


def test_an_ignored_value_that_is_a_class_number():
    moved = LABELS.clone()
    moved[moved == 2], moved[moved == IGNORE] = 3, 2
    found = CARLosses()(golden_features(1), moved, 4, 2)
    assert float(found["loss_car_intra"]) == pytest.approx(0.0621892, abs=1.5e-7)


def test_float32_inside_half_precision():
    features = golden_features(4)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(features.bfloat16(), 3)
    expected = losses(features.bfloat16().float(), 3)
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize(
    ("size", "small"), [((513, 513), (17, 17)), ((513, 1025), (17, 33)), ((65, 97), (3, 4))]
)
def test_labels_of_crops_are_every_32nd(size, small):
    labels = torch.arange(size[0] * size[1]).view(1, *size)
    assert torch.equal(nearest_labels(labels, *small), labels[:, ::32, ::32])


def test_labels_of_other_sizes_are_the_nearest_with_aligned_corners():
    labels = torch.arange(6 * 10).view(1, 6, 10)
    found = nearest_labels(labels, 3, 4)
    # i 5 / 2 = 0, 2.5, 5 and j 9 / 3 = 0, 3, 6, 9; halves up
    assert torch.equal(found[0], labels[0][torch.tensor([0, 3, 5])][:, torch.tensor([0, 3, 6, 9])])
    assert torch.equal(nearest_labels(labels, 1, 1)[0], labels[0, :1, :1])
    assert torch.equal(nearest_labels(labels[:, :1, :1], 2, 3), torch.zeros(1, 2, 3).long())
