"""Traced and scripted models against eager ones, for every kind of model."""

import copy
import io

import pytest
import torch
import torchvision
from detectron2.structures import Instances
from torch import nn

from d2dense import config
from d2dense.errors import UserError
from d2dense.export import adapt, device_constants, to_torchscript
from d2dense.export.adapters import BOXES, Adapter
from d2dense.export.reduction import reduced
from d2dense.export.untrained import spread_outputs
from tests.export.exportable import TEST_SCORES, picture, tiny_model

KINDS = {
    "fscascade": {},
    "fscascade_mask": {"mask": True},
    "fscascade_cached_avgpool": {"LFS_MODE": "cached", "BOX_PREDICTOR": "avgpool"},
    "conv_head_only": {"CFS": False, "LFS": False, "CONV_HEAD": True},
    "cfs_only": {"LFS": False},
    "plain_cascade": {"CFS": False, "LFS": False},
    "plain_cascade_mask": {"CFS": False, "LFS": False, "mask": True},
    "mask_rcnn": {"heads": "StandardROIHeads", "mask": True},
    "faster_rcnn": {"heads": "StandardROIHeads"},
    "retinanet": {"arch": "RetinaNet"},
    "batch_retinanet": {"arch": "BatchRetinaNet"},
    "flexible_cascade_mask": {"heads": "FlexibleCascadeROIHeads", "mask": True},
}
TRACE_ONLY = {
    "detectron2_cascade": {"heads": "CascadeROIHeads"},
    "detectron2_cascade_mask": {"heads": "CascadeROIHeads", "mask": True},
    "semantic": {"arch": "SemanticSegmentor"},
}
CASES = [(name, method) for name in KINDS for method in ("trace", "script")]
CASES += [(name, "trace") for name in TRACE_ONLY]
# the boxes of models whose twins with masks are tried too
WITHOUT_MASKS = {"fscascade", "plain_cascade", "detectron2_cascade"}
CASES = [
    pytest.param(*case, marks=pytest.mark.long if case[0] in WITHOUT_MASKS else ())
    for case in CASES
]


def reloaded(module, device="cpu"):
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer, map_location=device)


def assert_same(module, model, image):
    """Compare with eager mode and return the number of detections."""
    with torch.no_grad():
        expected, found = adapt(model)(image), module(image)
    assert len(expected) == len(found)
    for a, b in zip(expected, found):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-4)
    return expected[0].shape[0]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_equals_eager_at_other_sizes(kind, method):
    """Boxes alone are for the long tests where the twin with masks compares them as well."""
    model = tiny_model(**(KINDS | TRACE_ONLY)[kind])
    module = to_torchscript(model, picture(96, 128), method=method)
    assert device_constants(module) == []
    module = reloaded(module)
    assert device_constants(module) == []
    assert assert_same(module, model, picture(150, 101, seed=1)) > 0
    assert assert_same(module, model, picture(64, 197, seed=2, dtype=torch.float32)) > 0


@pytest.mark.parametrize("method", ["trace", "script"])
@pytest.mark.parametrize("mode", TEST_SCORES[1:])  # the first is every other test's
def test_every_test_score_mode(mode, method):
    model = tiny_model(TEST_SCORES=mode)
    last = tiny_model(TEST_SCORES="last")
    module = to_torchscript(model, picture(96, 128), method=method)
    image = picture(150, 101, seed=1)
    assert_same(module, model, image)
    scores = module(image)[1], adapt(last)(image)[1]
    assert scores[0].shape != scores[1].shape or not torch.equal(*scores), "no difference here"


@pytest.mark.parametrize("method", ["trace", "script"])
@pytest.mark.parametrize("mask", [False, True])
def test_no_detections(mask, method):
    model = tiny_model(mask=mask)
    for predictor in model.roi_heads.box_predictor:
        predictor.test_score_thresh = 1.1
    module = to_torchscript(model, picture(96, 128), method=method)
    assert assert_same(module, model, picture(150, 101, seed=1)) == 0


@pytest.mark.parametrize("method", ["trace", "script"])
@pytest.mark.parametrize("mask", [False, True])
def test_no_proposals(mask, method):
    model = tiny_model(mask=mask)
    model.proposal_generator.min_box_size = 1e5
    module = to_torchscript(model, picture(96, 128), method=method)
    assert assert_same(module, model, picture(150, 101, seed=1)) == 0


@pytest.mark.parametrize("mask", [False, True])
def test_traced_on_an_image_without_proposals(mask):
    model = tiny_model(mask=mask)
    # proposals must be 100 pixels wide and high, so small images have none
    model.proposal_generator.min_box_size = 100.0
    small, large = picture(70, 70), picture(260, 330)
    for traced_on in (small, large):
        module = to_torchscript(model, traced_on)
        assert assert_same(module, model, small) == 0
        assert assert_same(module, model, large) > 0


@pytest.mark.parametrize("method", ["trace", "script"])
def test_number_of_proposals_varies(method):
    model = tiny_model(heads="FSCascadeROIHeads", TEST_SCORES="ensemble_own_rois")
    model.proposal_generator.post_nms_topk = {False: 1000, True: 1000}
    counts = []
    module = to_torchscript(model, picture(96, 128), method=method)
    for size in ((64, 64), (200, 170)):
        image = picture(*size, seed=3)
        assert_same(module, model, image)
        with torch.no_grad():
            images = model.preprocess_image([{"image": image}])
            proposals, _ = model.proposal_generator(images, model.backbone(images.tensor))
        counts.append(len(proposals[0]))
    assert counts[0] != counts[1]


