"""The collaborative detector: what trains what, switches, and inference without any of it."""

import copy

import pytest
import torch

from codetr import CoDETR
from d2dense.engine.recompute import enable_activation_checkpointing
from d2dense.errors import UserError
from d2dense.export import adapt
from d2dense.modeling.detr import DeformableDETR
from tests.projects.codetr import plain, tiny

CLOSE = {"rtol": 1e-5, "atol": 1e-7}


def gradients(model, inputs):
    """Losses, and the gradient of every parameter by their sum."""
    torch.manual_seed(1)
    losses = model(inputs)
    named = dict(model.named_parameters())
    found = torch.autograd.grad(sum(losses.values()), list(named.values()), allow_unused=True)
    return losses, dict(zip(named, found))


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("counts", [(4, 2), (0, 3), (0, 0)])
def test_every_parameter_gets_a_finite_gradient(kind, counts):
    model = tiny.detector(kind)
    losses, found = gradients(model, tiny.inputs(counts=counts))
    for name, loss in losses.items():
        assert loss.isfinite(), name
        assert loss.dtype == torch.float32
    for name, gradient in found.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
    assert found["backbone.stem.weight"].abs().sum() > 0


def test_names_of_losses():
    losses = tiny.detector()(tiny.inputs())
    main = {f"{layer}loss_{part}" for layer in ("", "d0.", "enc_") for part in _PARTS}
    queries = {
        f"{layer}loss_{part}_aux{head}"
        for layer in ("", "d0.")
        for part in _PARTS
        for head in (0, 1)
    }
    heads = {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls0", "loss_bbox0"}
    heads |= {"loss_cls1", "loss_bbox1", "loss_centerness1"}
    assert losses.keys() == main | queries | heads
    twice = tiny.detector(heads=(tiny.rcnn, tiny.rcnn))(tiny.inputs())
    assert {"loss_rpn_cls0", "loss_rpn_cls1", "loss_cls0", "loss_cls1"} <= twice.keys()
    assert "loss_rpn_cls" not in twice
    one = tiny.detector(heads=(tiny.atss,))(tiny.inputs())
    assert "loss_centerness0" in one


_PARTS = ("cls", "bbox", "iou")


def test_weights_of_the_losses():
    """Lambda 1 for queries, lambda 2 times the number of layers for heads."""
    inputs = tiny.inputs()
    usual, changed = tiny.detector(), tiny.detector(query_weight=0.5, head_weight=3.0)
    head = changed.auxiliary_heads[1]
    with torch.no_grad():
        expected, found = usual(inputs), changed(inputs)
        images = changed.preprocess(inputs)
        maps = changed.adapter(changed.encode(images))
        raw, _ = head.losses(maps, [each["instances"] for each in inputs])
    for name, loss in raw.items():
        torch.testing.assert_close(found[f"{name}1"], 3 * 2 * loss, **CLOSE)
        torch.testing.assert_close(expected[f"{name}1"], 2 * 2 * loss, **CLOSE)
    for name in expected:
        if name.endswith("_aux1"):  # of the first head samples are random
            torch.testing.assert_close(found[name], 0.5 * expected[name], **CLOSE)
        elif name.startswith(("enc_", "d0.loss_cls")) and "aux" not in name:
            assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("queries", [{}, {"negatives": False}], ids=["negatives", "filling"])
def test_one_pass_or_one_per_head(kind, queries):
    """The same losses and gradients: heads do not hear each other, and nobody hears filling."""
    inputs = tiny.inputs(counts=(6, 1))
    both = [tiny.detector(kind, queries=queries, one_pass=each) for each in (True, False)]
    (losses, found), (expected, of_expected) = (gradients(model, inputs) for model in both)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], **CLOSE)
    for name, gradient in of_expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale + 1e-7)


@pytest.mark.parametrize("mask_padding", [True, False])
def test_heads_see_the_images_that_the_detector_sees(mask_padding):
    """With jitter on a large scale padding is part of the image, for everybody."""
    model = tiny.detector(mask_padding=mask_padding)
    seen, head = [], model.auxiliary_heads[1]
    usual = head.losses
    head.losses = lambda maps, given: seen.append(given) or usual(maps, given)
    inputs = tiny.inputs(sizes=((64, 96), (80, 72)))
    losses = model(inputs)
    assert all(loss.isfinite() for loss in losses.values())
    sizes = [(64, 96), (80, 72)] if mask_padding else [(80, 96), (80, 96)]
    assert [each.image_size for each in seen[0]] == sizes
    for each, given in zip(seen[0], inputs):
        assert each.gt_boxes is given["instances"].gt_boxes


def test_only_the_heads():
    model = tiny.detector(queries=False)
    losses, found = gradients(model, tiny.inputs())
    assert not any("aux" in name for name in losses)
    assert "loss_rpn_cls" in losses
    assert all(gradient is not None for gradient in found.values())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_only_the_queries(kind):
    """Heads assign but stay as they are; everything else is trained."""
    model = tiny.detector(kind, train_heads=False)
    losses = model(tiny.inputs())
    assert {"loss_cls_aux0", "loss_cls_aux1"} <= losses.keys()
    assert not {"loss_rpn_cls", "loss_cls0", "loss_centerness1"} & losses.keys()
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        of_head = name.startswith("auxiliary_heads")
        assert parameter.requires_grad != of_head, name
        assert (parameter.grad is None) == of_head, name


