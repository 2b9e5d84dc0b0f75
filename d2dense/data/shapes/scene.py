"""Compose one picture: what lies where (exactly), then how it looks.

Things are laid out from front to back. Each keeps the pixels that nothing in front of it has taken,
and an object of which too little would be seen is never put there at all; labels and picture
therefore always agree.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import cv2
import numpy as np

from .outlines import CLASSES, OUTLINES, blob, place, stroke
from .textures import FILLS, MATERIALS, colour, grain, texture, view, window

__all__ = ["MAX_OBJECTS", "MIN_SIZE", "Item", "Scene", "make_scene"]

MIN_SIZE = 12  # pixels, longer side of the smallest object
MAX_OBJECTS = 200  # item numbers are kept in one byte
MIN_VISIBLE_SHARE, MIN_VISIBLE_PIXELS = 0.4, 30
EMPTY_SHARE = 0.04  # of the pictures: background and clutter alone
CLUTTER = -1
Colour = tuple[float, float, float]  # BGR, 0..255
# Rotation in radians, logarithm of the aspect ratio, shear.
_POSE_HIGH = np.array([0.6, 0.22, 0.15])
_POSE_LOW = -_POSE_HIGH
_SHIFT = 4  # bits of sub-pixel precision in drawing


@dataclass
class Item:
    """An object or a piece of clutter in the picture.

    Attributes:
        label: index into ``CLASSES``, or ``CLUTTER``.
        left, top: corner of the item's window in the picture.
        alpha: (h, w) uint8 coverage inside the window; at least 128 belongs to the item.
    """

    label: int
    left: int
    top: int
    alpha: np.ndarray

    @property
    def window(self) -> tuple[slice, slice]:
        height, width = self.alpha.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


@dataclass
class Scene:
    """A finished picture with its exact labels.

    Attributes:
        image: (H, W, 3) uint8, BGR.
        owner: (H, W) uint8: 0 where the background is seen, i + 1 where ``items[i]`` is.
        items: front to back; every object among them is visible.
        material: (H, W) uint8, the background's index into ``STUFF_CLASSES``, items ignored.
    """

    image: np.ndarray
    owner: np.ndarray
    items: list[Item]
    material: np.ndarray


def make_scene(
    rng: np.random.Generator, *, height: int, width: int, objects: tuple[int, int] = (1, 8)
) -> Scene:
    """Compose a scene.

    Args:
        rng: source of everything random.
        height, width: of the picture in pixels.
        objects: smallest and largest number of objects tried; hidden ones are left out, and a few
            pictures have none.
    """
    owner, items = _lay_out(rng, height, width, objects)
    material, kinds = _lay_background(rng, height, width)
    image, colours = _paint_background(rng, material, kinds)
    previous: list[Colour] = []
    for item in reversed(items):
        previous = [_paint_item(rng, image, item, colours + previous)]
    return Scene(_photograph(rng, image), owner, items, material)


# Layout -------------------------------------------------------------------------------------------


def _lay_out(
    rng, height: int, width: int, objects: tuple[int, int]
) -> tuple[np.ndarray, list[Item]]:
    owner = np.zeros((height, width), dtype=np.uint8)
    items: list[Item] = []
    count = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(objects[0], objects[1] + 1))
    front, back = int(rng.random() < 0.35), int(rng.integers(2, 7))
    kinds = ["wire"] * front + ["object"] * count + ["clutter"] * back
    neighbour: np.ndarray | None = None
    for kind in kinds:
        if kind == "object":
            label = int(rng.integers(len(CLASSES)))
            contours = _place_object(rng, label, height, width, neighbour)
            neighbour = contours[0]
        else:
            label = CLUTTER
            contours = _place_clutter(rng, height, width, wire=kind == "wire" or rng.random() < 0.5)
        item = _draw_item(label, contours, height, width)
        if item is not None and _take_pixels(owner, item, number=len(items) + 1):
            items.append(item)
    return owner, items


def _place_object(
    rng, label: int, height: int, width: int, neighbour: np.ndarray | None
) -> list[np.ndarray]:
    """Return an object's contours; now and then it is put half behind the one placed before."""
    largest = max(min(height, width) / 2, MIN_SIZE)
    size, beside, x, y, direction = rng.random(5).tolist()
    # each octave of sizes holds more objects than the one below it
    extent = MIN_SIZE * (largest / MIN_SIZE) ** math.sqrt(size)
    margin = 0.3 * extent
    x, y = margin + x * (width - 2 * margin), margin + y * (height - 2 * margin)
    if neighbour is not None and beside < 0.35:
        low, high = neighbour.min(axis=0), neighbour.max(axis=0)
        gap = 0.4 * (extent + (high - low).max())
        centre = (low + high) / 2
        x = centre[0] + gap * math.cos(2 * math.pi * direction)
        y = centre[1] + gap * math.sin(2 * math.pi * direction)
        x, y = min(max(x, margin), width - margin), min(max(y, margin), height - margin)
    angle, stretch, shear = rng.uniform(_POSE_LOW, _POSE_HIGH).tolist()
    return place(
        OUTLINES[CLASSES[label]],
        extent=extent,
        angle=angle,
        aspect=math.exp(stretch),
        shear=shear,
        centre=(x, y),
    )


