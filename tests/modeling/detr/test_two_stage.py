"""The decoder that looks forward twice, and whole detectors in two stages."""

import warnings

import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import ImageList
from torch import nn

from d2dense.config import detr
from d2dense.export import adapt
from d2dense.modeling.detr import inverse_sigmoid
from d2dense.modeling.detr.positions import encode_coordinates
from tests.modeling.detr.test_deformable_detr import Strides
from tests.modeling.detr.whole import (
    CLASSES,
    Transformer,
    check_checkpointing,
    check_export,
    check_trace,
    image,
)
from tests.modeling.waiting import OpCounter

KINDS = ("deformable_detr_plus_plus", "dino")


def build(kind, **changes):
    torch.manual_seed(0)
    node = getattr(detr, kind)(
        backbone=None, in_features="abc", num_classes=CLASSES, channels=16, levels=3
    )
    for part in (node.encoder, node.decoder):
        part.update(heads=2, points=2, feedforward=32, layers=2)
    node.queries.num_queries = 7
    node.max_detections = 10
    if kind == "dino":
        node.denoising.num_queries = 8
    node.update(changes)
    node.backbone = nn.Identity()  # replaced below
    model = instantiate(node)
    model.backbone = Strides()
    for head in (*model.heads.boxes, model.queries.boxes):  # untrained ones move nothing
        nn.init.normal_(head.layers[-1].weight, std=0.5)
    return model


# ------------------------------------------------ the decoder


@pytest.mark.parametrize("kind", KINDS)
def test_look_forward_twice(kind):
    """Gradients of one layer's boxes: its own box head and the one before, not the one before
    that.
    """
    model = build(kind)
    model.decoder.layers.append(model.decoder.layers[0])
    model.heads = type(model.heads)(channels=16, num_classes=CLASSES, layers=3, shared=False)
    for head in model.heads.boxes:
        nn.init.normal_(head.layers[-1].weight, std=0.5)
    memory = model.encode(model.preprocess([image(64, 64)]))
    for twice, expected in ((True, [False, True, True]), (False, [False, False, True])):
        model.decoder.look_forward_twice = twice
        model.zero_grad()
        _, boxes = model.decode(memory)
        boxes[2].sum().backward(retain_graph=True)
        heads = [head.layers[-1].weight.grad for head in model.heads.boxes]
        assert [head is not None and bool(head.any()) for head in heads] == expected


def test_refinement_before_the_norm_predictions_after():
    model = build("dino")
    nn.init.normal_(model.decoder.norm.weight)
    memory = model.encode(model.preprocess([image(64, 64), image(40, 50)]))
    queries = model.queries(memory)
    raw = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda _, __, state: raw.append(state))
    logits, boxes = model.predict(queries, memory)
    first, second = raw
    head = model.heads.boxes[0]
    norm = model.decoder.norm
    ratios = memory.valid_ratios
    start = inverse_sigmoid(queries.references, 1e-3)
    refined = (head.layers(first) + start).sigmoid()
    assert torch.allclose(boxes[0], (head.layers(norm(first)) + start).sigmoid(), atol=1e-6)
    last = model.heads.boxes[1].layers(norm(second)) + inverse_sigmoid(refined, 1e-3)
    assert torch.allclose(boxes[1], last.sigmoid(), atol=1e-5)
    assert torch.allclose(logits[1], model.heads.classes[1](norm(second)), atol=1e-6)
    # positions are those of the first level with its padding, (y, x, w, h)
    scaled = refined.detach() * ratios[:, 0].repeat(1, 2)[:, None]
    waves = encode_coordinates(scaled[..., [1, 0, 2, 3]], channels=8)
    position = model.decoder.positions.layers(waves)
    of_levels = refined.detach()[:, :, None] * ratios.repeat(1, 1, 2)[:, None]
    expected = model.decoder.layers[1](first, position, of_levels, memory)
    assert torch.allclose(expected, second, atol=1e-5)


