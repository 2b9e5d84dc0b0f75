"""ImageNet classifiers: the recipe, costs, a run of the tiny one with the launcher, and what its
checkpoint gives a detector.
"""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from PIL import Image

from cednet import CEDNet, CEDNetClassifier, CEDNetTrunk, NextFamily
from d2dense import checkpoint, config, model_zoo
from d2dense.checkpoint import load_weights
from d2dense.config import detectors
from d2dense.engine.experiment import experiment
from d2dense.engine.train_net import main
from d2dense.errors import UserError
from d2dense.export import export_model
from d2dense.inference import Predictor
from d2dense.layers import fold_for_inference
from d2dense.modeling import ImageClassifier
from tests.projects.parity import optimizer_groups
from tools import analyze_model, demo

NAME = "CEDNet/classifier_cednet_next_t_imagenet"
TINY = "CEDNet/classifier_cednet_tiny_objects"
# parameters with the auxiliary classifiers and without, measured on the official code
PARAMS = {
    "cednet_next_t": (40_041_784, 33_826_152),
    "cednet_next_s": (65_498_272, 56_174_824),
    "cednet_next_b": (105_118_624, 94_615_528),
    "cednet_swin_t": (38_001_249, 32_178_833),
    "cednet_r50_t": (40_078_392, 34_387_048),
    "cednet_next_t_unet": (37_712_440, 31_496_808),
    "cednet_next_t_hourglass": (37_145_592, 30_929_960),
    "convnext_t": (28_589_128, 28_589_128),
    "r50": (25_557_032, 25_557_032),
}
DROP_PATH = {"cednet_next_t": 0.1, "cednet_next_s": 0.4, "cednet_next_b": 0.5}


@pytest.fixture(autouse=True)
def _quiet_logging():
    """The command line sets up the root logger; leave it as it was."""
    root = logging.getLogger()
    level = root.level
    yield
    for handler in [each for each in root.handlers if hasattr(each, "_d2dense_handler")]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


# ------------------------------------------------ models and recipe


@pytest.mark.parametrize("backbone", PARAMS)
def test_parameters(backbone):
    cfg = model_zoo.get_config(f"CEDNet/classifier_{backbone}_imagenet")
    with torch.device("meta"):
        model = config.build_model(cfg, device="meta")
    with_heads, without = PARAMS[backbone]
    assert sum(p.numel() for p in model.parameters()) == with_heads
    others = [] if with_heads == without else model.network.heads[:-1]
    assert with_heads - sum(p.numel() for head in others for p in head.parameters()) == without
    assert sum(p.numel() for p in fold_for_inference(copy.deepcopy(model)).parameters()) == without
    if backbone in DROP_PATH:
        rates = [m.drop_path for m in model.modules() if hasattr(m, "drop_path")]
        assert max(rates) == pytest.approx(DROP_PATH[backbone])


def test_the_analysis_tool_prints_the_published_cost(tmp_path):
    report = tmp_path / "costs.json"
    argv = ["--config-file", NAME, "--json", str(report), "--input-size", "224", "224"]
    assert analyze_model.main([*argv, "--tasks", "params", "flops"]) in (0, None)
    found = json.loads(report.read_text())
    assert found["params"] == 33_826_152  # the paper's 34 M
    assert found["macs"] == pytest.approx(5.695e9, rel=1e-3)


@pytest.mark.parametrize("kind", ["lazy", "yaml"])
def test_the_recipe(kind):
    run = experiment(model_zoo.get_config(NAME, kind), device="cpu")
    settings = run.settings
    assert settings.max_iter == round(300 * 1_281_167 / 4096)
    assert settings.total_batch_size == settings.reference_batch_size == 4096
    assert (settings.ema_enabled, settings.ema_decay, settings.amp_enabled) == (True, 0.9999, True)
    assert settings.lr_rule == "linear"
    assert run.train_names == ["imagenet_1k_train"]
    with torch.device("meta"):
        model = config.build_model(run.cfg, device="meta")
    decays = {}
    for group in optimizer_groups(run, model):
        assert group["lr"] == 4e-3
        decays |= dict.fromkeys(group["params"], group["weight_decay"])
    for name, parameter in model.named_parameters():
        assert decays[name] == (0.05 if parameter.ndim > 1 else 0.0), name
    lr = run.build_lr_multiplier()
    assert lr(0) == 0
    assert lr(10 / 300) == pytest.approx(0.5, abs=1e-3)
    assert lr(20 / 300) == pytest.approx(1, abs=1e-4)
    assert lr(160 / 300) == pytest.approx((1 + 1e-6 / 4e-3) / 2, abs=1e-3)  # half of the cosine
    assert 4e-3 * lr(1) == pytest.approx(1e-6)
    assert model.mixing.mixup_alpha == 0.8
    assert model.mixing.cutmix_alpha == 1.0
    assert model.mixing.mix_prob == 1.0
    assert model.mixing.switch_prob == 0.5
    assert model.mixing.label_smoothing == 0.1


