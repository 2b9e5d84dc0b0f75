"""Configs: yaml equals lazy, every switch from both kinds, the tool's table, a short training."""

import json

import pytest
import torch

from d2dense import config, model_zoo
from d2dense.config import resolve_class_counts
from d2dense.errors import UserError
from tests.projects import parity
from tests.projects.parity import KINDS, on_meta, settings_of
from tools import analyze_model

NAMES = [name for name in model_zoo.list_models("yaml") if name.startswith("HFGD/")]
TINY = [name for name in NAMES if "tiny" in name]


def test_names_that_users_rely_on_have_both_kinds():
    fixed = (
        "semantic_fpn_r50_pascal_context",
        "hfgd_r50_os4_pascal_context",
        "hfgd_r50_os2_cityscapes",
        "sa_car_r50_d8_pascal_context",
        "hfgd_tiny_shapes",
        "semantic_fpn_tiny_shapes",
    )
    assert {f"HFGD/{name}" for name in fixed} <= set(NAMES)
    assert set(NAMES) <= set(model_zoo.list_models("lazy"))


@pytest.mark.parametrize("name", NAMES)
def test_both_kinds_give_the_same_model_and_run(name):
    parity.check_model_and_run(name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train", [True, False])
def test_both_kinds_read_data_alike(name, train):
    parity.check_data(name, train=train)


@pytest.mark.parametrize("name", TINY)
def test_both_kinds_start_from_the_same_values(name):
    parity.check_start(name)


# ------------------------------------------------ switches

# yacs spelling, lazy spelling below model.sem_seg_head, value that is not the default
SWITCHES = [
    ("HFGM.AXIAL_ATTENTION", "axial_attention", False),
    ("HFGM.AA_HEADS", "aa_heads", 2),
    ("HFGM.AA_RESIDUAL", "aa_residual", False),
    ("HFGM.STOP_GRAD_FEATURES", "stop_grad_features", False),
    ("HFGM.STOP_GRAD_KERNELS", "stop_grad_kernels", False),
    ("HFGM.ENABLED", "hfgm", False),
    *(("CAE.NAME", "encoder", name) for name in ("identity", "aspp", "ocr", "self_attention")),
    ("CAE.CHANNELS", "encoder_channels", 20),
    ("CAE.KEY_CHANNELS", "key_channels", 3),
    ("CAE.LEAD_CONVS", "lead_convs", 1),
    ("CAE.LEAD_KERNEL", "lead_kernel", 3),
    ("UPSAMPLER.OUT_STRIDE", "out_stride", 1),
    ("CAR.INTRA", "car.intra", False),
    ("CAR.C2C", "car.c2c", False),
    ("CAR.C2P", "car.c2p", False),
    ("CAR.INTRA_WEIGHT", "car.intra_weight", 0.5),
    ("CAR.C2C_WEIGHT", "car.c2c_weight", 0.5),
    ("CAR.C2P_WEIGHT", "car.c2p_weight", 0.5),
    ("CAR.C2C_THRESHOLD", "car.c2c_threshold", 0.125),
    ("CAR.C2P_THRESHOLD", "car.c2p_threshold", 0.125),
    ("CAR.C2P_MASK_IGNORED", "car.c2p_mask_ignored", True),
    ("CAR.GLOBAL_MEANS", "car.global_means", False),
    ("NORM_EPS", "norm_eps", 0.5),
    ("NORM_MOMENTUM", "norm_momentum", 0.5),
    ("LOSS_NORMALIZER", "loss_normalizer", "valid"),
    ("COARSE_WEIGHT", "coarse_weight", 0.25),
    ("AUXILIARY_WEIGHT", "auxiliary_weight", 0.25),
]


def everything(model):
    """What a switch can change: modules, plain attributes, eps and momentum of norms."""
    head = model.sem_seg_head
    norms = [(m.eps, m.momentum) for m in head.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    return str(head), settings_of(head), norms


@pytest.mark.parametrize(("key", "argument", "value"), SWITCHES)
def test_every_switch_works_from_both_kinds(key, argument, value):
    name = "HFGD/hfgd_tiny_shapes"
    by_yaml = everything(on_meta(name, "yaml", f"MODEL.HFGD.{key}={value}"))
    by_lazy = everything(on_meta(name, "lazy", f"model.sem_seg_head.{argument}={value}"))
    assert by_yaml == by_lazy
    assert by_yaml != everything(on_meta(name, "yaml"))


@pytest.mark.parametrize("upsampler", ["sfpn", "none"])
def test_upsamplers_work_from_both_kinds(upsampler):
    name, hfgm = "HFGD/hfgd_tiny_shapes", upsampler != "none"
    by_yaml = on_meta(
        name,
        "yaml",
        f"MODEL.HFGD.UPSAMPLER.NAME={upsampler}",
        "MODEL.HFGD.UPSAMPLER.OUT_STRIDE=4",
        f"MODEL.HFGD.HFGM.ENABLED={hfgm}",
    )
    head = "model.sem_seg_head"
    by_lazy = on_meta(
        name, "lazy", f"{head}.upsampler={upsampler}", f"{head}.out_stride=4", f"{head}.hfgm={hfgm}"
    )
    assert everything(by_yaml) == everything(by_lazy)
    assert (by_yaml.sem_seg_head.upsampler is None) == (upsampler == "none")


MISTAKES = [
    (["encoder=resnet"], "expected one of identity, aspp, ocr, self_attention, car"),
    (["upsampler=fpn"], "did you mean 'sfpn'|expected one of none, sfpn, usfpn"),
    (["upsampler=none"], "HFGM guides an upsampled map"),
    (["upsampler=sfpn"], "sfpn ends at output stride 4, not 2"),
    (["out_stride=3"], "expected 4, 2 or 1"),
    (["aa_heads=5"], "32 channels cannot be split into 5"),
    (["loss_normalizer=some"], "expected one of all, valid"),
    (["in_features=[res3,res4,res5]"], "strides 4, 8, 16 and 32"),
    (["in_features=[p2,res3,res4,res5]"], "takes the map 'p2'"),
    (["num_classes=1"], "CAR compares classes"),
]


@pytest.mark.parametrize(("overrides", "words"), MISTAKES)
def test_what_does_not_go_together_is_one_line(overrides, words):
    items = [f"model.sem_seg_head.{each}" for each in overrides]
    with pytest.raises(UserError, match=words):
        on_meta("HFGD/hfgd_tiny_shapes", "lazy", *items)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_list_of_another_length_is_named_before_training(kind, tmp_path, monkeypatch):
    """15 classes in the data; the message says which key to change."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    key = {"yaml": "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "lazy": "model.sem_seg_head.num_classes"}[kind]
    cfg = config.load(model_zoo.get_config_file("HFGD/hfgd_tiny_shapes", kind), [f"{key}=16"])
    with pytest.raises(UserError, match=key):
        resolve_class_counts(cfg)


# ------------------------------------------------ the tool and training


def test_the_analysis_tool_prints_the_table(tmp_path, capsys):
    report = tmp_path / "costs.json"
    argv = ["--config-file", "HFGD/hfgd_tiny_shapes", "--json", str(report), "--depth", "3"]
    analyze_model.main([*argv, "--input-size", "65", "65"])
    printed = capsys.readouterr().out
    found = json.loads(report.read_text())
    names = [f"sem_seg_head.{part}" for part in ("encoder", "classifier", "hfgm.attention")]
    names += [f"sem_seg_head.upsampler.{part}" for part in ("laterals", "branches", "end")]
    for name in ["backbone", *names]:
        assert name in printed
        assert found["modules"][name]["params"] > 0
        assert found["modules"][name]["macs"] > 0
    # the linear features of CAR are folded: 48 x 48 weights and 48 biases less
    assert found["params_training"] - found["params"] == 48 * 49


def test_the_tiny_model_fits_two_images():
    """Both cross entropies fall far below ln K, and the fine one sees what the coarse one cannot:
    lines of three pixels at a stride of 32.
    """
    torch.manual_seed(0)
    model = model_zoo.get_model("HFGD/hfgd_tiny_shapes").train()
    generator = torch.Generator().manual_seed(1)
    batch = []
    for k in range(2):
        labels = torch.zeros(129, 129, dtype=torch.int64)
        labels[:, 20 + 30 * k :: 40] = labels[:, 21 + 30 * k :: 40] = 1
        labels[:, 22 + 30 * k :: 40] = 1
        labels[64:, :64] = 2 + k
        image = labels[None].repeat(3, 1, 1) * torch.tensor([60, 30, 80]).view(3, 1, 1)
        noise = torch.randint(0, 20, (3, 129, 129), generator=generator)
        batch.append({"image": (image + noise).to(torch.uint8), "sem_seg": labels})
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(60):
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert float(losses["loss_fine"].detach()) < 0.35  # ln 15 is 2.7
    assert float(losses["loss_coarse"].detach()) < 0.9
    head, truth = model.sem_seg_head, torch.stack([each["sem_seg"] for each in batch])
    with torch.no_grad():  # with the batch's statistics: running ones lag behind
        images = torch.stack([model._normalised(each["image"]) for each in batch])
        features = model.backbone(images)
        found = [head.fine_scores(features), head.coarse_scores(features)]
    fine, coarse = (
        torch.nn.functional.interpolate(each, (129, 129), mode="bilinear", align_corners=True)
        for each in found
    )
    thin = truth == 1
    overlap = [
        float(((each.argmax(1) == 1) & thin).sum() / ((each.argmax(1) == 1) | thin).sum())
        for each in (fine, coarse)
    ]
    assert overlap[0] > 0.5
    assert overlap[0] > overlap[1] + 0.2
