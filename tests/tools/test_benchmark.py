"""The benchmark of models and peers: its plan, its arithmetic, and what becomes of failures."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.proposal_generator import StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import faster_rcnn, retinanet, rpn

from d2dense.errors import UserError
from d2dense.model_benchmark import catalogue, peers, report, turns
from d2dense.model_benchmark.cells import FAILED, MEASURED, NOT_MEASURED, Cell, Plan, Settings
from d2dense.model_benchmark.fixed_work import fix_work
from d2dense.model_benchmark.runner import Results, run
from d2dense.model_benchmark.subjects import BackboneSubject, Group
from tools import benchmark as tool

SETTINGS = Settings(size=(8, 8), batches=(1, 2), modes=("eager",), precisions=("fp32",), rounds=3)


class Network(nn.Module):
    def __init__(self, fail_in_training=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.fail_in_training = fail_in_training

    def forward(self, images):
        if self.training and self.fail_in_training:
            raise torch.OutOfMemoryError("no memory\nfor this")
        return [self.conv(images)]


def _refuse(size):
    raise ValueError("it cannot be built")


GROUP = Group(
    name="G",
    subjects=(
        BackboneSubject(name="ours", peer="theirs", builder=lambda size: Network()),
        BackboneSubject(name="theirs", library="x", builder=lambda size: Network(True)),
        BackboneSubject(name="broken", library="x", builder=_refuse),
    ),
)


def _cell(subject, phase="inference", batch=1, **more):
    return Cell(subject=subject, phase=phase, batch=batch, **more)


# ------------------------------------------------ the plan


def test_a_plan_goes_from_one_image_to_training_to_batches_to_compiled_models():
    settings = Settings(size=(8, 8), compile=("theirs",))
    plan = Plan.of(GROUP, settings)
    names = [each.name for each in plan.turns]
    assert names == [
        "inference, batch 1",
        "training",
        "inference, batch 8",
        "inference, batch 1, bf16",
        "training, bf16",
        "exported torchscript",
        "compiled",
    ]
    assert [each.rounds for each in plan.turns] == [3, 2, 1, 3, 2, 3, 3]
    assert [cell.precision for cell in plan.turns[4].cells] == ["bf16"] * 3
    # exported and compiled are what ratios are made of: ours, and the peers that are named
    assert [cell.subject for cell in plan.turns[5].cells] == ["ours", "theirs"]
    assert [cell.subject for cell in plan.turns[6].cells] == ["theirs"]
    ((cell, reason),) = plan.left_out
    assert (cell.subject, cell.mode) == ("ours", "compiled")
    assert "--compile" in reason


def test_a_group_trains_on_as_many_images_as_its_models_need():
    pooled = peers.torchvision_segmenter("deeplabv3_resnet50")
    for group, given, expected in (
        (GROUP, 1, 1),
        (Group(name="G", subjects=(*GROUP.subjects, pooled)), 1, 2),
        (Group(name="G", subjects=(*GROUP.subjects, pooled)), 3, 3),
    ):
        settings = Settings(size=(8, 8), modes=("eager",), training_batch=given)
        (found,) = (each for each in Plan.of(group, settings).turns if each.name == "training")
        assert {cell.batch for cell in found.cells} == {expected}


def test_patterns_choose_our_models_and_keep_their_peers():
    (group,) = catalogue.select(catalogue.KINDS["full"], ["HFGD/hfgd*"])
    ours = [each.name for each in group.subjects if each.peer]
    assert ours == ["HFGD/hfgd_r50_os4_pascal_context", "HFGD/hfgd_r50_os2_cityscapes"]
    assert sum(not each.peer for each in group.subjects) == 3
    with pytest.raises(UserError, match="HFDG"):
        catalogue.select(catalogue.KINDS["full"], ["HFDG/*"])


def test_every_headline_model_has_a_peer_in_its_group():
    names = set()
    for group in catalogue.KINDS["full"]:
        beside = {each.name for each in group.subjects if not each.peer}
        assert all(each.peer in beside for each in group.subjects if each.peer)
        names |= {each.name for each in group.subjects}
    assert names >= {
        "FSCascade/fscascade_r50_fpn_1x",
        "FSCascade/cascade_rcnn_r50_fpn_1x",
        "CEDNet/retinanet_cednet_next_t",
        "CEDNet/cascade_mask_rcnn_cednet_next_t",
        "CEDNet/upernet_cednet_next_t",
        "HFGD/semantic_fpn_r50_pascal_context",
        "HFGD/hfgd_r50_os4_pascal_context",
        "HFGD/hfgd_r50_os2_cityscapes",
        "CoDETR/deformable_detr_r50_1x",
        "CoDETR/co_deformable_detr_r50_1x",
        "CoDETR/co_dino_5scale_r50_1x",
    }


# ------------------------------------------------ equal work


@pytest.mark.parametrize(
    ("kind", "weights", "of_ten_classes"),
    [
        ("Faster R-CNN", detection.FasterRCNN_ResNet50_FPN_Weights, 10 * 5 * 1025),
        ("Mask R-CNN", detection.MaskRCNN_ResNet50_FPN_Weights, 10 * (5 * 1025 + 257)),
        ("RetinaNet", detection.RetinaNet_ResNet50_FPN_Weights, 10 * 9 * (9 * 256 + 1)),
    ],
)
def test_torchvisions_detectors_are_the_published_ones(kind, weights, of_ten_classes):
    """With 80 classes instead of 90."""
    with torch.device("meta"):
        model = peers.torchvision_detector(kind).builder((64, 96))
    count = sum(each.numel() for each in model.parameters())
    assert count == weights.COCO_V1.meta["num_params"] - of_ten_classes
    assert (model.transform.min_size, model.transform.max_size) == ((64,), 96)
    first = [p for n, p in model.backbone.body.named_parameters() if n.startswith("layer1.")]
    assert not any(each.requires_grad for each in first)


_PUBLISHED = Path(detectron2.__file__).parent / "model_zoo" / "configs"


@pytest.mark.skipif(not _PUBLISHED.is_dir(), reason="this detectron2 comes without its configs")
@pytest.mark.parametrize(
    ("kind", "published"),
    [
        ("Faster R-CNN", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"),
        ("CascadeROIHeads", "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"),
        ("CascadeROIHeads with masks", "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"),
        ("RetinaNet", "COCO-Detection/retinanet_R_50_FPN_1x.yaml"),
        ("SemSegFPNHead", "Misc/semantic_R_50_FPN_1x.yaml"),
    ],
)
def test_detectron2s_models_are_the_published_ones(kind, published):
    expected = get_cfg()
    expected.merge_from_file(str(_PUBLISHED / published))
    ours = peers.detectron2_config(kind)
    for cfg in (expected, ours):
        cfg.MODEL.WEIGHTS = ""
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 59
        if kind == "CascadeROIHeads":
            cfg.MODEL.MASK_ON = False
    assert ours.MODEL == expected.MODEL


def test_first_stages_leave_boxes_at_their_anchors():
    for head in (StandardRPNHead(in_channels=4, num_anchors=3), rpn.RPNHead(4, 3)):
        fix_work(head)
        scores, deltas = head([torch.randn(1, 4, 5, 5)])
        assert not deltas[0].any()
        assert scores[0].std() > 0


def test_every_region_is_of_one_class_above_the_threshold():
    ours = FastRCNNOutputLayers(
        ShapeSpec(channels=6),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        num_classes=80,
    )
    theirs = faster_rcnn.FastRCNNPredictor(6, 81)
    for head, background in ((ours, 80), (theirs, 0)):
        fix_work(head)
        scores, deltas = head(torch.randn(7, 6))
        over = scores.softmax(dim=1) > 0.05
        assert over.sum(dim=1).tolist() == [1] * 7
        assert not over[:, background].any()
        assert not deltas.any()


def test_every_anchor_is_of_one_class_above_the_threshold():
    classes = retinanet.RetinaNetClassificationHead(4, num_anchors=9, num_classes=81)
    fix_work(classes)
    over = classes([torch.randn(1, 4, 3, 3)]).sigmoid() > 0.05
    assert over.sum(dim=2).unique().tolist() == [1]


# ------------------------------------------------ measuring


@pytest.fixture(autouse=True)
def quick_collections():
    """Garbage is collected before every call; what was imported need not be gone through."""
    gc.freeze()
    yield
    gc.unfreeze()


def _measure(seconds, *, settings=SETTINGS):
    results, known = {}, {}
    subjects = {each.name: each for each in GROUP.subjects}

    def keep(cell, found):
        if found is not None:
            results[cell] = found

    for each in Plan.of(GROUP, settings).turns:
        turns.measure(each, subjects, settings, turns.Clock(seconds), known, keep)
    return results, known


def test_a_failure_costs_its_cell_alone():
    results, known = _measure(100)
    states = {(c.subject, c.phase, c.batch): each["state"] for c, each in results.items()}
    assert states == {
        ("ours", "inference", 1): MEASURED,
        ("theirs", "inference", 1): MEASURED,
        ("broken", "inference", 1): FAILED,
        ("ours", "training", 1): MEASURED,
        ("theirs", "training", 1): FAILED,
        ("broken", "training", 1): FAILED,
        ("ours", "inference", 2): MEASURED,
        ("theirs", "inference", 2): MEASURED,
        ("broken", "inference", 2): FAILED,
    }
    assert results[_cell("broken")]["reason"] == "ValueError: it cannot be built"
    assert "OutOfMemoryError: no memory" in results[_cell("theirs", "training")]["reason"]
    one = results[_cell("ours")]
    assert len(one["seconds"]) == 3
    assert min(one["seconds"]) > 0
    assert known["ours"]["params"] == 5 * 27
    assert known["ours"]["macs"] == 5 * 27 * 64


def test_exported_models_and_half_precision_are_measured_too():
    settings = Settings(size=(8, 8), batches=(1,), modes=("eager", "exported"))
    results, _ = _measure(100, settings=settings)
    ours = {(c.phase, c.precision, c.mode) for c in results if c.subject == "ours"}
    assert ours == {
        ("inference", "fp32", "eager"),
        ("inference", "bf16", "eager"),
        ("inference", "fp32", "exported torchscript"),
        ("training", "fp32", "eager"),
        ("training", "bf16", "eager"),
    }
    assert all(each["state"] == MEASURED for c, each in results.items() if c.subject == "ours")


def test_half_precision_is_autocast():
    seen = []

    class Seen(Network):
        def forward(self, images):
            (found,) = super().forward(images)
            seen.append((self.training, found.dtype))
            return [found]

    subject = BackboneSubject(name="ours", builder=lambda size: Seen())
    cells = tuple(
        Cell(subject="ours", phase=phase, batch=1, precision="bf16")
        for phase in ("inference", "training")
    )
    one = turns.Turns(name="t", rounds=1, cells=cells)
    known = {"ours": {"params": 1, "macs": 1}}
    turns.measure(
        one, {"ours": subject}, SETTINGS, turns.Clock(100), known, lambda cell, found: None
    )
    assert set(seen) == {(False, torch.bfloat16), (True, torch.bfloat16)}


def test_without_time_nothing_is_guessed():
    results, _ = _measure(-1)
    assert {each["state"] for each in results.values()} == {NOT_MEASURED}
    assert all("--minutes" in each["reason"] for each in results.values())


def test_larger_calls_are_begun_only_if_they_fit():
    known = {"ours": {"params": 1, "macs": 1, "seconds": 2.0}}
    found = {}
    for batch, seconds in ((4, 15.0), (4, 60.0)):
        cell = _cell("ours", batch=batch)
        one = turns.Turns(name="t", rounds=1, cells=(cell,))
        subjects = {"ours": GROUP.subjects[0]}
        keep = lambda c, each: found.setdefault(seconds, each) if each else None  # noqa: B023, E731
        turns.measure(one, subjects, SETTINGS, turns.Clock(seconds), known, keep)
    # 8 seconds before the round and 8 in it
    assert (found[15.0]["state"], found[60.0]["state"]) == (NOT_MEASURED, MEASURED)


# ------------------------------------------------ processes


_WORKER = """
import json, os, signal, sys, time
request = json.load(sys.stdin)
log = open(sys.argv[1], "a")
given = [request["done"], [cell["subject"] for cell in request["failed"]]]
print(json.dumps(given), file=log, flush=True)
def say(**line):
    print(json.dumps(line), flush=True)
