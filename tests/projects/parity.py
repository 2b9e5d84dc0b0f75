"""That a model's two configs, yaml and lazy, say the same: what all projects check."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from detectron2.config import instantiate
from omegaconf import DictConfig, ListConfig

from d2dense import config, model_zoo
from d2dense.data import mappers
from d2dense.data.copy_paste import build_copy_paste
from d2dense.engine.experiment import experiment

KINDS = ("yaml", "lazy")
OWN = ("cednet", "codetr", "d2dense", "fscascade", "hfgd")  # packages


@functools.cache
def on_meta(name: str, kind: str = "lazy", *overrides: str) -> torch.nn.Module:
    """The model without values; to be looked at only, as it is made once."""
    cfg = config.load(model_zoo.get_config_file(name, kind), list(overrides))
    with torch.device("meta"):
        return config.build_model(cfg, device="meta")


def check_model_and_run(name: str) -> None:
    """Modules, their settings, names and shapes of values; schedule, optimizer and datasets."""
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
    assert held_by(models[0]) == held_by(models[1])
    backbones = [getattr(model, "backbone", None) for model in models]
    sizes = [getattr(backbone, "size_divisibility", None) for backbone in backbones]
    assert sizes[0] == sizes[1]
    groups = [optimizer_groups(e, model) for e, model in zip((by_yaml, by_lazy), models)]
    assert groups[0] == groups[1]
    schedules = [e.build_lr_multiplier() for e in (by_yaml, by_lazy)]
    where = torch.linspace(0, 0.999, 97).tolist()
    assert [schedules[0](t) for t in where] == pytest.approx([schedules[1](t) for t in where])


def check_data(name: str, *, train: bool, ignored: Sequence[str] = ()) -> None:
    """Augmentations, formats, copy-paste, batches and workers.

    Args:
        ignored: settings of the mapper that may differ
    """
    yaml, lazy = (model_zoo.get_config(name, kind) for kind in KINDS)
    node = lazy.dataloader.train if train else lazy.dataloader.test
    by_yaml, by_lazy = mappers.from_cfg(yaml, train), instantiate(node.mapper)
    ours, theirs = (
        # lists and tuples say the same
        {
            key: str(value).translate(str.maketrans("()", "[]"))
            for key, value in vars(mapper).items()
            if key not in ignored
        }
        for mapper in (by_yaml, by_lazy)
    )
    assert ours == theirs
    assert node.num_workers == yaml.DATALOADER.NUM_WORKERS
    if not train:
        assert node.batch_size == yaml.DATALOADER.TEST_BATCH_SIZE
        return
    assert node.total_batch_size == yaml.SOLVER.IMS_PER_BATCH
    assert node.dataset.filter_empty == yaml.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    assert node.aspect_ratio_grouping == yaml.DATALOADER.ASPECT_RATIO_GROUPING
    pasters = [build_copy_paste(yaml), instantiate(node.get("copy_paste"))]
    settings = [each and vars(each) for each in pasters]
    assert settings[0] == settings[1]


def check_start(name: str) -> None:
    """All values at the start of training."""
    states = []
    for kind in KINDS:
        torch.manual_seed(0)
        cfg = model_zoo.get_config(name, kind)
        states.append(config.build_model(cfg, device="cpu").state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def held_by(model) -> dict[str, dict]:
    """The attributes of samplers, coders, assigners and so on, which are no modules."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            own = type(value).__module__.split(".")[0] in OWN and hasattr(value, "__dict__")
            if own and not isinstance(value, (torch.nn.Module, tuple)):
                found[f"{name}.{key}"] = {k: str(v) for k, v in vars(value).items()}
    return found


def settings_of(model) -> dict[str, dict]:
    """Plain attributes of all modules and of what they hold: thresholds, weights, sizes, modes."""
    plain = (bool, int, float, str, tuple, list, dict, type(None), ListConfig, DictConfig)
    found = {}
    for name, module in model.named_modules():
        values = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, plain) and not key.startswith("_") and key != "vis_period"
        }
        for key in ("box2box_transform", "anchor_matcher", "proposal_matcher", "anchor_generator"):
            if hasattr(module, key) and not isinstance(getattr(module, key), torch.nn.Module):
                held = getattr(module, key)
                for attribute in ("weights", "thresholds", "labels", "allow_low_quality_matches"):
                    if hasattr(held, attribute):
                        values[f"{key}.{attribute}"] = getattr(held, attribute)
        if isinstance(values.get("loss_weight"), (dict, DictConfig)):
            values["loss_weight"] = {k: v for k, v in values["loss_weight"].items() if v != 1.0}
        found[name] = {key: listed(value) for key, value in values.items()}
    return found


def listed(value):
    if isinstance(value, (dict, DictConfig)):
        return {k: listed(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, ListConfig)):
        return [listed(v) for v in value if not isinstance(v, torch.nn.Module)]
    return value


def optimizer_groups(run, model) -> list[dict]:
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = run.build_optimizer(model)
    return [
        {**{k: v for k, v in group.items() if k != "params"}, "type": type(optimizer).__name__,
         "params": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]  # fmt: skip
