"""Model files: what is read and refused, what is reported, and that no half file is seen."""

from __future__ import annotations

import errno
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from d2dense import checkpoint
from d2dense.checkpoint import load_weights
from d2dense.errors import UserError


def model(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(body=nn.Linear(4, 4), head=nn.Linear(4, classes)))


def assert_loaded(net, expected):
    for name, value in expected.items():
        assert torch.equal(net.state_dict()[name], value), name


class Trap:
    """Running code when opened, as a pickle may."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("kind", ["checkpoint", "bare", "wrapped", "state_dict"])
def test_usual_layouts_are_loaded(tmp_path, kind):
    state = model().state_dict()
    content = {
        "checkpoint": {"model": state, "iteration": 3},
        "bare": state,
        "wrapped": {"model": {f"module.{name}": value for name, value in state.items()}},
        "state_dict": {"state_dict": state},
    }[kind]
    torch.save(content, tmp_path / "a.pth")
    net = model()
    nn.init.zeros_(net.body.weight)
    report = load_weights(net, tmp_path / "a.pth")
    assert_loaded(net, state)
    assert set(report.used) == set(state)
    assert (report.missing, report.unexpected, report.misshaped) == ((), (), ())
    report.require_complete()


def test_report_names_what_did_not_fit(tmp_path, caplog):
    state = model(classes=5).state_dict()
    del state["body.bias"]
    state["neck.weight"] = torch.zeros(1)
    state["pixel_mean"] = torch.zeros(3)  # comes from the config, so it is not worth a word
    torch.save({"model": state}, tmp_path / "a.pth")
    net = model(classes=3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with caplog.at_level("INFO"):
        report = load_weights(net, tmp_path / "a.pth")
    assert report.used == ("body.weight",)
    assert report.missing == ("body.bias",)
    assert report.unexpected == ("neck.weight",)
    assert report.misshaped == (("head.weight", (5, 4), (3, 4)), ("head.bias", (5,), (3,)))
    assert_loaded(net, {name: before[name] for name in ("body.bias", "head.weight", "head.bias")})
    for words in (
        "1 of the model's 4",
        "head.weight starts afresh: shape (5, 4)",
        "body.bias",
        "neck.weight",
    ):
        assert words in caplog.text
    with pytest.raises(UserError, match=r"head.weight has shape \(5, 4\).*number of classes"):
        report.require_complete()


def test_other_shapes_are_an_error_that_says_both_ways_out(tmp_path):
    torch.save({"model": model(classes=5).state_dict()}, tmp_path / "a.pth")
    net = model(classes=3)
    before = {name: value.clone() + 1 for name, value in net.state_dict().items()}
    net.load_state_dict(before)
    with pytest.raises(UserError) as error:
        load_weights(net, tmp_path / "a.pth", reinit_misshaped=False)
    for words in (
        "head.weight has shape (5, 4) in the file and (3, 4) in the model",
        "head.bias has shape (5,)",
        "number of classes",
        "TRAIN.REINIT_MISSHAPED True",
        "train.reinit_misshaped=true",
    ):
        assert words in str(error.value)
    assert_loaded(net, before)  # nothing was loaded before the error


def test_many_other_shapes_are_counted(tmp_path):
    layers = OrderedDict((f"layer{i}", nn.Linear(2, 3)) for i in range(4))
    wider = OrderedDict((f"layer{i}", nn.Linear(2, 4)) for i in range(4))
    torch.save(nn.Sequential(wider).state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"layer0.weight .*layer0.bias .*layer1.weight .* 5 more"):
        load_weights(nn.Sequential(layers), tmp_path / "a.pth", reinit_misshaped=False)


def test_shapes_that_fit_are_no_error(tmp_path):
    state = model().state_dict()
    torch.save({"model": state}, tmp_path / "a.pth")
    net = model()
    nn.init.zeros_(net.body.weight)
    report = load_weights(net, tmp_path / "a.pth", reinit_misshaped=False)
    assert report.share == 1.0
    assert_loaded(net, state)


def test_exactly_the_tensors_of_another_shape_start_afresh(tmp_path, caplog):
    state = {name: value + 1 for name, value in model(classes=5).state_dict().items()}
    torch.save({"model": state}, tmp_path / "a.pth")
    net = model(classes=3)
    fresh = {name: value.clone() for name, value in net.state_dict().items()}
    load_weights(net, tmp_path / "a.pth", reinit_misshaped=True)
    assert_loaded(net, {name: state[name] for name in ("body.weight", "body.bias")})
    assert_loaded(net, {name: fresh[name] for name in ("head.weight", "head.bias")})
    texts = [record.getMessage() for record in caplog.records]
    assert [text.split(" ")[0] for text in texts] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("names", "percent", "loud"),
    [(("head.weight",), "34.3", True), (("body.weight",), "45.7", True), (None, "100.0", False)],
)
def test_the_loaded_share_of_the_parameters_is_told(tmp_path, caplog, names, percent, loud):
    """4 x 4 + 4 in the body and 4 x 3 + 3 in the head: 35 parameters."""
    state = model().state_dict()
    torch.save({name: state[name] for name in names or state}, tmp_path / "a.pth")
    with caplog.at_level("INFO"):
        report = load_weights(model(), tmp_path / "a.pth")
    assert f"tensors loaded, {percent} % of its parameters" in caplog.text
    assert f"{100 * report.share:.1f}" == percent
    assert ("ONLY" in caplog.text) == loud


def test_a_shared_parameter_counts_once(tmp_path):
    net = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), second=nn.Linear(4, 4)))
    net.second.weight = net.first.weight
    state = {"second.weight": torch.zeros(4, 4)}
    torch.save(state, tmp_path / "a.pth")
    assert load_weights(net, tmp_path / "a.pth").share == pytest.approx(16 / 24)


def test_missing_names_make_it_incomplete(tmp_path):
    state = model().state_dict()
    del state["head.bias"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"lacks head.bias"):
        load_weights(model(), tmp_path / "a.pth").require_complete()


def test_nothing_that_fits_is_a_mistake(tmp_path):
    torch.save({"model": {"conv.weight": torch.zeros(1)}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"fits nothing in Sequential.*conv.weight.*body.weight"):
        load_weights(model(), tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.pth", None, "does not exist"),
        ("empty.pth", b"", "damaged"),
        ("text.pth", b"<html>not found</html>", "damaged"),
        ("numbers.pth", {"epoch": 3}, "no weights"),
        ("list.pth", [1, 2], "holds list"),
        ("odd.pth", {"model": {"body.weight": "text"}}, "body.weight is a str"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, name, content, words):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=words):
        load_weights(model(), path)


def test_truncated_file_is_damaged(tmp_path):
    path = tmp_path / "a.pth"
    checkpoint.write(path, {"model": model().state_dict()})
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read(path)


def test_code_in_a_file_does_not_run_unless_allowed(tmp_path):
    path, mark = tmp_path / "a.pth", tmp_path / "ran"
    torch.save({"model": model().state_dict(), "extra": Trap(mark)}, path)
    with pytest.raises(UserError, match="allow_pickle"):
        checkpoint.read(path)
    assert not mark.exists()
    load_weights(model(), path, allow_pickle=True)
    assert mark.exists()


def test_pickle_is_refused_unless_allowed_then_arrays_become_tensors(tmp_path):
    path = tmp_path / "a.pkl"
    state = {name: value.numpy() for name, value in model().state_dict().items()}
    path.write_bytes(pickle.dumps({"model": state, "__author__": "someone"}))
    with pytest.raises(UserError, match="allow_pickle"):
        load_weights(model(), path)
    net = model()
    nn.init.zeros_(net.body.weight)
    load_weights(net, path, allow_pickle=True)
    assert_loaded(net, model().state_dict())


def test_caffe2_names_are_matched(tmp_path):
    from detectron2.modeling.backbone.resnet import BasicStem

    path = tmp_path / "R-50.pkl"
    weight = np.random.default_rng(0).normal(size=(8, 3, 7, 7)).astype("float32")
    norm = np.arange(8, dtype="float32")
    content = {"conv1_w": weight, "res_conv1_bn_s": norm, "res_conv1_bn_b": norm + 1}
    path.write_bytes(pickle.dumps({**content, "conv1_w_momentum": weight}))
    net = nn.Sequential(OrderedDict(stem=BasicStem(out_channels=8, norm="FrozenBN")))
    load_weights(net, path, allow_pickle=True)
    assert torch.equal(net.stem.conv1.weight, torch.from_numpy(weight))
    assert torch.equal(net.stem.conv1.norm.bias, torch.from_numpy(norm + 1))


def test_writing_keeps_plain_values_only_and_leaves_no_half_file(tmp_path):
    path = tmp_path / "a.pth"
    content = {
        "model": model().state_dict(),
        "settings": OmegaConf.create({"betas": [0.9, 0.99]}),
        "score": np.float64(1.5),
        "pair": (1, None),
    }
    checkpoint.write(path, content)
    read = checkpoint.read(path)
    assert read["settings"] == {"betas": [0.9, 0.99]}
    assert (read["score"], read["pair"]) == (1.5, (1, None))
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"entry \.bad is a Trap"):
        checkpoint.write(path, {"model": {}, "bad": Trap("x")})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    checkpoint.write(path, {"model": model().state_dict()})

    def disk_full(content, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(UserError, match=r"a.pth cannot be written \(no space"):
        checkpoint.write(path, {"model": {}})
    assert set(checkpoint.read(path)["model"]) == set(model().state_dict())
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]