failed = [(c["subject"], c["phase"], c["batch"]) for c in request["failed"]]
for phase, batch in (("inference", 1), ("training", 1), ("inference", 2)):
    for subject in ("ours", "theirs", "broken"):
        if (subject, phase, batch) in failed or f"{phase}, batch {batch}" in request["done"]:
            continue
        cell = dict(subject=subject, phase=phase, batch=batch, precision="fp32", mode="eager")
        say(trying=cell)
        if (subject, phase) == ("theirs", "inference"):
            os.kill(os.getpid(), signal.SIGKILL)
        if (subject, phase) == ("ours", "training"):
            sys.exit("a library's last words")
        if sys.argv[2] == "slow":
            time.sleep(60)
        say(cell=cell, found={"state": "measured", "seconds": [1.0], "peak": None})
    say(trying=None)
say(known={"ours": {"params": 7, "macs": 8}})
"""


def _run(tmp_path, how="fast", seconds=100.0, results=None):
    results = Results() if results is None else results
    script, log = tmp_path / "worker.py", tmp_path / "log"
    script.write_text(_WORKER)
    log.write_text("")
    run(
        [GROUP],
        SETTINGS,
        results,
        kind="quick",
        seconds=seconds,
        save=lambda: None,
        say=lambda text: None,
        worker=(sys.executable, "-S", str(script), str(log), how),
    )
    return results, [json.loads(line) for line in log.read_text().splitlines()]


def test_a_dead_process_costs_a_cell_and_another_one_goes_on(tmp_path):
    results, requests = _run(tmp_path)
    found = results.cells["G"]
    failed = {str(cell): each["reason"] for cell, each in found.items() if each["state"] == FAILED}
    assert len(found) == 9
    assert set(failed) == {
        "theirs, inference, batch 1, fp32, eager",
        "theirs, inference, batch 2, fp32, eager",
        "ours, training, batch 1, fp32, eager",
    }
    assert "SIGKILL" in failed["theirs, inference, batch 1, fp32, eager"]
    words = "code 1: a library's last words"
    assert words in failed["ours, training, batch 1, fp32, eager"]
    assert results.known == {"G": {"ours": {"params": 7, "macs": 8}}}
    assert requests[0] == [[], []]
    assert requests[1] == [[], ["theirs"]]
    assert requests[-1][0] == ["inference, batch 1", "training"]
    # all is settled: going on starts no process
    assert _run(tmp_path, results=results)[1] == []
    # what was lost is measured again, and nothing else
    lost = [cell for cell in found if cell.batch == 2]
    for cell in lost:
        del found[cell]
    (request,) = _run(tmp_path, results=results)[1][:1]
    assert request[0] == ["inference, batch 1", "training"]
    assert set(lost) <= set(found)


def test_a_process_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    from d2dense.model_benchmark import runner

    monkeypatch.setattr(runner, "_GRACE", 0.5)
    monkeypatch.setattr(runner, "_LEAST", 0.0)
    results, requests = _run(tmp_path, "slow", seconds=1.0)
    assert len(requests) == 1
    assert {each["state"] for each in results.cells["G"].values()} == {NOT_MEASURED}


# ------------------------------------------------ tables


def test_ratios_are_medians_over_rounds_and_by_macs():
    found = {
        _cell("ours"): [2.0, 3.0, 8.0],
        _cell("theirs"): [1.0, 2.0, 2.0],
        _cell("ours", batch=2): [4.0],
        _cell("ours", precision="bf16"): [1.0, 1.5, 2.0],
        _cell("ours", "training"): [9.0, 9.0],
        _cell("theirs", "training"): [3.0, 6.0],
    }
    cells = {c: {"state": MEASURED, "seconds": s, "peak": 2**20} for c, s in found.items()}
    cells[_cell("broken")] = {"state": FAILED, "reason": "why"}
    known = {"ours": {"params": 2_000_000, "macs": 6 * 10**9}, "theirs": {"macs": 4 * 10**9}}
    results = Results(cells={"G": cells}, known={"G": known})
    settings = dataclasses.replace(SETTINGS, precisions=("fp32", "bf16"))
    tables = report.tables([GROUP], settings, Results.from_dict(results.as_dict()))
    ours, theirs, broken = tables["Summary"]
    assert ours["time ratio"] == 2.0  # of 2, 1.5 and 4
    assert ours["MAC ratio"] == 1.5
    assert ours["time / MAC ratio"] == pytest.approx(2.0 / 1.5)
    assert ours["training time ratio"] == 2.25  # of 3 and 1.5
    assert (ours["ms"], ours["images/s, batch 2"], ours["M params"]) == (3000.0, 0.5, 2.0)
    assert (theirs["ms"], theirs["M params"], theirs["images/s, batch 2"]) == (2000.0, None, None)
    assert broken["ms"] is None
    modes = tables["Precisions and modes"][0]
    assert (modes["bf16 eager ms"], modes["bf16 eager ratio"]) == (1500.0, 0.5)
    assert [row["beside"] for row in tables["Ratios to every peer"]] == ["theirs", "broken"]
    assert tables["Not measured"] == [
        {"what": "inference, batch 1, fp32, eager", "of": "broken", "state": FAILED, "why": "why"}
    ]


def test_files_are_named_after_the_machine():
    cpu = {"device": "cpu", "cpu": "Intel(R) Core(TM) i7-8700K CPU @ 3.70GHz", "cores": 12}
    assert report.slug(cpu) == "intel_core_i7_8700k_12_cores"
    cpu["cpu"] = "AMD EPYC 7763 64-Core Processor"
    assert report.slug(cpu) == "amd_epyc_7763_12_cores"
    assert report.slug({"device": "NVIDIA H100 80GB HBM3"}) == "nvidia_h100_80gb_hbm3"


# ------------------------------------------------ the command


def test_the_command_measures_writes_and_goes_on(tmp_path, capsys):
    flags = ["--quick", "--models", "backbone*", "--device", "cpu", "--output", str(tmp_path)]
    flags += ["--rounds", "1", "--batch", "1", "--modes", "eager", "--precision", "fp32"]
    assert tool.main(flags) == 0
    (path,) = tmp_path.glob("machine_*.json")
    saved = json.loads(path.read_text())
    ours, theirs = saved["rows"]["Summary"]
    assert ours["model"] == "backbone of CEDNet/retinanet_cednet_tiny_shapes"
    assert (ours["peer"], theirs["peer"]) == (theirs["model"], "")
    for row in (ours, theirs):
        numbers = [row["ms"], row["GMAC"], row["images/s, batch 1"], row["s / training step"]]
        assert min(numbers) > 0
    assert ours["time / MAC ratio"] == pytest.approx(ours["time ratio"] / ours["MAC ratio"])
    assert "Not measured" not in saved["rows"]
    text = path.with_suffix(".md").read_text()
    assert "## Summary" in text
    assert str(tmp_path) in saved["command"]

    # nothing is left to measure
    capsys.readouterr()
    assert tool.main([*flags, "--resume"]) == 0
    assert "taking turns" not in capsys.readouterr().out
    assert json.loads(path.read_text())["results"] == saved["results"]

    with pytest.raises(UserError, match="rounds: 1, now 2"):
        tool.main([*flags, "--resume", "--rounds", "2"])


def test_mistakes_are_named(tmp_path):
    for flags, words in (
        (["--resume", "--quick", "--output", str(tmp_path)], "does not exist"),
        (["--formats", "onxn"], "did you mean|onnx"),
        (["--rounds", "0"], "--rounds: '0' is not a whole number of 1 or more"),
        (["--models", "nothing*"], "fits none"),
        (["--size", "64", "-1"], "--size: '-1' is not"),
    ):
        with pytest.raises(UserError, match=words):
            tool.main([*flags, "--device", "cpu"])
