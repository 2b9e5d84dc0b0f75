"""Strange and wrong input: a defined result, or one line that says what to change."""

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from cednet import CEDNet, CEDNetTrunk, SwinFamily, block_family
from d2dense.checkpoint import load_weights
from d2dense.engine.settings import RunSettings
from d2dense.engine.step import TrainStep
from d2dense.errors import UserError
from tests.projects.cednet import tiny, tiny_detectors

MIXERS = list(tiny.FAMILIES)
DETECTORS = ("retinanet", "mask_rcnn", "cascade_mask_rcnn")
CLASSES = tiny_detectors.NUM_CLASSES


def sample(height, width, *, boxes=0, dtype=torch.uint8, channels=3):
    """A picture with annotations of every kind."""
    generator = torch.Generator().manual_seed(height + width)
    image = torch.randint(0, 256, (channels, height, width), generator=generator)
    target = Instances((height, width))
    box = torch.tensor([[0.0, 0.0, 0.9 * width, 0.8 * height]])
    target.gt_boxes = Boxes(box.repeat(boxes, 1))
    target.gt_classes = torch.arange(boxes) % CLASSES
    target.gt_masks = BitMasks(torch.ones(boxes, height, width, dtype=torch.bool))
    labels = torch.randint(0, CLASSES, (height, width), generator=generator)
    return {"image": image.to(dtype), "instances": target, "sem_seg": labels}


def train(model, batch):
    """Return the losses; every parameter must have a gradient, and all numbers must be finite."""
    model.train()
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    return losses


@torch.no_grad()
def predict(model, image):
    return model.eval()([{"image": image}])[0]


def boxes_of(result):
    assert torch.isfinite(result["instances"].pred_boxes.tensor).all()
    return result["instances"].pred_boxes.tensor


# ------------------------------------------------ images


@pytest.mark.parametrize("name", DETECTORS)
def test_images_smaller_than_a_stride_or_one_pixel_wide(name):
    model = tiny_detectors.MODELS[name]()
    for height, width in ((5, 7), (1, 90), (70, 1), (1, 1)):
        boxes = boxes_of(predict(model, sample(height, width)["image"]))
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
    train(model, [sample(5, 7, boxes=1), sample(1, 90, boxes=1)])


def test_small_images_in_the_segmenter():
    model = tiny_detectors.upernet()
    for height, width in ((5, 7), (1, 90), (1, 1)):
        scores = predict(model, sample(height, width)["image"])["sem_seg"]
        assert scores.shape == (CLASSES, height, width)
        assert torch.isfinite(scores).all()
    train(model, [sample(5, 7), sample(1, 90)])


@pytest.mark.parametrize("name", tiny_detectors.MODELS)
def test_batches_of_mixed_sizes(name):
    model = tiny_detectors.MODELS[name]()
    train(model, [sample(64, 96, boxes=2), sample(33, 20, boxes=1)])


@pytest.mark.parametrize("mixer", MIXERS)
def test_empty_batches_use_every_parameter(mixer):
    net = tiny.backbone(mixer).train()
    before = {name: value.clone() for name, value in net.named_buffers() if "running" in name}
    sum(each.sum() for each in net(torch.zeros(0, 3, 64, 64)).values()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or p.grad.any()] == []
    after = dict(net.named_buffers())
    assert all(torch.equal(after[name], value) for name, value in before.items())


