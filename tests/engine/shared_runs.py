"""Runs of two processes that share model or optimizer out in each way; see test_parallel.py.

All of them are one start of two processes, since starting costs more than running.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import timm
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.modeling.backbone.swin import SwinTransformer
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import nn

from d2dense import config
from d2dense.engine.recompute import blocks
from d2dense.engine.trainer import Trainer
from d2dense.errors import UserError
from d2dense.solver.optim import param_groups
from tests.engine.fakes import FakeExperiment, make_batches

MODES = ("none", "zero1", "fsdp")
STEPS = 6
SCALE = 2.0**100
PLAIN = {"max_iter": STEPS, "test_names": ()}
# name -> settings of a run and its optimizer
RUNS = {
    "adamw": {
        **PLAIN,
        "clip_enabled": True,
        "clip_type": "full_model",
        "clip_value": 0.05,
        "ema_enabled": True,
        "ema_decay": 0.6,
        "accumulation_steps": 2,
        "checkpoint_period": 3,
        "eval_period": 3,
        "test_names": ("uneven",),
        "activation_checkpointing": True,
    },
    "sgd": {**PLAIN, "clip_enabled": True, "clip_type": "norm", "clip_value": 0.02},
    "value": {**PLAIN, "clip_enabled": True, "clip_type": "value", "clip_value": 0.02},
    "largest": {
        **PLAIN,
        "clip_enabled": True,
        "clip_type": "full_model",
        "clip_value": 0.01,
        "clip_norm_type": math.inf,
    },
    "bfloat16": {**PLAIN, "amp_enabled": True, "amp_dtype": "bfloat16"},
    "skip": {**PLAIN, "non_finite_policy": "skip"},
    "scaled": PLAIN,
}


class ConvBlock(nn.Module):
    """Residual; two processes cannot share 3 channels evenly, and one of them has no part of 1."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(1, channels)
        self.gate = nn.Linear(channels, 1)

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x)))
        return x + y * self.gate(y.mean(dim=(2, 3))).sigmoid()[..., None, None]


class DeepModel(nn.Module):
    """What detectors do that sharing can stumble over.

    A frozen block, frozen norms, a block that runs twice, a method that is not forward, tied
    weights, a head that some images use only, a layer that no loss uses.
    """

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.frozen_norm = FrozenBatchNorm2d(3)
        self.blocks = nn.ModuleList([ConvBlock(3) for _ in range(3)])
        self.blocks[0].requires_grad_(False)
        self.head = nn.Linear(3, 2)
        self.tied = self.head
        self.sometimes = nn.Linear(3, 2)
        self.never = nn.Linear(3, 3)

    def features(self, images):
        x = self.frozen_norm(self.stem(images))
        for block in (*self.blocks, self.blocks[1]):
            x = block(x)
        return x.mean(dim=(2, 3))

    def forward(self, batch):
        if any(each.get("fails") for each in batch):
            raise FloatingPointError("the boxes diverged")
        images = torch.stack([each["image"] for each in batch])
        features = self.features(images)
        outputs = self.head(features)
        if not self.training:
            return [{"value": output} for output in outputs]
        target = torch.stack([each["target"] for each in batch]).to(outputs)
        errors = (outputs.float() - target).square().mean(dim=0)
        losses = {"loss_first": errors[0], "loss_second": self.tied(features).square().mean()}
        if any(each.get("extra") for each in batch):
            losses["loss_second"] = losses["loss_second"] + self.sometimes(features).abs().mean()
        return losses


