"""Recipes on real pictures, by overrides alone: a few steps of the model made small, then the
evaluation of the decoder and of each auxiliary branch.
"""

from __future__ import annotations

import json
import logging

import pytest
import torch
from detectron2.modeling.postprocessing import detector_postprocess

from d2dense import checkpoint, config, model_zoo
from d2dense.engine.experiment import experiment
from d2dense.engine.train_net import main

COCO = "CoDETR/co_deformable_detr_r50_1x"
LVIS = "CoDETR/co_dino_5scale_swin_l_lsj_lvis_3x"
SIDE = 96
# (yacs key, lazy key, value)
COMMON = [
    ("MODEL.WEIGHTS", "train.init_checkpoint", ""),
    ("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size", 2),
    ("SOLVER.MAX_ITER", "train.max_iter", 2),
    ("DATALOADER.NUM_WORKERS", "dataloader.train.num_workers", 0),
    ("DATALOADER.NUM_WORKERS", "dataloader.test.num_workers", 0),
    ("SEED", "train.seed", 1),
    ("TRAIN.LOG_PERIOD", "train.log_period", 1),
    ("MODEL.DETR.NUM_QUERIES", "model.queries.num_queries", 20),
    ("MODEL.DETR.ENCODER_LAYERS", "model.encoder.layers", 1),
    ("MODEL.DETR.DECODER_LAYERS", "model.decoder.layers", 1),
    ("MODEL.DETR.FEEDFORWARD", "model.encoder.feedforward", 64),
    ("MODEL.DETR.FEEDFORWARD", "model.decoder.feedforward", 64),
    ("MODEL.CODETR.RCNN.HIDDEN", "model.auxiliary_heads.0.hidden", 32),
]
SMALL_COCO = [
    ("INPUT.MIN_SIZE_TRAIN", "dataloader.train.mapper.augmentations.min_size", "[80,96]"),
    ("INPUT.DETR.CROP_MIN_SIZES", "dataloader.train.mapper.augmentations.crop_min_sizes", "[96]"),
    ("INPUT.DETR.CROP_RANGE", "dataloader.train.mapper.augmentations.crop_range", "[64,96]"),
    ("MODEL.BACKBONE.FREEZE_AT", "model.backbone.freeze_at", 5),
    ("INPUT.MIN_SIZE_TEST", "dataloader.test.mapper.augmentations.min_size", None),
]
SMALL_LVIS = [
    f"dataloader.train.mapper.augmentations.image_size={SIDE}",
    f"dataloader.test.mapper.augmentations.min_size=[{SIDE}]",
    f"dataloader.test.mapper.augmentations.max_size={SIDE}",
    f"model.square={SIDE}",
    "model.backbone.embed_dim=12",
    "model.backbone.depths=[1,1,1,1]",
    "model.backbone.heads=[1,2,2,2]",
    "model.backbone.window=3",
    *(f"model.neck.input_shape.res{k + 2}.channels={12 * 2**k}" for k in range(4)),
    "train.class_count=auto",
]


@pytest.fixture(autouse=True)
def _quiet_logging():
    root = logging.getLogger()
    level = root.level
    yield
    for handler in [each for each in root.handlers if hasattr(each, "_d2dense_handler")]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def spelled(changes, kind):
    overrides = []
    for yaml, lazy, value in changes:
        if kind == "lazy":
            overrides.append(f"{lazy}={f'[{SIDE}]' if value is None else value}")
        else:
            text = str(SIDE if value is None else value)
            overrides += [yaml, text.replace("[", "(").replace("]", ",)")]
    return overrides


def data(files, kind):
    """Overrides that name the data; the training set is the test set too."""
    if kind == "lazy":
        return [f"datasets.{s}.{k}={v}" for s, found in files.items() for k, v in found.items()]
    return [
        word
        for slot, found in files.items()
        for key, value in found.items()
        for word in (f"DATASETS.CUSTOM.{slot.upper()}.{key.upper()}", str(value))
    ]


def coco(shared_data, folder):
    """All training images, and four to test on."""
    root = shared_data / "coco_mini"
    content = json.loads((root / "annotations/instances_val.json").read_text())
    content["images"] = content["images"][:4]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (folder / "val.json").write_text(json.dumps(content))
    files = {"train": root / "annotations/instances_train.json", "val": folder / "val.json"}
    return {s: {"json": file, "images": root / "images" / s} for s, file in files.items()}