def _place_clutter(rng, height: int, width: int, *, wire: bool) -> list[np.ndarray]:
    side = min(height, width)
    x, y, angle, size, shape = rng.random(5).tolist()
    centre, angle = (x * width, y * height), 2 * math.pi * angle
    if wire:
        extent = side * (0.3 + 0.7 * size)
        outline = stroke(rng, length=extent, width=2 + 0.015 * side * shape)
        return place(outline, extent=extent, angle=angle, centre=centre)
    extent = side * (0.04 + 0.21 * size)
    return place(blob(rng), extent=extent, angle=angle, aspect=0.3 + 0.4 * shape, centre=centre)


def _draw_item(label: int, contours: list[np.ndarray], height: int, width: int) -> Item | None:
    """Rasterise contours (xy in picture pixels) in their window; None if off the picture."""
    fixed = [(contour * (1 << _SHIFT)).astype(np.int32) for contour in contours]
    x, y, w, h = (v >> _SHIFT for v in cv2.boundingRect(fixed[0]))
    left, top = max(x - 1, 0), max(y - 1, 0)
    right, bottom = min(x + w + 3, width), min(y + h + 3, height)
    if right <= left or bottom <= top:
        return None
    alpha = np.zeros((bottom - top, right - left), dtype=np.uint8)
    corner = (-left << _SHIFT, -top << _SHIFT)
    cv2.fillPoly(alpha, fixed, 255, lineType=cv2.LINE_AA, shift=_SHIFT, offset=corner)
    return Item(label, left, top, alpha)


def _take_pixels(owner: np.ndarray, item: Item, *, number: int) -> bool:
    """Give the item its free pixels; False, and nothing done, if too little would be seen."""
    mask = item.alpha >= 128
    free = mask & (owner[item.window] == 0)
    visible = np.count_nonzero(free)
    if item.label != CLUTTER:
        enough = max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * np.count_nonzero(mask))
        if visible < enough:
            return False
    owner[item.window][free] = number
    return visible > 0


def _lay_background(rng, height: int, width: int) -> tuple[np.ndarray, list[int]]:
    """Return the material per pixel and the materials used: one, or two with an edge between."""
    first, second = (int(k) for k in rng.permutation(len(MATERIALS))[:2])
    material = np.full((height, width), first, dtype=np.uint8)
    if rng.random() < 0.4:
        return material, [first]
    middle, tilt, bow = rng.uniform(0.25, 0.75), rng.uniform(-0.3, 0.3), rng.uniform(-0.2, 0.2)
    t = np.linspace(0, 1, 9)
    edge = middle + tilt * (t - 0.5) + bow * (4 * (t - 0.5) ** 2 - 0.5)
    if rng.random() < 0.7:
        line = np.stack([t * width, edge * height], axis=1)
        ends = [(width, height), (0, height)]
    else:
        line = np.stack([edge * width, t * height], axis=1)
        ends = [(width, height), (width, 0)]
    cv2.fillPoly(material, [np.concatenate([line, ends]).astype(np.int32)], second)
    return material, [first, second]


# Looks --------------------------------------------------------------------------------------------

# Hue in degrees, saturation and value ranges that the materials' colours are drawn from.
_PALETTE = {
    "plaster": ((0, 360), (0.02, 0.30), (0.45, 0.90)),
    "wood": ((15, 40), (0.30, 0.65), (0.30, 0.75)),
    "stone": ((0, 360), (0.00, 0.20), (0.25, 0.70)),
    "grass": ((60, 130), (0.30, 0.65), (0.25, 0.60)),
}


def _bgr(hue: float, saturation: float, value: float) -> Colour:
    """Colour of a hue in degrees and saturation and value in 0..1."""
    red, green, blue = colorsys.hsv_to_rgb(hue / 360, saturation, value)
    return 255 * blue, 255 * green, 255 * red


