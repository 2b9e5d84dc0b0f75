"""The head: who trains whom, sizes, the shared classifier, losses."""

import pytest
import torch
import torch.nn.functional as F

from tests.modeling.waiting import OpCounter
from tests.projects.hfgd import tiny

FINE = ("upsampler.", "hfgm.")
SIZE = (129, 97)


class Whole(torch.nn.Module):
    """A backbone under a head, so that gradients of both can be asked for."""

    def __init__(self, **options):
        super().__init__()
        self.backbone, self.head = tiny.backbone(), tiny.head(**options)

    def losses(self):
        images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(3))
        return self.head(self.backbone(images), tiny.labels(*SIZE))[1]


def gradients(names, **options):
    """Gradients by parameter name of the sum of the named losses; None as it is."""
    model = Whole(**options).train()
    losses = model.losses()
    sum(losses[name] for name in names).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def is_fine(name):
    return name.startswith(tuple(f"head.{part}" for part in FINE))


def is_zero(gradient):
    return gradient is None or not gradient.any()


# k's bias shifts all scores of a query alike, which softmax does not see
def can_be_zero(name):
    return name.endswith("k.bias")


CAR = ("loss_car_intra", "loss_car_c2c", "loss_car_c2p")
UPSAMPLERS = [{"upsampler": "sfpn"}, {"out_stride": 4}, {"out_stride": 2}]


@pytest.mark.parametrize("options", UPSAMPLERS)
def test_the_fine_loss_trains_the_fine_path_only(options):
    found = gradients(["loss_fine"], **options)
    for name, gradient in found.items():
        if is_fine(name):
            assert can_be_zero(name) or not is_zero(gradient), name
        else:
            assert is_zero(gradient), name


@pytest.mark.parametrize("names", [["loss_coarse"], list(CAR)])
def test_all_other_losses_do_not_train_the_fine_path(names):
    found = gradients(names)
    for name, gradient in found.items():
        learns = not is_fine(name) and not can_be_zero(name)
        if names != ["loss_coarse"]:  # CAR ends at its features
            learns = learns and not name.startswith(("head.encoder.trailing", "head.classifier"))
            assert learns or is_zero(gradient) or can_be_zero(name), name
        assert not (learns and is_zero(gradient)), name
        if is_fine(name):
            assert is_zero(gradient), name


def test_together_they_give_each_part_what_it_gets_alone_to_the_last_bit():
    both = gradients(["loss_fine", "loss_coarse"])
    fine, coarse = gradients(["loss_fine"]), gradients(["loss_coarse"])
    for name, gradient in both.items():
        assert torch.equal(gradient, (fine if is_fine(name) else coarse)[name]), name


@pytest.mark.parametrize(
    ("options", "reaches_features", "reaches_kernels"),
    [
        ({"hfgm": False}, True, True),
        ({"stop_grad_features": False}, True, False),
        ({"stop_grad_kernels": False}, False, True),
    ],
)
def test_without_a_switch_the_fine_loss_goes_further(options, reaches_features, reaches_kernels):
    found = gradients(["loss_fine"], **options)
    assert is_zero(found["head.classifier.weight"]) != reaches_kernels
    assert is_zero(found["head.classifier.bias"]) != reaches_kernels
    assert is_zero(found["head.encoder.trailing.conv.weight"]) != reaches_features
    assert is_zero(found["backbone.model.conv1.0.weight"]) != reaches_features
    assert is_zero(found["backbone.model.layer1.0.conv1.weight"]) != reaches_features


def test_without_hfgm_there_is_one_path():
    head = tiny.head(hfgm=False)
    losses = head(tiny.maps(65, 65), tiny.labels(65, 65))[1]
    assert set(losses) == {"loss_fine", *CAR}
    assert head.hfgm is None
    assert set(tiny.head()(tiny.maps(65, 65), tiny.labels(65, 65))[1]) == {
        "loss_fine",
        "loss_coarse",
        *CAR,
    }


@pytest.mark.parametrize("constant", [True, False])
@torch.no_grad()
def test_the_fine_path_reads_the_live_classifier(constant):
    head = tiny.head(stop_grad_kernels=constant).eval()
    features = tiny.maps(65, 97)
    before = head(features)[0]
    head.classifier.bias[2] += 1
    moved = head(features)[0] - before
    expected = torch.zeros(tiny.CLASSES).index_fill(0, torch.tensor([2]), 1.0)
    torch.testing.assert_close(moved, expected.view(1, -1, 1, 1).expand_as(moved))


def test_guidance_without_attention_is_the_upsampled_map():
    head = tiny.head(axial_attention=False).eval()
    assert not list(head.hfgm.parameters())
    with_it = tiny.head().eval()
    assert len(list(with_it.hfgm.parameters())) == 16 + 3
    x = torch.randn(1, 16, 4, 5)
    assert torch.equal(head.hfgm(x), x)


