"""Official weights: every name of every variant, and the recorded outputs, losses and gradients."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
import torch

from codetr import official, official_names
from d2dense import checkpoint, config, model_zoo
from d2dense.errors import UserError
from tests.projects.codetr import official_weights as rules
from tools import convert_checkpoint

pytestmark = pytest.mark.skipif(not rules.NAMES.is_file(), reason=f"no {rules.NAMES}")
recorded = pytest.mark.skipif(not rules.FOLDER.is_dir(), reason=f"no {rules.FOLDER}")

SMALL = ["co_deformable_detr_r50_1x", "co_dino_5scale_r50_1x"]
QUERIES = {
    "co_deformable_detr_r50_1x": 300,
    "co_dino_5scale_r50_1x": 900,
    "co_dino_5scale_swin_large": 900,
    "co_dino_5scale_vit_large": 1500,
    "co_dino_5scale_lsj_vit_large_lvis": 900,
}
# section 2 of the reference: all parameters, and those used at inference in millions
PARAMETERS = {
    "co_deformable_detr_r50_1x": (65_129_894, 47.59),
    "co_dino_5scale_r50_1x": (65_204_005, 48.04),
    "co_dino_5scale_swin_large": (235_471_769, 218.3),
    "co_dino_5scale_vit_large": (365_367_657, 347.2),
    "co_dino_5scale_lsj_vit_large_lvis": (374_877_868, None),
}
NO_PARAMETER = r"running_|num_batches_tracked|freqs_|relative_position_index"
TRAINING_ONLY = (
    r"rpn_head\.|roi_head\.|bbox_head\.|query_head\.(downsample|label_embedding)\."
    r"|query_head\.transformer\.(aux_pos_trans|pos_feats|head_pos_embed)"
)


@functools.cache
def on_meta(variant):
    with torch.device("meta"):
        return official.build(variant)


@functools.cache
def filled(variant, num_queries=None):
    weights = rules.weights(variant, num_queries=num_queries)
    return official.load(variant, weights, num_queries=num_queries)


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_kept():
    """A gigabyte of weights, which every process that a later test forks would have too."""
    yield
    filled.cache_clear()


def test_the_variants_are_those_of_the_official_files():
    assert set(official.VARIANTS) == set(rules.tables()) == set(QUERIES)


@pytest.mark.parametrize("variant", QUERIES)
def test_every_official_tensor_has_its_name_and_shape(variant):
    found = official.state_dict(on_meta(variant))
    expected = rules.tables()[variant]
    assert set(found) == set(expected)
    for name, (shape, dtype) in expected.items():
        assert list(found[name].shape) == shape, name
        assert str(found[name].dtype) == f"torch.{dtype}", name


@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameters_are_those_of_the_reference(variant):
    total, used = PARAMETERS[variant]
    sizes = {
        name: value.numel()
        for name, value in official.state_dict(on_meta(variant)).items()
        if not re.search(NO_PARAMETER, name)
    }
    assert sum(sizes.values()) == total
    if used is not None:
        count = sum(size for name, size in sizes.items() if not re.match(TRAINING_ONLY, name))
        assert round(count / 1e6, 2 if used < 100 else 1) == used


@pytest.mark.parametrize("variant", SMALL)
def test_weights_come_back_bit_for_bit(variant):
    model = filled(variant)
    assert not any(module.training for module in model.modules())
    back = official.state_dict(model)
    for name, value in rules.weights(variant).items():
        assert torch.equal(back[name], value), name


def test_the_number_of_queries_is_an_option():
    weights = rules.weights("co_dino_5scale_r50_1x", num_queries=50)
    model = official.load("co_dino_5scale_r50_1x", weights, num_queries=50)
    back = official.state_dict(model)["query_head.transformer.query_embed.weight"]
    assert torch.equal(back, weights["query_head.transformer.query_embed.weight"])
    with pytest.raises(UserError, match=r"query_embed.*\(50, 256\)"):
        official.load("co_dino_5scale_r50_1x", weights)


def test_weights_made_for_another_size_of_images_say_so(monkeypatch):
    """Models with large-scale jitter save a rotary table for their size: here 1024 pixels."""
    monkeypatch.setattr(official, "build_with_weights", lambda build, *_: build())
    table = {"backbone.rope_glb.freqs_cos": torch.zeros(64 * 64, 64)}
    sides = []
    with torch.device("meta"):
        for weights in ({}, table):
            model = official.load("co_dino_5scale_lsj_vit_large_lvis", weights)
            sides.append(model.backbone.rotary_side)
    assert sides == [96, 64]


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match="did you mean 'co_dino_5scale_r50_1x'"):
        official.load("co_dino_5scale_r50", {})
    weights = dict(rules.weights(SMALL[0]))
    del weights["neck.convs.0.conv.weight"]
    with pytest.raises(UserError, match="no weights for tensors"):
        official.load(SMALL[0], weights)
    weights = rules.weights(SMALL[0]) | {"query_head.more": torch.zeros(1)}
    with pytest.raises(UserError, match=r"no place for: query_head\.more"):
        official.load(SMALL[0], weights)


def test_the_source_is_known_to_the_tool():
    assert "codetr" in checkpoint.sources()


# ------------------------------------------------ recorded outputs


def inspected(model, meta):
    images = rules.images(meta["image_seed"], meta["valid_sizes"], meta["image_size"])
    return official.inspect(model, images, [tuple(size) for size in meta["valid_sizes"]])


def thinned(name, value):
    """The part of an array that the recordings hold."""
    kind, _, level = name.rpartition("_")
    if level.isdigit() and kind in ("backbone", "neck", "atss_cls", "atss_reg", "atss_ctr"):
        k = max(1, value.shape[2] // 8)
        step = {"backbone": value.shape[1] // 16, "neck": 16, "atss_cls": 8}.get(kind, 1)
        return value[:, ::step, ::k, ::k]
    if level.isdigit() and kind in ("rpn_cls", "rpn_reg"):
        k = max(1, value.shape[2] // 8)
        return value[:, :: 3 if kind == "rpn_reg" else 1, ::k, ::k]
    if name.startswith("rpn_prop"):
        return value[:100]
    if name.partition("_")[0] in ("roi",):
        step = {"roi_feat_mean": slice(None, None, 4), "roi_cls": slice(None, None, 3)}
        return value[:20, step.get(name, slice(16))]
    if "det" in name:
        return value[:50]
    if name == "memory":
        return value[:, :: max(1, value.shape[1] // 60), ::8]
    if name == "adapter_last":
        return value[:, ::4]
    if name == "enc_score":
        return value[:, :: max(1, value.shape[1] // 500)]
    if name == "dec_box":
        return value[:, :, :: max(1, value.shape[2] // 100)]
    if name == "dec_cls":
        return value[:, :, :: max(1, value.shape[2] // 20), ::4]
    if name == "dec_cls_last":
        return value[:, :12]
    return value


def tolerance(name):
    if name.endswith(("_box", "_prop0", "_prop1")) and not name.startswith(("enc_", "dec_")):
        return 5e-3  # pixels
    if name.endswith(("topk_box", "dec_box")):
        return 1e-5
    return 1e-5 if name.endswith("det0_score") else 1e-4


DERIVED = ("img_probe", "stat_cls", "stat_box", "stat_memory")


@recorded
@torch.no_grad()
def test_outputs_are_those_of_the_official_code():
    arrays, meta = rules.recording("eval_co_deformable_r50")
    found = inspected(filled(meta["variant"]), meta)
    for name, expected in arrays.items():
        if name in DERIVED:
            continue
        value = thinned(name, found[name]).numpy()
        assert value.shape == expected.shape, name
        if expected.dtype.kind == "i":
            assert np.array_equal(value, expected), name
        else:
            assert np.abs(value - expected).max() <= tolerance(name), name


@recorded
def test_losses_and_gradients_are_those_of_the_official_code():
    arrays, meta = rules.recording("train_co_deformable_r50")
    model = filled(meta["variant"])
    sizes = [tuple(size) for size in meta["valid_sizes"]]
    images = rules.images(meta["image_seed"], sizes, meta["image_size"])
    boxes, labels = ([torch.from_numpy(arrays[f"gt_{kind}0"])] for kind in ("box", "label"))
    found = official.losses(model, images, sizes, boxes, labels)
    expected = dict(zip(arrays["loss_names"].tolist(), arrays["loss_values"].tolist()))
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    tensors = official.loss_tensors(model, images, sizes, boxes, labels)
    of_boxes = {k: v for k, v in tensors.items() if "bbox" in k or "iou" in k}
    for some, key in ((tensors, "grad_norm"), (of_boxes, "grad_norm_box")):
        model.zero_grad(set_to_none=True)
        sum(some.values()).backward(retain_graph=some is tensors)
        _check_norms(model, arrays["grad_keys"].tolist(), arrays[key])
    model.zero_grad(set_to_none=True)


def _check_norms(model, keys, expected):
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    names = official_names.correspondence(model, ()).names
    found = {names[ours]: g for ours, g in gradients.items()}
    largest = np.nanmax(expected)
    for key, norm in zip(keys, expected):
        if np.isnan(norm):
            assert found[key] is None or float(found[key].norm()) == 0, key
        elif norm > 1e-6 * largest:
            assert float(found[key].norm()) == pytest.approx(norm, rel=1e-3), key


# ------------------------------------------------ the tool


@pytest.mark.parametrize(
    ("name", "heads"), [("co_dino_5scale_r50_1x", 2), ("dino_5scale_r50_1x", 0)]
)
def test_the_tool_converts_for_detectors_with_heads_and_without(name, heads, tmp_path, capsys):
    """All official tensors, those that are computed too, as in a published file."""
    weights = rules.weights("co_dino_5scale_r50_1x")
    counts = {
        key: torch.tensor(7)
        for key, (_, dtype) in rules.tables()["co_dino_5scale_r50_1x"].items()
        if dtype == "int64"
    }
    checkpoint.write(tmp_path / "theirs.pth", {"state_dict": weights | counts})
    files = [str(tmp_path / "theirs.pth"), str(tmp_path / "ours.pth")]
    convert_checkpoint.main(["--source", "codetr", "--config-file", f"CoDETR/{name}", *files])
    assert "0 tensors in the model, not in the file" in capsys.readouterr().out
    model = model_zoo.get_model(f"CoDETR/{name}", weights=files[1])
    assert len(getattr(model, "auxiliary_heads", ())) == heads
    back = official.state_dict(model)
    assert set(back) <= set(weights) | set(counts)
    assert all(torch.equal(back[key], weights[key]) for key in set(back) & set(weights))
    aside = [key for key in weights if key not in back]
    assert bool(aside) != bool(heads)
    assert all(re.match(TRAINING_ONLY, key) for key in aside)


def test_models_without_official_names_are_one_line():
    with torch.device("meta"):
        cfg = model_zoo.get_config("CoDETR/deformable_detr_r50_1x")
        model = config.build_model(cfg, device="meta")
    with pytest.raises(UserError, match="codetr has names for Co-DETRs on"):
        official.state_dict(model)