def test_without_heads_it_is_the_base_detector():
    torch.manual_seed(0)
    plain_model = DeformableDETR(**tiny.base()).train()
    torch.manual_seed(0)
    model = CoDETR(**tiny.base()).train()
    assert model.state_dict().keys() == plain_model.state_dict().keys()
    inputs = tiny.inputs()
    expected, found = plain_model(inputs), model(inputs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_inference_is_the_base_detectors(kind):
    model = tiny.detector(kind).eval()
    before = len(list(model.modules()))
    bare = model.inference_model()
    assert type(bare) is DeformableDETR
    assert len(list(model.modules())) == before
    expected = DeformableDETR(**{**tiny.base(kind), "denoising": None})
    assert bare.state_dict().keys() == expected.state_dict().keys()
    inputs = tiny.inputs()

    def touched(*_):
        raise AssertionError("a part that is for training only")

    for part in (model.adapter, model.positive_queries, *model.auxiliary_heads.modules()):
        part.register_forward_pre_hook(touched)
    with torch.no_grad():
        pairs = zip(model(inputs), bare(inputs))
    for found, expected in pairs:
        assert torch.equal(
            found["instances"].pred_boxes.tensor, expected["instances"].pred_boxes.tensor
        )
    exported = adapt(model)
    count = sum(parameter.numel() for parameter in bare.parameters())
    assert sum(parameter.numel() for parameter in exported.parameters()) == count
    with torch.no_grad():
        assert torch.equal(exported(inputs[0]["image"])[1], found_scores(model, inputs[:1]))


def found_scores(model, inputs):
    with torch.no_grad():
        return model(inputs)[0]["instances"].scores


@pytest.mark.parametrize("branch", [0, 1])
def test_branches_can_be_evaluated(branch):
    model = tiny.detector(evaluate_branch=branch).eval()
    inputs = tiny.inputs()
    for each in inputs:
        each.update(height=each["image"].shape[1] * 2, width=each["image"].shape[2] * 2)
    with torch.no_grad():
        found = model(inputs)
        images = model.preprocess(inputs)
        maps = model.adapter(model.encode(images))
        expected = model.auxiliary_heads[branch].detect(maps, images.image_sizes)
    for each, plain_result in zip(found, expected):
        assert len(each["instances"]) > 0
        boxes = each["instances"].pred_boxes.tensor
        torch.testing.assert_close(boxes, 2 * plain_result.pred_boxes.tensor)
    with pytest.raises(UserError, match="EVALUATE_BRANCH"):
        model.inference_model()


def test_wrong_settings_are_named():
    with pytest.raises(UserError, match=r"EVALUATE_BRANCH.*2"):
        tiny.detector(evaluate_branch=2)
    with pytest.raises(UserError, match="TRAIN_HEADS"):
        tiny.detector(queries=False, train_heads=False)
    with pytest.raises(UserError, match="HEAD_EMBEDDING"):
        tiny.detector(queries={"head_embedding": "scalars"})
    arguments = tiny.base()
    with pytest.raises(UserError, match="ADAPTER"):
        CoDETR(**arguments, auxiliary_heads=[tiny.atss()])


def test_recomputed_parts_give_the_same():
    inputs = tiny.inputs()
    expected, of_expected = gradients(tiny.detector(), inputs)
    model = tiny.detector()
    # layers of encoder and decoder, and heads
    assert enable_activation_checkpointing(model) == 2 + 2 + 2
    model = copy.deepcopy(model)
    calls = []
    atss, rcnn = model.auxiliary_heads[1], model.auxiliary_heads[0]
    for part in (atss.classes, rcnn.rpn.head.conv, rcnn.classes):
        part.register_forward_hook(lambda *_: calls.append(1))
    losses, found = gradients(model, inputs)
    assert len(calls) == 2 * (3 + 3 + 1)  # once more in backward; three levels, or all regions
    for name in expected:
        assert torch.equal(losses[name], expected[name])
    for name, gradient in of_expected.items():
        torch.testing.assert_close(found[name], gradient, **CLOSE)


@pytest.mark.parametrize(
    "boxes",
    [
        [[10, 10, 10, 40]],  # nothing wide
        [[20, 20, 20, 20]],
        [[10, 10, 10.001, 10.001], [3, 3, 3.5, 3.5]],
        [[0, 0, 96, 64]] * 40,  # all the same, more than queries
        [[-1e4, -1e4, 1e4, 1e4]],
        [[30, 10, 20, 40]],  # upside down
    ],
    ids=["flat", "empty", "tiny", "equal", "huge", "inverted"],
)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_bad_boxes_stay_finite(kind, boxes):
    inputs = tiny.inputs(sizes=((64, 96),), counts=(0,))
    inputs[0]["instances"] = plain.instances((64, 96), boxes, [1] * len(boxes))
    losses, found = gradients(tiny.detector(kind), inputs)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_a_thousand_boxes():
    losses, found = gradients(tiny.detector(), tiny.inputs(counts=(1000, 0)))
    assert all(loss.isfinite() for loss in losses.values())
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_autocast():
    """Boxes and losses stay float32."""
    model, inputs = tiny.detector(), tiny.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, found = gradients(model, inputs)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(gradient.isfinite().all() for gradient in found.values())
