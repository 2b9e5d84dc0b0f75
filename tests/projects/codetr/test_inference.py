"""Inference drops the auxiliary heads: the outputs, the state and the cost are those of the base
detector.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2dense import config, model_zoo
from d2dense.costs import count_macs, count_parameters, detection_input
from d2dense.export import adapt
from d2dense.modeling.detr import DeformableDETR, OneToManyQueries
from tests.projects.codetr import family

HEADS = [(), ("atss",), family.PAIR, ("mask_rcnn", "fcos", "gfl")]


@pytest.fixture(scope="module")
def bases():
    return {base: family.detector(base, seed=1).eval() for base in family.BASES}


@pytest.mark.parametrize("heads", HEADS, ids=len)
@pytest.mark.parametrize("base", family.BASES)
@torch.no_grad()
def test_outputs_state_and_cost(bases, base, heads):
    """Of detectors with the same weights, where they have the same parts."""
    model, plain = family.detector(base, *heads).eval(), bases[base]
    state = plain.state_dict()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    extra = ("adapter.", "auxiliary_heads.", "positive_queries.")
    assert all(name.startswith(extra) for name in missing)
    assert bool(missing) == bool(heads)
    batch = family.batch((0, 0))
    for ours, theirs in zip(model(batch), plain(batch)):
        ours, theirs = ours["instances"], theirs["instances"]
        assert len(ours) > 0
        assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        assert torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.pred_classes, theirs.pred_classes)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    inputs = detection_input(96, 128)
    costs = count_macs(plain, inputs)
    assert costs[""] > 1e6
    assert {name: n for name, n in count_macs(model, inputs).items() if n} == {
        name: n for name, n in costs.items() if n
    }
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}
    bare = model.inference_model()
    assert type(bare) is DeformableDETR
    needed = {name: value for name, value in state.items() if not name.startswith("denoising.")}
    assert bare.state_dict().keys() == needed.keys()
    assert all(torch.equal(value, needed[name]) for name, value in bare.state_dict().items())
    assert not bare.training


class Plain(nn.Module):
    """Without results at the size of the original, which need values."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.inference(batch, do_postprocess=False)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("co_deformable_detr_r50_1x", "deformable_detr_pp_r50_1x"),
        ("dino_5scale_r50_rcnn_atss_1x", "dino_5scale_r50_1x"),
    ],
)
def test_cost_of_the_papers_models(name, plain):
    """And the parameters of what is exported."""
    found = []
    for each in (name, plain):
        with torch.device("meta"):
            model = config.build_model(model_zoo.get_config(f"CoDETR/{each}"), device="meta")
        macs = count_macs(Plain(model.eval()), detection_input(256, 320, device="meta"))[""]
        found.append((macs, count_parameters(adapt(model))[""]))
    assert found[0] == found[1]
    # section 2 of the reference: 47.59 M and 48.04 M, frozen batch norms included
    assert found[0][1] / 1e6 == pytest.approx(48.04 if "dino" in name else 47.59, abs=0.06)


@torch.no_grad()
def test_queries_for_copies_of_objects_are_of_training_only():
    """Hybrid matching beside auxiliary heads (a combination of our own)."""
    plain = family.detector("deformable_detr_pp", *family.PAIR, seed=1)
    model = family.detector(
        "deformable_detr_pp",
        *family.PAIR,
        seed=1,
        one_to_many=OneToManyQueries(num_queries=30, channels=64, repeats=3),
    )
    model.load_state_dict(plain.state_dict(), strict=False)
    batch = family.batch((2, 1))
    losses = model(batch)
    assert {"many_loss_cls", "loss_cls_aux0", "loss_cls0"} <= losses.keys()
    assert all(loss.isfinite() for loss in losses.values())
    ours, theirs = (each.eval()(batch)[0]["instances"] for each in (model, plain))
    assert torch.equal(ours.scores, theirs.scores)
    bare = model.inference_model()
    assert bare.state_dict().keys() == plain.inference_model().state_dict().keys()
    assert bare.one_to_many is None