def test_ablations_have_their_blocks_and_100_epochs():
    blocks = {"split_1of6": [[1, 2, 1], [5, 10, 5]], "stages_4": [[1, 4, 1]] * 4}
    for name, expected in blocks.items():
        cfg = model_zoo.get_config(f"CEDNet/classifier_cednet_next_t_{name}_imagenet_100ep")
        assert cfg.train.max_iter == round(100 * 1_281_167 / 4096)
        with torch.device("meta"):
            model = config.build_model(cfg, device="meta")
        found = [[len(each) for each in s.encoder.levels] for s in model.network.trunk.stages]
        assert found == expected
        assert len(model.network.heads) == len(expected)


# ------------------------------------------------ pre-training


def trunk(**options):
    options = {"blocks": [1, 1, 1], "num_stages": 2, "first_blocks": 1, **options}
    return L(CEDNetTrunk)(
        family=L(NextFamily)(layer_scale=1.0), widths=[8, 16, 24, 32], drop_path=0.0, **options
    )


def save_classifier(path, **options):
    node = L(ImageClassifier)(
        network=L(CEDNetClassifier)(trunk=trunk(last_decoder=False, **options), num_classes=5),
        num_classes=5,
    )
    torch.manual_seed(1)
    model = instantiate(node)
    torch.save({"model": model.state_dict(), "iteration": 7}, path)
    return model


def detector(**options):
    backbone = L(CEDNet)(trunk=trunk(**options), out_channels=16)
    torch.manual_seed(2)
    return instantiate(detectors.retinanet(backbone=backbone, num_classes=3, channels=16))


@pytest.mark.parametrize("style", ["fpn", "hourglass"])
def test_a_detector_takes_the_trunk_and_tells_what_it_left(tmp_path, caplog, style):
    caplog.set_level("INFO")
    first = save_classifier(tmp_path / "c.pth", style=style)
    model = detector(style=style)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_weights(model, tmp_path / "c.pth", reinit_misshaped=False)
    theirs = first.network.trunk.state_dict()
    for name, value in theirs.items():
        assert torch.equal(model.state_dict()[f"backbone.trunk.{name}"], value), name
    rest = set(before) - {f"backbone.trunk.{name}" for name in theirs}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in rest)
    # of the trunk, only a last decoder, which classifiers do not have, starts afresh
    fresh = {name.split(".decoder.")[0] for name in rest if name.startswith("backbone.trunk.")}
    assert fresh == ({"backbone.trunk.stages.1"} if style == "hourglass" else set())
    assert set(report.used) == {f"backbone.trunk.{name}" for name in theirs}
    heads = sum(name.startswith("network.heads.") for name in first.state_dict())
    assert f"{len(theirs)} tensors are used, {heads} left behind (network.heads" in caplog.text
    with pytest.raises(UserError, match="lacks"):
        report.require_complete()  # not for evaluation


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_stages": 3}, "no place for: network.trunk.stages.1.decoder"),
        (
            {"num_stages": 1},
            "no weights for tensors of BatchRetinaNet: backbone.trunk.stages.0.dec",
        ),
        ({"blocks": [1, 2, 1]}, "no place for: network.trunk.stages.0.encoder.levels.1.1"),
        ({"first_blocks": 0}, "no weights for .* backbone.trunk.first.0"),
    ],
)
def test_another_variant_is_one_error(tmp_path, options, words):
    save_classifier(tmp_path / "c.pth", **options)
    model = detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=f"c.pth: .*{words}") as error:
        load_weights(model, tmp_path / "c.pth")
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_classifier_with_other_classes_is_not_another_model(tmp_path):
    save_classifier(tmp_path / "c.pth")
    node = L(ImageClassifier)(
        network=L(CEDNetClassifier)(trunk=trunk(last_decoder=False), num_classes=2), num_classes=2
    )
    with pytest.raises(UserError, match=r"reinit_misshaped"):
        load_weights(instantiate(node), tmp_path / "c.pth", reinit_misshaped=False)
    report = load_weights(instantiate(node), tmp_path / "c.pth")
    assert {name.rpartition(".")[0] for name, _, _ in report.misshaped} == {
        "network.heads.0.linear",
        "network.heads.1.linear",
    }


