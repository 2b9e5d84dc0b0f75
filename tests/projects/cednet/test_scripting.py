"""TorchScript of the backbone, detectors, segmenter and classifier, at sizes that it never saw."""

import io

import pytest
import torch
from torch import nn

from cednet.trunk import STYLES
from d2dense.export import adapt, export_model, to_torchscript
from d2dense.layers import LayerNorm2d
from tests.export.exportable import picture
from tests.projects.cednet import tiny, tiny_detectors

ALL_FEATURES = ("p2", "p3", "p4", "p5", "p6", "p7", "p8", *tiny.RAW)
NETS = [(mixer, "fpn") for mixer in tiny.FAMILIES] + [("next", style) for style in STYLES[1:]]
SEEN = (1, 3, 64, 96)
# larger, smaller, other numbers of images, no multiples of 32 or of windows, thinner than a stride
OTHER_SIZES = ((2, 3, 96, 33), (1, 3, 130, 250), (3, 3, 1, 50), (1, 3, 5, 7))
OTHER_PICTURES = ((150, 101), (64, 197), (33, 260), (20, 20))
METHODS = ("trace", "script")
SMALL = {"blocks": (2, 1, 1), "first_blocks": 1}  # two in a row: windows are shifted in the second


def converted(model: nn.Module, method: str) -> torch.jit.ScriptModule:
    """What a reader of the saved file gets."""
    with torch.no_grad():
        if method == "trace":
            module = torch.jit.trace(model, tiny.images(*SEEN), strict=False, check_trace=False)
        else:
            module = torch.jit.script(model)
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@pytest.mark.parametrize(("mixer", "style"), NETS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_backbone(mixer, style, method):
    net = tiny.backbone(mixer, ALL_FEATURES, style=style, **SMALL)
    module = converted(net, method)
    for shape in (SEEN, *OTHER_SIZES):
        x = tiny.images(*shape)
        expected, found = net(x), module(x)
        assert list(found) == list(expected)
        assert all(tiny.close(found[name], value) for name, value in expected.items()), shape


@pytest.mark.parametrize("mixer", tiny.FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_classifier(mixer, method):
    model = tiny_detectors.classifier(mixer).eval()
    module = converted(model, method)
    for shape in (SEEN, *OTHER_SIZES):
        x = tiny.images(*shape)
        assert tiny.close(module(x), model(x)), shape


@torch.no_grad()
def test_classifier_of_all_stages_in_training():
    model = tiny_detectors.classifier().train()
    module = torch.jit.script(model)
    x = tiny.images(2, 3, 33, 40)
    assert all(tiny.close(a, b) for a, b in zip(module(x), model(x), strict=True))


@pytest.mark.parametrize("name", tiny_detectors.MODELS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_whole_models(name, method):
    model = tiny_detectors.MODELS[name]().eval()
    module, adapter = to_torchscript(model, picture(96, 128), method=method), adapt(model)
    for size in OTHER_PICTURES:
        image = picture(*size, seed=1)
        expected, found = adapter(image), module(image)
        assert expected[0].numel() > 20, "nothing to compare"
        for a, b in zip(expected, found, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("cascade_mask_rcnn", "trace", {"mixer": "cswin"}),
        ("upernet", "script", {"style": "hourglass", "mixer": "bottleneck"}),
    ],
)
def test_exported_files_need_none_of_our_packages(tmp_path, name, method, options):
    """The export runs the file in a fresh process and compares."""
    model = tiny_detectors.MODELS[name](**options).eval()
    done = export_model(model, picture(96, 128), output_dir=tmp_path, method=method)
    assert done.path.is_file()
    assert max(check.found for check in done.checks) > 0
    assert len({(check.height, check.width) for check in done.checks}) == 3


@torch.no_grad()
def test_a_wrong_size_in_a_trace_would_be_noticed():
    """The comparison above can fail: this one writes the size of the traced image down."""

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.norm = tiny.backbone(), LayerNorm2d(16)

        def forward(self, x):
            maps = self.net(x)
            height, width = (int(side) for side in maps["p4"].shape[-2:])
            return {"p4": self.norm(maps["p4"].reshape(-1, 16, height, width))}

    net = Frozen().eval()
    x = tiny.images(4, 3, 32, 48)
    with pytest.warns(torch.jit.TracerWarning):
        module = converted(net, "trace")
    try:
        same = tiny.close(module(x)["p4"], net(x)["p4"])
    except RuntimeError:
        same = False
    assert not same
