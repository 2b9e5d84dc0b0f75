"""The whole detector on tiny sizes."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from detectron2.structures import ImageList
from torch import nn

from d2dense.config import detr
from d2dense.config.defaults import get_cfg
from d2dense.errors import UserError
from d2dense.export import adapt
from d2dense.modeling.detr import (
    ChannelMapper,
    DeformableDecoder,
    DeformableDETR,
    LearnedQueries,
    PredictionHeads,
)
from tests.modeling.detr.whole import (
    CLASSES,
    Transformer,
    check_checkpointing,
    check_export,
    check_trace,
    image,
)


class Strides(Backbone):
    """Three maps by averaging over cells, so that padding stays where it is."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.mix = nn.Conv2d(3, width, 1)
        self.width = width

    size_divisibility = 32

    def forward(self, x):
        return {
            name: nn.functional.avg_pool2d(self.mix(x), stride, ceil_mode=True)
            for name, stride in (("a", 8), ("b", 16), ("c", 32))
        }

    def output_shape(self):
        return {n: ShapeSpec(channels=self.width, stride=s) for n, s in zip("abc", (8, 16, 32))}


def build(**changes):
    torch.manual_seed(0)
    node = detr.deformable_detr(
        backbone=None, in_features="abc", num_classes=CLASSES, channels=16, levels=3
    )
    for part in (node.encoder, node.decoder):
        part.update(heads=2, points=2, feedforward=32, layers=2, **changes)
    node.queries.num_queries = 7
    node.max_detections = 10
    node.backbone = nn.Identity()  # replaced below
    model = instantiate(node)
    model.backbone = Strides()
    with torch.no_grad():  # an untrained box head says the same for every query
        model.heads.boxes[-1].layers[-1].weight.normal_(std=0.5)
    return model


def no_dropout(**changes):
    return build(dropout=0.0, **changes)


def test_losses_of_every_layer_reach_every_parameter():
    model = build().train()
    for boxes in ((2, 1), (0, 3), (0, 0)):
        model.zero_grad()
        losses = model([image(48, 64, i, count) for i, count in enumerate(boxes)])
        kinds = ("loss_cls", "loss_bbox", "loss_iou")
        assert set(losses) == {*kinds, *(f"d0.{kind}" for kind in kinds)}
        sum(losses.values()).backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert missing == []


def test_a_batch_gives_what_its_images_give_alone():
    model = no_dropout().eval()
    batch = [image(64, 96, 0), image(40, 50, 1)]
    with torch.no_grad():
        together = model(batch)
        alone = [model([each])[0] for each in batch]
    for ours, theirs in zip(together, alone):
        ours, theirs = ours["instances"], theirs["instances"]
        assert torch.allclose(ours.scores, theirs.scores, atol=1e-5)
        assert torch.allclose(ours.pred_boxes.tensor, theirs.pred_boxes.tensor, atol=1e-3)


def test_losses_do_not_see_the_padding():
    model = no_dropout().train()
    one = model([image(40, 50)])
    model.backbone.size_divisibility = 128
    padded = model([image(40, 50)])
    assert all(torch.allclose(one[name], padded[name], rtol=1e-4) for name in one)


def test_detections_are_the_best_pairs():
    model = no_dropout().eval()
    logits, boxes = torch.randn(2, 7, CLASSES), torch.rand(2, 7, 4)
    sizes = [(40, 60), (32, 32)]
    images = ImageList(torch.zeros(2, 3, 64, 64), sizes)
    for i, found in enumerate(model.select(logits, boxes, images)):
        pairs = [(float(logits[i, q, k].sigmoid()), q, k) for q in range(7) for k in range(CLASSES)]
        for n, (score, q, k) in enumerate(sorted(pairs, reverse=True)[:10]):
            x, y, w, h = boxes[i, q].tolist()
            height, width = sizes[i]
            expected = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
            limits = [width, height, width, height]
            expected = [min(max(v * s, 0), s) for v, s in zip(expected, limits)]
            assert found.pred_boxes.tensor[n].tolist() == pytest.approx(expected, abs=1e-4)
            assert float(found.scores[n]) == pytest.approx(score)
            assert int(found.pred_classes[n]) == k
        assert len(found) == 10


def test_fewer_pairs_than_detections():
    model = build().eval()
    model.selection.max_detections = 100
    assert len(model([image(40, 50)])[0]["instances"]) <= 7 * CLASSES


def test_results_have_the_size_of_the_original():
    model = no_dropout().eval()
    with torch.no_grad():
        small = model([image(40, 50)])[0]["instances"]
        large = model([{**image(40, 50), "height": 80, "width": 150}])[0]["instances"]
    assert large.image_size == (80, 150)
    scale = torch.tensor([3.0, 2.0, 3.0, 2.0])
    assert torch.allclose(large.pred_boxes.tensor, small.pred_boxes.tensor * scale, atol=1e-3)


def test_traced_inference_follows_other_sizes():
    model = no_dropout().eval()

    plain = adapt(model).eval()
    with torch.no_grad():
        traced = torch.jit.trace(plain, image(64, 64)["image"], check_trace=False)
        for size in ((40, 96), (33, 50), (128, 64)):
            pixels = image(*size, seed=3)["image"]
            for ours, theirs in zip(traced(pixels), plain(pixels)):
                assert torch.allclose(ours, theirs, atol=1e-3)


def test_traced_transformer_takes_batches_of_other_sizes():
    check_trace(Transformer(no_dropout().eval()), [(2, 96, 64), (1, 32, 160)])


