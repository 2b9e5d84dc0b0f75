"""Deformable DETR on CEDNet: official weights, costs and the official recipe."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import nn

from cednet import official
from cednet.official_names import correspondence
from d2dense import config, model_zoo
from d2dense.checkpoint import convert
from d2dense.costs import count_macs, detection_input
from d2dense.data import mappers
from d2dense.engine.experiment import experiment
from d2dense.errors import UserError
from tests.projects.cednet import golden
from tests.projects.parity import optimizer_groups

OFFICIAL = "full_deformable_detr_next_tiny"
PREFIX = "CEDNet/deformable_detr_"
needs_names = pytest.mark.skipif(not golden.variants(), reason="no official names here")
needs_groups = pytest.mark.skipif(not golden.train_meta(), reason="no official training facts here")


def on_meta(name):
    with torch.device("meta"):
        return config.build_model(model_zoo.get_config(PREFIX + name), device="meta")


# ------------------------------------------------ costs


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cednet_next_t", 42_554_326),
        ("cednet_next_s", 64_902_998),
        # backbones of the tables, and the same transformer
        ("cednet_next_b", 92_067_840 + 42_554_326 - 31_581_568),
        ("cednet_r50_t", 32_330_880 + 42_554_326 - 31_581_568),
        ("convnext_t", 40_909_622),
    ],
)
def test_parameters(name, count):
    # ConvNeXt has a norm of the level that is not used, which is frozen
    assert sum(p.numel() for p in on_meta(name).parameters() if p.requires_grad) == count


class WithoutPostprocessing(nn.Module):
    """The network alone: rescaled detections are counted, which needs values."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.inference(batch, do_postprocess=False)


@pytest.mark.parametrize(("name", "giga"), [("cednet_next_t", 222.9), ("cednet_next_s", 303.7)])
def test_multiply_accumulates(name, giga):
    model = on_meta(name)
    model.backbone._size_divisibility = 32  # published costs are of the image alone
    batch = detection_input(800, 1280, device="meta")
    found = count_macs(WithoutPostprocessing(model), batch, attention=False)[""]
    assert found / 1e9 == pytest.approx(giga, rel=0.01)


# ------------------------------------------------ official weights


