"""Classes that count in a batch of federated data."""

import torch

from d2dense.modeling.detr import DETRCriterion, HungarianMatcher
from d2dense.modeling.detr.federated import FederatedClasses, federated_classes


def test_all_that_occur_count_and_others_fill_up():
    torch.manual_seed(0)
    choose = FederatedClasses(torch.ones(20), number=6)
    occur = torch.zeros(20, dtype=torch.bool)
    occur[[3, 7]] = True
    for _ in range(50):
        count = choose(occur)
        assert count[[3, 7]].all()
        assert int(count.sum()) == 6
    occur[:9] = True
    assert torch.equal(choose(occur), occur)


def test_draws_follow_the_weights():
    torch.manual_seed(0)
    weights = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])
    choose = FederatedClasses(weights, number=1)
    none = torch.zeros(5, dtype=torch.bool)
    shares = torch.stack([choose(none) for _ in range(8000)]).float().mean(dim=0)
    assert torch.allclose(shares, weights / 16, atol=0.02)


def test_frequencies_of_lvis():
    found = federated_classes(number=50, power=0.5)
    assert found.log_weights.shape == (1203,)
    assert found.log_weights.isfinite().all()


def test_only_classes_that_count_have_a_loss():
    class Given(FederatedClasses):
        def forward(self, occur):
            self.occur = occur
            return occur | (torch.arange(5) == 4)

    given = Given(torch.ones(5))
    plain = DETRCriterion(matcher=HungarianMatcher(), num_classes=5)
    some = DETRCriterion(matcher=HungarianMatcher(), num_classes=5, federated=given)
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 7, 5)
    boxes = torch.rand(1, 2, 7, 4) * 0.5 + 0.2
    labels = torch.full((2, 7), 5)
    labels[0, 0], labels[1, 3] = 1, 2
    known = {
        "labels": labels,
        "targets": boxes[0],
        "box_weights": (labels < 5).float(),
        "sizes": torch.full((2, 1, 4), 100.0),
        "number": torch.tensor(2.0),
    }
    logits.requires_grad_()
    (whole,) = torch.autograd.grad(plain.known_losses(logits, boxes, **known)["loss_cls"], logits)
    (part,) = torch.autograd.grad(some.known_losses(logits, boxes, **known)["loss_cls"], logits)
    assert given.occur.tolist() == [False, True, True, False, False]
    assert not part[..., [0, 3]].any()
    assert torch.equal(part[..., [1, 2, 4]], whole[..., [1, 2, 4]])


def test_no_predictions_at_all():
    some = DETRCriterion(
        matcher=HungarianMatcher(), num_classes=5, federated=FederatedClasses(torch.ones(5))
    )
    found = some.known_losses(
        torch.zeros(1, 2, 0, 5),
        torch.zeros(1, 2, 0, 4),
        labels=torch.zeros(2, 0, dtype=torch.int64),
        targets=torch.zeros(2, 0, 4),
        box_weights=torch.zeros(2, 0),
        sizes=torch.full((2, 1, 4), 100.0),
        number=torch.tensor(1.0),
    )
    assert all(float(loss) == 0 for loss in found.values())
