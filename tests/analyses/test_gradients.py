"""Input gradients against finite differences, and that asking for them leaves no trace."""

import random

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from d2dense import config
from d2dense.analyses.gradients import input_gradient
from d2dense.analyses.untouched import set_loss_mode, untouched
from d2dense.errors import UserError
from d2dense.layers import Residual

SIZE = (75, 90)  # no multiple of a stride: batches are padded
MODELS = {
    "cednet": ("CEDNet/retinanet_cednet_tiny_shapes", ["model.backbone.trunk.drop_path=0.5"]),
    "running average": (
        "CEDNet/retinanet_cednet_tiny_shapes",
        ["model.loss_normalizer=running_average"],
    ),
    "faster": ("FSCascade/faster_rcnn_tiny_shapes", []),
    "cascade": ("FSCascade/cascade_rcnn_tiny_shapes", []),
    "fscascade": ("FSCascade/fscascade_mask_tiny_shapes", []),
}


def build(name):
    path, overrides = MODELS[name]
    torch.manual_seed(1)
    return config.build_model(config.load(path, overrides), device="cpu").eval()


def sample(size=SIZE):
    target = Instances(size)
    target.gt_boxes = Boxes(torch.tensor([[10.0, 12.0, 40.0, 50.0], [50.0, 5.0, 85.0, 40.0]]))
    target.gt_classes = torch.tensor([1, 4])
    masks = torch.zeros(2, *size, dtype=torch.bool)
    masks[0, 12:50, 10:40] = masks[1, 5:40, 50:85] = True
    target.gt_masks = BitMasks(masks)
    image = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0))
    return {"image": image.to(torch.uint8), "instances": target, "file_name": "noise.jpg"}


