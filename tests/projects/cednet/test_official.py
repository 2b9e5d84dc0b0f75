"""Whole official models: names, shapes and recorded outputs."""

import functools
import math

import pytest
import torch

from cednet import official
from d2dense.checkpoint import convert_with_report
from d2dense.errors import UserError
from tests.projects.cednet import golden

LARGE = [
    name for name in official.VARIANTS if name.endswith(("next_small", "next_base"))
]  # more of the same
DETECTORS = {
    "full_retinanet": "det_retina",
    "full_mask_rcnn": "det_twostage",
    "full_cascade_mask_rcnn": "det_twostage",
    "full_deformable_detr": "det_defdetr",
    "full_mask2former": "det_mask2former",
}
FILES = sorted(golden.GOLDEN.glob("*_*x*.npz"))

needs_names = pytest.mark.skipif(not golden.variants(), reason="no official names here")


@functools.lru_cache(maxsize=1)
def loaded(variant, salt=""):
    return official.load(variant, golden.filled(golden.variants()[variant], salt))


def named(outputs):
    """The outputs of a model under the names of the recordings."""
    if isinstance(outputs, dict):
        return outputs
    if isinstance(outputs, list):
        scores = {f"stage_logits_{i}": value for i, value in enumerate(outputs)}
        return scores | {"logits": outputs[-1]}
    return {f"out{i}": value for i, value in enumerate(outputs)}


def trunk_of(model):
    return model.trunk if hasattr(model, "trunk") else model.backbone.trunk


def middle(model, x):
    """What the trunk computes on the way, under the names of the recordings."""
    trunk = trunk_of(model)
    c2, stages = trunk(x)
    found = {"mid_stem": trunk.stem(x), "mid_c2": c2, "mid_stage0": trunk.down(c2)}
    for k, maps in enumerate(stages, 1):
        found |= {f"mid_stage{k}_c{level}": c for level, c in zip((3, 4, 5), maps)}
    return found


def official_tensors(variant):
    """[name, shape, dtype] of a model; whole detectors that are not in the reference are its
    backbones with the heads of the NeXt-T detector.
    """
    known = golden.variants()
    if variant in known:
        return known[variant]
    kind = next(kind for kind in DETECTORS if variant.startswith(kind))
    trunk = variant.removeprefix(f"{kind}_")
    backbone = known[f"{DETECTORS[kind]}_{trunk}"]
    heads = [t for t in known[f"{kind}_next_tiny"] if not t[0].startswith("backbone.")]
    return [[f"backbone.{name}", *rest] for name, *rest in backbone] + heads


# ------------------------------------------------ outputs


@pytest.mark.skipif(not FILES, reason="no recorded outputs here")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_equal_to_the_official_code(path):
    recording = golden.Recording(path)
    meta = recording.meta
    weights = golden.filled(golden.variants()[meta["variant"]], meta["salt"])
    for key, first in zip(*(recording.arrays[f"fill_probe_{k}"] for k in ("keys", "vals"))):
        assert weights[str(key)].flatten()[:4].numpy() == pytest.approx(first)
    x = golden.image(meta["input_seed"], 1, 3, meta["h"], meta["w"])
    assert x.flatten()[:8].numpy() == pytest.approx(recording.arrays["input_probe"])

    model = loaded(meta["variant"], meta["salt"])
    assert not model.training
    with torch.no_grad():
        found = named(model(x)) | middle(model, x)
        if "backbone_out0" in recording.names():
            maps = model.backbone(x).values()
            found |= {f"backbone_out{i}": value for i, value in enumerate(maps)}
    assert set(recording.names()) <= set(found)
    recording.assert_equal(**{name: found[name] for name in recording.names()})


@pytest.mark.skipif(not FILES, reason="no recorded outputs here")
def test_a_wrong_model_fails_the_check():
    path = golden.GOLDEN / "cls_next_tiny_64x96.npz"
    recording = golden.Recording(path)
    model = official.load("cls_next_tiny", golden.filled(golden.variants()["cls_next_tiny"]))
    model.trunk.first[0].norm.eps = 1e-5
    with torch.no_grad():
        scores = model(golden.image(recording.meta["input_seed"], 1, 3, 64, 96))
    assert recording.error("stage_logits_0", scores[0]) > golden.TOLERANCE


