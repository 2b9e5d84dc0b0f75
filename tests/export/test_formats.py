"""torch.export and ONNX files: any size, nothing found, what they take, what is missing."""

import json
import sys

import onnx
import pytest
import torch
from torch import nn

from d2dense.errors import UserError
from d2dense.export import adapt, export_model, formats, load, register_adapter
from d2dense.export.adapters import BOXES, CLASSES, SCORES, Adapter
from tests.export.exportable import picture

FILES = {"torch_export": "model.pt2", "onnx": "model.onnx"}


class Spots(nn.Module):
    """A detector of bright spots: as many detections as there are, perhaps none."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, 3, 5, 5, generator=torch.manual_seed(0)) / 75)


class _SpotsAdapter(Adapter):
    outputs = (BOXES, SCORES, CLASSES)

    def forward(self, image):
        values = image.to(torch.float32)[None] / 255
        scores = nn.functional.conv2d(values, self.model.weight, stride=16, padding=2)[0, 0]
        y, x = (scores > 0.27).nonzero().unbind(dim=1)
        centres = 16 * torch.stack([x, y, x, y], dim=1).to(torch.float32)
        return centres + centres.new_tensor([-8, -8, 8, 8]), scores[y, x], (x + y) % 3


register_adapter(Spots, _SpotsAdapter)


@pytest.fixture(scope="module", params=FILES)
def done(request, tmp_path_factory):
    """One file of each format, after its check in a fresh process."""
    folder = tmp_path_factory.mktemp(request.param)
    return export_model(Spots(), picture(120, 160), output_dir=folder, format=request.param)


def test_checked_at_other_sizes_and_without_detections(done):
    first, second, empty = done.checks
    assert {(first.height, first.width), (second.height, second.width)} == {(88, 190), (157, 107)}
    assert min(first.found, second.found) > 0
    assert done.max_error < 1e-5
    assert empty.found == 0


def test_description(done):
    about = json.loads(done.metadata_path.read_text())
    assert about["file"] == done.path.name == FILES[about["format"]]
    assert about["input"]["dtypes"] == ["float32"]
    assert about["input"]["sides"] == [33, None]
    assert about["input"]["shape"] == [3, "H", "W"]
    assert about["method"] is None  # tracing and scripting are TorchScript's
    assert about.get("opset") == (18 if about["format"] == "onnx" else None)


@pytest.mark.parametrize("size", [(33, 33), (40, 300), (513, 77)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_any_size_and_both_types_of_images(done, size, dtype):
    image = picture(*size, seed=3, dtype=dtype)
    found = load(done.path).run(image)
    expected = adapt(Spots())(image)
    assert found["boxes"].shape[0] > 0
    for output, value in zip(_SpotsAdapter.outputs, expected):
        assert found[output.name].dtype == value.dtype
        assert torch.allclose(found[output.name], value, atol=1e-6)


def test_nothing_found(done):
    found = load(done.path).run(torch.zeros(3, 100, 120, dtype=torch.uint8))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "boxes": (0, 4),
        "scores": (0,),
        "classes": (0,),
    }


def test_onnx_has_standard_operators_and_free_sides(done):
    if done.path.suffix != ".onnx":
        pytest.skip("about the ONNX file")
    model = onnx.load(str(done.path))
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert not model.functions
    (image,) = model.graph.input
    channels, *sides = image.type.tensor_type.shape.dim
    assert channels.dim_value == 3
    assert len({side.dim_param for side in sides}) == 2
    assert "" not in {side.dim_param for side in sides}
    assert [output.name for output in model.graph.output] == ["boxes", "scores", "classes"]


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_damaged_files(done, tmp_path, damage):
    content = done.path.read_bytes()
    path = tmp_path / done.path.name
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"x" * 100)
    path.with_suffix(".json").write_text(done.metadata_path.read_text())
    title = {".pt2": "torch.export", ".onnx": "ONNX"}[path.suffix]
    with pytest.raises(UserError, match=f"is not a {title} file: .") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_format_of_another_version(done, tmp_path):
    about = json.loads(done.metadata_path.read_text()) | {"format": "flat"}
    (tmp_path / "model.json").write_text(json.dumps(about))
    path = tmp_path / done.path.name
    path.write_bytes(done.path.read_bytes())
    with pytest.raises(UserError, match="has the format 'flat', expected one of torchscript"):
        load(path)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_said_before_any_work(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package {package} .*pip install '\.\[onnx\]'"):
        export_model(Spots(), picture(64, 64), output_dir=tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()


def test_an_onnx_file_without_onnxruntime(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime .*pip install '\.\[onnx\]'"):
        formats.FORMATS["onnx"].open(tmp_path / "model.onnx", "cpu")


def test_onnx_on_a_device_that_onnxruntime_does_not_know(monkeypatch, tmp_path):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UserError, match="onnxruntime has no CUDA here, but the device is cuda"):
        formats.FORMATS["onnx"].open(tmp_path / "model.onnx", "cuda")