class ByOfficialNames:
    """The official transformer from the weights as they are called there, one image without
    padding, operator by operator.
    """

    def __init__(self, weights):
        self.weights = weights

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name, x):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias)

    def perceptron(self, name, x):
        hidden = self.linear(f"{name}.layers.0.0", x).relu()
        return self.linear(f"{name}.layers.1", hidden)

    def deformable(self, name, query, points, tokens, shapes):
        count = len(query)
        values = self.linear(f"{name}.value_proj", tokens).view(-1, 8, 32)
        offsets = self.linear(f"{name}.sampling_offsets", query).view(count, 8, 4, 4, 2)
        shares = self.linear(f"{name}.attention_weights", query).view(count, 8, 16)
        shares = shares.softmax(-1).view(count, 8, 4, 4)
        read, start = torch.zeros(count, 8, 32), 0
        for level, (h, w) in enumerate(shapes):
            image = values[start : start + h * w].view(h, w, 8, 32).permute(2, 3, 0, 1)
            start += h * w
            where = points[:, None, None] + offsets[:, :, level] / torch.tensor([w, h])
            grid = where.transpose(0, 1) * 2 - 1
            samples = F.grid_sample(image, grid, align_corners=False)  # (8, 32, count, 4)
            read += torch.einsum("mcqp,qmp->qmc", samples, shares[:, :, level])
        return self.linear(f"{name}.output_proj", read.flatten(1))

    def memory(self, maps):
        tokens, positions, points = [], [], []
        for level, image in enumerate(maps):
            h, w = image.shape[1:]
            y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
            waves = []
            for angle in (y / h * 2 * math.pi, x / w * 2 * math.pi):
                for k in range(64):
                    scaled = angle / 10000 ** (2 * k / 128)
                    waves += [scaled.sin(), scaled.cos()]
            embedding = self.weights["bbox_head.transformer.level_embeds"][level]
            positions.append(torch.stack(waves, dim=-1).reshape(-1, 256) + embedding)
            points.append(torch.stack([x / w, y / h], dim=-1).reshape(-1, 2))
            tokens.append(image.flatten(1).T)
        tokens, positions, points = (torch.cat(each) for each in (tokens, positions, points))
        shapes = [each.shape[1:] for each in maps]
        for i in range(6):
            name = f"bbox_head.transformer.encoder.layers.{i}"
            read = self.deformable(
                f"{name}.attentions.0", tokens + positions, points, tokens, shapes
            )
            tokens = self.norm(f"{name}.norms.0", tokens + read)
            tokens = self.norm(
                f"{name}.norms.1", tokens + self.perceptron(f"{name}.ffns.0", tokens)
            )
        return tokens, shapes

    def __call__(self, maps):
        memory, shapes = self.memory(maps)
        position, content = self.weights["bbox_head.query_embedding.weight"].split(256, dim=1)
        points = self.linear("bbox_head.transformer.reference_points", position).sigmoid()
        for i in range(6):
            name = f"bbox_head.transformer.decoder.layers.{i}"
            weights = self.weights[f"{name}.attentions.0.attn.in_proj_weight"].chunk(3)
            biases = self.weights[f"{name}.attentions.0.attn.in_proj_bias"].chunk(3)
            inputs = (content + position, content + position, content)
            heads = [
                F.linear(x, w, b).view(-1, 8, 32).transpose(0, 1)
                for x, w, b in zip(inputs, weights, biases)
            ]
            shares = (heads[0] @ heads[1].transpose(1, 2) / math.sqrt(32)).softmax(-1)
            heard = (shares @ heads[2]).transpose(0, 1).flatten(1)
            heard = self.linear(f"{name}.attentions.0.attn.out_proj", heard)
            content = self.norm(f"{name}.norms.0", content + heard)
            read = self.deformable(
                f"{name}.attentions.1", content + position, points, memory, shapes
            )
            content = self.norm(f"{name}.norms.1", content + read)
            content = self.norm(
                f"{name}.norms.2", content + self.perceptron(f"{name}.ffns.0", content)
            )
        logits = self.linear("bbox_head.cls_branches.5", content)
        shift = self.linear("bbox_head.reg_branches.5.0", content).relu()
        shift = self.linear("bbox_head.reg_branches.5.2", shift).relu()
        shift = self.linear("bbox_head.reg_branches.5.4", shift)
        start = torch.cat([torch.log(points / (1 - points)), torch.zeros_like(points)], dim=1)
        return logits, (shift + start).sigmoid()


@needs_names
def test_official_weights_compute_what_their_names_say():
    weights = golden.filled(golden.variants()[OFFICIAL])
    for branches in ("cls_branches", "reg_branches"):  # one module under six names there
        for name in list(weights):
            if f"{branches}.5." in name:
                for i in range(5):
                    weights[name.replace(f"{branches}.5.", f"{branches}.{i}.")] = weights[name]
    model = official.load(OFFICIAL, weights)
    assert not model.training
    images = ImageList(golden.image(0, 1, 3, 64, 96), [(64, 96)])
    with torch.no_grad():
        maps = [each[0] for each in model.backbone(images.tensor).values()]
        logits, boxes = model.decode(model.encode(images))
        expected = ByOfficialNames(weights)(maps)
    assert torch.allclose(logits[-1, 0], expected[0], atol=1e-4)
    assert torch.allclose(boxes[-1, 0], expected[1], atol=1e-5)
    assert logits.shape == (6, 1, 300, 80)
    back = official.state_dict(model)
    assert back.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in back.items())


@needs_names
def test_another_number_of_classes_names_its_key():
    cfg = config.load(PREFIX + "cednet_next_t", ["model.num_classes=7"])
    with torch.device("meta"):
        model = config.build_model(cfg, device="meta")
    weights = {
        name: torch.empty(shape, device="meta") for name, shape, _ in golden.variants()[OFFICIAL]
    }
    with pytest.raises(UserError, match=r"MODEL\.DETR\.NUM_CLASSES"):
        convert(weights, "cednet", model)


