"""Conditional DETR and DAB-DETR as whole detectors, on tiny sizes and as published."""

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone, BasicStem, ResNet
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from torch import nn

from d2dense.config import single_scale_detr
from d2dense.config.defaults import get_cfg
from d2dense.costs import count_macs
from d2dense.errors import UserError
from d2dense.export import adapt
from d2dense.modeling.detr import DeformableDETR
from tests.modeling.detr.whole import (
    CLASSES,
    Transformer,
    check_checkpointing,
    check_export,
    check_trace,
    image,
)

KINDS = ("conditional", "dab")
both = pytest.mark.parametrize("kind", KINDS)


class Cells(Backbone):
    """A map of stride 32 by averaging over cells, so that padding stays where it is."""

    size_divisibility = 32

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Conv2d(3, width, 8, stride=8)
        self.width = width

    def forward(self, x):
        x = nn.functional.pad(x, (0, -x.shape[3] % 32, 0, -x.shape[2] % 32))
        return {"res5": nn.functional.avg_pool2d(self.mix(x), 4)}

    def output_shape(self):
        return {"res5": ShapeSpec(channels=self.width, stride=32)}


def lazy(kind, **arguments):
    return getattr(single_scale_detr, f"{kind}_detr")(**arguments)


def build(kind, *, layers=2, channels=16, dropout=0.0):
    torch.manual_seed(0)
    node = lazy(kind, backbone=None, widths={"res5": 8}, num_classes=CLASSES, channels=channels)
    for part in (node.encoder, node.decoder):
        part.update(heads=2, feedforward=32, layers=layers, dropout=dropout)
    node.queries.num_queries = 7
    node.max_detections = 10
    node.backbone = nn.Identity()  # replaced below
    model = instantiate(node)
    model.backbone = Cells(8)
    with torch.no_grad():  # an untrained box head says the same for every query
        model.heads.boxes[0].layers[-1].weight.normal_(std=0.5)
    return model


@both
@pytest.mark.parametrize("layers", [1, 3])
def test_losses_of_every_layer_reach_every_parameter(kind, layers):
    model = build(kind, layers=layers, dropout=0.1).train()
    free = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(free) == len(list(model.parameters())) - (kind == "dab")
    for boxes in ((2, 1), (0, 3), (0, 0)):
        model.zero_grad()
        losses = model([image(48, 64 + 9 * i, i, count) for i, count in enumerate(boxes)])
        kinds = ("loss_cls", "loss_bbox", "loss_iou")
        before = {f"d{i}.{kind}" for kind in kinds for i in range(layers - 1)}
        assert set(losses) == {*kinds, *before}
        sum(losses.values()).backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == free
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@both
def test_a_batch_gives_what_its_images_give_alone(kind):
    model = build(kind).eval()
    batch = [image(64, 96, 0), image(40, 50, 1), image(33, 129, 2)]
    with torch.no_grad():
        together = model(batch)
        alone = [model([each])[0] for each in batch]
    for ours, theirs in zip(together, alone):
        ours, theirs = ours["instances"], theirs["instances"]
        assert len(ours) == 10
        assert torch.allclose(ours.scores, theirs.scores, atol=1e-5)
        assert torch.allclose(ours.pred_boxes.tensor, theirs.pred_boxes.tensor, atol=1e-3)


@both
def test_losses_do_not_see_the_padding(kind):
    model = build(kind).train()
    one = model([image(40, 50)])
    model.backbone.size_divisibility = 128
    padded = model([image(40, 50)])
    assert all(torch.allclose(one[name], padded[name], rtol=1e-4) for name in one)


@both
def test_weights_of_losses_and_cost(kind):
    criterion = build(kind).criterion
    assert criterion.class_weight == {"conditional": 2.0, "dab": 1.0}[kind]
    assert (criterion.l1_weight, criterion.giou_weight) == (5.0, 2.0)
    matcher = criterion.matcher
    assert (matcher.class_weight, matcher.l1_weight, matcher.giou_weight) == (2.0, 5.0, 2.0)