# ------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("image", "coarse", "fine"),
    [
        ((513, 513), (17, 17), {4: (129, 129), 2: (257, 257), 1: (513, 513)}),
        ((512, 1024), (16, 32), {4: (128, 256), 2: (256, 512)}),
        ((513, 1025), (17, 33), {4: (129, 257), 2: (257, 513)}),
        ((1, 1), (1, 1), {4: (1, 1), 2: (1, 1), 1: (1, 1)}),
        ((30, 515), (1, 17), {4: (8, 129), 2: (15, 258), 1: (30, 515)}),
    ],
)
@torch.no_grad()
def test_sizes_of_scores(image, coarse, fine):
    for stride, size in fine.items():
        with torch.device("meta"):
            head = tiny.head(out_stride=stride).eval()
            features = {k: torch.empty(2, tiny.WIDTHS[k], 1, 1) for k in tiny.STRIDES}
        features = {
            k: v.new_empty(2, v.shape[1], *(tiny.side(n, tiny.STRIDES[k]) for n in image))
            for k, v in features.items()
        }
        assert head.coarse_scores(features).shape == (2, tiny.CLASSES, *coarse)
        assert head.fine_scores(features).shape == (2, tiny.CLASSES, *size)
        assert head(features)[0].shape == (2, tiny.CLASSES, *image)


@torch.no_grad()
def test_a_backbone_that_does_not_tell_the_image_size():
    """Then it is what the finest map and its stride say, right for multiples of the stride."""
    features = tiny.maps(64, 96)
    full = tiny.head(out_stride=2).eval()
    shapes = {key: shape for key, shape in tiny.SHAPES.items() if key != "res0"}
    blind = tiny.head(out_stride=2, input_shape=shapes).eval()
    image = features.pop("res0")
    assert torch.equal(blind(features)[0], full({**features, "res0": image})[0])


# ------------------------------------------------ cross entropies


def alone(**options):
    """A head whose cross entropy can be asked for without anything else."""
    head = tiny.head(**options)

    def loss(scores, targets):
        return head._cross_entropy(scores, targets) * head._loss_share(targets)

    return loss


@pytest.mark.parametrize(("normalizer", "factor"), [("all", 0.5), ("valid", 1.0)])
def test_ignored_pixels_count_in_the_denominator_or_not(normalizer, factor):
    loss = alone(loss_normalizer=normalizer)
    scores, targets = torch.randn(1, tiny.CLASSES, 9, 9), torch.randint(0, tiny.CLASSES, (1, 9, 9))
    expected = F.cross_entropy(scores, targets)
    torch.testing.assert_close(loss(scores, targets), expected)
    twice = torch.cat([targets, torch.full_like(targets, 255)])
    torch.testing.assert_close(loss(scores.repeat(2, 1, 1, 1), twice), factor * expected)


@pytest.mark.parametrize("normalizer", ["all", "valid"])
def test_nothing_but_ignored_pixels_is_zero_with_zero_gradients(normalizer):
    head = tiny.head(loss_normalizer=normalizer)
    losses = head(tiny.maps(65, 65), torch.full((2, 65, 65), 255))[1]
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_fine"].item() == losses["loss_coarse"].item() == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_losses_are_at_the_labels_size_with_aligned_corners():
    """Scores of 2 x 2 pixels are those of the four corners."""
    loss = alone()
    scores = torch.randn(1, tiny.CLASSES, 2, 2)
    targets = torch.full((1, 7, 5), 255)
    targets[0, ::6, ::4] = torch.tensor([[0, 1], [2, 3]])
    expected = F.cross_entropy(scores, targets[:, ::6, ::4], reduction="sum") / 35
    torch.testing.assert_close(loss(scores, targets), expected)


def test_weights_scale_their_losses():
    plain = tiny.head(encoder="ocr")(tiny.maps(65, 65), tiny.labels(65, 65))[1]
    assert set(plain) == {"loss_fine", "loss_coarse", "loss_auxiliary"}
    weights = {"fine_weight": 3.0, "coarse_weight": 0.5, "auxiliary_weight": 0.1}
    other = tiny.head(encoder="ocr", **weights)(tiny.maps(65, 65), tiny.labels(65, 65))[1]
    factors = {"loss_fine": 3.0, "loss_coarse": 0.5, "loss_auxiliary": 0.25}
    for name, factor in factors.items():
        torch.testing.assert_close(other[name], factor * plain[name])


def test_mixed_precision_trains_with_finite_losses():
    """Unscaled attention and CAR stay float32 inside; scores are far above float16's largest."""
    head = tiny.head()
    with torch.no_grad():
        head.encoder.attention.q.weight *= 300
        head.encoder.attention.k.weight *= 300
    seen = {}
    head.encoder.attention.q.register_forward_hook(lambda m, i, o: seen.update(q=o))
    with torch.autocast("cpu", torch.bfloat16):
        losses = head(tiny.maps(65, 65), tiny.labels(65, 65))[1]
    assert seen["q"].dtype == torch.bfloat16
    assert float(seen["q"].float().square().sum(-1).max()) > 65504
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("options", [{}, {"encoder": "ocr", "loss_normalizer": "valid"}])
def test_a_training_step_never_waits_for_the_device(options):
    head, features, targets = tiny.head(**options), tiny.maps(65, 65), tiny.labels(65, 65)
    with OpCounter() as counter:
        sum(head(features, targets)[1].values()).backward()
    assert counter.total > 100
    assert counter.waiting == 0
