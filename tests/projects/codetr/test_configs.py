"""Configs: yaml equals lazy, every recipe of the paper's tables, the tools and a short training."""

import functools

import pytest
import torch
from detectron2.config import instantiate

from d2dense import config, model_zoo
from d2dense.data import mappers
from d2dense.engine.experiment import experiment
from tests.projects.fscascade.test_configs import optimizer_groups, settings_of

KINDS = ("yaml", "lazy")
LAZY = [name for name in model_zoo.list_models("lazy") if name.startswith("CoDETR/")]
BOTH = [name for name in model_zoo.list_models("yaml") if name.startswith("CoDETR/")]
TINY = [name for name in BOTH if "tiny" in name]
FIXED = ["deformable_detr_r50_1x", "co_deformable_detr_r50_1x", "co_dino_5scale_r50_1x"]


@functools.cache
def on_meta(name, kind="lazy"):
    cfg = config.load(model_zoo.get_config_file(name, kind))
    with torch.device("meta"):
        return config.build_model(cfg, device="meta")


def test_names_that_users_rely_on_have_both_kinds():
    assert {f"CoDETR/{name}" for name in FIXED} <= set(BOTH)
    assert set(BOTH) <= set(LAZY)
    assert len(TINY) == 4


@pytest.mark.parametrize("name", BOTH)
def test_both_kinds_give_the_same_model_and_run(name):
    by_yaml, by_lazy = (
        experiment(model_zoo.get_config(name, kind), device="cpu") for kind in KINDS
    )
    assert by_yaml.settings == by_lazy.settings
    assert by_yaml.train_names == by_lazy.train_names
    assert by_yaml.test_names == by_lazy.test_names
    models = [on_meta(name, kind) for kind in KINDS]
    assert str(models[0]) == str(models[1])
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in models]
    assert list(shapes[0].items()) == list(shapes[1].items())
    assert settings_of(models[0]) == settings_of(models[1])
    groups = [optimizer_groups(e, model) for e, model in zip((by_yaml, by_lazy), models)]
    assert groups[0] == groups[1]
    schedules = [e.build_lr_multiplier() for e in (by_yaml, by_lazy)]
    where = torch.linspace(0, 0.999, 97).tolist()
    assert [schedules[0](t) for t in where] == pytest.approx([schedules[1](t) for t in where])


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("train", [True, False])
def test_both_kinds_read_data_alike(name, train):
    yaml, lazy = (model_zoo.get_config(name, kind) for kind in KINDS)
    node = lazy.dataloader.train if train else lazy.dataloader.test
    by_yaml, by_lazy = mappers.from_cfg(yaml, train), instantiate(node.mapper)
    ours, theirs = (
        # lists and tuples say the same
        {k: str(v).translate(str.maketrans("()", "[]")) for k, v in vars(mapper).items()}
        for mapper in (by_yaml, by_lazy)
    )
    assert ours == theirs
    if train:
        assert node.total_batch_size == yaml.SOLVER.IMS_PER_BATCH
        assert node.num_workers == yaml.DATALOADER.NUM_WORKERS
        assert node.dataset.filter_empty == yaml.DATALOADER.FILTER_EMPTY_ANNOTATIONS


@pytest.mark.parametrize("name", TINY)
def test_both_kinds_start_from_the_same_values(name):
    states = []
    for kind in KINDS:
        torch.manual_seed(0)
        cfg = model_zoo.get_config(name, kind)
        states.append(config.build_model(cfg, device="cpu").state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
