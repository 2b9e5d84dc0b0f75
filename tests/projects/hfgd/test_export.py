"""TorchScript: traced and scripted at sizes never seen; the fine path alone, folded."""

import io

import pytest
import torch
from detectron2.layers import ShapeSpec

from d2dense.costs import count_macs
from d2dense.export import adapt, export_model, to_torchscript
from d2dense.modeling import Segmenter, TimmBackbone
from tests.export.exportable import picture
from tests.projects.hfgd import tiny
from tests.projects.hfgd.test_encoders import settle

METHODS = ("trace", "script")
OTHER_SIZES = ((97, 161), (130, 65), (33, 40))
VARIANTS = {
    "hfgd_os2": {"out_stride": 2},
    "hfgd_os1": {"out_stride": 1},
    "semantic_fpn": {"encoder": "identity", "upsampler": "sfpn", "hfgm": False},
    "aspp": {"encoder": "aspp"},
    "ocr": {"encoder": "ocr"},
    "self_attention": {"encoder": "self_attention", "axial_attention": False},
    "no_upsampler": {"upsampler": "none", "hfgm": False},
}


def read_again(module):
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def close(a, b):
    """In float64: attention without a scale makes much of the rounding that folding changes."""
    return float((a - b).abs().max() / b.abs().max()) < 1e-10


def of_convnext():
    torch.manual_seed(0)
    backbone = TimmBackbone(
        name="test_convnext",
        out_features=list(tiny.STRIDES),
        same_padding=True,
        size_divisibility=0,
        out_norm="LN",
    )
    shapes = {k: ShapeSpec(channels=v.channels, stride=v.stride) for k, v in
              backbone.output_shape().items()}  # fmt: skip
    return Segmenter(
        backbone=backbone,
        sem_seg_head=tiny.head(input_shape=shapes, out_stride=2),
        pixel_mean=[120.0] * 3,
        pixel_std=[60.0] * 3,
    )


@pytest.mark.parametrize("name", [*VARIANTS, "convnext"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_other_sizes(name, method):
    model = of_convnext() if name == "convnext" else tiny.segmenter(**VARIANTS[name])
    model = settle(model).double()
    module = read_again(to_torchscript(model, picture(65, 97), method=method))
    adapter = adapt(model)
    for size in OTHER_SIZES:
        image = picture(*size, seed=1)
        (expected,), (found,) = adapter(image), module(image)
        assert found.shape == (tiny.CLASSES, *size)
        assert close(found, expected), size


def operators(module):
    """How often each operator is in the graph, calls inlined."""
    graph = module.inlined_graph
    return [node.kind() for node in graph.nodes()]


@torch.no_grad()
def test_only_the_fine_path_is_in_the_graph():
    """As many convolutions and products as that path has, and weights of no other."""
    model = settle(tiny.segmenter(out_stride=4))
    module = to_torchscript(model, picture(65, 97), method="trace")
    backbone = sum(isinstance(m, torch.nn.Conv2d) for m in model.backbone.modules())
    # lead 2, folded trailing 1, laterals 3, branches 7, end 1, output 1, classifier once
    assert operators(module).count("aten::_convolution") == backbone + 2 + 1 + 3 + 7 + 1 + 1 + 1
    assert operators(module).count("aten::linear") == 3 + 4 + 4
    assert operators(module).count("aten::scaled_dot_product_attention") == 3
    names = {name for name, _ in module.named_parameters()}
    assert not any("encoder.feature" in name or ".car" in name for name in names)
    # the model itself still trains
    assert "sem_seg_head.encoder.feature.weight" in dict(model.named_parameters())
    losses = model.train()([{"image": picture(65, 97), "sem_seg": tiny.labels(65, 97)[0]}] * 2)
    assert "loss_car_c2c" in losses


@torch.no_grad()
def test_evaluation_computes_the_fine_path_alone():
    head = tiny.head(out_stride=4).eval()
    seen = []
    head.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    _, losses = head(tiny.maps(65, 97))
    assert seen == [(2, tiny.CLASSES, 17, 25)]
    assert losses == {}
    costs = count_macs(head, tiny.maps(65, 97, images=1))
    assert costs["classifier"] == 17 * 25 * 16 * tiny.CLASSES


@pytest.mark.parametrize("method", METHODS)
def test_an_exported_file_needs_none_of_our_packages(tmp_path, method):
    """It is run in a fresh process at two other sizes."""
    model = settle(tiny.segmenter(out_stride=2), 0.1)
    done = export_model(model, picture(65, 97), output_dir=tmp_path, method=method)
    assert done.path.is_file()
    assert done.max_error < 1e-4
    assert len({(check.height, check.width) for check in done.checks}) == 3