@torch.no_grad()
def test_other_types_of_numbers():
    net = tiny.backbone()
    x = tiny.images(1, 3, 40, 64)
    expected = net(x)
    for name, value in net(x.double()).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name])
    half = net.bfloat16()(x)
    assert {value.dtype for value in half.values()} == {torch.bfloat16}
    with pytest.raises(UserError, match=r"normalised images .* found torch\.uint8"):
        net(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize("name", tiny_detectors.MODELS)
def test_pictures_of_any_type_of_numbers(name):
    model = tiny_detectors.MODELS[name]()
    with torch.no_grad():
        results = [
            predict(model, sample(40, 64, dtype=dtype)["image"])
            for dtype in (torch.uint8, torch.float32, torch.float64)
        ]
    if name == "upernet":
        assert all(tiny.close(each["sem_seg"], results[0]["sem_seg"]) for each in results)
    else:
        assert len({len(boxes_of(each)) for each in results}) == 1


def test_another_number_of_channels():
    with pytest.raises(UserError, match=r"\(N, 3, H, W\).*found \(1, 4, 64, 64\).*PIXEL_MEAN"):
        tiny.backbone()(torch.zeros(1, 4, 64, 64))
    assert tiny.trunk(in_channels=4).eval()(torch.zeros(1, 4, 32, 32))[0].shape == (1, 16, 8, 8)


@torch.no_grad()
def test_pixels_that_are_no_numbers():
    """They stay in their image; detectors find nothing in it, and losses say it."""
    net = tiny.backbone("next")
    x = tiny.images(2, 3, 64, 64)
    expected = net(x[:1])
    x[1] = float("nan")
    for name, value in net(x).items():
        assert tiny.close(value[:1], expected[name])
        assert value[1].isnan().any()
    model = tiny_detectors.retinanet()
    assert len(predict(model, torch.full((3, 64, 64), float("nan")))["instances"]) == 0


# ------------------------------------------------ targets and proposals


@pytest.mark.parametrize("name", DETECTORS)
def test_batches_without_any_box(name):
    losses = train(tiny_detectors.MODELS[name](), [sample(64, 96), sample(64, 64)])
    assert all(float(v.detach()) == 0 for k, v in losses.items() if "box_reg" in k or "mask" in k)


@pytest.mark.parametrize("name", DETECTORS[1:])
def test_no_proposals_in_evaluation(name):
    model = tiny_detectors.MODELS[name]()
    model.proposal_generator.min_box_size = 1e5
    result = predict(model, sample(64, 96)["image"])["instances"]
    assert len(result) == 0
    assert result.pred_masks.shape[0] == 0


# ------------------------------------------------ batch norm with one value


class _Sum(nn.Module):
    """Makes a loss of what comes out."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch):
        maps = self.net(torch.stack([each["image"] for each in batch]).float())
        return {"loss": sum(each.square().mean() for each in maps.values())}


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (lambda: _Sum(tiny.backbone("bottleneck")), (1, 1)),
        (tiny_detectors.upernet, (64, 64)),
        (lambda: tiny_detectors.upernet(norm="SyncBN"), (64, 64)),
    ],
    ids=["backbone", "upernet", "upernet with SyncBN"],
)
def test_one_value_per_channel_of_a_batch_norm(model, size):
    model = model().train()
    settings = RunSettings(output_dir="unused", max_iter=1, device="cpu")
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.1), settings=settings)
    with EventStorage(), pytest.raises(UserError, match=r"one value per channel.*two images"):
        step(iter([[sample(*size)]]))
    with EventStorage():
        assert step(iter([[sample(*size), sample(*size)]])).applied


# ------------------------------------------------ checkpoints and arguments


@pytest.mark.parametrize("name", tiny_detectors.MODELS)
def test_checkpoints_for_other_classes_are_refused_by_name(name, tmp_path, monkeypatch):
    model = tiny_detectors.MODELS[name]()
    path = tmp_path / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    monkeypatch.setattr(tiny_detectors, "NUM_CLASSES", CLASSES + 2)
    other = tiny_detectors.MODELS[name]()
    with pytest.raises(UserError) as error:
        load_weights(other, str(path), reinit_misshaped=False)
    line = str(error.value)
    assert "REINIT_MISSHAPED" in line
    assert "\n" not in line
    assert {"retinanet": "cls_score", "upernet": "classifier"}.get(name, "box_predictor") in line
    report = load_weights(other, str(path), reinit_misshaped=True)
    assert report is not None
    assert torch.equal(
        other.backbone.trunk.stem[0].conv.weight, model.backbone.trunk.stem[0].conv.weight
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tiny.trunk(style="unnet"), "did you mean 'unet'"),
        (lambda: tiny.trunk(blocks=((1, 1, 1), (1, 1, 1)), num_stages=3), "3 stages but .* for 2"),
        (lambda: tiny.trunk(blocks=(1, 2)), "three numbers"),
        (lambda: tiny.trunk(blocks=(1, -2, 1)), "three numbers"),
        (lambda: tiny.trunk(blocks=()), "three numbers"),
        (lambda: tiny.trunk(num_stages=0), "stages"),
        (lambda: tiny.trunk(first_blocks=-1), "first_blocks"),
        (lambda: tiny.trunk(drop_path=1.0), "drop_path"),
        (lambda: CEDNetTrunk(widths=(96, 192)), "four numbers"),
        (lambda: CEDNetTrunk(family=SwinFamily(), widths=(96, 100, 288, 416)), "multiple of 32"),
        (lambda: block_family("nextt"), "did you mean 'next'"),
        (lambda: CEDNet(trunk=tiny.trunk(), out_features=[]), "out_features"),
    ],
)
def test_wrong_arguments_are_one_line(make, words):
    with pytest.raises((UserError, ValueError), match=words) as error:
        make()
    assert "\n" not in str(error.value)