def test_groups_of_queries_in_one_pass():
    """A mask of each image separates groups like passes of their own."""
    model = build("dino").eval()
    memory = model.encode(model.preprocess([image(64, 64), image(40, 50)]))
    queries = model.queries(memory)._replace(proposals=None)
    group = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 1, 1]])
    mask = group[:, :, None] != group[:, None, :]
    with torch.no_grad():
        together, _ = model.decoder(queries._replace(mask=mask), memory, model.heads.predict_boxes)
        for i in range(2):
            for number in range(2):
                rows = (group[i] == number).nonzero()[:, 0]
                alone = queries._replace(
                    content=queries.content[:, rows], references=queries.references[:, rows]
                )
                states, _ = model.decoder(alone, memory, model.heads.predict_boxes)
                assert torch.allclose(together[-1][i, rows], states[-1][i], atol=1e-5)


# ------------------------------------------------ whole detectors


@pytest.mark.parametrize("kind", KINDS)
def test_losses_reach_every_parameter(kind):
    model = build(kind).train()
    for boxes in ((2, 1), (0, 3), (0, 0), (30, 2)):
        model.zero_grad()
        losses = model([image(48, 64, i, count) for i, count in enumerate(boxes)])
        names = {f"{place}loss_{part}" for place in ("", "d0.") for part in ("cls", "bbox", "iou")}
        expected = names | {f"enc_loss_{part}" for part in ("cls", "bbox", "iou")}
        if kind == "dino":
            expected |= {name.replace("loss_", "dn_loss_") for name in names}
        assert set(losses) == expected
        sum(losses.values()).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_pure_set(kind):
    """Noised queries, the encoder and evaluation mode change no loss of the matched queries."""
    model = build(kind)
    images = model.preprocess([image(48, 64), image(40, 50, 1)])
    instances = [image(48, 64)["instances"], image(40, 50, 1)["instances"]]
    memory = model.encode(images)
    targets = model.build_targets(images, instances)
    losses = model.losses(images, instances)
    alone = model.criterion(*model.decode(memory), targets)
    assert all(torch.allclose(losses[name], alone[name], rtol=1e-4) for name in alone)
    model.eval()
    again = model.losses(images, instances)
    same = [name for name in losses if "dn_" not in name]
    assert all(torch.allclose(losses[name], again[name], rtol=1e-5) for name in same)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_do_not_see_the_padding(kind):
    model = build(kind, denoising=None).train()
    nn.init.zeros_(model.queries.transform.bias)  # nothing chooses the padding
    one = model([image(40, 50)])
    model.backbone.size_divisibility = 128
    padded = model([image(40, 50)])
    # all positions have a binary loss of classes, padding too; and positions made of references
    # are relative to the first level with its padding
    same = [n for n in one if n != "enc_loss_cls"] if kind == KINDS[0] else ["enc_loss_cls"]
    same += ["enc_loss_bbox", "enc_loss_iou"]
    assert all(torch.allclose(one[name], padded[name], rtol=1e-3) for name in same)


