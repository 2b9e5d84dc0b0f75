"""Image classifier: losses of several heads, mixing of images, scores, both kinds of config."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyCall as L
from omegaconf import OmegaConf
from torch import nn

from d2dense import config
from d2dense.config import get_cfg
from d2dense.errors import UserError
from d2dense.modeling import ImageClassifier, TimmBackbone, timm_classifier

MEAN, STD = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([2.0, 4.0, 5.0])
K = 6


class Heads(nn.Module):
    """A linear layer per head on the flattened image; remembers what it saw."""

    def __init__(self, heads=2, size=4):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(3 * size * size, K) for _ in range(heads))
        self.seen = None

    def forward(self, x):
        self.seen = x
        scores = [layer(x.flatten(1)) for layer in self.layers]
        return scores if self.training and len(scores) > 1 else scores[-1]


def classifier(heads=2, **options):
    network = Heads(heads)
    return ImageClassifier(
        network=network, num_classes=K, pixel_mean=MEAN.tolist(), pixel_std=STD.tolist(), **options
    )


def batch(count=4, size=4):
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, size, size), generator=g, dtype=torch.uint8)
    labels = [(3 * k + 1) % K for k in range(count)]
    return [{"image": i, "label": k} for i, k in zip(images, labels)]


def normalised(inputs):
    images = torch.stack([each["image"] for each in inputs]).float()
    return (images - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)


# ------------------------------------------------ losses


@pytest.mark.parametrize(("weights", "expected"), [((), (0.5, 0.5)), ((0.2, 0.7), (0.2, 0.7))])
def test_every_head_has_a_loss_with_its_weight(weights, expected):
    model, inputs = classifier(head_weights=weights).train(), batch()
    losses = model(inputs)
    assert list(losses) == ["loss_cls_stage1", "loss_cls_stage2"]
    labels = torch.tensor([each["label"] for each in inputs])
    for loss, weight, layer in zip(losses.values(), expected, model.network.layers):
        expected = F.cross_entropy(layer(normalised(inputs).flatten(1)), labels)
        assert loss.item() == pytest.approx(weight * expected.item(), rel=1e-5)


def test_one_head_and_label_smoothing():
    model, inputs = classifier(heads=1, label_smoothing=0.3).train(), batch(3)
    losses = model(inputs)
    labels = torch.tensor([each["label"] for each in inputs])
    scores = model.network.layers[0](normalised(inputs).flatten(1))
    expected = F.cross_entropy(scores, labels, label_smoothing=0.3)
    assert list(losses) == ["loss_cls"]
    assert losses["loss_cls"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_mixup_mixes_images_and_targets_alike():
    model = classifier(heads=1, mixup=0.8, label_smoothing=0.1).train()
    inputs = batch(6)
    np.random.seed(3)
    loss = model(inputs)["loss_cls"]
    np.random.seed(3)
    assert np.random.rand() < 1.0  # whether to mix
    share = np.random.beta(0.8, 0.8)
    x = normalised(inputs)
    assert torch.allclose(model.network.seen, share * x + (1 - share) * x.flip(0), atol=1e-4)
    labels = torch.tensor([each["label"] for each in inputs])
    target = share * F.one_hot(labels, K) + (1 - share) * F.one_hot(labels.flip(0), K)
    target = 0.9 * target + 0.1 / K
    scores = model.network.layers[0](model.network.seen.flatten(1))
    expected = -(target * scores.log_softmax(1)).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_cutmix_takes_a_rectangle_and_its_share_of_the_target():
    model = classifier(heads=1, cutmix=1.0).train()
    model.network = Heads(1, size=16)
    inputs = batch(2, size=16)
    x = normalised(inputs)
    shares = []
    for seed in range(20):
        np.random.seed(seed)
        loss = model(inputs)["loss_cls"]
        changed = (model.network.seen != x).any(1)  # (2, 16, 16)
        assert torch.equal(changed[0], changed[1])
        rows, columns = changed[0].any(1), changed[0].any(0)
        assert changed[0].sum() == rows.sum() * columns.sum()  # all of a rectangle
        share = 1 - float(changed[0].float().mean())
        labels = torch.tensor([each["label"] for each in inputs])
        target = share * F.one_hot(labels, K) + (1 - share) * F.one_hot(labels.flip(0), K)
        scores = model.network.layers[0](model.network.seen.flatten(1))
        expected = -(target * scores.log_softmax(1)).sum(1).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        shares.append(share)
    assert max(shares) - min(shares) > 0.5


def is_cut(seen, x):
    """Whether each pixel is one image's or the other's, and not a blend."""
    own, other = (seen == x).all(1), (seen == x.flip(0)).all(1)
    return bool((own | other).all())


def test_with_both_half_of_the_batches_are_cut():
    model, inputs = classifier(heads=1, mixup=0.8, cutmix=1.0).train(), batch(2)
    x = normalised(inputs)
    np.random.seed(0)
    cut = 0
    for _ in range(200):
        model(inputs)
        cut += is_cut(model.network.seen, x)
    assert 70 < cut < 130


def test_mixing_can_be_rare_and_draws_from_numpy_alone():
    model, inputs = classifier(heads=1, mixup=0.8, mix_prob=0.25).train(), batch(2)
    x = normalised(inputs)
    np.random.seed(0)
    mixed = 0
    for _ in range(100):
        model(inputs)
        mixed += not torch.equal(model.network.seen, x)
    assert 10 < mixed < 40
    np.random.seed(5)
    torch.manual_seed(1)
    first = [model(inputs)["loss_cls"].item() for _ in range(5)]
    np.random.seed(5)
    torch.manual_seed(2)
    assert first == [model(inputs)["loss_cls"].item() for _ in range(5)]


# ------------------------------------------------ evaluation


def test_scores_are_probabilities_of_the_last_head():
    model, inputs = classifier(mixup=0.8).eval(), batch(3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model([{"image": each["image"]} for each in inputs])
    with torch.no_grad():
        scores = model.network.layers[-1](normalised(inputs).flatten(1))
    for each, expected in zip(found, scores.softmax(1)):
        assert each["class_scores"].dtype == torch.float32
        assert torch.allclose(each["class_scores"], expected, atol=0.05)
        assert float(each["class_scores"].sum()) == pytest.approx(1, abs=1e-5)


def test_the_state_holds_the_network_alone():
    assert all(name.startswith("network.") for name in classifier().state_dict())


# ------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: classifier(mixup=0.8).train()(batch(3)), "a batch has 3 images"),
        (lambda: classifier().train()(batch(1) + batch(1, size=8)), "all the same size"),
        (lambda: classifier().train()([{"image": torch.zeros(3, 4, 4)}]), "has no label"),
        (lambda: classifier(head_weights=(1, 1, 1)).train()(batch()), "3 numbers for 2 heads"),
        (lambda: classifier(label_smoothing=1.5), "LABEL_SMOOTHING"),
        (lambda: classifier(mixup=-1), "MIXUP"),
        (lambda: timm_classifier(name="convnext_tinyy"), "convnext_tiny"),
        (lambda: timm_classifier(name="test_convnext", options={"depth": 3}), "cannot build"),
    ],
)
def test_mistakes_are_one_line(call, words):
    with pytest.raises(UserError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_an_unknown_network_is_named():
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.CLASSIFIER.NAME = "ImageClassifier", "Timm"
    with pytest.raises(UserError, match="'Timm', which is not in the registry CLASSIFIER"):
        config.build_model(cfg, device="cpu")


# ------------------------------------------------ timm's networks, both kinds of config


def test_timm_networks_from_both_kinds():
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.CLASSIFIER.NUM_CLASSES = "ImageClassifier", K
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.DROP_PATH = "test_convnext", 0.2
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    cfg.INPUT.FORMAT = "RGB"
    lazy = OmegaConf.create(
        {
            "model": L(ImageClassifier)(
                network=L(timm_classifier)(
                    name="test_convnext", num_classes="${..num_classes}", drop_path_rate=0.2
                ),
                num_classes=K,
            )
        },
        flags={"allow_objects": True},
    )
    models = []
    for each in (cfg, lazy):
        torch.manual_seed(0)
        models.append(config.build_model(each, device="cpu"))
    assert str(models[0]) == str(models[1])
    states = [model.state_dict() for model in models]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    by_yaml, by_lazy = (
        {k: v for k, v in vars(model).items() if not k.startswith("_")} for model in models
    )
    assert by_yaml == by_lazy
    losses = models[0].train()(batch(2, size=32))
    losses["loss_cls"].backward()
    assert all(p.grad is not None for p in models[0].parameters())
    assert models[0].eval()(batch(2, size=32))[0]["class_scores"].shape == (K,)


def test_a_backbone_starts_from_a_classifiers_checkpoint(tmp_path):
    network = timm_classifier(name="test_convnext", num_classes=K)
    model = ImageClassifier(network=network, num_classes=K)
    torch.save({"model": model.state_dict()}, tmp_path / "c.pth")
    backbone = TimmBackbone(name="test_convnext", weights=str(tmp_path / "c.pth"))
    weights = network.state_dict()
    for name, value in backbone.model.state_dict().items():
        name = name.replace("stem_", "stem.").replace("stages_", "stages.")
        assert torch.equal(value, weights[name]), name
