"""The segmenter: padding, batches, results at the original size, any head, TorchScript."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import SemanticSegmentor
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from torch import nn

from d2dense import config, export
from d2dense.config import get_cfg
from d2dense.errors import UserError
from d2dense.modeling import Segmenter, SemanticInference, TimmBackbone, UperNetHead

MEAN, STD = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]


class Pixels(Backbone):
    """Passes the image on, so that a head sees what the segmenter made of it."""

    size_divisibility = 4

    def __init__(self):
        super().__init__()
        self._out_features = ["x"]
        self._out_feature_channels = {"x": 3}
        self._out_feature_strides = {"x": 1}

    def forward(self, x):
        return {"x": x}


class Memory(nn.Module):
    """A head that keeps what it gets; its scores are the pixels and the mean of the whole image."""

    ignore_value = 255

    def forward(self, features, targets=None):
        x = features["x"]
        self.images, self.targets = x, targets
        if self.training:
            return None, {"loss": x.sum()}
        return torch.cat([x, x.mean((1, 2, 3), keepdim=True).expand(-1, 1, *x.shape[2:])], 1), {}


def plain(**options) -> Segmenter:
    return Segmenter(
        backbone=Pixels(), sem_seg_head=Memory(), pixel_mean=MEAN, pixel_std=STD, **options
    )


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def normal(image: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
    return (image - mean) / std


def tiny(**arguments) -> Segmenter:
    torch.manual_seed(0)
    options = {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24]}
    backbone = TimmBackbone(name="convnext_tiny", out_norm="LN", options=options)
    head = UperNetHead(
        input_shape=backbone.output_shape(),
        in_features=["res2", "res3", "res4", "res5"],
        num_classes=5,
        channels=8,
        norm="BN",
        auxiliary_feature="res4",
        auxiliary_channels=8,
    )
    return Segmenter(
        backbone=backbone, sem_seg_head=head, pixel_mean=MEAN, pixel_std=STD, **arguments
    )


# ------------------------------------------------ training


@pytest.mark.parametrize(
    ("pad_to", "size"), [(None, (8, 12)), ([16, 9], (16, 12)), ([7, 30], (8, 32))]
)
def test_training_images_are_filled_up_after_normalisation(pad_to, size):
    model = plain(pad_to=pad_to).train()
    pictures = [picture(6, 9), picture(8, 5, seed=1)]
    batch = [
        {"image": image, "sem_seg": torch.full(image.shape[1:], k)}
        for k, image in enumerate(pictures)
    ]
    assert set(model(batch)) == {"loss"}
    images, targets = model.sem_seg_head.images, model.sem_seg_head.targets
    assert images.shape == (2, 3, *size)
    assert targets.shape == (2, *size)
    for k, image in enumerate(pictures):
        h, w = image.shape[1:]
        assert torch.equal(images[k, :, :h, :w], normal(image))
        assert int((images[k] != 0).any(0).sum()) == h * w
        assert (targets[k, :h, :w] == k).all()
        assert int((targets[k] == 255).sum()) == size[0] * size[1] - h * w


def test_training_without_labels_is_a_mistake():
    with pytest.raises(UserError, match=r"INPUT\.MAPPER semantic"):
        plain().train()([{"image": picture(8, 8)}])


def test_all_parameters_learn_from_a_batch_of_two_sizes_and_nothing_labelled_is_zero():
    model = tiny(pad_to=[64, 64]).train()
    sizes = ((64, 40), (33, 64))
    labels = [torch.randint(0, 5, size) for size in sizes]
    for void in (False, True):
        model.zero_grad()
        batch = [
            {"image": picture(*each.shape), "sem_seg": torch.full_like(each, 255) if void else each}
            for each in labels
        ]
        losses = model(batch)
        assert set(losses) == {"loss_sem_seg", "loss_sem_seg_aux"}
        assert all((float(loss.detach()) == 0) == void for loss in losses.values())
        sum(losses.values()).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert len(grads) == len(list(model.parameters()))
        assert all(torch.isfinite(grad).all() for grad in grads.values())


# ------------------------------------------------ evaluation


@torch.no_grad()
def test_results_have_the_original_size_and_no_padding():
    model = plain().eval()
    found = model([{"image": picture(7, 10), "height": 21, "width": 15}])[0]["sem_seg"]
    expected = F.interpolate(
        normal(picture(7, 10))[None], (21, 15), mode="bilinear", align_corners=False
    )[0]
    assert torch.allclose(found[:3], expected, atol=1e-6)
    assert model([{"image": picture(7, 10)}])[0]["sem_seg"].shape == (4, 7, 10)


@torch.no_grad()
def test_whole_images_filled_up_to_an_odd_size():
    model = plain(inference=SemanticInference(pad_to=[9, 13])).eval()
    model.backbone.size_divisibility = 1
    found = model([{"image": picture(8, 12)}])[0]["sem_seg"]
    seen = model.sem_seg_head.images
    assert seen.shape == (1, 3, 9, 13)
    assert torch.equal(seen[0, :, :8, :12], normal(picture(8, 12)))
    assert int(seen[0, :, 8].count_nonzero() + seen[0, :, :, 12].count_nonzero()) == 0
    assert torch.equal(found[:3], normal(picture(8, 12)))
    grey = SemanticInference(pad_to=[9, 13], pad_value=127.5)
    model = plain(inference=grey).eval()
    model.backbone.size_divisibility = 1
    again = model([{"image": picture(8, 12)}])[0]["sem_seg"]
    assert torch.equal(again[:3], found[:3])
    border = normal(torch.full((3, 1, 1), 127.5))
    assert torch.allclose(model.sem_seg_head.images[0, :, 8], border[:, 0])
    assert torch.allclose(model.sem_seg_head.images[0, :, :, 12], border[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("inference", [None, SemanticInference(window=[5, 5], multi_scale=True)])
def test_results_do_not_depend_on_the_rest_of_the_batch(inference):
    model = plain(inference=inference).eval()
    batch = [
        {"image": picture(8, 8), "height": 9, "width": 9},
        {"image": picture(20, 12, seed=1)},
        {"image": picture(8, 8, seed=2), "height": 9, "width": 9},
        {"image": picture(8, 8, seed=3), "height": 5, "width": 4},
    ]
    together = [each["sem_seg"] for each in model(batch)]
    for item, found in zip(batch, together):
        assert torch.allclose(found, model([item])[0]["sem_seg"], atol=1e-6)
    assert [tuple(each.shape[1:]) for each in together] == [(9, 9), (20, 12), (9, 9), (5, 4)]


@torch.no_grad()
def test_a_whole_image_equals_detectron2s_segmentor():
    ours = tiny().eval()
    theirs = SemanticSegmentor(
        backbone=ours.backbone, sem_seg_head=ours.sem_seg_head, pixel_mean=MEAN, pixel_std=STD
    ).eval()
    batch = [{"image": picture(70, 53), "height": 35, "width": 106}]
    assert torch.allclose(ours(batch)[0]["sem_seg"], theirs(batch)[0]["sem_seg"], atol=1e-6)


@torch.no_grad()
def test_windows_of_a_real_network_are_those_of_the_image():
    """Three windows in a row, each alone through Detectron2's segmentor."""
    model = tiny(inference=SemanticInference(window=[64, 64], stride=[42, 42])).eval()
    alone = tiny().eval()
    image = picture(64, 120)
    found = model([{"image": image}])[0]["sem_seg"]
    starts = [0, 42, 56]
    parts = [alone([{"image": image[:, :, x : x + 64]}])[0]["sem_seg"] for x in starts]
    for column in (0, 41, 42, 55, 56, 63, 64, 105, 106, 119):
        seen = [p[:, :, column - x] for p, x in zip(parts, starts) if 0 <= column - x < 64]
        assert torch.allclose(found[:, :, column], torch.stack(seen).mean(0), atol=1e-5)


