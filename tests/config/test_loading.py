"""Any config opens by content, both spellings of overrides work, mistakes are named."""

from __future__ import annotations

import textwrap

import pytest
import torch
from omegaconf import DictConfig

from d2dense import config
from d2dense.errors import UserError

LAZY = """
from detectron2.config import LazyCall as L
from torch import nn
from torch.optim import AdamW

_width = 4
model = L(nn.Linear)(in_features=_width - 1, out_features="${.in_features}", bias=True)
train = dict(max_iter=10, device="cpu", init_checkpoint="")
optimizer = L(AdamW)(lr=0.1, betas=[0.9, 0.999])
"""


@pytest.fixture
def lazy_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(textwrap.dedent(LAZY))
    return path


@pytest.fixture
def yaml_file(tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER:\n  BASE_LR: 0.5\n  MAX_ITER: 7\n")
    path = tmp_path / "child.yaml"
    path.write_text("_BASE_: base.yaml\nSOLVER:\n  MAX_ITER: 9\nMODEL:\n  DEVICE: cpu\n")
    return path


def test_kind_is_decided_by_content(lazy_file, yaml_file, tmp_path):
    lazy = config.load(lazy_file)
    assert config.kind_of(lazy) == "lazy"
    assert isinstance(lazy, DictConfig)
    assert config.kind_of(config.load(yaml_file)) == "yaml"
    config.save(lazy, tmp_path / "saved.yaml")
    assert config.kind_of(config.load(tmp_path / "saved.yaml")) == "lazy"


def test_yaml_base_is_followed(yaml_file):
    cfg = config.load(yaml_file)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.5, 9)


@pytest.mark.parametrize(
    "items",
    [["SOLVER.BASE_LR", "0.25"], ["SOLVER.BASE_LR=0.25"], ["solver.base_lr=2.5e-1"]],
)
def test_yaml_overrides_in_every_spelling(yaml_file, items):
    assert config.load(yaml_file, items).SOLVER.BASE_LR == 0.25


@pytest.mark.parametrize("items", [["optimizer.lr", "1e-3"], ["optimizer.lr=1e-3"]])
def test_lazy_overrides_in_both_spellings(lazy_file, items):
    assert config.load(lazy_file, items).optimizer.lr == 1e-3


def test_override_values_take_the_type_of_what_they_replace(yaml_file, lazy_file):
    cfg = config.load(
        yaml_file,
        ["DATASETS.TEST", "one", "SOLVER.STEPS", "[3, 4]", "SOLVER.BASE_LR", "1", "OUTPUT_DIR=7"],
    )
    assert cfg.DATASETS.TEST == ("one",)
    assert cfg.SOLVER.STEPS == (3, 4)
    assert isinstance(cfg.SOLVER.BASE_LR, float)
    assert cfg.OUTPUT_DIR == "7"
    lazy = config.load(lazy_file, ["model.bias=false", "optimizer.betas=[0.8, 0.9]"])
    assert lazy.model.bias is False
    assert list(lazy.optimizer.betas) == [0.8, 0.9]


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["SOLVER.BASE_LT", "1"], ["SOLVER.BASE_LT", "SOLVER.BASE_LR"]),
        (["SOLVERS.BASE_LR=1"], ["SOLVERS.BASE_LR", "SOLVER.BASE_LR"]),
        (["SOLVER.BASE_LR", "fast"], ["SOLVER.BASE_LR", "fast", "float"]),
        (["SOLVER.AMP.ENABLED", "3"], ["SOLVER.AMP.ENABLED", "bool"]),
        (["SOLVER.BASE_LR"], ["no value"]),
    ],
)
def test_yaml_mistakes_are_named(yaml_file, items, words):
    with pytest.raises(UserError) as error:
        config.load(yaml_file, items)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["optimizer.lrr=1"], ["optimizer.lrr", "optimizer.lr"]),
        (["trian.max_iter=1"], ["trian.max_iter", "train"]),
        (["optimizer.lr=fast"], ["optimizer.lr", "fast"]),
        (["model.bia=true"], ["model.bia", "model.bias"]),
        (["model.in_features.deep=1"], ["model.in_features.deep"]),
    ],
)
def test_lazy_mistakes_are_named(lazy_file, items, words):
    with pytest.raises(UserError) as error:
        config.load(lazy_file, items)
    assert all(word in str(error.value) for word in words)


def test_lazy_override_may_set_an_argument_that_the_config_leaves_out(lazy_file):
    cfg = config.load(lazy_file, ["model.dtype=null"])
    assert "dtype" in cfg.model


