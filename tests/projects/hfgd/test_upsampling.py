"""The pyramids against their description, written out branch by branch."""

import pytest
import torch
import torch.nn.functional as F

from d2dense.errors import UserError
from hfgd import FeaturePyramid
from hfgd.layers import HeadNorm
from tests.projects.hfgd import tiny
from tests.projects.hfgd.test_encoders import settle

SIZE = (65, 98)
# sizes that each branch's convolutions are enlarged to, None for no enlargement
SIZES = {stride: tuple(tiny.side(n, stride) for n in SIZE) for stride in (1, 2, 4, 8, 16, 32)}
BRANCHES = {
    4: [[None], [4], [8, 4], [16, 8, 4]],
    2: [[None, 2], [4, 2], [8, 4, 2], [16, 8, 4, 2]],
    1: [[None, 2, 1], [4, 2, 1], [8, 4, 2, 1], [16, 8, 4, 2, 1]],
}


def to(x, stride):
    return F.interpolate(x, size=SIZES[stride], mode="bilinear", align_corners=True)


@pytest.mark.parametrize("stride", [4, 2, 1])
@pytest.mark.parametrize("kernel", [1, 3])
@torch.no_grad()
def test_it_is_its_description(stride, kernel):
    torch.manual_seed(0)
    widths = [tiny.WIDTHS[name] for name in ("res2", "res3", "res4")]
    pyramid = FeaturePyramid(
        in_channels=widths,
        channels=6,
        lateral_kernel=kernel,
        out_stride=stride,
        norm=HeadNorm(name="BN"),
    )
    settle(pyramid).double()
    maps = [torch.randn(2, c, *SIZES[s]).double() for c, s in zip(widths, (4, 8, 16))]
    top = torch.randn(2, 6, *SIZES[32]).double()

    lateral = [conv(x) for conv, x in zip(pyramid.laterals, maps)]
    p4 = lateral[2] + to(top, 16)
    p3 = lateral[1] + to(p4, 8)
    p2 = lateral[0] + to(p3, 4)
    total = 0
    for x, convs, steps in zip((p2, p3, p4, top), pyramid.branches, BRANCHES[stride], strict=True):
        for conv, step in zip(convs, steps, strict=True):
            x = conv(x) if step is None else to(conv(x), step)
        total = total + x
    expected = pyramid.end(total)
    found = pyramid(maps, top, SIZE)
    assert found.shape == (2, 6, *SIZES[stride])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert {conv.conv.kernel_size[0] for conv in pyramid.laterals} == {kernel}


def test_no_convolution_of_3x3_runs_at_half_the_size():
    pyramid = FeaturePyramid(
        in_channels=[8, 12, 16], channels=6, out_stride=2, norm=HeadNorm(name="BN")
    )
    seen = []
    for module in pyramid.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(lambda m, i, output: seen.append(output.shape[2]))
    features = tiny.maps(*SIZE)
    pyramid([features[f"res{k}"] for k in (2, 3, 4)], torch.randn(2, 6, *SIZES[32]), SIZE)
    assert len(seen) == 3 + 11
    assert max(seen) == SIZES[4][0]


def test_an_unknown_stride_is_a_line():
    with pytest.raises(UserError, match="expected 4, 2 or 1"):
        FeaturePyramid(in_channels=[1, 1, 1], out_stride=8, norm=HeadNorm())