@pytest.mark.parametrize(
    ("variant", "size", "count"),
    [
        ("cls_swin_tiny", 224, 3),
        ("det_retina_cswin_tiny", 96, 5),
        ("det_retina_next_tiny_hourglass", 96, 5),
        ("det_retina_next_tiny_fpnvariant", 96, 5),
        ("det_defdetr_res50", 96, 4),
        ("det_mask2former_next_tiny", 96, 4),
    ],
)
@needs_names
def test_families_without_recordings_run(variant, size, count):
    model = loaded(variant)
    with torch.no_grad():
        outputs = model(golden.image(0, 1, 3, size, size))
    assert len(outputs) == count
    assert all(torch.isfinite(each).all() for each in outputs)


# ------------------------------------------------ names


@needs_names
def test_variants_are_all_official_models():
    others = set(official.VARIANTS) - set(golden.variants())
    assert len(others) == len(official.VARIANTS) - len(golden.variants())
    assert all(name.startswith(tuple(DETECTORS)) for name in others)
    assert len(set(official.VARIANTS)) == len(official.VARIANTS)


@needs_names
@pytest.mark.parametrize("variant", LARGE)
def test_names_and_shapes_are_the_official_ones(variant):
    with torch.device("meta"):
        model = official.build(variant)
    ours = {name: list(value.shape) for name, value in official.state_dict(model).items()}
    tensors = official_tensors(variant)
    assert ours == {name: shape for name, shape, _ in tensors}
    theirs = {name: torch.empty(shape, device="meta") for name, shape, _ in tensors}
    report = convert_with_report(theirs, "cednet", model)
    assert report.missing == ()
    assert report.weights.keys() == model.state_dict().keys()
    assert all(name.endswith("relative_position_index") for name in report.unused)


@needs_names
@pytest.mark.parametrize("variant", [name for name in official.VARIANTS if name not in LARGE])
def test_round_trip_to_official_names(variant):
    tensors = official_tensors(variant)
    weights = {
        name: torch.arange(math.prod(shape), dtype=torch.float32).view(shape) + len(name)
        for name, shape, kind in tensors
        if "float" in kind
    }
    model = official.load(variant, weights)
    assert not model.training
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    back = official.state_dict(model)
    assert back.keys() == {name for name, _, _ in tensors}
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    index = [name for name in back if name.endswith("relative_position_index")]
    assert bool(index) == ("_swin_" in variant)
    for name in index:  # its definition, spelled out for a query and a key of a 7 x 7 window
        for (y1, x1), (y2, x2) in (((0, 0), (6, 6)), ((3, 5), (1, 2)), ((6, 0), (0, 6))):
            row = (y1 - y2 + 6) * 13 + (x1 - x2 + 6)
            assert back[name][y1 * 7 + x1, y2 * 7 + x2] == row


@needs_names
def test_backbone_prefix_does_not_matter():
    tensors = golden.variants()["det_mask2former_res50"]
    weights = golden.filled(tensors)
    x = golden.image(0, 1, 3, 64, 64)
    with torch.no_grad():
        plain = official.load("det_mask2former_res50", weights)(x)
        weights = {f"backbone.{name}": value for name, value in weights.items()}
        prefixed = official.load("det_mask2former_res50", weights)(x)
    assert all(torch.equal(a, b) for a, b in zip(plain, prefixed))


@needs_names
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("stages.1.0.encoder.0.0.gamma"), "stages.0.encoder.levels.0.0"),
        (lambda w: w.update(surplus=torch.zeros(1)), "surplus"),
        (lambda w: w.update({"stem.0.bias": torch.zeros(31)}), r"\(31,\)"),
        (lambda w: w.clear(), "stem.0.conv.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, words):
    weights = golden.filled(golden.variants()["det_mask2former_next_tiny"])
    change(weights)
    with pytest.raises(UserError, match=words):
        official.load("det_mask2former_next_tiny", weights)


def test_unknown_models_are_named():
    with pytest.raises(UserError, match="det_retina_next_tiny"):
        official.load("det_retina_next_tinny", {})
