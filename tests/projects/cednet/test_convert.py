"""Official checkpoints into our models, in Python and by the tool."""

import pytest
import torch
from detectron2.modeling import build_model as build

from cednet import CEDNetClassifier, StageClassifier
from d2dense import checkpoint, config, model_zoo
from d2dense.errors import UserError, run_tool
from tests.projects.cednet import golden, tiny
from tools import convert_checkpoint

CONFIG = """
MODEL:
  META_ARCHITECTURE: RetinaNet
  DEVICE: cpu
  BACKBONE: {NAME: CEDNet}
  CEDNET:
    WIDTHS: [16, 32, 48, 64]
    FIRST_BLOCKS: 2
    BLOCKS: [2, 2, 2]
    NUM_STAGES: 2
    OUT_CHANNELS: 16
    STYLE: %s
  RETINANET: {IN_FEATURES: [p3, p4, p5, p6, p7], NUM_CLASSES: 3}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}
"""


def classifier(style="fpn", **options):
    trunk = tiny.trunk(style=style, last_decoder=False, **options)
    heads = [StageClassifier(in_channels=64, num_classes=5) for _ in trunk.stages]
    return CEDNetClassifier(trunk=trunk, heads=heads)


@pytest.fixture(params=["fpn", "unet"])
def setting(request, tmp_path):
    """A detector's config, a classifier and its file under the official names."""
    path = tmp_path / "detector.yaml"
    path.write_text(CONFIG % request.param)
    source = classifier(request.param)
    weights = checkpoint.convert_back(source, "cednet")
    file = tmp_path / "official.pth"
    return path, source, weights, file


def test_pre_training_fills_the_trunk_and_nothing_else(setting):
    path, source, weights, _ = setting
    model = build(config.load(str(path)))
    report = checkpoint.convert_with_report(weights, "cednet", model)
    assert {name.split(".")[0] for name in report.unused} == {"final_layers", "norms", "heads"}
    last = "backbone.trunk.stages.1.decoder."
    expected = {
        name
        for name in model.state_dict()
        if not name.startswith("backbone.trunk.") or name.startswith(last)
    }
    assert set(report.missing) == expected
    model.load_state_dict(report.weights, strict=False)
    x = tiny.images(1, 3, 64, 64)
    with torch.no_grad():
        _, ours = model.eval().backbone.trunk(x)
        _, theirs = source.eval().trunk(x)
    assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0]))


@pytest.mark.parametrize("root", ["model", "state_dict", "model_ema", None])
def test_tool_writes_what_a_detector_loads(setting, root, capsys, tmp_path):
    path, source, weights, file = setting
    weights = {f"module.{name}": value for name, value in weights.items()}
    torch.save(weights if root is None else {root: weights, "epoch": 3}, file)
    output = tmp_path / "ours.pth"
    argv = ["--source", "cednet", "--config-file", str(path), str(file), str(output)]
    assert run_tool(lambda: convert_checkpoint.main(argv)) == 0
    said = capsys.readouterr().out
    used = len(source.trunk.state_dict())
    assert f"{used} tensors used" in said
    assert "16 tensors in the file, not in the model" in said
    model = build(config.load(str(path)))
    report = checkpoint.load_weights(model, str(output))
    assert len(report.used) == used
    assert not report.unexpected


def test_the_average_of_the_weights_can_be_chosen(setting, tmp_path):
    path, _, weights, file = setting
    average = {name: value + 1 for name, value in weights.items()}
    torch.save({"model": weights, "model_ema": average}, file)
    output = tmp_path / "ours.pth"
    argv = ["--source", "cednet", "--config-file", str(path), str(file), str(output)]
    convert_checkpoint.main([*argv, "--key", "model_ema"])
    ours = checkpoint.read(output)["model"]["backbone.trunk.stem.0.conv.weight"]
    assert torch.equal(ours, weights["stem.0.weight"] + 1)
    with pytest.raises(UserError, match=r"--key may be .*model_ema"):
        convert_checkpoint.main([*argv, "--key", "ema"])


def test_mistakes_end_the_tool_with_one_line_and_nothing_written(setting, capsys, tmp_path):
    path, _, weights, file = setting
    torch.save(weights, file)
    surplus = tmp_path / "surplus.pth"
    torch.save({**weights, "surplus": torch.zeros(1)}, surplus)
    output = tmp_path / "ours.pth"
    argv = ["--source", "cednet", "--config-file", str(path), str(file), str(output)]
    for changed, words in (
        ([*argv[:4], str(surplus), str(output)], "surplus"),
        ([*argv, "MODEL.CEDNET.WIDTHS", "(16,32,48,96)"], "shape"),
        ([*argv, "MODEL.CEDNET.NUM_STAGES", "3"], "stages.2"),
        (["--source", "timmm", *argv[2:]], "cednet"),
    ):
        assert run_tool(lambda argv=changed: convert_checkpoint.main(argv)) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
        assert not output.exists()


def test_a_classifier_of_another_number_of_classes_is_named():
    weights = checkpoint.convert_back(classifier(), "cednet")
    other = classifier()
    other.heads = torch.nn.ModuleList(
        StageClassifier(in_channels=64, num_classes=7) for _ in range(2)
    )
    with pytest.raises(UserError, match=r"heads.0.weight has shape \(5, 2048\).*number of classes"):
        checkpoint.convert(weights, "cednet", other)