def test_unknown_yaml_key_names_the_nearest(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text("SOLVER:\n  BASE_LRR: 0.5\n")
    with pytest.raises(UserError, match=r"SOLVER\.BASE_LRR.*SOLVER\.BASE_LR'"):
        config.load(path)


def test_yaml_never_runs_code(tmp_path):
    path = tmp_path / "evil.yaml"
    marker = tmp_path / "ran"
    path.write_text(f"A: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(UserError):
        config.load(path)
    path.write_text("model:\n  _target_: os.system\n  command: 'true'\n")
    with pytest.raises(UserError, match=r"os\.system"):
        config.load(path)
    path.write_text("model:\n  _target_: d2dense.config.lazy.named\n  name: os.system\n")
    with pytest.raises(UserError, match=r"os\.system"):
        config.load(path)
    assert not marker.exists()


CALLS = [
    "{_target_: d2dense.errors.os.system, command: 'touch MARKER'}",
    "{_target_: torch.nn.functional.torch.os.system, command: 'touch MARKER'}",
    "{_target_: {_target_: d2dense.config.lazy.locate, name: os.system}, command: 'touch MARKER'}",
    "{_target_: d2dense.config.lazy.named, name: d2dense.errors.os.system}",
    "\"${oc.create:{_target_:os.system,command:'touch MARKER'}}\"",
    "{_target_: 'torch.nn.${name}'}",
    "[{a: {_target_: builtins.eval, source: 1}}]",
]


@pytest.mark.parametrize("call", CALLS)
def test_no_way_around_leads_a_yaml_file_to_code(tmp_path, call):
    marker, path = tmp_path / "ran", tmp_path / "evil.yaml"
    path.write_text(
        f"model: {call.replace('MARKER', str(marker))}\ntrain: {{_target_: torch.nn.Linear}}\n"
    )
    with pytest.raises(UserError, match=r"names|resolver"):
        config.build_model(config.load(path), device="cpu")
    assert not marker.exists()


@pytest.mark.parametrize(
    "item",
    [
        "model._target_=os.system",
        "model={'_target_': 'os.system', 'command': 'touch MARKER'}",
        "model=[{'_target_': 'd2dense.errors.os.system', 'command': 'touch MARKER'}]",
        "model.in_features=${oc.create:{_target_:os.system,command:'touch MARKER'}}",
    ],
)
def test_nor_do_overrides(lazy_file, tmp_path, item):
    with pytest.raises(UserError):
        config.build_model(
            config.load(lazy_file, [item.replace("MARKER", str(tmp_path / "ran"))]), device="cpu"
        )
    assert not (tmp_path / "ran").exists()


def _bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (_bomb(30), "aliases"),
        ("MODEL: &a {X: *a}", "alias"),
        ("MODEL: " + "[" * 2000, "nested"),
        ("OUTPUT_DIR: 2001-01-01", "quotes"),
        ("OUTPUT_DIR: 2001-13-45", "cannot be read"),
        ("1: 2", "quotes"),
        ("MODEL: null", "MODEL = None"),
        ("OUTPUT_DIR: '{[]: 1}'", "unhashable"),
        ("OUTPUT_DIR: '" + "x" * 9000 + "'\nSEED: {a: 1}", "SEED"),
        ("_BASE_: a.yaml", "leads back"),
        ("_BASE_: [b.yaml]\nSEED: 1", "b.yaml"),
        ("_BASE_: 3", "_BASE_"),
        (f"_BASE_: {'x' * 5000}", "too long"),
        ('_BASE_: "a\\0.yaml"', "_BASE_"),
        ('OUTPUT_DIR: "\\ud800"', "surrogates"),
    ],
)
def test_odd_yaml_is_one_line(tmp_path, text, words):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        config.load(path)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["SOLVER={}"], "node"),
        (["DATASETS.CUSTOM..JSON=a"], "unknown config key"),
        (["OUTPUT_DIR=\udcff"], "UTF-8"),
        (["SEED=0x" + "f" * 5000], "str"),
        (["SEED={[]: 1}"], "str"),
    ],
)
def test_odd_overrides_are_one_line(yaml_file, items, words):
    with pytest.raises(UserError, match=words):
        config.load(yaml_file, items)


def test_a_model_that_cannot_be_built_is_one_line(lazy_file):
    for item in ("model.in_features=-3", "model.in_features=${model}", "model=3"):
        with pytest.raises(UserError):
            config.build_model(config.load(lazy_file, [item]), device="cpu")