@torch.no_grad()
def test_it_takes_detectron2s_own_head():
    backbone = Pixels()
    shapes = {"x": ShapeSpec(channels=3, stride=4)}
    head = SemSegFPNHead(
        shapes, num_classes=4, conv_dims=8, common_stride=4, norm="", ignore_value=255
    )
    backbone.forward = lambda x: {"x": F.avg_pool2d(x, 4)}
    model = Segmenter(
        backbone=backbone,
        sem_seg_head=head,
        pixel_mean=MEAN,
        pixel_std=STD,
        inference=SemanticInference(window=[8, 8], multi_scale=True, average="logits"),
    )
    found = model.eval()([{"image": picture(11, 13), "height": 22, "width": 26}])
    assert found[0]["sem_seg"].shape == (4, 22, 26)
    losses = model.train()([{"image": picture(11, 13), "sem_seg": torch.zeros(11, 13).long()}])
    assert set(losses) == {"loss_sem_seg"}


# ------------------------------------------------ config and export


def yaml_cfg() -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "Segmenter"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = MEAN, STD
    cfg.MODEL.BACKBONE.NAME = "TimmBackbone"
    cfg.MODEL.TIMM.NAME = "convnext_atto"
    head = cfg.MODEL.SEM_SEG_HEAD
    head.NAME, head.NORM, head.NUM_CLASSES, head.CONVS_DIM = "UperNetHead", "BN", 7, 12
    head.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    return cfg