def test_a_detectors_file_fills_a_bare_backbone():
    backbone = tiny.backbone()
    file = {f"backbone.{k}": v for k, v in checkpoint.convert_back(backbone, "cednet").items()}
    file["bbox_head.retina_cls.weight"] = torch.zeros(1)
    report = checkpoint.convert_with_report(file, "cednet", tiny.backbone())
    assert report.missing == ()
    assert report.unused == ("bbox_head.retina_cls.weight",)


# ------------------------------------------------ whole detectors

DETECTORS = ["retinanet", "faster_rcnn", "mask_rcnn", "cascade_mask_rcnn"]
# (detector, what its override sets, tensors of its file that follow the number of classes)
CLASS_COUNTS = [
    ("retinanet", "model.num_classes=3", ["retina_cls.weight", "retina_cls.bias"]),
    ("mask_rcnn", "model.roi_heads.num_classes=3", ["fc_cls.weight", "fc_reg.weight"]),
    ("cascade_mask_rcnn", "model.roi_heads.num_classes=3", ["bbox_head.0.fc_cls.weight"]),
]


def zoo(detector):
    return f"CEDNet/{detector}_cednet_tiny_shapes"


@pytest.fixture
def official_file(tmp_path):
    """Makes a whole detector of the zoo, and its file as MMDetection writes it."""

    def make(detector, kind="lazy"):
        model = config.build_model(model_zoo.get_config(zoo(detector), kind), device="cpu")
        path = tmp_path / f"{detector}.pth"
        weights = {f"module.{k}": v for k, v in checkpoint.convert_back(model, "cednet").items()}
        torch.save({"meta": {"epoch": 36, "CLASSES": ("a", "b")}, "state_dict": weights}, path)
        return model, path

    return make


def run_converter(*argv):
    return run_tool(lambda: convert_checkpoint.main(["--source", "cednet", *map(str, argv)]))


@pytest.mark.parametrize("kind", ["lazy", "yaml"])
@pytest.mark.parametrize("detector", [name for name in DETECTORS if name != "faster_rcnn"])
def test_whole_detectors_come_back_complete(detector, kind, official_file, tmp_path, capsys):
    model, path = official_file(detector, kind)
    file = model_zoo.get_config_file(zoo(detector), kind)
    output = tmp_path / "ours.pth"
    assert run_converter("--config-file", file, path, output) == 0
    said = capsys.readouterr().out
    expected = model.state_dict()
    assert f"{len(expected)} tensors used" in said
    assert "0 tensors in the file, not in the model" in said
    assert "0 tensors in the model, not in the file" in said
    fresh = config.build_model(config.load(str(file)), device="cpu")
    report = checkpoint.load_weights(fresh, str(output))
    report.require_complete()
    assert report.share == 1
    assert not report.unexpected
    found = fresh.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("detector", DETECTORS)
def test_official_names_of_heads_are_all_there(detector):
    """What the official files hold, by kind, at another size."""
    names = checkpoint.convert_back(tiny.detector(detector), "cednet").keys()
    heads = {name for name in names if not name.startswith("backbone.")}
    variant = "mask_rcnn" if detector == "faster_rcnn" else detector
    tensors = golden.variants().get(f"full_{variant}_next_tiny")
    if tensors is None:
        pytest.skip("no official names here")
    expected = {name for name, *_ in tensors if not name.startswith("backbone.")}
    if detector == "faster_rcnn":
        expected = {name for name in expected if ".mask_head." not in name}
    assert heads == expected


@pytest.mark.parametrize(("detector", "override", "named"), CLASS_COUNTS)
def test_another_number_of_classes_is_one_line_with_the_key(
    detector, override, named, official_file, tmp_path, capsys
):
    _, path = official_file(detector)
    output = tmp_path / "ours.pth"
    assert run_converter("--config-file", zoo(detector), path, output, override) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(name in said for name in named)
    assert (
        f"set MODEL.{'RETINANET' if detector == 'retinanet' else 'ROI_HEADS'}.NUM_CLASSES" in said
    )
    assert override.split("=")[0] in said
    assert not output.exists()


def test_other_differences_than_the_classes_do_not_point_at_their_number(
    official_file, tmp_path, capsys
):
    _, path = official_file("retinanet")
    sizes = "model.anchor_generator.sizes=[[8],[16],[32],[64],[128]]"
    overrides = (sizes, "model.head.num_anchors=3")
    assert run_converter("--config-file", zoo("retinanet"), path, tmp_path / "o", *overrides) == 2
    said = capsys.readouterr().err
    assert "retina_reg" in said
    assert "use the config of the model that the file belongs to" in said


def test_a_classifiers_file_fills_only_the_trunk_of_a_two_stage_detector(tmp_path, capsys):
    source = classifier()
    file = tmp_path / "classifier.pth"
    torch.save({"model": checkpoint.convert_back(source, "cednet")}, file)
    model = tiny.detector("cascade_mask_rcnn")
    weights = checkpoint.read(file)["model"]
    report = checkpoint.convert_with_report(weights, "cednet", model)
    assert all(name.startswith("backbone.trunk.") for name in report.weights)
    fresh = {name.split(".")[0] for name in report.missing}
    assert fresh == {"backbone", "proposal_generator", "roi_heads"}
    assert not any(name.startswith("backbone.trunk.") for name in report.missing)


def test_anchors_in_different_orders_are_refused():
    model = tiny.detector("retinanet")
    cells = list(model.anchor_generator.cell_anchors)
    cells[1].copy_(cells[1].flip(0))
    weights = checkpoint.convert_back(tiny.detector("retinanet"), "cednet")
    with pytest.raises(UserError, match="different orders"):
        checkpoint.convert(weights, "cednet", model)
