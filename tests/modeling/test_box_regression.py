"""Box losses against fvcore's."""

import fvcore.nn
import pytest
import torch

from d2dense.errors import UserError
from d2dense.modeling import box_transform, check_box_loss, giou_loss, masked_box_loss
from tests.modeling import batches as b


def test_giou_is_bitwise_fvcores_with_its_gradient():
    boxes, gt_boxes = b.random_boxes(200, seed=0), b.random_boxes(200, seed=1)
    gt_boxes[:50] = boxes[:50] + 3  # large overlaps
    gt_boxes[50:60] = boxes[50:60]
    a, c = boxes.clone().requires_grad_(), boxes.clone().requires_grad_()
    got, expected = giou_loss(a, gt_boxes), fvcore.nn.giou_loss(c, gt_boxes)
    assert torch.equal(got, expected)
    got.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(a.grad, c.grad)


@pytest.mark.parametrize("loss", ["smooth_l1", "giou", "diou", "ciou"])
def test_rows_outside_the_mask_may_hold_anything(loss):
    boxes = b.random_boxes(30, seed=0)
    deltas = (torch.randn(2, 30, 4) * 0.1).requires_grad_()
    gt_boxes = torch.stack([b.random_boxes(30, seed=n) for n in (1, 2)])
    mask = torch.rand(2, 30) < 0.3
    settings = {"transform": box_transform(weights=[1, 1, 1, 1]), "loss_type": loss}
    expected = sum(
        masked_box_loss(
            deltas[n, r][None, None],
            boxes[r][None],
            gt_boxes[n, r][None, None],
            torch.ones(1, 1) > 0,
            **settings,
        )
        for n, r in mask.nonzero().tolist()
    )
    broken = torch.where(mask[..., None], gt_boxes, torch.tensor(float("nan")))
    for outside in (gt_boxes, torch.zeros_like(gt_boxes) + gt_boxes * mask[..., None], broken):
        got = masked_box_loss(deltas, boxes, outside, mask, **settings)
        torch.testing.assert_close(got, expected)
        (grad,) = torch.autograd.grad(got, deltas)
        assert grad.isfinite().all()
        assert not grad[~mask].any()


def test_an_unknown_loss_is_named():
    with pytest.raises(UserError, match="'l3'; expected one of smooth_l1"):
        check_box_loss("l3")
