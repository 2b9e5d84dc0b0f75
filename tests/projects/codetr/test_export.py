"""TorchScript of every detector of the family: right at other sizes and batch sizes, and nothing of
ours, of the traced size, or of what only training needs is in it.
"""

from __future__ import annotations

import io

import pytest
import torch
from detectron2.config import instantiate
from torch import nn

from codetr import nodes
from d2dense.export import adapt, export, to_torchscript
from d2dense.export.torchscript import quiet
from d2dense.modeling import EVA02ViT, Swin
from d2dense.modeling.necks import SimplePyramid
from tests.projects.codetr import family

TRACED = (150, 211)
OTHER_SIZES = ((33, 50), (200, 65))
# what would be written down of the traced size: sides and areas of the image, of the batch and of
# its maps, as far as no width of a layer is the same number
OF_TRACED = {150, 211, 160, 224, 56, 28, 14, 40 * 56, 20 * 28, 10 * 14, 5 * 7}


def operators(block):
    """Kinds of all nodes, in loops and branches too."""
    for node in block.nodes():
        yield node.kind()
        for inner in node.blocks():
            yield from operators(inner)


def constants(graph):
    """Whole numbers that are written down, alone or in tensors, and lengths of those tensors."""
    found = set()
    for node in graph.findAllNodes("prim::Constant", recurse=True):
        if node.output().type().kind() == "NoneType":
            continue
        value = node.output().toIValue()
        if isinstance(value, torch.Tensor):
            found |= {*value.shape, *(value.flatten().tolist() if value.numel() < 100 else ())}
        elif isinstance(value, int) and not isinstance(value, bool):
            found.add(value)
    return found


def exported(model):
    """The model's file, read again, after a look at its graph."""
    module = to_torchscript(model, family.image(*TRACED)["image"])
    graph = module.inlined_graph
    kinds = set(operators(graph))
    assert {kind.split("::")[0] for kind in kinds} <= {"aten", "prim", "torchvision"}
    assert "prim::PythonOp" not in kinds
    assert not constants(graph) & OF_TRACED
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@torch.no_grad()
def check_other_sizes(model, module):
    adapter, found = adapt(model), 0
    for size in OTHER_SIZES:
        image = family.image(*size, seed=4)["image"]
        for a, b in zip(module(image), adapter(image)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
        found += len(a)
    assert found > len(OTHER_SIZES)  # detections were compared


CASES = {
    **{base: (base, {}) for base in family.BASES},
    "soft_nms": ("dino_5scale", {"soft_nms_iou": 0.5}),
    "official_soft_nms": ("dino_4scale", {"soft_nms_iou": 0.5, "by_offset": True}),
    "square": ("dino_4scale", {"square": 256, "pad_value": 114.0, "mask_padding": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_detector(case):
    base, changes = CASES[case]
    model = family.detector(base, *family.PAIR, max_detections=9, **changes).eval()
    module = exported(model)
    names = {name.removeprefix("model.") for name, _ in module.named_parameters()}
    plain = dict(family.detector(base).named_parameters())
    assert names == {name for name in plain if not name.startswith("denoising")}
    check_other_sizes(model, module)


class Network(nn.Module):
    """Images and their sizes without padding -> logits and boxes of the last layer."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, sizes):
        maps = self.model.backbone(images)
        maps = self.model.neck([maps[name] for name in self.model.in_features])
        memory = self.model.encoder(maps, sizes, (images.shape[2], images.shape[3]))
        return self.model.decode(memory, all_layers=False)


def inputs(batch, height, width):
    sizes = torch.tensor([[height - 6.0, width - 20.0 * i] for i in range(batch)])
    return torch.randn(batch, 3, height, width), sizes


@pytest.mark.parametrize("base", family.BASES)
@torch.no_grad()
def test_batches(base):
    """Traced with one or two images, of padded batches too."""
    model = family.detector(base, *family.PAIR).eval().inference_model()
    network = Network(model)
    for traced in (1, 2):
        with quiet():
            module = torch.jit.trace(network, inputs(traced, 160, 224), check_trace=False)
        assert not constants(module.inlined_graph) & OF_TRACED
        for given in (inputs(1, 32, 128), inputs(2, 96, 64)):
            for a, b in zip(module(*given), network(*given)):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def with_backbone(kind):
    """A small Co-DINO on a transformer."""
    torch.manual_seed(0)
    model = family.detector("dino_5scale", *family.PAIR, max_detections=9, soft_nms_iou=0.5)
    if kind == "vit":
        model.backbone = EVA02ViT(
            channels=32, depth=2, heads=2, window=3, global_blocks=[1], position_side=4
        )
        model.in_features = ["res4"]
        model.neck = SimplePyramid(in_channels=32, out_channels=64)
    else:
        model.backbone = Swin(embed_dim=8, depths=[1, 2, 1, 1], heads=[1, 1, 2, 2], window=3)
        node = nodes.detr.channel_mapper(
            widths={f"res{k + 2}": 8 * 2**k for k in range(4)}, channels=64, levels=5
        )
        model.neck = instantiate(node)
    return model.eval()


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_on_transformers(kind):
    model = with_backbone(kind)
    check_other_sizes(model, exported(model))


@pytest.mark.long
def test_the_tool_checks_it_in_a_fresh_process(tmp_path):
    """Which can import none of our packages."""
    done = export("CoDETR/co_dino_tiny_shapes", output_dir=tmp_path)
    assert done.path.is_file()
    assert done.max_error < 1e-4
    assert len({(check.height, check.width) for check in done.checks}) == 3