@both
def test_settings(kind):
    node = lazy(kind, backbone=None, widths={"res5": 2048})
    for part in (node.encoder, node.decoder):
        part = instantiate(part)
        assert len(part.layers) == 6
        layer = part.layers[0]
        assert layer.dropout.p == layer.ffn.dropout.p == {"conditional": 0.1, "dab": 0.0}[kind]
        assert layer.ffn.linear1.out_features == 2048
        activation = {"conditional": nn.ReLU, "dab": nn.PReLU}[kind]
        assert isinstance(layer.ffn.activation, activation)
    encoder = instantiate(node.encoder)
    assert encoder.positions.temperature == {"conditional": 10000.0, "dab": 20.0}[kind]
    assert encoder.positions.offset == 0
    assert encoder.layers[0].attention.num_heads == 8
    assert instantiate(node.neck).convs[0].bias is not None


@both
def test_traced_inference_follows_other_sizes(kind):
    model = adapt(build(kind).eval()).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, image(64, 64)["image"], check_trace=False)
        for size in ((40, 96), (33, 50), (128, 64)):
            pixels = image(*size, seed=3)["image"]
            for ours, theirs in zip(traced(pixels), model(pixels)):
                assert torch.allclose(ours, theirs, atol=1e-3)


@both
def test_traced_transformer_takes_batches_of_other_sizes(kind):
    model = Transformer(build(kind).eval())
    traced = check_trace(model, [(2, 96, 64), (1, 32, 160), (3, 64, 128)])
    assert "PythonOp" not in str(traced.inlined_graph)


@pytest.mark.long
@both
def test_exported_transformer_takes_other_sizes(kind):
    check_export(Transformer(build(kind).eval()), 2)


