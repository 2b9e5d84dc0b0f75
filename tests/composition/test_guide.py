"""The examples of docs/combine.md, as they stand there."""

from __future__ import annotations

import re

import pytest
import torch
from detectron2.modeling import BACKBONE_REGISTRY

from d2dense import config, model_zoo
from d2dense.composition_report import RECIPES
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "combine.md").read_text()
EXAMPLES = {
    name: text
    for text in re.findall(r"```(?:python|yaml)\n(.*?)```", PAGE, re.DOTALL)
    for name in re.findall(r"^# (\w+\.(?:py|yaml))$", text, re.MULTILINE)
}
NAMES = sorted({name.partition(".")[0] for name in EXAMPLES})


def test_there_are_five_in_both_kinds():
    assert len(NAMES) == 5
    assert len(EXAMPLES) == 10 == PAGE.count("```") / 2


@pytest.mark.parametrize("name", NAMES)
def test_both_kinds_build_the_same_model(name, tmp_path):
    models = []
    for suffix in ("py", "yaml"):
        path = tmp_path / f"{name}.{suffix}"
        path.write_text(EXAMPLES[path.name])
        cfg = config.load(path)
        assert config.kind_of(cfg) == {"py": "lazy", "yaml": "yaml"}[suffix]
        with torch.device("meta"):
            models.append(config.build_model(cfg, device="meta"))
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in models]
    assert list(shapes[0].items()) == list(shapes[1].items())
    sizes = [model.backbone.size_divisibility for model in models]
    assert sizes[0] == sizes[1] or "resnet" in name


def test_names_on_the_page():
    known = {name for name, _ in BACKBONE_REGISTRY}
    named = set(re.findall(r"`(build_\w+_backbone)`", PAGE))
    assert len(named) == 5
    assert named | {"CEDNet", "TimmBackbone", "ViTPyramid", "EVA02ViT", "ViTDet"} <= known
    for name in RECIPES:
        assert f"`{name}`" in PAGE
        assert name in model_zoo.list_models("lazy")
        assert name in model_zoo.list_models("yaml")