class DeepExperiment(FakeExperiment):
    """Two parameter groups; only the first process has test images."""

    def __init__(self, output_dir, *, kind, **settings):
        super().__init__(
            output_dir, batches=make_batches(8, 4), find_unused_parameters=True, **settings
        )
        self.kind = kind
        for batch in self.batches[::2]:
            batch[1]["extra"] = True  # on the second process
        if kind == "skip":
            self.batches[2][1]["image"].fill_(math.nan)
            self.batches[2][1]["file_name"] = "broken.jpg"
        if kind == "scaled":  # a finite loss, whose scaled gradient is not
            self.batches[2][1]["target"].fill_(1e9)

    def build_model(self):
        return DeepModel()

    def build_optimizer(self, model):
        bias = [p for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
        rest = [p for n, p in model.named_parameters() if p.requires_grad and p.dim() > 1]
        norm = [p for n, p in model.named_parameters() if n.endswith("norm.weight")]
        norm = [p for p in norm if p.requires_grad]
        groups = [
            {"params": rest, "lr": 0.02},
            {"params": bias + norm, "lr": 0.04, "weight_decay": 0.0},
        ]
        if self.kind in ("adamw", "skip"):
            return torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1, fused=True)
        return torch.optim.SGD(groups, lr=0.02, momentum=0.9, weight_decay=0.1)

    def build_test_loader(self, name):
        return images_of_test() if comm.is_main_process() else []


def images_of_test():
    return make_batches(3, 1, seed=9)


def deep(folder, kind, mode, *, resume=False) -> Trainer:
    experiment = DeepExperiment(folder, kind=kind, sharding=mode, **RUNS[kind])
    trainer = Trainer(experiment, resume=resume)
    if kind == "scaled":  # what float16 needs, without float16
        trainer.step.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    return trainer


def run_all(args) -> None:
    folder = Path(args.output_dir)
    held = {}
    for kind in RUNS:
        for mode in MODES:
            trainer = deep(folder / kind / mode, kind, mode)
            trainer.train()
            held[f"{kind}-{mode}"] = sizes(trainer)
    torch.save(held, folder / f"held{comm.get_rank()}.pth")
    for saved in MODES:
        for mode in MODES:
            resume(folder, saved, mode, to=folder / "adamw" / f"{saved}-{mode}")
    for name in LEVERS:
        lever(folder / "levers" / name, name)
    for name in REAL:
        for mode in MODES:
            real(folder / name / mode, name, mode)
    disagree(folder / "disagree")
    fail(folder / "fail")


def resume(folder, saved, mode, *, to) -> None:
    """Go on with what ``saved`` left after three steps."""
    if comm.is_main_process():
        to.mkdir(parents=True)
        shutil.copy(folder / "adamw" / saved / "model_0000002.pth", to)
        (to / "last_checkpoint").write_text("model_0000002.pth")
    comm.synchronize()
    trainer = deep(to, "adamw", mode, resume=True)
    assert trainer.completed == 3
    trainer.train()


def sizes(trainer) -> dict[str, int]:
    """Count what this process holds."""
    optimizer = trainer.optimizer
    state = [v for entries in optimizer.state.values() for v in entries.values()]
    return {
        "weights": sum(p.numel() for p in trainer.parallel.local(trainer.model.parameters())),
        "state": sum(
            p.numel()
            for p in trainer.parallel.local([v for v in state if v is not None])
            if p.dim()
        ),
    }


# what saves memory without changing the result, apart from rounding
LEVERS = {
    "plain": {},
    "recompute": {"activation_checkpointing": True},
    "accumulate": {"accumulation_steps": 2},
    "bfloat16": {"amp_enabled": True, "amp_dtype": "bfloat16"},
    "all": {
        "activation_checkpointing": True,
        "accumulation_steps": 2,
        "amp_enabled": True,
        "amp_dtype": "bfloat16",
        "sharding": "fsdp",
    },
}


def lever(folder, name) -> None:
    """Three steps of the same 4 images each, however many processes and parts there are."""
    experiment = DeepExperiment(
        folder, kind="sgd", log_period=1, **{**RUNS["sgd"], "max_iter": 3}, **LEVERS[name]
    )
    batches = make_batches(3, 4)
    if name in ("accumulate", "all"):
        batches = [part for batch in batches for part in (batch[:2], batch[2:])]
    experiment.batches = batches
    Trainer(experiment).train()


