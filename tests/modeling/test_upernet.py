"""UperNet head: sizes, losses, TorchScript, and its place in Detectron2's segmentor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec

from d2dense.modeling.upernet import UperNetHead

SHAPES = {
    name: ShapeSpec(channels=channels, stride=stride)
    for name, channels, stride in (("c2", 6, 4), ("c3", 8, 8), ("c4", 10, 16), ("c5", 12, 32))
}


def head(**options) -> UperNetHead:
    torch.manual_seed(0)
    options = {"norm": "BN", "auxiliary_feature": "c4", "auxiliary_channels": 4, **options}
    return UperNetHead(
        input_shape=SHAPES, in_features=list(SHAPES), num_classes=5, channels=8, **options
    )


def features(height: int, width: int, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(
            batch, s.channels, -(-height // s.stride), -(-width // s.stride), generator=generator
        )
        for name, s in SHAPES.items()
    }


@torch.no_grad()
def test_scores_cover_the_image_at_any_size():
    model = head().eval()
    for height, width in ((64, 96), (50, 33), (1, 1)):
        scores, losses = model(features(height, width))
        assert scores.shape == (2, 5, -(-height // 4) * 4, -(-width // 4) * 4)
        assert losses == {}


def test_losses_are_weighted_means_over_labelled_pixels():
    model = head(dropout=0.0, loss_weight=2.0, auxiliary_loss_weight=0.25).train()
    maps = features(64, 64)
    targets = torch.randint(0, 5, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    targets[0, :20] = 255
    _, losses = model(maps, targets)
    for name, scores, weight in (
        ("loss_sem_seg", model.scores(maps), 2.0),
        ("loss_sem_seg_aux", model.auxiliary_scores(maps), 0.25),
    ):
        scores = F.interpolate(scores, (64, 64), mode="bilinear", align_corners=False)
        chances = scores.log_softmax(1).gather(1, targets.clamp(max=4)[:, None])[:, 0]
        expected = -weight * chances[targets != 255].mean()
        assert float(losses[name].detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_nothing_labelled_gives_zero_losses_with_gradients():
    model = head().train()
    _, losses = model(features(64, 64), torch.full((2, 64, 64), 255))
    assert {float(loss.detach()) for loss in losses.values()} == {0.0}
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_auxiliary_classifier_is_optional():
    model = head(auxiliary_feature=None).train()
    assert model.auxiliary is None
    _, losses = model(features(64, 64), torch.zeros(2, 64, 64))
    assert list(losses) == ["loss_sem_seg"]


@torch.no_grad()
def test_the_coarsest_map_alone_reaches_every_pixel_through_the_pyramid():
    """With every other map zero, a change in one corner of c5 moves the scores of the other."""
    model = head().eval()
    maps = {name: torch.zeros_like(each) for name, each in features(256, 256, 1).items()}
    before = model.scores(maps)
    maps["c5"][..., 0, 0] = 100.0
    assert (model.scores(maps) - before)[..., -1, -1].abs().max() > 1e-4


@torch.no_grad()
def test_traced_equals_eager_at_other_sizes():
    model = head().eval()

    class Scores(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = model

        def forward(self, c2, c3, c4, c5):
            return self.head.scores({"c2": c2, "c3": c3, "c4": c4, "c5": c5})

    wrapped = Scores()
    traced = torch.jit.trace(wrapped, tuple(features(64, 64).values()))
    for height, width in ((64, 96), (224, 40)):
        maps = tuple(features(height, width).values())
        assert torch.allclose(traced(*maps), wrapped(*maps), atol=1e-5)


@torch.no_grad()
def test_scripted_equals_eager_at_other_sizes():
    model = head().eval()
    scripted = torch.jit.script(model)
    for height, width in ((64, 96), (33, 40)):
        maps = features(height, width)
        assert torch.allclose(scripted(maps)[0], model(maps)[0], atol=1e-5)
