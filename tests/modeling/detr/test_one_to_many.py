"""Hybrid matching: more queries in training, matched with copies of the objects."""

import pytest
import torch
from detectron2.config import instantiate

from d2dense.config import detr
from d2dense.config.defaults import get_cfg
from d2dense.engine.recompute import enable_activation_checkpointing
from d2dense.errors import UserError
from d2dense.export import adapt
from d2dense.modeling.detr import OneToManyQueries, build_targets, parts
from tests.modeling.detr.test_two_stage import build
from tests.modeling.detr.whole import image


def hybrid(kind="deformable_detr_plus_plus", *, count=9, repeats=2, weight=1.0, **changes):
    extra = OneToManyQueries(num_queries=count, channels=16, repeats=repeats, weight=weight)
    model = build(kind, **changes)
    model.one_to_many = extra
    return model


def memory_of(model, *images):
    return model.encode(model.preprocess(list(images)))


def test_they_come_next_in_rank():
    model = hybrid()
    memory = memory_of(model, image(64, 96), image(50, 60))
    queries = model.queries(memory)
    extra = model.one_to_many(model.queries, queries.proposals)
    model.queries.num_queries = 7 + 9
    both = model.queries.propose(memory)
    assert torch.equal(extra.references, both.boxes[:, 7:])
    assert not extra.references.requires_grad
    assert torch.equal(extra.content, model.one_to_many.content.weight.expand(2, -1, -1))
    expected = model.queries.positions(both.boxes[:, 7:]).chunk(2, dim=-1)[0]
    assert torch.allclose(extra.position, expected)


def test_more_queries_than_positions():
    model = hybrid(count=200)
    memory = memory_of(model, image(32, 32))
    queries = model.queries(memory)
    positions = memory.tokens.shape[1]
    extra = model.one_to_many(model.queries, queries.proposals)
    assert extra.references.shape == (1, 200, 4)
    assert (extra.references[0, positions - 7 :] == 1).all()  # none is left
    sum(model([image(32, 32)]).values()).backward()


@pytest.mark.parametrize("kind", ["deformable_detr_plus_plus", "dino"])
def test_the_detectors_own_losses_do_not_change(kind):
    """Neither group hears the other: losses and gradients of the first are those without."""
    images = [image(64, 96), image(50, 60, boxes=0)]
    model = hybrid(kind)
    found = []
    for extra in (model.one_to_many, None):
        model.one_to_many = extra
        torch.manual_seed(3)  # of denoising
        found.append(model(images))
    many = {name for name in found[0] if "many_" in name}
    assert many == {p + "many_loss_" + x for p in ("", "d0.") for x in ("cls", "bbox", "iou")}
    assert found[0].keys() - many == found[1].keys()
    for name, loss in found[1].items():
        torch.testing.assert_close(found[0][name], loss)


def test_losses_are_those_of_annotations_given_twice():
    """A detector whose own queries were the further ones, with every object annotated twice."""
    images = [image(64, 96), image(50, 60, boxes=1)]
    model = hybrid(repeats=2, weight=0.5)
    losses = model(images)
    memory = memory_of(model, *images)
    proposals = model.queries.propose(memory)
    extra = model.one_to_many(model.queries, proposals)
    logits, boxes = model.predict(extra, memory)
    twice = [type(each["instances"]).cat([each["instances"]] * 2) for each in images]
    targets = build_targets(twice, logits.device, num_classes=3)
    assert targets.counts == [4, 2]
    for name, loss in model.criterion(logits, boxes, targets).items():
        ours = losses[name.replace("loss_", "many_loss_")]
        torch.testing.assert_close(ours, 0.5 * loss, rtol=1e-4, atol=1e-6)


def test_each_object_gets_as_many_queries():
    model = hybrid(repeats=4, count=20)
    targets = build_targets([image(64, 96, boxes=3)["instances"]], torch.device("cpu"))
    matches = model.criterion.matcher(
        torch.randn(1, 1, 20, 3), torch.rand(1, 1, 20, 4) * 0.5 + 0.2, targets.repeated(4)
    )
    assert matches.found.shape == (1, 1, 12)
    assert matches.found.all()
    assert len(matches.queries.unique()) == 12


def test_all_parameters_get_gradients_and_checkpointing_changes_nothing():
    model = hybrid()
    sum(model([image(64, 64)]).values()).backward()
    without = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    before = model.one_to_many.content.weight.grad.clone()
    enable_activation_checkpointing(model)
    model.zero_grad()
    sum(model([image(64, 64)]).values()).backward()
    assert torch.allclose(before, model.one_to_many.content.weight.grad, atol=1e-6)


def test_inference_and_export_know_nothing_of_them():
    model, given = hybrid().eval(), image(64, 96)
    with torch.no_grad():
        found = model([given])[0]["instances"]
        exported = adapt(model)
        model.one_to_many = None
        plain = model([given])[0]["instances"]
    assert torch.equal(found.scores, plain.scores)
    assert torch.equal(found.pred_boxes.tensor, plain.pred_boxes.tensor)
    assert not [name for name in exported.state_dict() if "one_to_many" in name]


def test_both_kinds_of_config():
    node = get_cfg().MODEL.DETR
    assert parts.transformer(node)["one_to_many"] is None
    node.update(TWO_STAGE=True, BOX_REFINEMENT=True)
    node.ONE_TO_MANY.QUERIES = 1500
    lazy = detr.deformable_detr_plus_plus(backbone=None, in_features=["p3"])
    with torch.device("meta"):
        yaml = parts.transformer(node)["one_to_many"]
        lazy = instantiate(detr.hybrid_matching(lazy).one_to_many)
    for extra in (yaml, lazy):
        assert extra.content.weight.shape == (1500, 256)
        assert (extra.repeats, extra.weight) == (6, 1.0)


def test_one_stage_has_no_proposals_for_them():
    node = detr.deformable_detr(
        backbone=None, in_features="abc", num_classes=3, channels=16, levels=3
    )
    for part in (node.encoder, node.decoder):
        part.update(heads=2, points=2, feedforward=32, layers=2)
    node.backbone = torch.nn.Identity()
    detr.hybrid_matching(node)
    with pytest.raises(UserError, match="LearnedQueries; give TwoStageQueries"):
        instantiate(node)