# ------------------------------------------------ a run, from the folder to the detector


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """Two folders of small pictures, whose three classes differ in colour and direction."""
    root = tmp_path_factory.mktemp("stripes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for label, name in enumerate(("down", "left", "up")):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 60, (40, 40, 3))
                pixels[:, :, label] += rng.integers(80, 180)
                picture = Image.fromarray(pixels.astype(np.uint8))
                picture.save(root / split / name / f"{k}.png")
    return root


def overrides(kind, stripes, output, max_iter=24):
    data = {"train": stripes / "train", "val": stripes / "val"}
    if kind == "lazy":
        items = []
        for slot, path in data.items():
            items += [f"datasets.{slot}.kind=image_folder", f"datasets.{slot}.images={path}"]
        settings = {
            "train.class_count": "auto",
            "train.output_dir": output,
            "dataloader.train.total_batch_size": 8,
            "train.max_iter": max_iter,
            "train.eval_period": max_iter,
            "train.checkpointer.period": 12,
            "train.log_period": 12,
            "train.ema.enabled": "true",
            "train.ema.decay": 0.8,
            "lr_multiplier.warmup_length": 0.1,
        }
        return items + [f"{key}={value}" for key, value in settings.items()]
    items = []
    for slot, path in data.items():
        items += [f"DATASETS.CUSTOM.{slot.upper()}.KIND", "image_folder"]
        items += [f"DATASETS.CUSTOM.{slot.upper()}.IMAGES", str(path)]
    settings = {
        "DATASETS.CLASS_COUNT": "auto",
        "OUTPUT_DIR": output,
        "SOLVER.IMS_PER_BATCH": 8,
        "SOLVER.MAX_ITER": max_iter,
        "TEST.EVAL_PERIOD": max_iter,
        "SOLVER.CHECKPOINT_PERIOD": 12,
        "TRAIN.LOG_PERIOD": 12,
        "SOLVER.EMA.ENABLED": True,
        "SOLVER.EMA.DECAY": 0.8,
        "SOLVER.WARMUP_ITERS": 1,
    }
    return items + [str(each) for item in settings.items() for each in item]


@pytest.fixture(scope="module")
def run(stripes, tmp_path_factory):
    """The output folder of a finished run of the tiny config."""
    output = tmp_path_factory.mktemp("run")
    assert main(["--config-file", TINY, *overrides("lazy", stripes, output)]) == 0
    return output


def last_metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {key: value for row in rows for key, value in row.items()}


def test_the_tiny_classifier_learns(run):
    metrics = last_metrics(run)
    assert metrics["classification/top1"] > 70  # a third would be chance
    assert "classification/top5" not in metrics  # three classes
    assert {"loss_cls_stage1", "loss_cls_stage2"} <= set(metrics)
    assert (run / "model_best.pth").is_file()
    predictions = run / "inference" / "custom_val" / "classification_predictions.json"
    assert len(json.loads(predictions.read_text())) == 24


def test_resumed_equals_unbroken(run, stripes, tmp_path):
    """Mixup draws of the process, augmentations of the stream, averages: all go on."""
    output = tmp_path / "resumed"
    output.mkdir()
    for name in ("model_0000011.pth", "config.yaml"):
        (output / name).write_bytes((run / name).read_bytes())
    (output / "last_checkpoint").write_text("model_0000011.pth")
    listed = json.loads((run / "checkpoints.json").read_text())
    (output / "checkpoints.json").write_text(json.dumps(listed))
    argv = ["--config-file", TINY, "--resume", *overrides("lazy", stripes, output)]
    assert main(argv) == 0
    assert "model_0000011.pth at iteration 12" in (output / "log.txt").read_text()
    found, expected = (checkpoint.read(each / "model_final.pth")["model"] for each in (output, run))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_evaluation_and_prediction_give_the_same_again(run, stripes, tmp_path, capsys):
    weights = str(run / "model_final.pth")
    argv = ["--config-file", TINY, "--eval-only", f"train.init_checkpoint={weights}"]
    assert main([*argv, *overrides("lazy", stripes, tmp_path / "eval")]) == 0
    rows = tmp_path / "eval" / "inference" / "custom_val" / "classification_predictions.json"
    expected = json.loads(rows.read_text())
    before = json.loads(
        (run / "inference" / "custom_val" / "classification_predictions.json").read_text()
    )
    assert expected == before
    changes = overrides("lazy", stripes, tmp_path / "p")
    predictor = Predictor(TINY, weights=weights, overrides=changes)
    path = stripes / "val" / expected[0]["image_id"]
    scores = predictor(str(path))["class_scores"]
    best = scores.topk(3)
    names = [predictor.metadata.image_classes[k] for k in best.indices]
    assert names == expected[0]["classes"]
    assert best.values.tolist() == pytest.approx(expected[0]["scores"], abs=1e-5)

    out = tmp_path / "demo"
    argv = ["--config-file", TINY, "--weights", weights, "--input", str(path), "--output", str(out)]
    capsys.readouterr()
    assert demo.main([*argv, *changes]) == 0
    assert f"{path.name}: {names[0]} {100 * float(best.values[0]):.1f}%" in capsys.readouterr().out
    written = json.loads((out / "predictions.json").read_text())["images"][0]["classes"]
    assert [each["name"] for each in written] == names
    assert (out / path.name).is_file()


@pytest.mark.parametrize("method", ["trace", "script"])
def test_the_exported_file_scores_as_the_predictor(run, stripes, tmp_path, method):
    predictor = Predictor(
        TINY, weights=str(run / "model_final.pth"), overrides=overrides("lazy", stripes, tmp_path)
    )
    picture = str(stripes / "val" / "left" / "3.png")
    image = predictor.preprocess(picture)["image"]
    found = export_model(predictor.model, image, output_dir=tmp_path / "exported", method=method)
    (scores,) = torch.jit.load(str(found.path))(image)
    assert torch.allclose(scores, predictor(picture)["class_scores"], atol=1e-6)
    assert json.loads(found.metadata_path.read_text())["task"] == "classification"


@pytest.mark.long
def test_two_processes_of_a_yaml_config(stripes, tmp_path):
    output = tmp_path / "two"
    file = str(model_zoo.get_config_file(TINY, "yaml"))
    argv = ["--config-file", file, "--num-gpus", "2", "--device", "cpu"]
    assert main([*argv, *overrides("yaml", stripes, output, max_iter=10)]) == 0
    assert last_metrics(output)["classification/top1"] > 0
    predictions = output / "inference" / "custom_val" / "classification_predictions.json"
    assert len(json.loads(predictions.read_text())) == 24  # every picture once


def test_its_checkpoint_starts_the_tiny_detector(run):
    cfg = config.load(
        "CEDNet/retinanet_cednet_tiny_shapes", ["model.backbone.trunk.widths=[16,32,48,64]"]
    )
    model = config.build_model(cfg, device="cpu")
    report = load_weights(model, run / "model_final.pth", reinit_misshaped=False)
    saved = checkpoint.read(run / "model_final.pth")["model"]
    count = sum(name.startswith("network.trunk.") for name in saved)
    assert len(report.used) == count == len(model.backbone.trunk.state_dict())
    name = "stages.1.encoder.levels.2.0.mlp.fc1.weight"
    assert torch.equal(model.backbone.trunk.state_dict()[name], saved[f"network.trunk.{name}"])


def test_a_wrong_number_of_classes_is_one_line_before_the_first_step(stripes, tmp_path):
    items = [i for i in overrides("lazy", stripes, tmp_path) if "class_count" not in i]
    with pytest.raises(
        UserError, match=r"model.num_classes = 10, but dataset .* has 3: down, left"
    ):
        main(["--config-file", TINY, *items])
