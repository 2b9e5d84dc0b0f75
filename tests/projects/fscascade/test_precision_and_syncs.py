"""Autocast, and how often the heads make the host wait for the device."""

from __future__ import annotations

import pytest
import torch

from tests.modeling.waiting import OpCounter
from tests.projects.fscascade import builders as b


def box_loss_ops(num_images: int, **settings) -> OpCounter:
    from fscascade.training import box_losses

    heads = b.heads(**settings).train()
    props, gt = b.proposals((30,) * num_images), b.targets((3,) * num_images)
    with b.EventStorage(1):  # not a step that reads accuracies
        labelled = heads.label_and_sample_proposals(props, gt)
        with OpCounter() as counter:
            box_losses(heads, b.features(num_images), labelled, gt)
    return counter


@pytest.mark.parametrize("settings", [{}, {"cfs": False, "lfs": False}, {"lfs_mode": "cached"}])
def test_box_losses_never_wait_per_image(settings):
    """Sizes are read with one ``tolist`` per stage (not seen here); nothing else waits."""
    two, eight = box_loss_ops(2, **settings), box_loss_ops(8, **settings)
    assert two.waiting == eight.waiting == 0
    per_image = (eight.total - two.total) / 6
    assert per_image < 20  # filling image sizes and joining lists; no matching or pooling per image


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_synchronisation_per_stage_on_a_gpu(monkeypatch):
    import warnings

    from fscascade.training import box_losses

    def syncs(num_images):
        heads = b.heads().train().cuda()
        feats = {name: f.cuda() for name, f in b.features(num_images).items()}
        props = [p.to("cuda") for p in b.proposals((30,) * num_images)]
        gt = [t.to("cuda") for t in b.targets((3,) * num_images)]
        with b.EventStorage(1):
            labelled = heads.label_and_sample_proposals(props, gt)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    box_losses(heads, feats, labelled, gt)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchron" in str(w.message) for w in caught)

    assert syncs(2) == syncs(6) <= 3


@pytest.mark.parametrize("settings", [{}, {"cfs": False, "lfs": False}, {"conv_head": True}])
def test_bfloat16_autocast_trains_and_detects(settings):
    heads, full = b.heads(masks=True, **settings), b.heads(masks=True, **settings)
    gt = b.targets(masks=True)
    expected = b.losses(full, gt=gt)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = b.losses(heads, gt=gt)
    for name, value in losses.items():
        assert value.dtype == torch.float32, name
        assert value.isfinite()
    # the first stage sees the same boxes; later ones have drifted apart
    torch.testing.assert_close(
        losses["loss_cls_stage0"], expected["loss_cls_stage0"], rtol=0.05, atol=0.02
    )
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in heads.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = b.detections(heads)
    assert all(len(f) and f.pred_boxes.tensor.dtype == torch.float32 for f in found)
