"""What models do that asks for sizes, recorded once for all: crops, windows, pyramids, pooling,
batch norm of regions, soft suppression.
"""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from d2dense.export.adapters import Adapter, Output
from d2dense.export.exported_program import record
from d2dense.export.onnx import open_onnx, save_onnx
from d2dense.export.symbolic import symbolic_sizes
from d2dense.modeling import TimmBackbone
from d2dense.modeling.detr import soft_nms
from d2dense.modeling.necks.pyramid import resize
from tests.export.exportable import picture

SIZES = [(33, 33), (100, 131), (64, 96), (70, 152)]


def output(name):
    return Output(name=name, shape=(), dtype="float32", meaning="")


class _Parts(Adapter):
    """One map after the other, every one of a size that follows from the image's."""

    outputs = tuple(map(output, ("cropped", "up", "down", "pooled", "normalised", "suppressed")))

    def forward(self, image):
        x = self.model[0](image[None] / 255)
        rows, columns = (image.shape[1] + 7) // 8, (image.shape[2] + 7) // 8
        cropped = x[:, :, :rows, :columns].contiguous()
        half = F.max_pool2d(cropped, 3, stride=2, padding=1)
        quarter = F.max_pool2d(half, 3, stride=2, padding=1)
        up, down = resize(quarter, cropped), resize(cropped, quarter)
        pooled = F.adaptive_avg_pool2d(cropped, 3)
        regions = (cropped[0, 0] > cropped.mean()).nonzero()
        at = cropped[0, :, regions[:, 0], regions[:, 1]].T
        normalised = self.model[1](at[:, :, None, None])
        return cropped, up, down, pooled, normalised, self._suppressed(half)

    def _suppressed(self, x):
        corners = x.flatten(2)[:, :2].mT * 20
        scores = x.flatten(2)[:, 2].sigmoid()
        boxes = torch.cat([corners, corners + 30], dim=2)
        return soft_nms(boxes, scores, (scores > 0.5).long(), iou=0.3, min_score=0.2)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 9, stride=8, padding=8), nn.BatchNorm2d(4))
    model[0].weight.data *= 3
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return _Parts(model).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def program(parts):
    return record(parts, picture(64, 64))


@pytest.fixture(scope="module", params=["torch_export", "onnx"])
def run(request, parts, program, tmp_path_factory):
    if request.param == "torch_export":
        return program.module()
    path = tmp_path_factory.mktemp("parts") / "model.onnx"
    with mock.patch("d2dense.export.onnx.record", return_value=program):  # for the second time
        save_onnx(parts, picture(64, 64), path)
    return open_onnx(path, "cpu")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size(parts, run, size):
    image = picture(*size, dtype=torch.float32)
    expected = parts(image)
    suppressed = expected[-1]
    assert 0 < suppressed.count_nonzero() < suppressed.numel()
    for output, a, b in zip(parts.outputs, expected, run(image)):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5, msg=output.name)


@pytest.mark.parametrize("size", [(7, 9), (3, 4), (1, 1), (16, 20)])
def test_adaptive_pooling(size):
    x = torch.randn(2, 3, *size)
    for target in (1, 2, 6, (4, 3)):
        with symbolic_sizes():
            found = F.adaptive_avg_pool2d(x, target)
        torch.testing.assert_close(found, F.adaptive_avg_pool2d(x, target), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(5, 7), (3, 3), (1, 2), (9, 4), (18, 23), (3, 10)])
def test_pyramids_that_pool_or_enlarge(monkeypatch, size):
    from d2dense.modeling.necks import pyramid

    # as while recording, where equal sizes are not asked for
    monkeypatch.setattr(pyramid, "is_recorded", lambda: True)
    x, like = torch.randn(2, 3, *size), torch.zeros(2, 1, -(-size[0] // 2), -(-size[1] // 2))
    for a, b in ((x, like), (like + x.mean(), x), (x, x)):
        expected = resize(a, b)
        with symbolic_sizes():
            assert torch.equal(resize(a, b), expected)


def test_timm_windows():
    options = {"depths": (2, 2, 2, 2), "embed_dim": 16, "num_heads": (1, 2, 2, 2)}
    name = "swin_tiny_patch4_window7_224"
    torch.manual_seed(0)
    backbone = TimmBackbone(name=name, size_divisibility=0, options=options).eval()
    for size in SIZES:
        x = torch.rand(1, 3, *size)
        with torch.no_grad():
            expected = backbone(x)
            with symbolic_sizes():
                found = backbone(x)
        assert all(torch.equal(expected[level], found[level]) for level in expected)