class Classifier(nn.Module):
    """A backbone and the means of its features as outputs."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, batch):
        features = self.backbone(torch.stack([each["image"] for each in batch]))
        features = features if isinstance(features, torch.Tensor) else list(features.values())[-1]
        target = torch.stack([each["target"] for each in batch])
        return {"loss": (features.flatten(1).mean(dim=1) - target[:, 0]).square().mean()}


class RealExperiment(FakeExperiment):
    """A model that others wrote; ``name`` is one of :data:`REAL`."""

    def __init__(self, output_dir, *, name, **settings):
        batches = REAL[name][1]()
        super().__init__(output_dir, batches=batches, test_names=(), max_iter=2, **settings)
        self.name = name

    def build_model(self):
        return REAL[self.name][0]().train()

    def build_optimizer(self, model):
        groups = param_groups(model, base_lr=0.01, weight_decay=0.1, weight_decay_norm=0.0)
        return torch.optim.SGD(groups, lr=0.01, momentum=0.9)


def swin():
    return Classifier(
        SwinTransformer(
            embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=2, out_indices=(1,)
        )
    )


def vit_of_timm():
    return Classifier(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3))


def synchronised():
    return Classifier(nn.Sequential(*(BasicBlock(3, 3, norm="SyncBN") for _ in range(3))))


def cascade():
    return config.build_model(config.load("FSCascade/fscascade_tiny_shapes"), device="cpu")


def pictures(count=2):
    batches = make_batches(count, 4)
    for each in (image for batch in batches for image in batch):
        each["image"] = each["image"].repeat(1, 6, 6)[:, :32, :32]
    return batches


def scenes(count=2):
    """Images with boxes; those of the second process in the second step have none."""
    batches = make_batches(count, 4)
    for step, batch in enumerate(batches):
        for index, each in enumerate(batch):
            each["image"] = (each["image"].repeat(1, 11, 11)[:, :64, :64] * 50 + 100).clamp(0, 255)
            found = 0 if step == 1 and index % 2 else 2
            boxes = torch.tensor([[4.0, 4.0, 30.0, 28.0], [20.0, 10.0, 60.0, 50.0]])[:found]
            each["instances"] = Instances((64, 64), gt_boxes=Boxes(boxes))
            each["instances"].gt_classes = torch.arange(found)
            each["height"] = each["width"] = 64
    return batches


REAL = {
    "cascade": (cascade, scenes),
    "swin": (swin, pictures),
    "timm": (vit_of_timm, pictures),
    "synchronised": (synchronised, pictures),
}


def real(folder, name, mode) -> None:
    """Two steps; under FSDP with activation checkpointing, which changes nothing either."""
    experiment = RealExperiment(
        folder, name=name, sharding=mode, activation_checkpointing=mode == "fsdp"
    )
    trainer = Trainer(experiment)
    trainer.train()
    if mode == "fsdp":
        note = [type(each).__name__ for each in blocks(trainer.model)]
        assert note
        assert all(each.startswith("FSDP") for each in note), note


class Skipping(DeepModel):
    """Leaves out a block's result for some images: FSDP cannot reduce its gradients then."""

    def features(self, images):
        x = super().features(images)
        return x.detach() if self.training and comm.get_rank() else x


def disagree(folder) -> None:
    experiment = DeepExperiment(folder, kind="sgd", sharding="fsdp", **RUNS["sgd"])
    experiment.build_model = Skipping
    try:
        Trainer(experiment).train()
    except UserError as error:
        (folder / f"error{comm.get_rank()}.txt").write_text(str(error))


def fail(folder) -> None:
    """The forward pass of the second process fails in the third step: this ends both."""
    experiment = DeepExperiment(folder, kind="sgd", sharding="fsdp", **RUNS["sgd"])
    experiment.batches[2][1].update(fails=True, file_name="broken.jpg")
    Trainer(experiment).train()
