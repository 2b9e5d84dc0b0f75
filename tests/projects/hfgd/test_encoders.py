"""The encoders: widths, what they give to losses, equations, folding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from d2dense.layers import fold_for_inference
from hfgd.encoders import ENCODERS, build_encoder
from hfgd.layers import ConvNormReLU, HeadNorm

NORM = HeadNorm(name="BN")


def built(name, **changes):
    torch.manual_seed(0)
    settings = {
        "in_channels": 24,
        "out_channels": 10,
        "channels": 12,
        "key_channels": 5,
        "lead_convs": 2,
        "lead_kernel": 1,
        "stride": 32,
        "num_classes": 7,
        "norm": NORM,
    }
    return build_encoder(name, **{**settings, **changes})


def settle(module, spread=1.0):
    """Running statistics, affine parameters and biases that are not those of a new layer."""
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.running_mean.normal_(std=spread)
            each.running_var.uniform_(0.5, 2)
            nn.init.uniform_(each.weight, 0.5, 2)
            nn.init.normal_(each.bias, std=spread)
        if isinstance(each, (nn.Conv2d, nn.Linear)) and each.bias is not None:
            nn.init.normal_(each.bias, std=spread)
    return module.eval()


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_ends_in_the_decoders_width(name):
    encoder = built(name)
    x = torch.randn(2, 24, 3, 5)
    found, extra = encoder.encode(x)
    assert found.shape == (2, 10, 3, 5)
    assert set(extra) == {"car": {"car_features"}, "ocr": {"auxiliary_scores"}}.get(name, set())
    if name == "ocr":
        assert extra["auxiliary_scores"].shape == (2, 7, 3, 5)
    if name == "car":
        assert extra["car_features"].shape == (2, 12, 3, 5)
    convs = [m for m in encoder.modules() if isinstance(m, ConvNormReLU)]
    assert all(conv.conv.bias is None for conv in convs)
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == len(convs)
    assert all(norm.eps == 1e-3 and norm.momentum == 3e-4 for norm in norms)


def kernels(name, part=""):
    """(input, output, kernel, dilation) of the CBRs below ``part``, in order, at full width."""
    with torch.device("meta"):
        wide = {"in_channels": 2048, "out_channels": 256, "channels": 512, "key_channels": 64}
        encoder = built(name, **wide)
    module = encoder.get_submodule(part) if part else encoder
    return [
        (m.conv.in_channels, m.conv.out_channels, m.conv.kernel_size[0], m.conv.dilation[0])
        for m in module.modules()
        if isinstance(m, ConvNormReLU)
    ]


def test_layers_at_full_width():
    assert kernels("identity") == [(2048, 256, 1, 1)]
    assert kernels("car", "lead") == [(2048, 512, 1, 1), (512, 512, 1, 1)]
    assert kernels("car", "trailing") == [(512, 256, 1, 1)]
    assert kernels("aspp", "branches") == [
        (2048, 256, 1, 1), (2048, 256, 3, 3), (2048, 256, 3, 6), (2048, 256, 3, 9)
    ]  # fmt: skip
    assert kernels("aspp", "project") == [(1280, 256, 1, 1)]
    assert kernels("self_attention") == [(2048, 512, 3, 1), (512, 512, 3, 1), (512, 256, 1, 1)]
    assert kernels("ocr", "pixels") == [(2048, 512, 3, 1)]
    assert kernels("ocr", "auxiliary") == [(2048, 2048, 3, 1)]
    for part in ("query", "key"):
        assert kernels("ocr", part) == [(512, 256, 1, 1), (256, 256, 1, 1)]
    assert kernels("ocr", "value") == [(512, 256, 1, 1)]
    assert kernels("ocr", "context") == [(256, 512, 1, 1)]
    assert kernels("ocr", "merge") == [(1024, 512, 1, 1)]
    assert kernels("ocr", "project") == [(512, 256, 1, 1)]


def test_rates_of_aspp_follow_the_stride():
    rates = [branch.conv.dilation[0] for branch in built("aspp", stride=8).branches]
    assert rates == [1, 12, 24, 36]


@torch.no_grad()
def test_car_encoder_is_its_table():
    encoder = settle(built("car")).double()
    x = torch.randn(2, 24, 3, 4, dtype=torch.float64)

    def cbr(module, x):
        n, w = module.norm, module.conv.weight
        y = torch.einsum("oc,nchw->nohw", w[:, :, 0, 0], x)
        y = (y - n.running_mean.view(1, -1, 1, 1)) / (n.running_var + 1e-3).sqrt().view(1, -1, 1, 1)
        return (y * n.weight.view(1, -1, 1, 1) + n.bias.view(1, -1, 1, 1)).relu()

    lead = cbr(encoder.lead[1], cbr(encoder.lead[0], x))
    pixels = lead.flatten(2).transpose(1, 2)
    a = encoder.attention
    shares = (a.q(pixels) @ a.k(pixels).transpose(1, 2)).softmax(2)
    mixed = lead + (shares @ a.v(pixels)).transpose(1, 2).view_as(lead)
    features = F.conv2d(mixed, encoder.feature.weight, encoder.feature.bias)
    found, extra = encoder.encode(x)
    torch.testing.assert_close(extra["car_features"], features)
    torch.testing.assert_close(found, cbr(encoder.trailing, features))
    assert torch.equal(encoder(x), found)


@torch.no_grad()
def test_ocr_attends_to_the_centres_of_its_own_scores():
    encoder = settle(built("ocr"))
    x = torch.randn(1, 24, 3, 4)
    scores, pixels = encoder.auxiliary(x)[0].flatten(1), encoder.pixels(x)[0].flatten(1)
    centres = torch.stack([(row.softmax(0) * pixels).sum(1) for row in scores], 1)[None, :, :, None]
    query, key, value = (
        part(maps)[0].flatten(1)
        for part, maps in (
            (encoder.query, encoder.pixels(x)),
            (encoder.key, centres),
            (encoder.value, centres),
        )
    )
    shares = (query.t() @ key / query.shape[0] ** 0.5).softmax(1)
    context = encoder.context((value @ shares.t()).view(1, -1, 3, 4))
    merged = encoder.merge(torch.cat([context, encoder.pixels(x)], 1))
    torch.testing.assert_close(encoder(x), encoder.project(merged), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_aspp_spreads_the_mean_of_the_map():
    encoder = settle(built("aspp"))
    x = torch.randn(2, 24, 5, 6)
    mean = encoder.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, 5, 6)
    parts = [mean, *(branch(x) for branch in encoder.branches)]
    torch.testing.assert_close(encoder(x), encoder.project(torch.cat(parts, 1)))


# ------------------------------------------------ folding


@pytest.mark.parametrize("norm", ["BN", "GN"])
@torch.no_grad()
def test_folded_features_give_the_same_result(norm):
    wide = {"channels": 512, "out_channels": 256, "in_channels": 64, "key_channels": 64}
    encoder = settle(built("car", **wide, norm=HeadNorm(name=norm)))
    x = torch.randn(2, 64, 5, 6)
    expected = encoder(x)
    count = sum(p.numel() for p in encoder.parameters())
    assert fold_for_inference(encoder) is encoder
    error = (encoder(x) - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-5
    extra = 256 if norm == "GN" else 0  # a group norm has no mean that takes a bias in
    assert count - sum(p.numel() for p in encoder.parameters()) == 512 * 512 + 512 - extra
    again = encoder(x)
    fold_for_inference(encoder)  # a second time changes nothing
    assert torch.equal(encoder(x), again)