@both
def test_checkpointed_layers_give_the_same_gradients(kind):
    model = build(kind, dropout=0.1).train()
    check_checkpointing(model, [image(48, 64), image(70, 90, 1)])


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kind, dtype):
    model = build(kind).train()
    plain = model([image(48, 64)])
    with torch.autocast("cpu", dtype=dtype):
        cast = model([image(48, 64)])
    for name, loss in cast.items():
        assert loss.dtype == torch.float32
        assert torch.allclose(loss, plain[name], rtol=0.2, atol=0.05)
    sum(cast.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@both
def test_it_learns_a_picture(kind):
    torch.manual_seed(0)
    model = build(kind, channels=32).train()
    given = image(128, 160)
    boxes = torch.tensor([[10.0, 20.0, 60.0, 90.0], [70.0, 5.0, 150.0, 40.0], [90, 60, 120, 120]])
    for box, value in zip(boxes.long().tolist(), (0, 128, 255)):
        given["image"][:, box[1] : box[3], box[0] : box[2]] = value
    given["instances"] = Instances((128, 160), gt_boxes=Boxes(boxes), gt_classes=torch.arange(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [80])
    totals = []
    for _ in range(110):
        total = sum(model([given]).values())
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        totals.append(float(total.detach()))
    assert totals[-1] < totals[0] / 10, (totals[0], totals[-1])
    found = model.eval()([given])[0]["instances"]
    overlaps = pairwise_iou(given["instances"].gt_boxes, found.pred_boxes)
    right = found.pred_classes == torch.arange(3)[:, None]
    assert (overlaps * right).amax(dim=1).min() > 0.75


# ------------------------------------------------ with ResNet-50, as published


def resnet(depth=50, **options):
    return L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=L(ResNet.make_default_stages)(depth=depth, norm="FrozenBN", **options),
        out_features=["res5"],
        freeze_at=2,
    )


def published(kind):
    with torch.device("meta"):
        return instantiate(
            lazy(kind, backbone=resnet(stride_in_1x1=False), widths={"res5": 2048}, num_classes=91)
        )


@both
def test_parameters_with_resnet_50(kind):
    c, hidden = 256, 2048
    square, norm = c * c + c, 2 * c
    feedforward = c * hidden + hidden + hidden * c + c
    encoder = 6 * (4 * square + feedforward + 2 * norm)
    decoder = 6 * (6 * square + 6 * square + feedforward + 3 * norm)
    decoder += square + norm + 2 * square  # position in layer 0, last norm, scale
    heads = 2 * square + (c * 4 + 4) + (c * 91 + 91)
    backbone, frozen = 23_454_912, 222_400  # convolutions of ResNet-50, of its stem and res2
    expected = backbone + 2048 * c + c + encoder + decoder + heads
    if kind == "conditional":
        expected += 300 * c + square + 2 * c + 2
    else:
        expected += 2 * square + 12  # scale of the encoder, slopes
        expected += (2 * c * c + c + square) + (square + 2 * c + 2)  # positions, sides
        expected += 300 * 4
    model = published(kind)
    assert sum(p.numel() for p in model.parameters()) == expected
    free = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert free == expected - frozen - (600 if kind == "dab" else 0)
    assert round(expected / 1e6, 1) == {"conditional": 43.4, "dab": 43.7}[kind]  # "44 M"


@both
def test_cost_with_resnet_50(kind):
    """Published are means over validation images, 90 and 94 G; a common size is this one, of
    photographs of 3 to 2.
    """
    model = Transformer(published(kind).eval())
    with torch.device("meta"):
        given = torch.zeros(1, 3, 800, 1216)
    macs = count_macs(model, given, attention=False)[""]
    assert macs / 1e9 == pytest.approx({"conditional": 90, "dab": 94}[kind], rel=0.03)


# ------------------------------------------------ both kinds of config


def yaml(kind, **keys):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "DeformableDETR"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    node = cfg.MODEL.DETR
    node.IN_FEATURES = ["res5"]
    node.NECK = "projection"
    node.LEVELS = 1
    node.TRANSFORMER = kind
    node.CHANNELS = 64
    node.FEEDFORWARD = 2048
    node.ENCODER_LAYERS = node.DECODER_LAYERS = 2
    node.POSITION_OFFSET = 0.0
    if kind == "dab":
        node.DROPOUT = 0.0
        node.POSITION_TEMPERATURE = 20.0
        node.CLASS_WEIGHT = 1.0
    for key, value in keys.items():
        node[key] = value
    return cfg


def describe(module):
    """What a module is beside its parameters."""
    names = ("dropout", "p", "temperature", "offset", "anchors", "look_forward_twice", "eps")
    names += ("class_weight", "l1_weight", "giou_weight", "alpha", "gamma", "num_classes", "heads")
    settings = {n: v for n in names if isinstance(v := getattr(module, n, None), (int, float))}
    return type(module).__name__, settings


@both
def test_yaml_and_lazy_models_are_the_same(kind):
    torch.manual_seed(0)
    ours = DeformableDETR(yaml(kind))
    torch.manual_seed(0)
    node = lazy(kind, backbone=resnet(18), widths={"res5": 512}, channels=64)
    node.encoder.layers = node.decoder.layers = 2
    theirs = instantiate(node)
    ours_state, their_state = ours.state_dict(), theirs.state_dict()
    assert list(ours_state) == list(their_state)
    assert all(torch.equal(ours_state[name], their_state[name]) for name in ours_state)
    assert [describe(each) for each in ours.modules()] == [describe(m) for m in theirs.modules()]


@both
@pytest.mark.parametrize(
    ("key", "value"), [("LEVELS", 4), ("TWO_STAGE", True), ("NECK", "none"), ("TRANSFORMER", "dn")]
)
def test_what_does_not_go_together_is_a_mistake(kind, key, value):
    def encode(cfg):
        with torch.device("meta"):
            images = ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)])
            DeformableDETR(cfg).encode(images)

    with pytest.raises(UserError, match=key):
        encode(yaml(kind, **{key: value}))
