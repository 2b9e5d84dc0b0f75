"""Names to configs to models, and what is said of names, kinds and weights that do not fit."""

from __future__ import annotations

import pytest
import torch

from d2dense import config, model_zoo
from d2dense.errors import UserError

TINY = "FSCascade/fscascade_tiny_shapes"
LAZY_ONLY = {"CEDNet/mask2former_cednet_tiny_shapes"}  # its parts have no yacs keys


def test_every_model_is_lazy_and_tiny_ones_are_yaml_too():
    names, yaml = model_zoo.list_models(), model_zoo.list_models("yaml")
    assert names == model_zoo.list_models("lazy")
    assert set(yaml) <= set(names)
    tiny = [name for name in names if name.endswith("cednet_tiny_shapes") or "FSCascade" in name]
    assert set(tiny) - set(yaml) == LAZY_ONLY
    assert {"FSCascade/fscascade_r50_fpn_1x", "FSCascade/cascade_rcnn_r50_fpn_1x"} <= set(names)
    assert any("tiny" in name for name in names)
    assert not any("base" in name for name in names)


def test_kind_decides_the_file_and_the_config():
    for kind, suffix in (("lazy", ".py"), ("yaml", ".yaml")):
        assert model_zoo.get_config_file(TINY, kind).suffix == suffix
        assert config.kind_of(model_zoo.get_config(TINY, kind)) == kind
    assert config.dump(config.load(TINY)) == config.dump(model_zoo.get_config(TINY))


def test_models_come_in_eval_mode_with_overrides_in_both_spellings():
    model = model_zoo.get_model(TINY, model__roi_heads__num_classes=3)
    assert not model.training
    assert model.roi_heads.num_classes == 3
    same = model_zoo.get_model(TINY, model={"roi_heads": {"num_classes": 3}})
    shapes = [p.shape for p in model.parameters()]
    assert shapes == [p.shape for p in same.parameters()]


def test_weights_are_loaded_and_must_fit(tmp_path):
    first = model_zoo.get_model(TINY)
    torch.save({"model": first.state_dict()}, tmp_path / "w.pth")
    second = model_zoo.get_model(TINY, weights=str(tmp_path / "w.pth"))
    for a, b in zip(first.state_dict().values(), second.state_dict().values()):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match="bbox_pred"):
        model_zoo.get_model("FSCascade/cascade_rcnn_tiny_shapes", weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: model_zoo.get_model("FSCascade/fscascade_tiny_shape"), TINY),
        (lambda: model_zoo.get_config(TINY, "toml"), "toml"),
        (lambda: model_zoo.list_models("toml"), "toml"),
        (lambda: model_zoo.get_config_file("tiny"), "unknown model"),
        (lambda: model_zoo.get_model(TINY, device="gpu"), "cpu or cuda"),
        (lambda: model_zoo.get_model(TINY, model__roi_head__num_classes=3), "roi_heads"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(UserError, match=words):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu_is_a_user_error():
    with pytest.raises(UserError, match="no GPU"):
        model_zoo.get_model(TINY, device="cuda")
