"""One optimizer step: accumulation, precision, clipping."""

from __future__ import annotations

import pytest
import torch

from d2dense.engine.settings import RunSettings
from d2dense.engine.step import TrainStep
from d2dense.errors import UserError
from tests.engine.fakes import TinyModel, make_batches


def build(model=None, *, lr=0.1, **settings):
    torch.manual_seed(0)
    model = model or TinyModel()
    settings = RunSettings(output_dir="unused", max_iter=1, device="cpu", **settings)
    return model, TrainStep(model, torch.optim.SGD(model.parameters(), lr), settings=settings)


def halves(batches):
    return [part for batch in batches for part in (batch[:2], batch[2:])]


def test_two_batches_of_two_equal_one_batch_of_four():
    batches = make_batches(3, 4)
    whole, whole_step = build()
    parts, parts_step = build(accumulation_steps=2)
    whole_batches, part_batches = iter(batches), iter(halves(batches))
    for _ in batches:
        one, two = whole_step(whole_batches), parts_step(part_batches)
        assert one.images == two.images == 4
        for name in one.losses:
            torch.testing.assert_close(one.losses[name], two.losses[name])
    for expected, found in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(found, expected)
    with pytest.raises(StopIteration):
        next(part_batches)


def test_step_equals_a_plain_loop_and_losses_carry_no_graph():
    batches = make_batches(2, 4)
    model, step = build()
    reference, _ = build()
    optimizer = torch.optim.SGD(reference.parameters(), 0.1)
    for batch in batches:
        result = step(iter([batch]))
        losses = reference(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        assert set(result.losses) == {"loss_first", "loss_second"}
        for name, loss in result.losses.items():
            assert not loss.requires_grad
            assert torch.equal(loss, losses[name])
    for expected, found in zip(reference.parameters(), model.parameters()):
        assert torch.equal(found, expected)


def test_model_that_returns_one_loss():
    class One(TinyModel):
        def forward(self, batch):
            return super().forward(batch)["loss_first"]

    torch.manual_seed(0)
    _, step = build(One())
    assert set(step(iter(make_batches(1, 2))).losses) == {"loss"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda losses: {**losses, "loss_third": 0.0}, "loss 'loss_third' is a float"),
        (lambda losses: {"loss_all": torch.ones(2)}, r"loss 'loss_all' is of shape \(2,\)"),
        (lambda losses: {}, "returned an empty dict"),
        (lambda losses: None, "returned NoneType"),
        (lambda losses: list(losses.values()), "returned list"),
    ],
)
def test_losses_of_another_kind_are_named(change, message):
    class Odd(TinyModel):
        def forward(self, batch):
            return change(super().forward(batch))

    _, step = build(Odd())
    with pytest.raises(UserError, match=message):
        step(iter(make_batches(1, 2)))


def test_bfloat16_on_the_cpu_computes_in_bfloat16_and_trains():
    seen = []
    model, step = build(amp_enabled=True, amp_dtype="bfloat16")
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    batch = make_batches(1, 4)[0]
    losses = [sum(step(iter([batch])).losses.values()).item() for _ in range(30)]
    assert set(seen) == {torch.bfloat16}
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not step.scaler.is_enabled()


def test_float16_on_the_cpu_is_refused():
    with pytest.raises(UserError, match="bfloat16"):
        build(amp_enabled=True, amp_dtype="float16")


@pytest.mark.parametrize(
    ("clip_type", "limit"), [("value", 1e-3), ("norm", 1e-2), ("full_model", 1e-2)]
)
def test_clipping_bounds_the_update(clip_type, limit):
    # with SGD and lr 1 the update is the gradient
    model, step = build(lr=1.0, clip_enabled=True, clip_type=clip_type, clip_value=limit)
    before = [p.detach().clone() for p in model.parameters()]
    step(iter(make_batches(1, 4)))
    updates = [a - b.detach() for a, b in zip(before, model.parameters())]
    measured = {
        "value": max(update.abs().max() for update in updates),
        "norm": max(update.norm() for update in updates),
        "full_model": torch.stack([update.norm() for update in updates]).norm(),
    }[clip_type]
    assert measured == pytest.approx(limit, rel=1e-3)


def test_clipping_applies_to_the_accumulated_gradient():
    batches = make_batches(1, 4)
    settings = {"lr": 1.0, "clip_enabled": True, "clip_type": "full_model", "clip_value": 0.05}
    whole, whole_step = build(**settings)
    parts, parts_step = build(accumulation_steps=2, **settings)
    whole_step(iter(batches))
    parts_step(iter(halves(batches)))
    for expected, found in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(found, expected)