def test_a_config_that_cannot_be_written_is_one_line(lazy_file, tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        config.save(config.load(lazy_file), tmp_path)


def test_missing_file_suggests_a_model_name():
    with pytest.raises(UserError, match="neither a file nor a model-zoo name"):
        config.load("nothing/here.yaml")


def test_saved_lazy_config_builds_the_same_model(lazy_file, tmp_path):
    first = config.load(lazy_file, ["model.in_features=5"])
    config.save(first, tmp_path / "saved.yaml")
    second = config.load(tmp_path / "saved.yaml")
    models = []
    for cfg in (first, second):
        torch.manual_seed(0)
        models.append(config.build_model(cfg))
    for a, b in zip(*(m.state_dict().values() for m in models)):
        assert torch.equal(a, b)
    assert models[1].weight.shape == (5, 5)
    assert config.dump(first) == config.dump(second)


def test_config_saved_before_a_module_moved_loads(tmp_path):
    cfg = config.load("FSCascade/fscascade_tiny_shapes")
    new = config.dump(cfg)
    path = tmp_path / "old.yaml"
    path.write_text(new.replace("d2dense.solver.param_groups", "d2dense.engine.optim.param_groups"))
    assert path.read_text() != new
    optimizer = config.load(path).optimizer
    assert optimizer.params._target_ == "d2dense.solver.optim.param_groups"


def test_saved_yaml_config_is_the_same(yaml_file, tmp_path):
    cfg = config.load(yaml_file, ["MODEL.ROI_HEADS.NUM_CLASSES", "auto"])
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == -1
    config.save(cfg, tmp_path / "saved.yaml")
    assert config.dump(config.load(tmp_path / "saved.yaml")) == config.dump(cfg)


def test_classes_as_values_survive_saving(tmp_path):
    path = tmp_path / "with_class.py"
    path.write_text(
        "from detectron2.config import LazyCall as L\nfrom torch import nn\n"
        "from timm.layers import Mlp\n"
        "model = L(Mlp)(in_features=2, act_layer=nn.SiLU)\n"
    )
    cfg = config.load(path)
    config.save(cfg, tmp_path / "saved.yaml")
    assert isinstance(config.build_model(config.load(tmp_path / "saved.yaml")).act, torch.nn.SiLU)


def test_import_of_a_missing_name_is_one_line(tmp_path):
    (tmp_path / "base.py").write_text("optimizer = {}\n")
    (tmp_path / "child.py").write_text("from .base import model\n")
    with pytest.raises(UserError, match="model"):
        config.load(tmp_path / "child.py")


def test_any_error_of_a_config_is_one_line_with_its_place(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text("model = {}\nx = undefined_name\n")
    with pytest.raises(UserError, match=r"NameError.*undefined_name.*line 2"):
        config.load(path)


def test_unreadable_yaml_is_one_line(tmp_path):
    for content in (b"\xff\xfe\x00", b"a: [1,\nb: {"):
        (tmp_path / "wrong.yaml").write_bytes(content)
        with pytest.raises(UserError, match=r"not plain yaml") as error:
            config.load(tmp_path / "wrong.yaml")
        assert "\n" not in str(error.value)


def test_a_value_does_not_replace_a_node(lazy_file):
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        config.load(lazy_file, ["optimizer=sgd"])
    assert config.load(lazy_file, ["optimizer=null"]).optimizer is None


@pytest.mark.parametrize(
    ("item", "nearest"),
    [
        ("MODEL.ROI_HEADS.NAME=FSCascadeROIHead", "FSCascadeROIHeads"),
        ("MODEL.BACKBONE.NAME=build_resnet_fpn_backbon", "build_resnet_fpn_backbone"),
        ("MODEL.META_ARCHITECTURE=GeneralisedRCNN", "GeneralizedRCNN"),
    ],
)
def test_unregistered_names_suggest_the_nearest(repo_root, item, nearest):
    path = repo_root / "projects/FSCascade/configs/fscascade_tiny_shapes.yaml"
    with pytest.raises(UserError, match=f"did you mean '{nearest}'"):
        config.build_model(config.load(path, [item]))


def test_lambda_in_a_lazy_config_is_refused_on_saving(tmp_path):
    path = tmp_path / "with_lambda.py"
    path.write_text(
        "from detectron2.config import LazyCall as L\nmodel = L('builtins.dict')(key=lambda: 1)\n"
    )
    with pytest.raises(UserError, match=r"model\.key"):
        config.dump(config.load(path))
