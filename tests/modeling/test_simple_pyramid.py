"""Co-DETR's pyramid around a plain vision transformer, layer by layer from its description."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from torch import nn

from d2dense import config
from d2dense.errors import UserError
from d2dense.modeling.detr.parts import neck
from d2dense.modeling.necks import SimplePyramid

LEVELS = ["p2", "p3", "p4", "p5", "p6"]
# per level: how the map is prepared, and the sides of the kernels of its convolutions
STEPS = {
    "p2": ["up", 3, "up", 3, 1, 3],
    "p3": ["up", 3, 1, 3],
    "p4": [1, 3],
    "p5": ["pool", 1, 3],
    "p6": ["pool", "strided 3", 1, 3],
    "p7": ["pool", "strided 3", "strided 3", 1, 3],  # not Co-DETR's: for heads on p3 to p7
}


def tiny(**options):
    torch.manual_seed(0)
    pyramid = SimplePyramid(in_channels=16, out_channels=6, **options).requires_grad_(False)
    for parameter in pyramid.parameters():
        if parameter.ndim == 1:
            parameter.normal_(mean=1.0, std=0.3)
    return pyramid


def plain(x, steps, weights):
    """``weights`` are those of the convolutions and their norms, one after the other."""
    weights = iter(weights)
    last = len(steps) - 1
    for i, step in enumerate(steps):
        if step == "up":
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        elif step == "pool":
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        else:
            stride = 2 if step == "strided 3" else 1
            x = F.conv2d(x, kernel := next(weights), stride=stride, padding=kernel.shape[-1] // 2)
            assert kernel.shape[-1] == int(str(step)[-1])
            centred = x - x.mean(1, keepdim=True)
            x = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
            x = x * next(weights)[:, None, None] + next(weights)[:, None, None]
            if i < last:
                x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    assert next(weights, None) is None
    return x


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 3)])
def test_every_level_is_made_as_described(size):
    pyramid = tiny(levels=list(STEPS))
    x = torch.randn(2, 16, *size)
    maps = pyramid([x])
    assert len(maps) == len(STEPS)
    for name, found in zip(STEPS, maps):
        expected = plain(x, STEPS[name], pyramid.levels[name].parameters())
        assert found.shape[1] == 6
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_widths_inside_are_those_of_the_reference():
    with torch.device("meta"):
        pyramid = SimplePyramid()

    def widths(name):
        convs = [each for each in pyramid.levels[name] if isinstance(each, nn.Conv2d)]
        assert all(each.bias is None for each in convs)
        return [convs[0].in_channels, *(each.out_channels for each in convs)]

    assert widths("p2") == [1024, 512, 256, 256, 256]
    assert widths("p3") == [1024, 512, 256, 256]
    assert widths("p4") == widths("p5") == [1024, 256, 256]
    assert widths("p6") == [1024, 1024, 256, 256]


def test_some_levels_only_and_config():
    x = torch.randn(1, 16, 4, 4)
    assert [each.shape[-1] for each in tiny(levels=["p3", "p4", "p5", "p6"])([x])] == [8, 4, 2, 1]
    cfg = config.get_cfg()
    cfg.MODEL.BACKBONE.NAME = "EVA02ViT"
    node = cfg.MODEL.DETR
    node.merge_from_list(["NECK", "simple_pyramid", "IN_FEATURES", ["res4"], "LEVELS", 5])
    shapes = {"res4": ShapeSpec(channels=16, stride=16)}
    built = neck(node, shapes)
    assert list(built.levels) == LEVELS
    node.LEVELS = 4
    assert list(neck(node, shapes).levels) == LEVELS[1:]


@pytest.mark.parametrize("levels", [["p8"], ["p4", "p3"], []])
def test_unknown_levels_are_refused(levels):
    with pytest.raises(UserError, match="p2, p3, p4, p5, p6, p7"):
        SimplePyramid(levels=levels)


def test_a_trace_is_right_at_other_sizes():
    pyramid = tiny()
    traced = torch.jit.trace(lambda x: tuple(pyramid([x])), torch.randn(1, 16, 4, 4))
    for size in [(4, 6), (5, 7)]:
        x = torch.randn(2, 16, *size)
        for found, expected in zip(traced(x), pyramid([x])):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_transformer_under_the_pyramid_detects_and_trains():
    cfg = config.get_cfg()
    settings = {
        "MODEL.META_ARCHITECTURE": "DeformableDETR",
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.NAME": "EVA02ViT",
        "MODEL.VIT.CHANNELS": 16,
        "MODEL.VIT.DEPTH": 2,
        "MODEL.VIT.HEADS": 2,
        "MODEL.VIT.WINDOW": 3,
        "MODEL.VIT.GLOBAL_BLOCKS": (1,),
        "MODEL.VIT.POSITION_SIDE": 4,
        "MODEL.DETR.IN_FEATURES": ["res4"],
        "MODEL.DETR.NECK": "simple_pyramid",
        "MODEL.DETR.LEVELS": 5,
        "MODEL.DETR.CHANNELS": 32,
        "MODEL.DETR.ENCODER_LAYERS": 1,
        "MODEL.DETR.DECODER_LAYERS": 1,
        "MODEL.DETR.NUM_QUERIES": 5,
        "MODEL.DETR.NUM_CLASSES": 3,
    }
    cfg.merge_from_list([each for pair in settings.items() for each in pair])
    torch.manual_seed(0)
    model = config.build_model(cfg)
    batch = []
    for size in [(50, 71), (64, 33)]:
        instances = Instances(size, gt_boxes=Boxes(torch.tensor([[3.0, 4.0, 30.0, 40.0]])))
        instances.gt_classes = torch.tensor([1])
        batch.append({"image": torch.randint(256, (3, *size)), "instances": instances})
    model.train()
    sum(model(batch).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    for found, given in zip(model.eval()(batch), batch):
        assert found["instances"].image_size == given["instances"].image_size
        assert len(found["instances"]) == 15