@pytest.mark.long
@pytest.mark.parametrize("batch", [1, 2])
def test_exported_transformer_takes_other_sizes(batch):
    check_export(Transformer(no_dropout().eval()), batch)


def test_checkpointed_layers_give_the_same_gradients():
    check_checkpointing(build().train(), [image(48, 64)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = no_dropout().train()
    plain = model([image(48, 64)])
    with torch.autocast("cpu", dtype=dtype):
        cast = model([image(48, 64)])
    for name, loss in cast.items():
        assert loss.dtype == torch.float32
        assert torch.allclose(loss, plain[name], rtol=0.2, atol=0.05)


def test_meta_device():
    with torch.device("meta"):
        model = no_dropout().train()
    assert all(p.is_meta for p in model.parameters())


# ------------------------------------------------ parts


def test_initial_values():
    heads = PredictionHeads(channels=8, num_classes=4, layers=3)
    assert len(set(heads.classes)) == len(set(heads.boxes)) == 1
    assert torch.allclose(heads.classes[0].bias.sigmoid(), torch.full((4,), 0.01))
    references = torch.tensor([[[0.2, 0.7], [0.5, 0.5]]])
    logits, boxes = heads([torch.randn(1, 2, 8)] * 3, [references] * 3)
    assert logits.shape == (3, 1, 2, 4)
    small = torch.full((1, 2, 2), -2.0).sigmoid()
    assert torch.allclose(boxes, torch.cat([references, small], dim=-1).expand(3, -1, -1, -1))


def test_own_heads_start_from_the_size_of_the_reference():
    heads = PredictionHeads(channels=8, num_classes=4, layers=3, shared=False)
    assert len(set(heads.classes)) == len(set(heads.boxes)) == 3
    box = torch.tensor([[[0.2, 0.7, 0.1, 0.3]]])
    assert torch.allclose(heads.predict_boxes(1, torch.randn(1, 1, 8), box), box)


def test_heads_of_the_last_layer_alone():
    heads = PredictionHeads(channels=8, num_classes=4, layers=3, shared=False)
    states, references = torch.randn(3, 1, 5, 8).unbind(), torch.rand(3, 1, 5, 2).unbind()
    every, last = heads(states, references), heads(states[-1:], references[-1:])
    assert all(torch.equal(ours[-1:], theirs) for ours, theirs in zip(every, last))


def test_refinement_moves_references_without_their_gradients():
    model = no_dropout()
    model.decoder.box_refinement = True
    model.heads = PredictionHeads(channels=16, num_classes=CLASSES, layers=2, shared=False)
    for head in model.heads.boxes:
        nn.init.normal_(head.layers[-1].weight)
    images = model.preprocess([image(64, 64)])
    memory = model.encode(images)
    states, references = model.decoder(model.queries(memory), memory, model.heads.predict_boxes)
    assert [each.shape[-1] for each in references] == [2, 4]
    first = model.heads.predict_boxes(0, states[0], references[0])
    assert torch.equal(references[1], first)
    assert not references[1].requires_grad
    assert set(model.train()([image(64, 64)])) == set(no_dropout().train()([image(64, 64)]))


def test_queries_start_at_points_of_their_positions():
    queries = LearnedQueries(num_queries=5, channels=8)
    memory = build().encode(build().preprocess([image(32, 32), image(32, 32)]))
    found = queries(memory)
    expected = queries.reference_points(queries.embedding.weight[:, :8]).sigmoid()
    assert torch.allclose(found.references, expected.expand(2, -1, -1))
    assert torch.equal(found.content[1], queries.embedding.weight[:, 8:])


def test_channel_mapper():
    shapes = {"a": ShapeSpec(channels=4), "b": ShapeSpec(channels=6)}
    mapper = ChannelMapper(
        input_shape=shapes, in_features=["a", "b"], out_channels=8, levels=4, norm_groups=4
    )
    a, b = torch.randn(2, 4, 16, 12), torch.randn(2, 6, 8, 6)
    levels = mapper([a, b])
    assert [tuple(x.shape) for x in levels] == [
        (2, 8, 16, 12),
        (2, 8, 8, 6),
        (2, 8, 4, 3),
        (2, 8, 2, 2),
    ]
    first = nn.functional.conv2d(b, mapper.extra_convs[0].weight, stride=2, padding=1)
    expected = nn.functional.group_norm(first, 4)
    assert torch.allclose(levels[2], expected, atol=1e-5)


def test_maps_that_do_not_fit_are_named():
    model = build().eval()
    model.backbone = Strides(width=24)
    with pytest.raises(UserError, match=r"3 maps of 16 channels, found 3 with 24, 24, 24"):
        model([image(32, 32)])


def test_an_unknown_neck_is_a_mistake():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "TimmBackbone"
    cfg.MODEL.TIMM.NAME = "convnext_atto"
    cfg.MODEL.DETR.NECK = "fpn"
    with torch.device("meta"), pytest.raises(UserError, match="'fpn'; expected one of none"):
        DeformableDETR(cfg)


def test_decoder_without_refinement_keeps_the_references():
    decoder = DeformableDecoder(channels=16, levels=3, layers=3, heads=2, points=2)
    model = build()
    memory = model.encode(model.preprocess([image(32, 32)]))
    queries = model.queries(memory)
    _, references = decoder.eval()(queries, memory, model.heads.predict_boxes)
    assert all(each is queries.references for each in references)
