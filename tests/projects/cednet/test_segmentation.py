"""UperNet on CEDNet: costs, recipe, official weights, and the small model on real and made data."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image

from cednet.official_names import correspondence
from d2dense import config, costs, model_zoo
from d2dense.checkpoint import convert
from d2dense.data import builtin, loaders, mappers
from d2dense.data.augmentations import RandomScale
from d2dense.engine.experiment import experiment
from d2dense.errors import UserError
from d2dense.evaluation.loop import evaluate
from d2dense.inference import Predictor
from d2dense.layers import Residual
from tests.projects.cednet import golden
from tests.projects.parity import optimizer_groups

KINDS = ("yaml", "lazy")
OFFICIAL = "CEDNet/upernet_cednet_next_"
TINY = "CEDNet/upernet_cednet_tiny_shapes"


@functools.cache
def on_meta(name, kind="lazy"):
    with torch.device("meta"):
        return config.build_model(model_zoo.get_config(name, kind), device="meta")


# ------------------------------------------------ full size


@pytest.mark.parametrize(
    ("name", "count", "macs"),
    [
        (OFFICIAL + "t", 60_976_812, 962.4),
        (OFFICIAL + "s", 83_325_484, 1045.2),
        (OFFICIAL + "b", 122_896_684, 1184.3),
        ("CEDNet/upernet_convnext_t", 60_242_636, 938.9),
    ],
)
def test_costs_of_one_pass_without_the_auxiliary_classifier(name, count, macs):
    model = on_meta(name)
    inputs = costs.detection_input(512, 2048, device="meta")
    found = costs.count_macs(model, inputs, attention=False)
    assert costs.count_parameters(model)[""] == count
    assert found[""] / 1e9 == pytest.approx(macs, rel=0.01)
    assert "sem_seg_head.auxiliary" not in found
    assert model.inference.window == [512, 512]  # counting puts it back


@pytest.mark.skipif(not golden.train_meta(), reason="no official training facts here")
@pytest.mark.parametrize(("size", "official"), [("t", "tiny"), ("s", "small")])
def test_optimizer_groups_are_the_official_ones(size, official):
    model = on_meta(OFFICIAL + size)
    run = experiment(model_zoo.get_config(OFFICIAL + size), device="cpu")
    names = correspondence(model, ()).names
    expected = golden.train_meta()["param_groups"][f"upernet_next_{official}"]
    found = {
        names[name]: (group["lr"] / expected["base_lr"], group["weight_decay"])
        for group in optimizer_groups(run, model)
        for name in group["params"]
    }
    assert found.keys() == expected["params"].keys()
    for name, value in expected["params"].items():
        assert found[name] == pytest.approx(tuple(value)), name


@pytest.mark.parametrize(("size", "rate"), [("t", 0.2), ("s", 0.3), ("b", 0.4)])
def test_stochastic_depth_and_layer_scale(size, rate):
    modules = on_meta(OFFICIAL + size).backbone.modules()
    assert max(m.drop_path for m in modules if isinstance(m, Residual)) == pytest.approx(rate)
    assert model_zoo.get_config(OFFICIAL + size).model.backbone.trunk.family.layer_scale == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_schedule(kind):
    run = experiment(model_zoo.get_config(OFFICIAL + "t", kind), device="cpu")
    lr, steps = run.build_lr_multiplier(), run.settings.max_iter
    assert (steps, run.settings.total_batch_size) == (160_000, 16)
    assert run.settings.amp_enabled
    assert lr(0) == pytest.approx(1e-6)
    assert lr(750 / steps) == pytest.approx(0.5, rel=0.02)
    for where in (0.01, 0.25, 0.5, 0.999):
        assert lr(where) == pytest.approx(1 - where)


@pytest.mark.parametrize("kind", KINDS)
def test_training_samples(kind):
    """Sizes, padding and colours of the recipe, on noise of the size of a usual picture."""
    cfg = model_zoo.get_config(OFFICIAL + "t", kind)
    if kind == "yaml":
        mapper = mappers.from_cfg(cfg, is_train=True)
    else:
        mapper = instantiate(cfg.dataloader.train.mapper)
    steps = mapper.augmentations.augs
    assert [type(step).__name__ for step in steps] == [
        "RandomScale",
        "RandomCrop_CategoryAreaConstraint",
        "PhotometricDistortion",
        "RandomFlip",
    ]
    assert isinstance(steps[0], RandomScale)
    assert (steps[0].min_size, steps[0].max_size) == (512, 2048)
    assert list(steps[0].scale_range) == [0.5, 2.0]
    assert list(steps[1].crop_aug.crop_size) == [512, 512]
    assert steps[1].single_category_max_area == 0.75
    distortion = steps[2]
    assert (distortion.brightness, distortion.hue) == (32, 36)  # 36 degrees: 18 steps of OpenCV's
    assert (*distortion.contrast, *distortion.saturation) == (0.5, 1.5, 0.5, 1.5)
    assert mapper.image_format == "RGB"
    assert on_meta(OFFICIAL + "t", kind).pad_to == [512, 512]


@pytest.mark.skipif(not golden.variants(), reason="no official names here")
def test_official_weights_fit_the_model_of_the_zoo():
    path = next(iter(sorted(golden.GOLDEN.glob("full_upernet_next_tiny_*x*.npz"))), None)
    if path is None:
        pytest.skip("no recorded outputs here")
    recording = golden.Recording(path)
    meta = recording.meta
    model = config.build_model(config.load(OFFICIAL + "t"), device="cpu").eval()
    state = golden.filled(golden.variants()["full_upernet_next_tiny"], meta["salt"])
    weights = convert(state, "cednet", model)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    with torch.no_grad():
        features = model.backbone(golden.image(meta["input_seed"], 1, 3, meta["h"], meta["w"]))
        recording.assert_equal(
            decode_logits=model.sem_seg_head.scores(features),
            aux_logits=model.sem_seg_head.auxiliary_scores(features),
        )


# ------------------------------------------------ the small model


@pytest.mark.parametrize("kind", KINDS)
def test_one_key_turns_several_scales_on(kind):
    key = "TEST.SEM_SEG.MULTI_SCALE=True" if kind == "yaml" else "model.inference.multi_scale=true"
    path = model_zoo.get_config_file(TINY, kind)
    inference = [config.build_model(config.load(path, o)).inference for o in ([], [key])]
    assert [each.multi_scale for each in inference] == [False, True]
    assert inference[1].ratios == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert inference[1].flip
    assert inference[1].average == "probabilities"
    assert (inference[1].window, inference[1].stride) == ([128, 128], [85, 85])


@pytest.mark.parametrize("kind", KINDS)
def test_the_small_model_fits_a_batch(kind):
    torch.manual_seed(0)
    model = config.build_model(model_zoo.get_config(TINY, kind), device="cpu").train()
    model.pad_to = [64, 96]
    labels = torch.full((2, 60, 90), 3)
    labels[:, :, 45:] = 7
    labels[1] = labels[1].flip(1)
    labels[:, :5] = 255
    pictures = torch.where(labels == 7, 40, 200)[:, None].expand(-1, 3, -1, -1).to(torch.uint8)
    batch = [{"image": image, "sem_seg": each} for image, each in zip(pictures, labels)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        found = model.eval()([{"image": pictures[0], "height": 30, "width": 45}])[0]["sem_seg"]
    assert found.shape == (15, 30, 45)
    right = (found.argmax(0) == labels[0, ::2, ::2])[5:].float().mean()
    assert right > 0.9


@pytest.mark.parametrize("overrides", [[], ["model.inference.multi_scale=true"]])
def test_predictor_at_odd_sizes(overrides, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    small = ["model.backbone.trunk.blocks=[1,1,1]", "model.inference.ratios=[0.5,1.0]"]
    predictor = Predictor(TINY, overrides=[*small, *overrides])
    noise = np.random.default_rng(0).integers(0, 256, (75, 301, 3), dtype=np.uint8)
    found = predictor(noise)["sem_seg"]
    assert found.shape == (15, 75, 301)
    assert torch.isfinite(found).all()
    if overrides:
        assert torch.allclose(found.sum(0), torch.ones(75, 301), atol=1e-4)
        mirrored = predictor(np.ascontiguousarray(noise[:, ::-1]))["sem_seg"].flip(2)
        assert (mirrored.argmax(0) == found.argmax(0)).float().mean() > 0.95
    assert predictor.metadata.stuff_classes[0] == "disc"


def small_run(overrides):
    fixed = ["train.class_count=auto", "dataloader.train.total_batch_size=2", "train.seed=1"]
    return experiment(config.load(TINY, [*fixed, *overrides]), device="cpu")


def test_camvid_by_overrides_alone(shared_data):
    root = shared_data / "camvid_mini"
    entries = {"labels": "labels", "images": "images"}
    overrides = [
        f"datasets.{slot}.{key}={root / folder / slot}"
        for slot in ("train", "val")
        for key, folder in entries.items()
    ]
    overrides += [f"datasets.{slot}.classes={root / 'classes.json'}" for slot in ("train", "val")]
    overrides += [f"datasets.{slot}.ignore_label=11" for slot in ("train", "val")]
    run = small_run(overrides)
    model = run.build_model().train()
    names = json.loads((root / "classes.json").read_text())
    names = names["classes"] if isinstance(names, dict) else names
    assert model.sem_seg_head.classifier.out_channels == len(names)
    batch = next(iter(run.build_train_loader()))
    for each in batch:
        assert set(each["sem_seg"].unique().tolist()) <= {*range(11), 255}
    sum(model(batch).values()).backward()


def test_ade20k_is_evaluated_at_one_and_several_scales(shared_data):
    builtin.register_ade20k(shared_data / "ade20k_mini")
    try:
        name = "ade20k_sem_seg_val"
        data = [f"dataloader.train.dataset.names={name}", f"dataloader.test.dataset.names={name}"]
        results = {}
        for scales in ("false", "true"):
            more = [f"model.inference.multi_scale={scales}", "model.inference.ratios=[0.75]"]
            run = small_run([*data, *more])
            torch.manual_seed(0)
            model = run.build_model()
            assert model.sem_seg_head.classifier.out_channels == 150
            found = evaluate(
                model,
                {name: run.build_test_loader(name)},
                {name: run.build_evaluator(name, None)},
            )
            results[scales] = found[name]["sem_seg"]
        assert all(0 <= each["mIoU"] <= 100 for each in results.values())
        assert results["false"] != results["true"]
    finally:
        builtin.register_ade20k(builtin.dataset_root())


def test_a_label_outside_the_classes_ends_training_in_one_line(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    pixels = np.zeros((40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    Image.fromarray(pixels[..., 0] + 2).save(tmp_path / "labels" / "a.png")
    overrides = [
        f"datasets.{slot}.{key}={value}"
        for slot in ("train", "val")
        for key, value in (
            ("images", tmp_path / "images"),
            ("labels", tmp_path / "labels"),
            ("classes", "[a,b]"),
        )
    ]
    run = small_run(overrides)
    with pytest.raises(UserError, match="has class 2, but its dataset has the classes 0 to 1"):
        next(iter(run.build_train_loader()))


def test_samples_follow_seed_and_position_alone(shared_data):
    builtin.register_ade20k(shared_data / "ade20k_mini")
    try:
        batches = []
        for workers in (0, 2):
            loader = loaders.build_train_loader(
                dataset=loaders.get_dataset_dicts(names="ade20k_sem_seg_val", filter_empty=False),
                mapper=mappers.from_cfg(model_zoo.get_config(OFFICIAL + "t", "yaml"), True),
                total_batch_size=2,
                num_workers=workers,
                seed=3,
                aspect_ratio_grouping=False,
            )
            stream = iter(loader)
            batches.append([next(stream) for _ in range(2)])
        for one, two in zip(*batches):
            for a, b in zip(one, two):
                assert torch.equal(a["image"], b["image"])
                assert torch.equal(a["sem_seg"], b["sem_seg"])
                assert max(a["image"].shape[1:]) <= 512
    finally:
        builtin.register_ade20k(builtin.dataset_root())