def steps(folder):
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [row for row in rows if "total_loss" in row]


@pytest.mark.parametrize(
    ("kind", "number"), [("yaml", 0), pytest.param("lazy", 1, marks=pytest.mark.long)]
)
def test_coco_and_a_branch_of_what_it_trained(kind, number, shared_data, tmp_path):
    """Of the other kind of config there is LVIS below; ``test_configs.py`` compares both."""
    output = ("OUTPUT_DIR", "train.output_dir", tmp_path)
    overrides = [
        *spelled([*COMMON, *SMALL_COCO, output], kind),
        *data(coco(shared_data, tmp_path), kind),
    ]
    file = str(model_zoo.get_config_file(COCO, kind))
    common = ["--config-file", file, "--device", "cpu"]
    assert main([*common, *overrides]) == 0
    losses = steps(tmp_path)
    assert len(losses) == 2
    assert all(torch.tensor(row["total_loss"]).isfinite() for row in losses)
    for name in ("loss_rpn_cls", "loss_cls0", "loss_centerness1", "loss_iou_aux1", "enc_loss_iou"):
        assert name in losses[0], name

    weights = tmp_path / "model_final.pth"
    branch = {"yaml": "MODEL.CODETR.EVALUATE_BRANCH", "lazy": "model.evaluate_branch"}[kind]
    found = {}
    for evaluated in (None, number):
        chosen = [] if evaluated is None else spelled([(branch, branch, number)], kind)
        given = spelled([("MODEL.WEIGHTS", "train.init_checkpoint", weights)], kind)
        assert main([*common, "--eval-only", *overrides, *given, *chosen]) == 0
        (results,) = tmp_path.glob("inference/*/coco_instances_results.json")
        found[evaluated] = json.loads(results.read_text())
        results.unlink()

    run = experiment(config.load(file, overrides), device="cpu", training=False)
    model = run.build_model().eval()
    checkpoint.load_weights(model, weights).require_complete()
    (batch,) = next(iter(zip(run.build_test_loader(run.test_names[0]))))
    given = batch[0]
    with torch.no_grad():
        images = model.preprocess(batch)
        maps = model.adapter(model.encode(images))
        for evaluated, results in found.items():
            if evaluated is None:
                expected = model(batch)[0]["instances"]
            else:
                head = model.auxiliary_heads[evaluated].detect(maps, images.image_sizes)[0]
                expected = detector_postprocess(head, given["height"], given["width"])
            first = [each for each in results if each["image_id"] == given["image_id"]]
            assert len(first) == len(expected) > 0
            scores = sorted((each["score"] for each in first), reverse=True)
            assert scores == pytest.approx(expected.scores.tolist(), abs=1e-5)
    assert len({json.dumps(each, sort_keys=True) for each in found.values()}) == 2


def test_lvis_with_jitter_copy_paste_rare_classes_and_federated_loss(shared_data, tmp_path):
    root = shared_data / "lvis_mini"
    entry = {
        "json": root / "annotations/lvis_v0.5_val_mini.json",
        "images": root / "images",
        "kind": "lvis",
    }
    output = ("OUTPUT_DIR", "train.output_dir", tmp_path)
    overrides = [
        *spelled([*COMMON, output], "lazy"),
        *data({"train": entry, "val": entry}, "lazy"),
        *SMALL_LVIS,
    ]
    file = str(model_zoo.get_config_file(LVIS, "lazy"))
    assert main(["--config-file", file, "--device", "cpu", *overrides]) == 0
    losses = steps(tmp_path)
    assert len(losses) == 2
    assert all(torch.tensor(row["total_loss"]).isfinite() for row in losses)
    assert {"dn_loss_cls", "loss_cls0", "loss_bbox1"} <= set(losses[0])

    run = experiment(config.load(file, overrides), device="cpu")
    federated = run.build_model().criterion.federated
    assert federated.log_weights.shape == (1230,)  # the file's numbers of images
    counts = {
        c["name"]: c["image_count"] for c in json.loads(entry["json"].read_text())["categories"]
    }
    assert federated.log_weights.exp().square().sum() == pytest.approx(
        sum(counts.values()), rel=1e-4
    )
    sample = next(iter(run.build_train_loader()))[0]
    assert sample["image"].shape == (3, SIDE, SIDE)
