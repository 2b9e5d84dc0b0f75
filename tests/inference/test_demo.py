"""tools/demo.py: pictures and videos in, drawings and COCO json out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from d2dense import config
from d2dense.errors import run_tool


@pytest.fixture(scope="session")
def demo(repo_root):
    spec = importlib.util.spec_from_file_location("demo", repo_root / "tools" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tiny_cfg, tmp_path) -> list[str]:
    """Flags that name a tiny model with weights."""
    torch.manual_seed(0)
    torch.save({"model": config.build_model(tiny_cfg).state_dict()}, tmp_path / "model.pth")
    config.save(tiny_cfg, tmp_path / "config.yaml")
    flags = ["--config-file", tmp_path / "config.yaml", "--weights", tmp_path / "model.pth"]
    return [str(flag) for flag in flags]


def predictions(folder: Path) -> dict:
    return json.loads((folder / "predictions.json").read_text())


def make_video(path: Path, picture: np.ndarray, count: int) -> None:
    height, width = picture.shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (width, height))
    for index in range(count):
        writer.write(np.roll(picture, index, axis=0))
    writer.release()


def test_folder_of_pictures(demo, model, photo_folder, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--output", str(out), "--confidence-threshold", "0", "--batch-size", "2"]
    assert demo.main([*model, "--input", str(photo_folder), *flags]) == 0
    printed = capsys.readouterr()
    assert "3 pictures" in printed.out
    assert "FPS" in printed.out
    assert "3/3" in printed.err  # the progress bar
    content = predictions(out)
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "b.png", "c.PNG"]
    assert content["categories"][0] == {"id": 1, "name": "disc"}
    assert COCO(str(out / "predictions.json")).annToMask(content["annotations"][0]).any()
    for image in content["images"]:
        original = cv2.imread(str(photo_folder / image["file_name"]))
        drawn = cv2.imread(str(out / image["file_name"]))
        assert drawn.shape == original.shape
        assert (drawn != original).mean() > 0.05


def test_threshold_classes_and_top_k(demo, model, photo_folder, tmp_path):
    def run(*flags: str) -> list[dict]:
        out = tmp_path / "-".join(("out", *flags))
        arguments = [*model, "--input", str(photo_folder / "b.png"), "--output", str(out)]
        assert demo.main([*arguments, "--no-draw", *flags]) == 0
        assert [path.name for path in out.iterdir()] == ["predictions.json"]
        return predictions(out)["annotations"]

    everything = run("--confidence-threshold", "0")
    scores = sorted((a["score"] for a in everything), reverse=True)
    assert len(everything) == 15
    assert [a["score"] for a in run("--score-threshold", "0", "--top-k", "3")] == scores[:3]
    middle = str(scores[5])
    assert len(run("--confidence-threshold", middle)) in (5, 6)  # text may round the float
    assert run("--confidence-threshold", "1") == []
    some = everything[0]["category_id"]
    name = ["disc", "ring", "triangle", "square", "star", "cross", "crescent", "heart", "gear"]
    name = [*name, "arrow"][some - 1]
    kept = run("--confidence-threshold", "0", "--classes", name)
    assert {a["category_id"] for a in kept} == {some}
    assert len(kept) == sum(a["category_id"] == some for a in everything)


def test_video(demo, model, picture, tmp_path):
    make_video(tmp_path / "clip.avi", picture, 4)
    out = tmp_path / "out"
    flags = ["--output", str(out), "--confidence-threshold", "0", "--top-k", "2"]
    assert demo.main([*model, "--input", str(tmp_path / "clip.avi"), *flags]) == 0
    content = predictions(out)
    assert [i["file_name"] for i in content["images"]] == [f"clip.avi/{k:06d}" for k in range(4)]
    assert len(content["annotations"]) == 8
    drawn = cv2.VideoCapture(str(out / "clip.avi.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 4
    assert drawn.get(cv2.CAP_PROP_FPS) == pytest.approx(5)
    assert drawn.read()[1].shape == picture.shape


def test_unreadable_inputs_do_not_stop_the_others(demo, model, photo_folder, tmp_path, capsys):
    (photo_folder / "a.jpg").write_bytes(b"no picture")
    (photo_folder / "bad.mp4").write_bytes(b"no video")
    missing = str(tmp_path / "missing.png")
    out = tmp_path / "out"
    arguments = ["--input", str(photo_folder), missing, "--output", str(out)]
    assert demo.main([*model, *arguments]) == 1
    errors = capsys.readouterr().err
    for name in ("a.jpg", "bad.mp4", "missing.png"):
        assert f"{name}" in errors
    assert "3 of 5 inputs could not be read" in errors
    assert "Traceback" not in errors
    assert [i["file_name"] for i in predictions(out)["images"]] == ["b.png", "c.PNG"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes", "dics"], "did you mean 'disc'"),
        (["--confidence-threshold", "50"], "score threshold 50.0 is not within 0 to 1"),
        (["--score-threshold", "5"], "error: score threshold 5.0 is not within 0 to 1"),
        (["--top-k", "0"], "--top-k: '0'"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--input", "nothing*.jpg"], "no file matches"),
        (["MODEL.WEIGHT", "x"], "MODEL.WEIGHTS"),
        (["--opts", "MODEL.WEIGHT", "x"], "MODEL.WEIGHTS"),
        (["--config-file", "FSCascade/fscascade_tiny_shape"], "fscascade_tiny_shapes"),
    ],
)
def test_users_mistakes_are_one_line_and_exit_code_2(
    demo, model, photo_folder, tmp_path, capsys, flags, message
):
    arguments = [*model, "--input", str(photo_folder), "--output", str(tmp_path / "out"), *flags]
    assert run_tool(lambda: demo.main(arguments)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert message in errors[0]


def test_overrides_after_a_list_of_inputs_or_classes(demo):
    flags = ["--config-file", "f", "--output", "o"]
    args = demo.parse([*flags, "--input", "a.jpg", "b.jpg", "model.roi_heads.test_scores=stage1"])
    assert args.input == ["a.jpg", "b.jpg"]
    assert args.overrides == ["model.roi_heads.test_scores=stage1"]
    words = ["MODEL.ROI_HEADS.NUM_CLASSES", "3", "SEED", "1"]
    args = demo.parse([*flags, "--input", "a.jpg", "--classes", "CAR", "DOG", *words])
    assert (args.classes, args.overrides) == (["CAR", "DOG"], words)
    args = demo.parse([*flags, "--input", "a.jpg", "--opts", "a.b=1", "a.b=2"])
    assert args.overrides == ["a.b=1", "a.b=2"]


def test_error_lines_stand_alone_in_a_log_file(demo, model, photo_folder, tmp_path, capsys):
    (photo_folder / "a.jpg").write_bytes(b"no picture")
    arguments = [*model, "--input", str(photo_folder), "--output", str(tmp_path / "out")]
    assert demo.main(arguments) == 1
    errors = capsys.readouterr().err
    lines = [line for line in errors.split("\n") if "a.jpg" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


def test_inputs_are_never_overwritten(demo, model, photo_folder, capsys):
    before = (photo_folder / "a.jpg").read_bytes()
    arguments = [*model, "--input", str(photo_folder), "--output", str(photo_folder)]
    assert run_tool(lambda: demo.main(arguments)) == 2
    assert "overwritten" in capsys.readouterr().err
    assert (photo_folder / "a.jpg").read_bytes() == before


def test_semantic_model_writes_label_maps(demo, tmp_path, photo_folder):
    cfg = config.get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 15
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 16
    cfg.MODEL.SEM_SEG_HEAD.NORM = ""
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("shapes_val_sem_seg",)
    config.save(cfg, tmp_path / "config.yaml")
    out = tmp_path / "out"
    arguments = ["--config-file", str(tmp_path / "config.yaml")]
    arguments += ["--input", str(photo_folder / "b.png"), "--output", str(out)]
    assert demo.main([*arguments, "INPUT.MIN_SIZE_TEST", "64"]) == 0
    labels = cv2.imread(str(out / "labels" / "b.png.png"), cv2.IMREAD_UNCHANGED)
    assert labels.shape == (50, 70)
    assert labels.max() < 15
    assert predictions(out)["annotations"] == []
    assert (out / "b.png").is_file()