class Smooth(nn.Module):
    """Losses in double precision, of which differences are exact enough."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1).double()
        self.norm = nn.BatchNorm2d(4).double()
        self.drop = nn.Dropout(0.5)

    def forward(self, batch):
        x = batch[0]["image"].double()[None] / 255
        y = self.drop(self.norm(self.conv(x))).tanh()
        return {"loss_a": (y**2).mean(), "loss_b": (y[:, :2].mean() - 1) ** 2}


def test_equals_finite_differences_at_every_pixel():
    model, image = Smooth().eval(), torch.rand(3, 5, 6) * 255

    @torch.no_grad()
    def loss(changed):
        return float(sum(model([{"image": changed}]).values()))  # eval: the fixed statistics

    found = input_gradient(model, {"image": image})
    assert found.loss == pytest.approx(loss(image), rel=1e-12)
    expected, step = torch.zeros(5, 6), 0.5
    for y, x in np.ndindex(5, 6):
        slopes = []
        for channel in range(3):
            up, down = image.clone(), image.clone()
            up[channel, y, x] += step
            down[channel, y, x] -= step
            width = float(up[channel, y, x]) - float(down[channel, y, x])
            slopes.append(abs(loss(up) - loss(down)) / width)
        expected[y, x] = max(slopes)
    torch.testing.assert_close(found.map, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["cednet", "running average"])
def test_a_real_detector_equals_finite_differences(name):
    """Its losses are float32, so their differences have three digits at large gradients only."""
    model, example = build(name).double(), sample()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    found = input_gradient(model, example)
    image = example["image"].float()

    def loss(channel, y, x, step):
        changed = image.clone()
        changed[channel, y, x] += step
        return input_gradient(model, {**example, "image": changed}).loss

    pixels = [divmod(int(i), SIZE[1]) for i in found.map.flatten().topk(3).indices]
    for at in [*pixels, (SIZE[0] - 1, SIZE[1] - 1)]:
        slopes = [abs(loss(c, *at, 1.0) - loss(c, *at, -1.0)) / 2 for c in range(3)]
        assert float(found.map[at]) == pytest.approx(max(slopes), rel=5e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_left_behind(name, training):
    model, example = build(name), sample()
    model.train(training)
    first = next(model.parameters()).requires_grad_(False)
    before = {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "buffers": {k: v.clone() for k, v in model.named_buffers()},
        "modes": [module.training for module in model.modules()],
        "keys": [sorted(module.__dict__) for module in model.modules()],
        "needed": [p.requires_grad for p in model.parameters()],
        "normalizer": getattr(model, "loss_normalizer", None),
    }
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = input_gradient(model, example)
    assert found.map.shape == SIZE
    assert found.map.max() > 0
    assert all(torch.equal(v, before["state"][k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, before["buffers"][k]) for k, v in model.named_buffers())
    assert [module.training for module in model.modules()] == before["modes"]
    assert [sorted(module.__dict__) for module in model.modules()] == before["keys"]
    assert [p.requires_grad for p in model.parameters()] == before["needed"]
    assert not first.requires_grad
    assert getattr(model, "loss_normalizer", None) == before["normalizer"]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert random.getstate() == rng[1]
    assert np.random.get_state()[1].tolist() == rng[2]
    assert example["image"].dtype == torch.uint8
    again = input_gradient(model, example)
    assert again.loss == found.loss
    assert torch.equal(again.map, found.map)


def test_stochastic_depth_is_off():
    model = build("cednet")
    assert any(isinstance(m, Residual) and m.drop_path > 0.1 for m in model.modules())
    losses = {input_gradient(model, sample(), seed=seed).loss for seed in range(3)}
    assert len(losses) == 1


def test_a_two_stage_detector_is_asked_for_one_draw():
    """The seed decides what is sampled; where nothing had to be drawn, it could not."""
    model = build("faster")
    model.proposal_generator.batch_size_per_image = 16
    losses = {input_gradient(model, sample(), seed=seed).loss for seed in range(4)}
    assert len(losses) > 1


def test_mode_of_losses():
    noisy = [
        nn.BatchNorm2d(2), nn.SyncBatchNorm(2), nn.InstanceNorm2d(2, track_running_stats=True),
        nn.Dropout(0.1), nn.Dropout2d(0.1), nn.AlphaDropout(0.1), DropPath(0.1),
        StochasticDepth(0.1, "row"), Residual(channels=2, drop_path=0.1),
        nn.MultiheadAttention(2, 1, dropout=0.1),
    ]  # fmt: skip
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sequential(*noisy))
    set_loss_mode(model)
    assert model.training
    assert model[0].training
    assert model[1].training
    assert not any(module.training for module in noisy)


def test_the_model_is_put_back_after_an_error():
    model = build("cednet")
    with pytest.raises(AssertionError, match="annotations are missing"):
        input_gradient(model, {"image": sample()["image"]})
    assert not any(module.training for module in model.modules())
    with untouched(model):
        model.train()
        model.loss_normalizer = 7.0
        model.pixel_mean = model.pixel_mean + 1  # another tensor under the buffer's name
    assert not any(module.training for module in model.modules())
    assert not hasattr(model, "loss_normalizer")
    assert torch.equal(model.pixel_mean, build("cednet").pixel_mean)
    assert all(p.requires_grad for p in model.parameters())


def test_mistakes():
    class Silent(Smooth):
        def forward(self, batch):
            return []

    class Deaf(Smooth):
        def forward(self, batch):
            return {"loss": self.conv.weight.sum()}

    class Broken(Smooth):
        def forward(self, batch):
            return {"loss": (batch[0]["image"] * float("nan")).sum()}

    image = {"image": torch.rand(3, 4, 4), "file_name": "a.jpg"}
    with pytest.raises(UserError, match="Silent returns no losses"):
        input_gradient(Silent(), image)
    with pytest.raises(UserError, match="do not depend on the image"):
        input_gradient(Deaf(), image)
    with pytest.raises(UserError, match=r"loss of a\.jpg is nan"):
        input_gradient(Broken(), image)