@pytest.mark.parametrize("method", ["trace", "script"])
def test_the_model_stays_as_it_was(method):
    model = tiny_model(mask=True).train()
    before, nms = copy.deepcopy(model.state_dict()), torchvision.ops.boxes.batched_nms
    image = picture(96, 128)
    to_torchscript(model, image, method=method)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for n, p in model.named_parameters() if "roi_heads" in n)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not hasattr(Instances, "__torch_script_class__")
    assert not hasattr(Instances, "_jit_override_qualname")
    assert torchvision.ops.boxes.batched_nms is nms
    # an eager model still works with ordinary Instances
    assert isinstance(model.eval()([{"image": image}])[0]["instances"], Instances)


class _Unscriptable(nn.Module):
    """Something that no rule knows: the compiler finds it."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(*[x for _ in range(len(self.__dict__))])


def test_a_traced_swin_takes_other_sizes():
    """timm counts its windows in Python numbers."""
    cfg = reduced(config.load("CEDNet/retinanet_swin_t_fpn"))
    model = config.build_model(cfg, device="cpu").eval()
    spread_outputs(model, picture(96, 128))
    module = reloaded(to_torchscript(model, picture(96, 128), method="trace"))
    assert assert_same(module, model, picture(130, 75)) > 0
    assert not any(isinstance(each, torch.jit.ScriptModule) for each in model.modules())


def test_what_no_rule_knows_is_told_by_the_compiler():
    model = tiny_model()
    model.roi_heads.box_pooler = _Unscriptable(model.roi_heads.box_pooler)
    with pytest.raises(UserError, match=r"^GeneralizedRCNN with FSCascadeROIHeads .*\(\w"):
        to_torchscript(model, picture(96, 128), method="script")
    assert not hasattr(Instances, "__torch_script_class__")


def test_unknown_method_and_model():
    with pytest.raises(UserError, match="method 'jit', expected one of trace, script"):
        to_torchscript(tiny_model(), picture(96, 128), method="jit")
    with pytest.raises(UserError, match="Linear cannot be exported"):
        adapt(nn.Linear(2, 2))


def test_keypoints_are_refused():
    model = tiny_model(heads="StandardROIHeads")
    model.roi_heads.keypoint_on = True
    with pytest.raises(UserError, match="keypoints"):
        adapt(model)


class _Toy(Adapter):
    """Creates tensors on the device of its input, which tracing writes down as a constant."""

    outputs = (BOXES,)

    def forward(self, image):
        steps = torch.arange(image.shape[1], device=image.device)
        zeros = torch.zeros(2, device=image.device)
        return (steps + zeros.sum() + self.model.weight.sum(),)


def test_traced_devices_follow_the_model():
    from d2dense.export.devices import unbind_devices

    image = torch.zeros(3, 5, 6)
    traced = torch.jit.trace(_Toy(nn.Linear(2, 2)), (image,), check_trace=False)
    expected = traced(image)[0]
    assert set(device_constants(traced)) == {"cpu"}
    assert unbind_devices(traced) > 0
    elsewhere = reloaded(traced, "meta")
    assert device_constants(elsewhere) == []
    # moved elsewhere, every tensor is made there; the constant would leave "meta + cpu"
    assert elsewhere(image.to("meta"))[0].device.type == "meta"
    assert torch.equal(reloaded(traced)(image)[0], expected)
    assert reloaded(traced)(torch.zeros(3, 9, 6))[0].shape == (9,)


class _NMS(Adapter):
    outputs = (BOXES,)

    def forward(self, image):
        from detectron2.layers import batched_nms

        boxes, rest = image[0, :, :4], image[0, :, 4:]
        return (batched_nms(boxes, rest[:, 0], rest[:, 1].long(), 0.5),)


def _crowded(count, generator):
    """Boxes in pairs of IoU 0.5 up to rounding, of many classes: NMS hangs on the last bit."""
    corner = torch.rand(count, 2, generator=generator) * 700
    size = torch.rand(count, 2, generator=generator) * 40 + 5
    half = size * torch.tensor([0.5, 1.0])
    boxes = torch.cat(
        [torch.cat([corner, corner + size], 1), torch.cat([corner, corner + half], 1)]
    )
    classes = torch.randint(0, 80, (count,), generator=generator).repeat(2)
    scores = torch.rand(2 * count, generator=generator)
    return torch.cat([boxes, scores[:, None], classes[:, None]], 1)[None]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_nms_chooses_its_method_by_the_number_of_boxes():
    """torchvision does so in eager mode, but not while it is traced; the results differ."""
    from d2dense.export.torchscript import _trace

    generator = torch.Generator().manual_seed(0)
    few, many = _crowded(20, generator), _crowded(1500, generator)
    adapter = _NMS(nn.Linear(2, 2))
    naive = torch.jit.trace(adapter, (few,), check_trace=False)
    assert not torch.equal(naive(many)[0], adapter(many)[0]), "the case is too easy"
    traced = _trace(adapter, few)
    for boxes in (few, many):
        assert torch.equal(traced(boxes)[0], adapter(boxes)[0])