def _paint_background(
    rng, material: np.ndarray, kinds: list[int]
) -> tuple[np.ndarray, list[Colour]]:
    """Return the empty picture (H, W, 3) uint8 and the mean colours of its materials."""
    height, width = material.shape
    layers, colours = [], []
    for kind in kinds:
        name = MATERIALS[kind]
        base = _bgr(*(rng.uniform(*span) for span in _PALETTE[name]))
        spread = rng.uniform(0.15, 0.45)
        grey = view(
            name,
            height=height,
            width=width,
            scale=tuple(rng.uniform(0.6, 1.4, 2)),
            rng=rng,
        )
        layers.append(colour(grey, base, spread=spread))
        colours.append(base)
    image = layers[0]
    if len(layers) > 1:
        cv2.copyTo(layers[1], (material == kinds[1]).view(np.uint8), image)
    blur = rng.uniform(-0.5, 1.2)  # the background is a little out of focus in most pictures
    if blur > 0.3:
        image = cv2.GaussianBlur(image, (5, 5), blur)
    return image, colours


def _contrasting(rng, colours: list[Colour], *, distance: float) -> Colour:
    """Draw a colour at a Euclidean BGR distance from all of ``colours``, or the best of a few."""
    best, best_gap = colours[0], -1.0
    for hue, saturation, value in rng.random((8, 3)).tolist():
        candidate = _bgr(360 * hue, 0.05 + 0.85 * saturation, 0.2 + 0.8 * value)
        gap = min(math.dist(candidate, other) for other in colours)
        if gap > best_gap:
            best, best_gap = candidate, gap
        if gap >= distance:
            break
    return best


def _paint_item(rng, image: np.ndarray, item: Item, colours: list[Colour]) -> Colour:
    """Cast the item's shadow, then paint it: textured, lit from one side, with soft edges.

    Returns:
        the item's colour, chosen to differ from ``colours``.
    """
    height, width = item.alpha.shape
    clutter = item.label == CLUTTER
    depth = max(2, min(height, width) // (16 if clutter else 8))
    kernel, corner = (2 * depth + 1, 2 * depth + 1), (2 * depth, 2 * depth)
    soft = cv2.blur(item.alpha, kernel, borderType=cv2.BORDER_CONSTANT)
    _cast_shadow(image, item, soft, shift=depth, strength=rng.uniform(0.25, 0.55))

    base = _contrasting(rng, colours, distance=60 if clutter else 110)
    spread = rng.uniform(0.1, 0.3)
    fill = FILLS[int(rng.integers(2 if clutter else len(FILLS)))]
    grey = window(texture(fill), height=height, width=width, rng=rng)
    # Relief: the blurred coverage rises towards the middle; its slope along the diagonal is what
    # the light sees.
    shifted = cv2.blur(item.alpha, kernel, anchor=corner, borderType=cv2.BORDER_CONSTANT)
    slope = cv2.addWeighted(soft, 0.5, shifted, -0.5, 128)
    grey = cv2.addWeighted(grey, 0.8, slope, 0.8, -77)
    paint = colour(grey, base, spread=2 * spread)

    here = image[item.window]
    weight = item.alpha.astype(np.float32) * (1 / 255)
    here[:] = cv2.blendLinear(paint, np.ascontiguousarray(here), weight, 1 - weight)
    return base


def _cast_shadow(
    image: np.ndarray, item: Item, soft: np.ndarray, *, shift: int, strength: float
) -> None:
    """Darken what lies to the lower right of the item by its blurred coverage (h, w) uint8."""
    top, left = item.top + shift, item.left + shift
    here = image[top : top + soft.shape[0], left : left + soft.shape[1]]
    if here.size == 0:
        return
    shade = soft[: here.shape[0], : here.shape[1]]
    light = cv2.cvtColor(
        cv2.convertScaleAbs(shade, alpha=-strength, beta=255.0), cv2.COLOR_GRAY2BGR
    )
    here[:] = cv2.multiply(np.ascontiguousarray(here), light, scale=1 / 255)


def _photograph(rng, image: np.ndarray) -> np.ndarray:
    """Uneven and tinted light, slight blur, sensor noise."""
    height, width = image.shape[:2]
    y, x = np.mgrid[-1:1:9j, -1:1:9j]
    angle = rng.uniform(0, 2 * np.pi)
    ramp = rng.uniform(0, 0.25) * (np.cos(angle) * x + np.sin(angle) * y)
    light = 0.8 + ramp - rng.uniform(0, 0.15) * (x * x + y * y)
    tint = rng.uniform(0.93, 1.0, 3)
    light = np.clip(light[..., None] * tint * 230, 0, 255).astype(np.uint8)
    light = cv2.resize(light, (width, height), interpolation=cv2.INTER_LINEAR)
    image = cv2.multiply(image, light, scale=1 / 190)
    blur = rng.uniform(0, 0.8)
    if blur > 0.35:
        image = cv2.GaussianBlur(image, (3, 3), blur)
    noise = window(grain(), height=height, width=width, rng=rng)
    amount = rng.uniform(0.03, 0.25)
    return cv2.addWeighted(image, 1.0, noise, amount, -128 * amount)
