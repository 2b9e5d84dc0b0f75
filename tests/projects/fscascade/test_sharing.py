"""Feature sharing: worked examples by hand and by closed form, and algebraic properties."""

import math

import pytest
import torch
from torch import nn

from d2dense.errors import UserError
from fscascade import ClassificationHeads, LocalizationHead


def chain(head: LocalizationHead) -> list[nn.Conv2d]:
    """Return the convolutions in the order F_11, F_12, F_21, G_1, F_31, G_2."""
    return [
        head[0].conv1,
        head[0].conv2,
        head[1].conv1,
        head[1].relay,
        head[2].conv1,
        head[2].relay,
    ]


def run(head: LocalizationHead, pooled: list[torch.Tensor]) -> list[torch.Tensor]:
    out = []
    for k, x in enumerate(pooled):
        out.append(head(x, k, out[-1] if k else x))
    return out


def localization_head(channels: int = 1, dtype=torch.float64, **settings) -> LocalizationHead:
    return LocalizationHead(channels=channels, num_stages=3, **settings).to(dtype)


@pytest.mark.parametrize(
    ("pooled", "relu", "mode", "expected"),
    [
        ((1, 2, 3), True, "recompute", (1.25, 6.75, 3.09375)),
        ((1, 2, 3), True, "cached", (1.25, 9.75, 3.0)),
        ((1, 2, 3), False, "recompute", (1.25, 6.75, 3.09375)),
        ((1, 2, 3), False, "cached", (1.25, 9.75, 1.21875)),
        ((1, 2, -1), True, "recompute", (1.25, 6.75, -1.0)),
        ((1, 2, -1), False, "recompute", (1.25, 6.75, -2.78125)),
    ],
)
def test_scalar_localisation_chain_by_hand(pooled, relu, mode, expected):
    head = localization_head(mode=mode, relu_after_1x1=relu)
    scalars = [(2, 0), (0.5, 0.25), (-1, 4), (3, -0.5), (1.5, 0.5), (-0.25, 2)]
    with torch.no_grad():
        for conv, (weight, bias) in zip(chain(head), scalars):
            conv.weight.zero_()
            conv.weight[0, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = weight
            conv.bias.fill_(bias)
        out = run(head, [torch.full((1, 1, 1, 1), x, dtype=torch.float64) for x in pooled])
    assert [b.item() for b in out] == list(expected)


def sine_convs(head: LocalizationHead) -> None:
    for n, conv in enumerate(chain(head)):
        o, c, r, s = torch.meshgrid(*map(torch.arange, conv.weight.shape), indexing="ij")
        conv.weight.data = 0.15 + 0.2 * torch.sin((1 + o + 2 * c + 3 * r + 5 * s + 7 * n).double())
        conv.bias.data = 0.2 + 0.1 * torch.cos((n + torch.arange(len(conv.bias))).double())


def sine_pooled(stage: int) -> torch.Tensor:
    values = [
        [[0.5 + math.cos(0.7 * stage + c + 0.5 * y - 0.3 * x) for x in range(3)] for y in range(3)]
        for c in range(2)
    ]
    return torch.tensor([values], dtype=torch.float64)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    ("mode", "sums"),
    [
        ("recompute", (48.165201639, 7.751398927, 1.127881632)),
        ("cached", (48.165201639, 13.939403223, 7.459071363)),
    ],
)
def test_localisation_chain_sums(mode, sums, relu):
    head = localization_head(channels=2, mode=mode, relu_after_1x1=relu)
    sine_convs(head)
    with torch.no_grad():
        out = run(head, [sine_pooled(i) for i in (1, 2, 3)])
    assert [b.sum().item() for b in out] == pytest.approx(sums, abs=1e-8)


def test_localisation_chain_values():
    head = localization_head(channels=2)
    sine_convs(head)
    with torch.no_grad():
        out = run(head, [sine_pooled(i) for i in (1, 2, 3)])
    rows = [
        (2.008206477, 2.962184783, 2.452340652),
        (0.940148831, 1.305382804, 1.498622928),
        (0.238122526, 0.561171158, 0.883298454),
    ]
    corners = (1.944618419, -0.177254556, -0.140311235)
    for b, row, corner in zip(out, rows, corners):
        assert b[0, 0, 0].tolist() == pytest.approx(row, abs=1e-8)
        assert b[0, 1, 2, 2].item() == pytest.approx(corner, abs=1e-8)


class TwoLayers(nn.Sequential):
    """The fc pair T(x) = ReLU(W_2 ReLU(W_1 x + b_1) + b_2)."""

    def __init__(self, size: int, hidden: int, out: int):
        layers = nn.Flatten(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, out), nn.ReLU()
        super().__init__(*layers)


def sine_heads(sharing: bool = True) -> ClassificationHeads:
    heads = ClassificationHeads([TwoLayers(4, 3, 3) for _ in range(3)], sharing=sharing).double()
    for j, head in enumerate(heads):
        for n, layer in ((2 * j, head[1]), (2 * j + 1, head[3])):
            a, b = torch.meshgrid(*map(torch.arange, layer.weight.shape), indexing="ij")
            layer.weight.data = 0.2 + 0.4 * torch.sin((1 + a + 2 * b + 3 * n).double())
            layer.bias.data = 0.1 * torch.cos((torch.arange(3) + n).double())
    return heads


