"""Noised queries against the recorded ones and a slow loop."""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from d2dense.modeling.detr import (
    ContrastiveDenoising,
    DeformableDecoder,
    Memory,
    Queries,
    build_targets,
)
from tests.modeling.detr import recorded

SIZES = [(192, 256), (160, 208), (100, 120), (64, 64)]
needs_recording = pytest.mark.skipif(not recorded.THERE, reason="no recorded outputs here")


def instances(boxes, classes, size=(192, 256)):
    found = Instances(size)
    found.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.gt_classes = torch.as_tensor(classes, dtype=torch.int64)
    return found


def random_instances(count, size):
    corner = torch.rand(count, 2) * 30
    boxes = torch.cat([corner, corner + torch.rand(count, 2) * 30], dim=1)
    return instances(boxes, torch.randint(0, 5, (count,)), size)


def targets(*given):
    return build_targets(given, torch.device("cpu"))


def queries(count, images=1, channels=8):
    content = torch.randn(images, count, channels)
    return Queries(content, None, torch.rand(images, count, 4))


@needs_recording
def test_the_recorded_queries_and_mask():
    units = np.load(recorded.UNITS)
    given = targets(
        *(instances(units[f"cdn_gt_box{i}"], units[f"cdn_gt_label{i}"], SIZES[i]) for i in (0, 1))
    )
    module = ContrastiveDenoising()
    with torch.no_grad():
        weight = torch.randn(80, 256, generator=torch.Generator().manual_seed(11))
        module.label_embedding.weight.copy_(weight)
    torch.manual_seed(0)
    found = module(given)
    size, groups = units["cdn_pad_size_groups"]
    assert (found.content.shape[1], found.groups) == (size, groups)
    assert recorded.error(found.content[..., ::16], units["cdn_label_query"]) == 0
    expected = torch.from_numpy(units["cdn_box_query_logit"]).sigmoid()
    assert torch.allclose(found.references, expected, atol=1e-6)
    mask = np.unpackbits(units["cdn_attn_mask_packed"])[: 220 * 220].reshape(220, 220)
    assert tuple(units["cdn_attn_mask_shape"]) == mask.shape
    assert (found.join(queries(20, 2, 256)).mask.numpy() == mask).all()


@needs_recording
def test_the_recorded_random_numbers():
    units = np.load(recorded.UNITS)
    module = ContrastiveDenoising()
    torch.manual_seed(0)
    noise = module.draw(20, 8)
    assert (noise.flipped.numpy() == (units["cdn_rand_label_p"] < 0.25)).all()
    assert (noise.classes[noise.flipped].numpy() == units["cdn_rand_new_label"]).all()
    parts = units["cdn_rand_part"].reshape(20, 2, 8, 4) + np.array([0, 1]).reshape(1, 2, 1, 1)
    expected = parts.reshape(320, 4) * (units["cdn_rand_sign01"] * 2 - 1)
    assert np.abs(noise.shifts.numpy() - expected).max() < 1e-6


def by_loop(module, given, seed):
    """Query by query, in double precision: content, reference, label and target of every slot."""
    largest = max(len(each) for each in given)
    groups = max(1, module.num_queries // largest)
    every = [(i, k) for i, each in enumerate(given) for k in range(len(each))]
    count = 2 * groups * len(every)
    torch.manual_seed(seed)
    chance = torch.rand(count)
    chosen = [i for i in range(count) if chance[i] < 0.5 * module.label_noise]
    replaced = dict(zip(chosen, torch.randint(0, module.num_classes, (len(chosen),)).tolist()))
    signs = torch.randint(0, 2, (count, 4)).double() * 2 - 1
    parts = torch.rand(count, 4).double()
    width = 2 * groups * largest
    embedding = module.label_embedding.weight.detach()
    content = torch.zeros(len(given), width, embedding.shape[1])
    references = torch.full((len(given), width, 4), 0.5, dtype=torch.float64)
    labels = torch.full((len(given), width), module.num_classes)
    boxes = torch.full((len(given), width, 4), math.nan, dtype=torch.float64)
    n = 0
    for block in range(2 * groups):
        for i, k in every:
            height, w = given[i].image_size
            x0, y0, x1, y1 = given[i].gt_boxes.tensor[k].double().tolist()
            box = [x0 / w, y0 / height, x1 / w, y1 / height]
            reach = [(box[2] - box[0]) / 2, (box[3] - box[1]) / 2] * 2
            moved = []
            for c in range(4):
                shift = parts[n, c] + block % 2
                shift = shift * signs[n, c] * reach[c] * module.box_noise
                moved.append(min(max(box[c] + float(shift), 0.0), 1.0))
            centre = [(moved[0] + moved[2]) / 2, (moved[1] + moved[3]) / 2]
            noised = [*centre, moved[2] - moved[0], moved[3] - moved[1]]
            slot = block * largest + k
            for c, value in enumerate(noised):
                value = min(max(value, 0.0), 1.0)
                odds = max(value, 1e-3) / max(1 - value, 1e-3)
                references[i, slot, c] = odds / (1 + odds)
            label = int(given[i].gt_classes[k])
            content[i, slot] = embedding[replaced.get(n, label)]
            if block % 2 == 0:
                labels[i, slot] = label
                centre = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
                boxes[i, slot] = torch.tensor([*centre, box[2] - box[0], box[3] - box[1]])
            n += 1
    return content, references, labels, boxes


@pytest.mark.parametrize("counts", [(3, 0, 5, 1), (1,), (40, 7), (0, 2)])
@pytest.mark.parametrize(("label_noise", "box_noise"), [(0.5, 1.0), (1.0, 0.4)])
def test_by_loop(counts, label_noise, box_noise):
    torch.manual_seed(3)
    given = [random_instances(count, size) for count, size in zip(counts, SIZES)]
    module = ContrastiveDenoising(
        num_classes=5, channels=8, num_queries=30, label_noise=label_noise, box_noise=box_noise
    )
    content, references, labels, boxes = by_loop(module, given, 5)
    torch.manual_seed(5)
    found = module(targets(*given))
    assert torch.equal(found.content, content)
    assert torch.allclose(found.references.double(), references, atol=1e-6)
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.box_weights, (labels < 5).float())
    assert found.number == int((labels < 5).sum())
    there = labels < 5
    assert torch.allclose(found.targets[there].double(), boxes[there], atol=1e-6)


