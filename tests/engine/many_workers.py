"""What each of four processes does for ``test_many_processes``, all in one start."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from d2dense.engine.trainer import Trainer
from d2dense.layers import replace_sync_norms
from tests.engine import detectors
from tests.engine.fakes import FakeExperiment, make_batches
from tests.projects.fscascade import builders
from tests.projects.fscascade.test_roi_heads import VARIANTS

IMAGES, OBJECTS, STEPS = 4, 2, 2
# Objects of the two images of each of the pair.
COUNTS = {
    "unequal": [(5, 1), (0, 3)],
    "none_on_one": [(4, 3), (0, 0)],
    "none": [(0, 0), (0, 0)],
}
ARCHITECTURES = {
    "retinanet": detectors.retinanet_config,
    "faster_rcnn": lambda: detectors.tiny_config("FSCascade/faster_rcnn_tiny_shapes"),
    "cascade_mask_rcnn": lambda: detectors.tiny_config(norm="FrozenBN"),
}


def mask_rcnn_config():
    cfg = detectors.tiny_config(norm="FrozenBN")
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = False
    return cfg


ARCHITECTURES["mask_rcnn"] = mask_rcnn_config


def wrap(model, group=None):
    """As the trainer does: no search for unused parameters."""
    return DistributedDataParallel(model, process_group=group, broadcast_buffers=False)


def train(model, images, call=None) -> dict:
    """Take some plain gradient steps; return the first gradients and the final weights."""
    call = call or model
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        with EventStorage():
            sum(call(images).values()).backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    return {"gradients": gradients, "state": model.state_dict()}


def train_detector(group, ranks: int) -> dict:
    """This process's share of the batch, norms synchronised as a recipe with SyncBN has them."""
    torch.manual_seed(0)
    model = detectors.build(detectors.tiny_config(norm="SyncBN"))
    for module in model.modules():
        if isinstance(module, torch.nn.SyncBatchNorm):
            module.process_group = group
    replaced = replace_sync_norms(model)
    images = [detectors.image(n, OBJECTS) for n in range(dist.get_rank(), IMAGES, ranks)]
    torch.manual_seed(dist.get_rank())  # nothing may depend on what is drawn
    return {**train(model, images, wrap(model, group)), "replaced": replaced}


def exchange(model, batch, group) -> list[bool]:
    """Return whether every gradient is there, finite and the same in both processes."""
    call = wrap(Fixed(model, batch), group)
    with EventStorage():
        sum(call().values()).backward()
        call()  # here PyTorch complains of parameters that got no gradient
    gradients = [p.grad for p in call.parameters() if p.requires_grad]
    if any(each is None for each in gradients):
        return [False]
    flat = torch.cat([each.flatten() for each in gradients])
    first = flat.clone()
    dist.broadcast(first, 0, group=group)
    return [True, bool(torch.isfinite(flat).all()), torch.equal(first, flat)]


class Fixed(torch.nn.Module):
    """A model with its batch, so that every architecture is called alike."""

    def __init__(self, model, batch):
        super().__init__()
        self.model, self.batch = model, batch

    def forward(self):
        return self.batch(self.model)


def heads_with(counts, proposals=(40, 30)):
    """Return what calls FSCascade's heads on two images with so many objects."""

    def call(heads):
        targets = builders.targets(counts, masks=True)
        found = builders.proposals(proposals)
        return heads(None, builders.features(), found, targets)[1]

    return call


def exchange_all(rank: int, group) -> dict:
    found = {}
    for case, counts in COUNTS.items():
        for variant, settings in VARIANTS.items():
            heads = builders.heads(masks=True, **settings).train()
            found["heads", variant, case] = exchange(heads, heads_with(counts[rank]), group)
        images = [detectors.image(10 * rank + n, count) for n, count in enumerate(counts[rank])]
        for name, make in ARCHITECTURES.items():
            model = detectors.build(make())
            found["model", name, case] = exchange(model, lambda m, i=images: m(i), group)
    batch = heads_with((0, 0), (0, 0)) if rank else heads_with((4, 3))
    heads = builders.heads(masks=True).train()
    found["heads", "both", "no_regions"] = exchange(heads, batch, group)
    return found


def run(args) -> None:
    rank = comm.get_rank()
    pair = dist.new_group([0, 1])
    found = {}
    for norm in ("none", "SyncBN"):
        trainer = Trainer(FakeTraining(args.output_dir, norm=norm))
        trainer.train()
        found["fake", norm] = trainer.model.state_dict()
    found["detector", 4] = train_detector(None, 4)
    if rank < 2:
        found["detector", 2] = train_detector(pair, 2)
        found |= exchange_all(rank, pair)
    torch.save(found, Path(args.output_dir) / f"found{rank}.pth")


class FakeTraining(FakeExperiment):
    """Accumulation and clipping on the fake model; ``norm`` is none, BN or SyncBN."""

    def __init__(self, output_dir, *, norm):
        super().__init__(
            output_dir,
            batches=make_batches(8, 8),
            norm=norm != "none",
            max_iter=3,
            accumulation_steps=2,
            clip_enabled=True,
            clip_type="full_model",
            clip_value=0.5,
        )
        self.synchronised = norm == "SyncBN"

    def build_model(self):
        model = super().build_model()
        if self.synchronised:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model