OWN = [
    (0.016064941, 0.038790536, 0.259902319),
    (0.0, 0.088192160, 0.289475856),
    (0.338872713, 0.562555863, 0.475475166),
]
SHARED = [
    OWN[0],
    (0.058561648, 0.196668509, 0.556136799),
    (0.743423672, 1.117221324, 1.092430202),
]


def sine_inputs() -> list[torch.Tensor]:
    return [
        torch.tensor([[0.5 + math.cos(0.7 * i + q) for q in range(4)]], dtype=torch.float64)
        for i in (1, 2, 3)
    ]


@pytest.mark.parametrize(("sharing", "expected"), [(False, OWN), (True, SHARED)])
@pytest.mark.parametrize("own_at_hand", [False, True])
@torch.no_grad()
def test_class_features_by_closed_form(sharing, expected, own_at_hand):
    heads, x = sine_heads(sharing), sine_inputs()
    own = [heads.own(x[k], k) for k in range(3)] if own_at_hand else []
    features = heads(x, own)
    for stage in range(3):
        assert features[stage][0].tolist() == pytest.approx(expected[stage], abs=1e-8)
        at = heads.at(x[stage], stage, own[: stage + 1])
        assert at[0].tolist() == pytest.approx(expected[stage], abs=1e-8)


@torch.no_grad()
def test_cumulative_class_features_are_partial_sums_on_one_input():
    heads, x = sine_heads(), sine_inputs()[2]
    for own in ([], [heads.own(x, 2)]):
        sums = heads.cumulative(x, 2, own)
        for i in range(3):
            torch.testing.assert_close(sums[i], sum(heads[j](x) for j in range(i + 1)))


def random_heads(seed: int = 0, sharing: bool = True) -> ClassificationHeads:
    torch.manual_seed(seed)
    return ClassificationHeads([TwoLayers(12, 8, 6) for _ in range(3)], sharing=sharing)


def random_pooled(rows=(5, 4, 3)) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randn(r, 3, 2, 2) for r in rows]


def test_stage_one_is_plain_and_zero_earlier_layers_leave_every_stage_plain():
    heads, pooled = random_heads(), random_pooled()
    assert torch.equal(heads(pooled[:1], [])[0], heads[0](pooled[0]))
    for stage in (1, 2):
        nn.init.zeros_(heads[stage - 1][3].weight)
        nn.init.zeros_(heads[stage - 1][3].bias)
        feature = heads(pooled, [])[stage]
        torch.testing.assert_close(feature, heads[stage](pooled[stage]))
        assert feature.abs().sum() > 0


def test_identical_heads_multiply_the_own_feature():
    heads, pooled = random_heads(), random_pooled()
    for head in heads[1:]:
        head.load_state_dict(heads[0].state_dict())
    for i, feature in enumerate(heads(pooled, []), start=1):
        torch.testing.assert_close(feature, i * heads[0](pooled[i - 1]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [(5, 4, 3), (5, 0, 0), (0, 0, 0), (1, 1, 1)])
def test_batched_class_features_equal_a_slow_loop_in_value_and_gradient(rows):
    heads, pooled = random_heads(), random_pooled(rows)
    reference = [
        sum(heads[j](pooled[i]) for j in range(i + 1)) if rows[i] else torch.zeros(0, 6)
        for i in range(3)
    ]
    features = heads(pooled, [])
    for ours, slow in zip(features, reference):
        torch.testing.assert_close(ours, slow)
    wanted = torch.autograd.grad(
        sum(r.square().sum() for r in reference) + 0 * sum(p.sum() for p in heads.parameters()),
        list(heads.parameters()),
    )
    got = torch.autograd.grad(sum(f.square().sum() for f in features), list(heads.parameters()))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b)


def test_silent_relays_hand_the_pooled_feature_through():
    head = localization_head(channels=2, dtype=torch.float32)
    pooled = [torch.randn(3, 2, 4, 4) for _ in range(3)]
    for stage in list(head)[1:]:
        nn.init.zeros_(stage.relay.weight)
        nn.init.zeros_(stage.relay.bias)
    out = run(head, pooled)
    assert torch.equal(out[1], pooled[1])
    assert torch.equal(out[2], pooled[2])
    assert not torch.equal(out[0], pooled[0])


def test_without_sharing_each_stage_has_two_convolutions_of_its_own():
    head = localization_head(channels=2, sharing=False)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    for k in range(3):
        expected = head[k].conv2(head[k].conv1(x).relu()).relu()
        torch.testing.assert_close(head(x, k, x), expected)
        used = torch.autograd.grad(head(x, k, x).sum(), list(head.parameters()), allow_unused=True)
        assert [g is not None for g in used] == [stage == k for stage in range(3) for _ in range(4)]


def test_convolutions_start_he_normal_with_zero_bias():
    torch.manual_seed(0)
    head = LocalizationHead(channels=64, num_stages=3)
    for conv in chain(head):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
        assert not conv.bias.any()


def test_unknown_mode_names_the_known_ones():
    with pytest.raises(UserError, match="recompute, cached"):
        LocalizationHead(channels=2, num_stages=3, mode="recopmute")