@pytest.mark.parametrize("kind", KINDS)
def test_without_masks_padding_is_part_of_the_image(kind):
    model = build(kind, mask_padding=False, denoising=None).eval()
    small = [image(40, 50)]
    images = model.preprocess(small)
    assert images.tensor.shape[2:] == (64, 64)
    memory = model.encode(images)
    assert not memory.padding.any()
    assert (memory.valid_ratios == 1).all()
    whole = ImageList(images.tensor, [(64, 64)])
    with torch.no_grad():
        logits, boxes = model.decode(memory)
        found, expected = (model.select(logits[-1], boxes[-1], each)[0] for each in (images, whole))
    assert found.image_size == (40, 50)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    targets = model.build_targets(images, [small[0]["instances"]])
    x0, y0, x1, y1 = small[0]["instances"].gt_boxes.tensor[0].tolist()
    expected = [(x0 + x1) / 128, (y0 + y1) / 128, (x1 - x0) / 64, (y1 - y0) / 64]
    assert targets.boxes[0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    losses = model.losses(images, [small[0]["instances"]])
    padded = small[0]["instances"]
    padded._image_size = (64, 64)
    same = model.losses(whole, [padded])
    assert all(torch.equal(losses[name], same[name]) for name in losses)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_layers_give_the_same_gradients(kind):
    check_checkpointing(build(kind).train(), [image(48, 64)], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kind, dtype):
    model = build(kind).train()
    with torch.autocast("cpu", dtype=dtype):
        losses = model([image(48, 64, boxes=3), image(40, 50, 1)])
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_padding_of_a_value_before_normalisation():
    model = build("dino", pad_value=114.0, square=128)
    model.pixel_mean[:] = torch.tensor([100.0, 110, 120]).view(3, 1, 1)
    model.pixel_std[:] = 2.0
    given = image(40, 50)
    found = model.preprocess([given])
    assert found.tensor.shape == (1, 3, 128, 128)
    assert found.image_sizes == [(40, 50)]
    assert found.tensor[0, :, 100, 100].tolist() == [7.0, 2.0, -3.0]
    inside = (given["image"] - model.pixel_mean) / model.pixel_std
    assert torch.allclose(found.tensor[0, :, :40, :50], inside)
    model.pad_value = None
    assert not model.preprocess([given]).tensor[0, :, 40:].any()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("deformable_detr_plus_plus", {}),
        ("dino", {"soft_nms_iou": 0.5, "by_offset": True}),
        ("dino", {"soft_nms_iou": 0.5, "mask_padding": False, "pad_value": 9.0}),
    ],
)
def test_traced_inference_follows_other_sizes(kind, changes):
    model = build(kind, **changes).eval()
    plain = adapt(model).eval()
    with torch.no_grad():
        traced = torch.jit.trace(plain, image(64, 64)["image"], check_trace=False)
        # the last one has fewer positions than queries
        for size in ((40, 96), (33, 50), (128, 64), (8, 8)):
            pixels = image(*size, seed=3, boxes=0)["image"]
            for ours, theirs in zip(traced(pixels), plain(pixels)):
                assert torch.allclose(ours, theirs, atol=1e-3)
    assert "PythonOp" not in str(traced.inlined_graph)


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device(kind):
    """Costs are counted there."""
    with torch.device("meta"):
        model = build(kind, soft_nms_iou=0.8).eval()
    found = model.inference([{"image": torch.empty(3, 64, 64, device="meta")}], False)
    assert found[0].scores.shape == (7,)


@pytest.mark.parametrize("kind", KINDS)
def test_traced_transformer_takes_batches_of_other_sizes(kind):
    check_trace(Transformer(build(kind).eval()), [(2, 96, 64), (1, 32, 160)])


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_exported_transformer_takes_other_sizes(kind):
    check_export(Transformer(build(kind).eval()), 1)


# ------------------------------------------------ waiting for the device


def operations(kind, images):
    """Of the losses of a batch, after the backbone."""
    model = build(kind).train()
    given = [image(64, 64, i, boxes=3) for i in range(images)]
    memory = model.encode(model.preprocess(given))
    targets = model.build_targets(model.preprocess(given), [each["instances"] for each in given])
    with OpCounter() as counter:
        model.main_losses(memory, targets)
    return counter


@pytest.mark.parametrize(("kind", "waiting"), zip(KINDS, (0, 5)))
def test_no_operation_waits_or_runs_per_image(kind, waiting):
    """What waits is the matching, with one copy (not seen here); noise is drawn and spread over its
    slots on the host, where masks cost nothing.
    """
    two, six = operations(kind, 2), operations(kind, 6)
    assert two.waiting == six.waiting == waiting
    assert two.total == six.total


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_one_synchronisation_per_step_on_a_gpu(kind):
    model = build(kind).train().cuda()
    given = [image(64, 64, i, boxes=3) for i in range(4)]
    counts = []
    for _ in range(2):  # the first step also starts libraries
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                sum(model(given).values()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchron" in str(each.message) for each in caught))
    assert counts[1] <= 1