# ------------------------------------------------ the recipe


@needs_groups
def test_optimizer_groups_are_the_official_ones():
    run = experiment(model_zoo.get_config(PREFIX + "cednet_next_t"), device="cpu")
    model = on_meta("cednet_next_t")
    names = correspondence(model, ()).names
    expected = golden.train_meta()["param_groups"]["deformable_detr_next_tiny"]
    found = {}
    for group in optimizer_groups(run, model):
        assert list(group["betas"]) == expected["betas"]
        for name in group["params"]:
            found[names[name]] = (group["lr"] / expected["base_lr"], group["weight_decay"])
    assert found.keys() == expected["params"].keys()
    for name, value in expected["params"].items():
        assert found[name] == pytest.approx(tuple(value)), name


def scales(name):
    run = experiment(model_zoo.get_config(PREFIX + name), device="cpu")
    found = {}
    for group in optimizer_groups(run, on_meta(name)):
        found |= dict.fromkeys(group["params"], (group["lr"] / 2e-4, group["weight_decay"]))
    return found


def test_the_small_model_decays_by_half_stages():
    found = scales("cednet_next_s")
    expected = {
        "backbone.trunk.stem.0.conv.weight": (0.7**10, 0.05),
        "backbone.trunk.first.0.mlp.fc1.bias": (0.7**9, 0.0),
        "backbone.trunk.stages.3.encoder.levels.2.0.mlp.fc1.weight": (0.7, 0.05),
        "backbone.pyramid.lateral.0.conv.weight": (1.0, 0.05),
        "encoder.layers.0.norm1.weight": (1.0, 1e-4),
        "decoder.layers.5.cross_attention.sampling_offsets.bias": (0.1, 1e-4),
        "queries.reference_points.weight": (0.1, 1e-4),
    }
    assert {name: found[name] for name in expected} == {
        name: pytest.approx(value) for name, value in expected.items()
    }


@pytest.mark.parametrize("name", ["cednet_next_b", "cednet_r50_t", "convnext_t", "convnext_s"])
def test_the_others_have_one_weight_decay(name):
    for parameter, value in scales(name).items():
        slow = ("backbone.", "sampling_offsets", "reference_points")
        expected = 0.1 if any(part in parameter for part in slow) else 1.0
        assert value == pytest.approx((expected, 1e-4)), parameter


@pytest.mark.parametrize("kind", ["lazy", "yaml"])
def test_schedule_and_data(kind):
    cfg = model_zoo.get_config(PREFIX + "cednet_next_t", kind)
    run = experiment(cfg, device="cpu")
    lr, steps = run.build_lr_multiplier(), run.settings.max_iter
    assert steps == round(50 * 118_287 / 32)
    assert [lr(epoch / 50) for epoch in (0, 1, 39.99, 40.01)] == pytest.approx([1, 1, 1, 0.1])
    settings = run.settings
    assert settings.clip_enabled
    assert (settings.clip_type, settings.clip_value, settings.clip_norm_type) == (
        "full_model",
        0.1,
        2.0,
    )
    assert not settings.amp_enabled
    if kind == "yaml":
        assert not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        assert cfg.SOLVER.IMS_PER_BATCH == 32
        mapper = mappers.from_cfg(cfg, True)
        assert "RandomApply" in str(mapper.augmentations)
    else:
        assert not cfg.dataloader.train.dataset.filter_empty
        assert cfg.dataloader.train.total_batch_size == 32


@pytest.mark.parametrize(
    ("name", "rate"), [("next_t", 0.2), ("next_s", 0.3), ("next_b", 0.3), ("r50_t", 0.0)]
)
def test_drop_path(name, rate):
    cfg = model_zoo.get_config(f"{PREFIX}cednet_{name}")
    assert cfg.model.backbone.trunk.drop_path == rate
    assert cfg.model.backbone.size_divisibility == 128
