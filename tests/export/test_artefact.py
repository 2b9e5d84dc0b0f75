"""An exported file behind the interface of a Detectron2 model."""

import json

import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from d2dense import config
from d2dense.errors import UserError
from d2dense.export import CheckError, ExportedDetector, export_model, formats, load, verification
from d2dense.export import pipeline as pipeline_module
from d2dense.export.reduction import reduced
from d2dense.export.untrained import spread_outputs
from tests.export.exportable import NUM_CLASSES, picture, run_here, tiny_model

CLASSES = [f"class {k}" for k in range(NUM_CLASSES)]


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    monkeypatch.setattr(verification, "_run_fresh", run_here)


def exported(model, folder, **kwargs):
    return export_model(
        model,
        picture(96, 128),
        output_dir=folder,
        classes=CLASSES,
        resize={"rule": "shortest_edge", "min_size": 96, "max_size": 160},
        **kwargs,
    )


@pytest.mark.parametrize("method", ["trace", "script"])
def test_detections_in_original_pixels(tmp_path, method):
    model = tiny_model(mask=True)
    result = exported(model, tmp_path, method=method)
    batch = [
        {"image": picture(96, 140, seed=4), "height": 201, "width": 290},
        {"image": picture(130, 96, seed=5)},
    ]
    found = load(result.path)(batch)
    for item, one in zip(batch, found):
        expected = model([item])[0]["instances"]
        instances = one["instances"]
        assert len(expected) > 0
        assert instances.image_size == expected.image_size
        assert torch.allclose(instances.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-4)
        assert torch.allclose(instances.scores, expected.scores, atol=1e-5)
        assert torch.equal(instances.pred_classes, expected.pred_classes)
        assert torch.equal(instances.pred_masks, expected.pred_masks)


def test_masks_of_queries_in_original_pixels(tmp_path):
    model = config.build_model(
        reduced(config.load("CEDNet/mask2former_cednet_tiny_shapes")), device="cpu"
    )
    model = spread_outputs(model.eval(), picture(96, 128))
    result = exported(model, tmp_path, method="trace")
    item = {"image": picture(75, 130, seed=4), "height": 111, "width": 190}
    found, expected = (each([item])[0]["instances"] for each in (load(result.path), model))
    assert found.image_size == expected.image_size == (111, 190)
    assert expected.pred_masks.any(dim=(1, 2)).sum() > 10
    assert torch.equal(found.pred_classes, expected.pred_classes)
    assert torch.allclose(found.scores, expected.scores, atol=1e-5)
    assert (found.pred_masks != expected.pred_masks).sum() <= 5  # pixels on an edge, by rounding


def test_torchvision_pastes_masks_like_detectron2():
    """The documentation recommends its function to users who do not have Detectron2."""
    row = torch.arange(28) - 13.5
    disc = (1.2 - (row[:, None] ** 2 + row[None] ** 2).sqrt() / 24).clamp(0, 1)
    boxes = torch.tensor([[10.3, 5.2, 60.9, 44.1], [70.0, 30.5, 139.0, 95.7]])
    masks = torch.stack([disc, disc.roll(5, 1)])
    description = [{"name": name} for name in ("boxes", "scores", "classes", "masks")]
    outputs = boxes, torch.ones(2), torch.zeros(2, dtype=torch.int64), masks
    detector = ExportedDetector(
        lambda image: outputs, {"task": "detection", "outputs": description}
    )
    expected = detector([{"image": torch.zeros(3, 96, 140)}])[0]["instances"].pred_masks
    pasted = paste_masks_in_image(masks[:, None], boxes, (96, 140))[:, 0] > 0.5
    assert expected.sum() > 1000
    # torchvision rounds boxes to pixels
    assert (pasted & expected).sum() / (pasted | expected).sum() > 0.93


def test_semantic_scores_in_original_pixels(tmp_path):
    model = tiny_model(arch="SemanticSegmentor")
    result = exported(model, tmp_path)
    assert result.task == "semantic"
    batch = [{"image": picture(96, 140, seed=4), "height": 201, "width": 290}]
    expected, found = model(batch)[0]["sem_seg"], load(result.path)(batch)[0]["sem_seg"]
    assert found.shape == (NUM_CLASSES, 201, 290)
    assert torch.allclose(found, expected, atol=1e-5)


def test_description(tmp_path):
    result = exported(tiny_model(mask=True), tmp_path / "new" / "folder")
    about = json.loads(result.metadata_path.read_text())
    assert about["file"] == result.path.name == "model.ts"
    assert about["classes"] == CLASSES
    assert [output["name"] for output in about["outputs"]] == [
        "boxes",
        "scores",
        "classes",
        "masks",
    ]
    assert about["input"]["channels"] == "BGR"
    assert about["input"]["resize"]["min_size"] == 96
    assert about["check"]["max_error"] <= about["check"]["tolerance"] == 1e-4
    assert len(about["check"]["images"]) == 3
    outputs = load(result.path).run(picture(96, 128))
    for output in about["outputs"]:
        value = outputs[output["name"]]
        assert str(value.dtype) == f"torch.{output['dtype']}"
        assert value.dim() == len(output["shape"])


def test_a_wrong_file_is_removed(tmp_path, monkeypatch):
    def wrong(model, image, *, method):
        other = tiny_model(seed=1)
        return original(other, image, method=method)

    original = formats.to_torchscript
    monkeypatch.setattr(formats, "to_torchscript", wrong)
    model = tiny_model().train()
    with pytest.raises(CheckError):
        exported(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert model.training


def test_no_detections_anywhere_is_said(tmp_path, caplog):
    model = tiny_model()
    for predictor in model.roi_heads.box_predictor:
        predictor.test_score_thresh = 1.1
    exported(model, tmp_path)
    assert "no check image had detections" in caplog.text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda ts, about: about.unlink(), "model.json does not exist"),
        (lambda ts, about: ts.unlink(), "model.ts does not exist"),
        (lambda ts, about: about.write_text("[]"), "does not describe an exported model"),
        (lambda ts, about: about.write_text("{"), "does not describe an exported model"),
        (lambda ts, about: ts.write_bytes(b"x" * 100), "is not a TorchScript file"),
    ],
)
def test_damaged_files(tmp_path, damage, message):
    result = pipeline_module.Exported(
        path=tmp_path / "model.ts", metadata_path=tmp_path / "model.json", task="", checks=[]
    )
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(result.path))
    result.metadata_path.write_text(json.dumps({"task": "detection", "outputs": [{"name": "x"}]}))
    load(result.path)
    damage(result.path, result.metadata_path)
    with pytest.raises(UserError, match=message):
        load(result.path)


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="change --output"):
        exported(tiny_model(), tmp_path / "taken")
