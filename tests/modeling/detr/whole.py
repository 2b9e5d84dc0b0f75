"""What tests of whole detectors share: images with objects, the part that is recorded, checks."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from d2dense.engine.recompute import enable_activation_checkpointing

CLASSES = 3


def image(height: int, width: int, seed: int = 0, boxes: int = 2) -> dict:
    """Noise with objects of 8 pixels."""
    g = torch.Generator().manual_seed(seed)
    target = Instances((height, width))
    corner = torch.rand(boxes, 2, generator=g) * 20
    target.gt_boxes = Boxes(torch.cat([corner, corner + 8], dim=1))
    target.gt_classes = torch.arange(boxes) % CLASSES
    pixels = torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8)
    return {"image": pixels, "instances": target, "height": height, "width": width}


class Transformer(nn.Module):
    """From images ``(N, 3, H, W)`` and their sizes ``(N, 2)`` without padding to logits and boxes
    of a detector.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, sizes=None):
        if sizes is None:
            sizes = images.new_tensor(images.shape[2:]).expand(len(images), -1)
        found = self.model.backbone(images)
        maps = [found[name] for name in self.model.in_features]
        if self.model.neck is not None:
            maps = self.model.neck(maps)
        memory = self.model.encoder(maps, sizes, (images.shape[2], images.shape[3]))
        return self.model.decode(memory, all_layers=False)


def check_trace(model: Transformer, others):
    """A trace of the transformer follows other batches and sizes ``(N, H, W)``; returned."""

    def inputs(batch, height, width):
        sizes = torch.tensor([[height - 6.0, width - 20.0 * i] for i in range(batch)])
        return torch.randn(batch, 3, height, width), sizes

    with torch.no_grad():
        traced = torch.jit.trace(model, inputs(1, 64, 96), check_trace=False)
        for given in others:
            given = inputs(*given)
            for ours, theirs in zip(traced(*given), model(*given), strict=True):
                assert torch.allclose(ours, theirs, atol=1e-4)
    return traced


def check_export(model: Transformer, batch: int) -> None:
    """A torch.export of the transformer follows other sizes."""
    rows, columns = (32 * torch.export.Dim(name, min=2, max=16) for name in ("rows", "columns"))
    program = torch.export.export(
        model,
        (torch.randn(batch, 3, 96, 64), torch.tensor([[90.0, 60.0]] * batch)),
        dynamic_shapes=({2: rows, 3: columns}, None),
        strict=False,
    )
    sizes = [[64.0, 130.0], [50.0, 160.0]]
    other = torch.randn(batch, 3, 64, 160), torch.tensor(sizes[:batch])
    with torch.no_grad():
        for ours, theirs in zip(program.module()(*other), model(*other), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)


def check_checkpointing(model, images, *, atol: float = 1e-6) -> None:
    """Computing four layers again in backward does not change the gradients."""
    gradients = []
    for switch in (False, True):
        if switch:
            assert enable_activation_checkpointing(model) == 4
        model.zero_grad()
        torch.manual_seed(1)
        sum(model(images).values()).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=atol) for a, b in zip(*gradients, strict=True))
