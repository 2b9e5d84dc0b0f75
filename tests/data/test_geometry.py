"""Polygons and masks under crops and padding, against points and pixels."""

from __future__ import annotations

import numpy as np
import pytest
from detectron2.data import transforms as T
from detectron2.structures import polygons_to_bitmask
from fvcore.transforms.transform import CropTransform, PadTransform, TransformList
from matplotlib.path import Path as Outline

from d2dense.data.geometry import (
    clip_boxes,
    clip_polygon,
    polygon_area,
    transform_mask,
    transform_polygons,
)


def star(rng: np.random.Generator, corners: int) -> np.ndarray:
    """A simple polygon, mostly concave, around a point near the window [0, 20] x [0, 16]."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radii = rng.uniform(1, 16, corners)
    center = rng.uniform(-4, 22, 2)
    return center + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


@pytest.mark.parametrize("seed", range(40))
def test_pieces_cover_the_polygon_inside_the_window(seed):
    rng = np.random.default_rng(seed)
    height, width = 16, 20
    polygon = star(rng, int(rng.integers(3, 14)))
    pieces = clip_polygon(polygon, height, width)
    # random points miss edges and corners almost surely
    points = rng.uniform([-2, -2], [width + 2, height + 2], (4000, 2))
    window = ((points > 0) & (points < [width, height])).all(axis=1)
    expected = Outline(np.vstack([polygon, polygon[:1]])).contains_points(points) & window
    covered = np.zeros(len(points), int)
    for piece in pieces:
        assert (piece >= -1e-9).all()
        assert (piece <= np.array([width, height]) + 1e-9).all()
        covered += Outline(np.vstack([piece, piece[:1]])).contains_points(points)
    assert (covered == expected).all()  # covered once: pieces do not overlap


def test_a_u_shape_falls_apart_into_two_exact_pieces():
    u_shape = np.array([[0, 0], [2, 0], [2, 6], [4, 6], [4, 0], [6, 0], [6, 8], [0, 8]], float)
    pieces = clip_polygon(u_shape, 5, 10)
    extents = sorted((*p.min(axis=0), *p.max(axis=0)) for p in pieces)
    assert extents == [(0, 0, 2, 5), (4, 0, 6, 5)]
    assert [polygon_area(p) for p in pieces] == [10, 10]


def test_a_polygon_inside_the_window_is_returned_as_it_is():
    triangle = np.array([[1.0, 1], [5, 1], [3, 4]])
    assert clip_polygon(triangle, 4, 5)[0] is triangle
    assert clip_polygon(triangle + 100, 4, 5) == []


def test_a_polygon_that_crosses_itself_keeps_its_area():
    bow_tie = np.array([[0, 0], [8, 8], [8, 0], [0, 8]], float)
    assert sum(polygon_area(p) for p in clip_polygon(bow_tie, 8, 4)) == pytest.approx(16)


def test_a_touching_edge_leaves_nothing():
    square = np.array([[5, 0], [9, 0], [9, 4], [5, 4]], float)
    assert clip_polygon(square, 10, 5) == []


def test_clip_boxes_is_per_side():
    boxes = np.array([[-3.0, 2, 70, 50], [1, 1, 2, 2]])
    assert clip_boxes(boxes, 40, 60).tolist() == [[0, 2, 60, 40], [1, 1, 2, 2]]


@pytest.mark.parametrize("seed", range(10))
def test_polygons_and_masks_agree_after_nested_crops_and_flips(seed):
    rng = np.random.default_rng(seed)
    polygon = star(rng, 9) + 12
    mask = polygons_to_bitmask([p.reshape(-1) for p in clip_polygon(polygon, 40, 48)], 40, 48)
    transforms = TransformList(
        [
            CropTransform(3, 5, 40, 30),
            TransformList([T.HFlipTransform(40), CropTransform(6, 0, 30, 25)]),
            PadTransform(2, 1, 5, 4, seg_pad_value=255),
        ]
    )
    moved = transform_polygons(transforms, [polygon])
    drawn = polygons_to_bitmask([p.reshape(-1) for p in moved], 30, 37)
    expected = transform_mask(transforms, mask.astype(np.uint8)).astype(bool)
    assert expected.shape == (30, 37)
    different = drawn ^ expected
    edges = np.pad(expected, 1)
    inner = edges[:-2, 1:-1] & edges[2:, 1:-1] & edges[1:-1, :-2] & edges[1:-1, 2:] & expected
    outer = edges[:-2, 1:-1] | edges[2:, 1:-1] | edges[1:-1, :-2] | edges[1:-1, 2:] | expected
    assert not (different & (inner | ~outer)).any()  # rasterising differs on outlines only


def test_padding_is_not_object():
    mask = np.ones((2, 3), np.uint8)
    padded = transform_mask(PadTransform(1, 0, 2, 1, seg_pad_value=255), mask)
    assert padded.tolist() == [[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0] * 6]


def test_the_callers_polygons_are_not_changed():
    polygon = np.array([[10.0, 10], [20, 10], [20, 20]])
    before = polygon.copy()
    transform_polygons(TransformList([CropTransform(5, 5, 10, 10)]), [polygon])
    assert (polygon == before).all()
