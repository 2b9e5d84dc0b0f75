"""Pictures and labels that cannot be right: one line, or a defined result."""

import pytest
import torch
from detectron2.modeling import SemanticSegmentor

from d2dense.errors import UserError
from d2dense.layers import explained_single_values
from d2dense.modeling import SemanticInference
from tests.projects.hfgd import tiny

IGNORE = 255


def sample(height=33, width=40, value=None, **extra):
    image = torch.randint(0, 256, (3, height, width)).to(torch.uint8)
    labels = tiny.labels(height, width, images=1)[0]
    if value is not None:
        labels = torch.full_like(labels, value)
    return {"image": image, "sem_seg": labels, **extra}


@pytest.mark.parametrize("value", [-1, tiny.CLASSES, 254, 1000])
def test_a_label_of_no_class(value):
    model, bad = tiny.segmenter(), sample(file_name="street.png")
    bad["sem_seg"][3, 4] = value
    with pytest.raises(UserError, match=rf"street\.png has class {value}, .* 0 to 4 and ignores"):
        model.train()([sample(), bad])


@pytest.mark.parametrize("size", [(33, 41), (40, 33), (32, 40)])
def test_labels_of_another_size(size):
    """Filling up to one size would hide it."""
    model, bad = tiny.segmenter(pad_to=[65, 65]), sample(file_name="street.png")
    bad["sem_seg"] = torch.zeros(size, dtype=torch.int64)
    with pytest.raises(UserError, match=r"street\.png is .*, but the image is \(33, 40\)"):
        model.train()([sample(), bad])


def test_a_crop_without_labels_trains_on_the_others():
    model = tiny.segmenter(pad_to=[65, 65]).train()
    losses = model([sample(), sample(value=IGNORE)])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert losses["loss_fine"] > 0


def test_a_batch_without_labels_changes_nothing():
    model = tiny.segmenter(pad_to=[65, 65]).train()
    losses = model([sample(value=IGNORE), sample(value=IGNORE)])
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_fine"].item() == losses["loss_coarse"].item() == 0
    sum(losses.values()).backward()
    assert not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (2, 3)])
@pytest.mark.parametrize("options", [{"out_stride": 2}, {"encoder": "aspp"}, {"encoder": "ocr"}])
def test_tiny_pictures(size, options):
    model = tiny.segmenter(pad_to=[33, 33], **options)
    losses = model.train()([sample(*size), sample(*size)])  # filled up
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        found = model.eval()([{"image": sample(*size)["image"]}])[0]["sem_seg"]
    assert found.shape == (tiny.CLASSES, *size)
    assert found.isfinite().all()


def test_one_pixel_alone_has_no_variance():
    """Two such pictures have one; a single one without filling up is a line of advice."""
    model = tiny.segmenter().train()
    assert all(loss.isfinite() for loss in model([sample(1, 1), sample(1, 1)]).values())
    with pytest.raises(UserError, match="two images or more"), explained_single_values():
        model([sample(1, 1)])


def test_images_of_several_sizes_in_one_batch():
    model = tiny.segmenter().train()
    losses = model([sample(65, 40), sample(33, 97)])
    assert all(loss.isfinite() for loss in losses.values())


# ------------------------------------------------ crops are as they are


@pytest.mark.parametrize("size", [(65, 97), (64, 96), (50, 77)])
@torch.no_grad()
def test_pictures_are_not_filled_up_to_a_multiple(size):
    model = tiny.segmenter().eval()
    seen = []
    model.backbone.register_forward_hook(lambda m, i, maps: seen.append(maps["res5"].shape[2:]))
    found = model([{"image": sample(*size)["image"]}])[0]["sem_seg"]
    assert found.shape == (tiny.CLASSES, *size)
    assert seen == [tuple(tiny.side(n, 32) for n in size)]


@torch.no_grad()
def test_detectron2s_own_segmentor_takes_the_head():
    ours = tiny.segmenter().eval()
    theirs = SemanticSegmentor(
        backbone=ours.backbone,
        sem_seg_head=ours.sem_seg_head,
        pixel_mean=[120.0] * 3,
        pixel_std=[60.0] * 3,
    ).eval()
    for size in ((64, 96), (65, 97)):
        image = {"image": sample(*size)["image"]}
        expected, found = ours([image])[0]["sem_seg"], theirs([image])[0]["sem_seg"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.enable_grad():
        assert "loss_fine" in theirs.train()([sample(), sample()])


@torch.no_grad()
def test_windows_and_several_scales():
    model = tiny.segmenter(out_stride=2).eval()
    image = {"image": sample(65, 97)["image"]}
    for inference in (
        SemanticInference(window=[33, 33]),
        SemanticInference(multi_scale=True, ratios=[0.5, 1.0], average="logits", keep_odd=True),
    ):
        model.inference = inference
        found = model([image])[0]["sem_seg"]
        assert found.shape == (tiny.CLASSES, 65, 97)
        assert found.isfinite().all()