def test_every_key_reaches_the_model():
    cfg = yaml_cfg()
    head, test = cfg.MODEL.SEM_SEG_HEAD, cfg.TEST.SEM_SEG
    head.POOL_SCALES, head.DROPOUT, head.LOSS_WEIGHT, head.IGNORE_VALUE = (1, 4), 0.3, 2.0, 9
    head.AUXILIARY.FEATURE, head.AUXILIARY.CHANNELS = "res4", 20
    head.AUXILIARY.LOSS_WEIGHT, head.PAD_TO = 0.7, (64, 96)
    test.PAD_TO, test.PAD_STEP, test.PAD_VALUE, test.ALIGN_CORNERS = (65, 97), 32, 127.5, True
    test.WINDOW, test.STRIDE, test.MAX_WINDOWS, test.MULTI_SCALE = (64, 48), (32, 24), 9, True
    test.RATIOS, test.FLIP, test.AVERAGE, test.KEEP_ODD = (0.5, 2.0), False, "logits", True
    model = config.build_model(cfg)
    found = model.sem_seg_head
    assert found.pooling.fuse.in_channels == 320 + 2 * 12
    assert [pool[0].output_size for pool in found.pooling.pools] == [1, 4]
    assert found.dropout.p == found.auxiliary[1].p == 0.3
    assert (found.loss_weight, found.auxiliary_loss_weight, found.ignore_value) == (2.0, 0.7, 9)
    assert (found.auxiliary[0].in_channels, found.auxiliary[0].out_channels) == (160, 20)
    assert found.classifier.out_channels == 7
    assert model.pad_to == [64, 96]
    inference = model.inference
    assert (inference.window, inference.stride, inference.max_windows) == ([64, 48], [32, 24], 9)
    assert (inference.multi_scale, inference.ratios, inference.flip) == (True, [0.5, 2.0], False)
    assert (inference.average, inference.keep_odd) == ("logits", True)
    assert (inference.pad_to, inference.pad_step, inference.pad_value) == ([65, 97], 32, 127.5)
    assert inference.align_corners


def settings(module):
    """Return a module's own plain attributes."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def test_defaults_of_the_keys_are_the_constructors():
    by_key = config.build_model(yaml_cfg())
    assert vars(by_key.inference).keys() == vars(SemanticInference()).keys()
    assert str(by_key.inference) == str(SemanticInference())
    default = tiny()
    assert by_key.pad_to == default.pad_to
    assert settings(by_key.inference) == settings(SemanticInference())
    for name in ("loss_weight", "auxiliary_loss_weight", "ignore_value"):
        assert getattr(by_key.sem_seg_head, name) == getattr(default.sem_seg_head, name)
    assert by_key.sem_seg_head.auxiliary is None


def test_unknown_maps_are_named():
    cfg = yaml_cfg()
    cfg.MODEL.SEM_SEG_HEAD.AUXILIARY.FEATURE = "res6"
    with pytest.raises(UserError, match=r"takes the map 'res6'.*AUXILIARY.FEATURE"):
        config.build_model(cfg)


class Levels(Backbone):
    """A scriptable backbone of four maps."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList(
            nn.Conv2d(a, b, k, stride=k) for a, b, k in ((3, 8, 4), (8, 12, 2), (12, 16, 2))
        )
        self.last = nn.Conv2d(16, 24, 2, stride=2)
        self._out_features = ["res2", "res3", "res4", "res5"]
        self._out_feature_channels = dict(zip(self._out_features, (8, 12, 16, 24)))
        self._out_feature_strides = dict(zip(self._out_features, (4, 8, 16, 32)))

    @property
    def size_divisibility(self) -> int:
        return 32

    def forward(self, x):
        maps = {}
        for i, step in enumerate(self.steps):
            x = step(x)
            maps["res" + str(i + 2)] = x
        maps["res5"] = self.last(x)
        return maps


@pytest.mark.parametrize("method", ["trace", "script"])
def test_torchscript_equals_the_model_at_other_sizes(method):
    model = tiny().eval()  # its ConvNeXt has channels like the maps above, but cannot be scripted
    if method == "script":
        model.backbone = Levels().eval()
    module = export.to_torchscript(model, picture(64, 64), method=method)
    with torch.no_grad():
        for size in ((64, 96), (50, 75)):
            expected = model([{"image": picture(*size)}])[0]["sem_seg"]
            assert torch.allclose(module(picture(*size))[0], expected, atol=1e-4)
