"""No waste: compilation in one piece, no copies for memory order, and the benchmark's tables."""

import functools
import json

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cednet.trunk import STYLES
from tests.projects.cednet import test_bad_input as bad_input
from tests.projects.cednet import tiny, tiny_detectors

NETS = [(mixer, "fpn") for mixer in tiny.FAMILIES] + [("next", style) for style in STYLES[1:]]
SMALL = {"blocks": (1, 1, 1), "first_blocks": 1}


def compiled(model: nn.Module, **settings) -> nn.Module:
    """Without code generation; a break of the graph is an error."""
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager", **settings)


@pytest.mark.parametrize(
    ("mixer", "style", "training"),
    [
        *((*net, True) for net in NETS),
        (*NETS[0], False),
        *(pytest.param(*net, False, marks=pytest.mark.long) for net in NETS[1:]),
    ],
)
def test_one_graph_without_breaks(mixer, style, training):
    """In training there are the blocks of inference and stochastic depth, so that inference of the
    other networks is for the long tests.
    """
    net = tiny.backbone(mixer, ("p3", "p6"), style=style, drop_path=0.5, **SMALL).train(training)
    x, results = tiny.images(2, 3, 33, 64), []
    for run in (net, compiled(net, dynamic=False)):
        torch.manual_seed(0)
        results.append({name: value.detach() for name, value in run(x).items()})
    assert all(tiny.close(results[1][name], value) for name, value in results[0].items())


@pytest.mark.long
@torch.no_grad()
def test_a_compiled_network_takes_other_sizes():
    net = tiny.backbone("next", ("p3",), **SMALL)
    run = compiled(net)
    for shape in ((1, 3, 64, 64), (2, 3, 70, 96), (1, 3, 130, 33)):
        x = tiny.images(*shape)
        assert tiny.close(run(x)["p3"], net(x)["p3"]), shape


def test_a_compiled_detector_trains():
    """As the trainer compiles it (TRAIN.COMPILE, train.compile); heads may break the graph."""
    torch._dynamo.reset()
    losses = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = tiny_detectors.retinanet()
        if compiles:
            model.compile(backend="eager")
        with EventStorage():
            found = model.train()([bad_input.sample(64, 64, boxes=2)])
        sum(found.values()).backward()
        assert all(p.grad is not None for p in model.parameters())
        losses.append({name: float(value.detach()) for name, value in found.items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("training", [False, True])
def test_generated_code_computes_the_same(training):
    net = tiny.backbone("next", **SMALL, drop_path=0.0).train(training)
    torch._dynamo.reset()
    run = torch.compile(net, fullgraph=True)
    x, gradients = tiny.images(1, 3, 64, 64), []
    for each in (net, run):
        out = each(x)
        net.zero_grad()
        sum(value.square().mean() for value in out.values()).backward()
        gradients.append([p.grad for p in net.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)


# ------------------------------------------------ memory order


class _Copies(TorchDispatchMode):
    """Collects copies of maps to another memory order."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            self.found.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mixer", ["next", "bottleneck"])
def test_maps_are_not_copied_for_their_order(mixer, style, training):
    """Nothing is copied on channels_last images, but by the split of dilated convolutions."""
    net = tiny.backbone(mixer, style=style, lr_blocks=False).train(training)
    net = net.to(memory_format=torch.channels_last)
    x = tiny.images(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    with _Copies() as copies:
        out = net(x)
        assert copies.found == []
        if training:
            sum(value.square().mean() for value in out.values()).backward()
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in out.values())
    assert [shape for shape in copies.found if len(shape) == 4 and shape[0] == 2] == []


def test_a_copy_would_be_seen():
    norm = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4))
    x = tiny.images(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    with _Copies() as copies:
        norm(x).contiguous()
    assert copies.found


# ------------------------------------------------ the benchmark


def test_benchmark_writes_its_tables(tmp_path, monkeypatch, repo_root):
    import importlib.util

    path = repo_root / "projects" / "CEDNet" / "tools" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("cednet_benchmark", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tiny_net = functools.partial(tiny.backbone, "next", **SMALL)
    small = {tool.BASELINE: (tiny_net, "eager"), "twice": (_Twice, "eager")}
    monkeypatch.setattr(tool, "NETWORKS", small)
    monkeypatch.setattr(tool, "COMPILED", {"traced": (tiny_net, "TorchScript")})
    monkeypatch.setattr(tool, "OTHERS", {})
    # tested where it is; in a process that has compiled something, a fork cannot measure it
    monkeypatch.setattr(tool.benchmark, "peak_memory", lambda call: 2**20)
    argv = ["--size", "64", "64", "--rounds", "1", "--device", "cpu", "--output", str(tmp_path)]
    tool.main(argv)
    tables = json.loads((tmp_path / "cednet_cpu.json").read_text())["rows"]
    rows = {(row["mode"], row["network"]): row for row in tables["CEDNet-NeXt-T"]}
    for mode in ("inference", "training"):
        assert rows[mode, "twice"]["MAC ratio"] == 2
        assert rows[mode, "twice"]["time / MAC ratio"] > 0
        assert rows[mode, "twice"]["memory / MAC ratio"] == 0.5
    assert [
        (row["mode"], "peak MiB" in row)
        for row in tables["Compiled"]
        if row["network"] == "traced" and row["MAC ratio"] == 1
    ] == [("inference", False)]


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList([tiny.backbone("next", **SMALL) for _ in range(2)])

    def forward(self, x):
        return [each for net in self.nets for each in net(x).values()]