def test_without_noise_objects_are_exact():
    module = ContrastiveDenoising(
        num_classes=5, channels=8, num_queries=6, label_noise=0.0, box_noise=0.0
    )
    given = [random_instances(3, (64, 64)), random_instances(1, (64, 64))]
    state = torch.get_rng_state()
    found = module(targets(*given))
    assert torch.equal(state, torch.get_rng_state())
    blocks = found.references.unflatten(1, (4, 3))
    assert all(torch.equal(blocks[:, 0], blocks[:, i]) for i in range(4))
    expected = targets(*given).boxes[0].clamp(1e-3, 1 - 1e-3)
    assert torch.allclose(blocks[0, 0], expected, atol=1e-5)


def test_the_mask_row_by_row():
    module = ContrastiveDenoising(num_classes=5, channels=8, num_queries=6)
    found = module(targets(random_instances(3, (64, 64)), random_instances(2, (64, 64))))
    mask = found.join(queries(4, 2)).mask
    assert (found.groups, found.content.shape[1]) == (2, 12)
    for row in range(16):
        for column in range(16):
            same = row < 12 and column < 12 and row // 6 == column // 6
            assert bool(mask[row, column]) == (column < 12 and not same)


@torch.no_grad()
def test_matched_queries_do_not_see_the_noised_ones():
    decoder = DeformableDecoder(channels=8, levels=1, layers=2, heads=2, points=2).eval()
    tokens = torch.randn(2, 6, 8)
    memory = Memory(tokens, [(2, 3)], torch.zeros(2, 6, dtype=torch.bool), torch.ones(2, 1, 2))
    given = [random_instances(3, (64, 64)), random_instances(2, (64, 64))]
    module = ContrastiveDenoising(num_classes=5, channels=8, num_queries=6)
    noised = module(targets(*given))
    alone = queries(4, 2)._replace(position=torch.zeros(2, 4, 8))
    joined = noised.join(alone)._replace(position=torch.zeros(2, 16, 8))
    plain, _ = decoder(alone, memory, None)
    states, _ = decoder(joined, memory, None)
    assert all(
        torch.allclose(ours[:, 12:], theirs, atol=1e-6) for ours, theirs in zip(states, plain)
    )
    changed = noised._replace(content=noised.content.clone())
    changed.content[:, 0] += 1.0  # of the first group
    others, _ = decoder(changed.join(alone)._replace(position=torch.zeros(2, 16, 8)), memory, None)
    assert torch.allclose(others[-1][:, 6:], states[-1][:, 6:], atol=1e-6)
    assert not torch.allclose(others[-1][:, 1:6], states[-1][:, 1:6], atol=1e-4)


def test_no_objects_at_all():
    module = ContrastiveDenoising(num_classes=5, channels=8)
    found = module(targets(random_instances(0, (64, 64)), random_instances(0, (64, 64))))
    assert found.content.shape == (2, 0, 8)
    joined = found.join(queries(4, 2))
    assert not joined.mask.any()
    joined.content.sum().backward()
    assert not module.label_embedding.weight.grad.any()


def test_more_objects_than_noised_queries():
    module = ContrastiveDenoising(num_classes=5, channels=8, num_queries=10)
    found = module(targets(random_instances(1000, (64, 64)), random_instances(1, (64, 64))))
    assert (found.groups, found.content.shape[1], found.number) == (1, 2000, 1001)
