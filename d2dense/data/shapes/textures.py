"""Grey textures that repeat without a seam, made once per process, and their colouring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import cv2
import numpy as np

__all__ = ["FILLS", "STUFF_CLASSES", "TEXTURES", "colour", "grain", "texture", "view", "window"]

SIZE = 512
_TURNS = ((1, 0), (2, 1), (1, 1), (1, 2), (0, 1), (-1, 2), (-1, 1), (-2, 1))
_LEVELS = np.linspace(-1, 1, 256)[:, None]

# Background materials, in the order of their class ids; pixels of clutter are a class of their own.
MATERIALS = ("plaster", "wood", "stone", "grass")
STUFF_CLASSES: tuple[str, ...] = (*MATERIALS, "clutter")
FILLS = ("plain", "mottled", "striped", "checked", "dotted")
TEXTURES = (*MATERIALS, *FILLS)


def _noise(rng: np.random.Generator, *, power: float, stretch: float = 1.0) -> np.ndarray:
    """Periodic noise (SIZE, SIZE), unit variance; the spectrum falls with a power of frequency.

    ``stretch`` > 1 draws the grain out vertically.
    """
    fy, fx = np.fft.fftfreq(SIZE)[:, None] * stretch, np.fft.rfftfreq(SIZE)[None]
    frequency = np.maximum(np.hypot(fy, fx), 1.0 / SIZE)
    spectrum = np.fft.rfft2(rng.standard_normal((SIZE, SIZE))) / frequency**power
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, s=(SIZE, SIZE))
    return noise / noise.std()


def _pebbles(rng: np.random.Generator, *, cells: int) -> np.ndarray:
    """Periodic distance map (SIZE, SIZE) to scattered points; 1 in the gaps between them."""
    step = SIZE // cells
    grid = np.stack(np.meshgrid(np.arange(cells), np.arange(cells)), axis=-1).reshape(-1, 2) * step
    x, y = (grid + rng.integers(0, step, grid.shape)).T
    seeds = np.ones((SIZE, SIZE), dtype=np.uint8)
    seeds[y, x] = 0
    half = SIZE // 2
    wrapped = np.pad(seeds, half, mode="wrap")
    distance = cv2.distanceTransform(wrapped, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.clip(distance[half:-half, half:-half] / step, 0, 1)


def _grey(values: np.ndarray, *, contrast: float) -> np.ndarray:
    """Bring values to the middle grey 128 with a standard deviation of ``contrast`` levels."""
    values = (values - values.mean()) / values.std()
    return np.clip(128 + contrast * values, 0, 255).astype(np.uint8)


def _draw(name: str) -> np.ndarray:
    rng = np.random.default_rng(TEXTURES.index(name))
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    if name == "plaster":
        return _grey(_noise(rng, power=1.6) + 0.5 * _noise(rng, power=0.3), contrast=30)
    if name == "wood":
        warp = _noise(rng, power=2.0, stretch=6.0)
        rings = np.sin(2 * np.pi * 14 * x / SIZE + 5 * warp)
        return _grey(rings + 0.8 * _noise(rng, power=0.8, stretch=24.0), contrast=45)
    if name == "stone":
        return _grey(3 * _pebbles(rng, cells=20) ** 2 + 0.4 * _noise(rng, power=0.9), contrast=45)
    if name == "grass":
        return _grey(_noise(rng, power=1.0, stretch=0.25) + _noise(rng, power=0.4), contrast=45)
    if name == "plain":
        return _grey(_noise(rng, power=1.2), contrast=14)
    if name == "mottled":
        return _grey(_noise(rng, power=1.5), contrast=50)
    if name == "striped":
        return _grey(np.tanh(3 * np.sin(2 * np.pi * 48 * x / SIZE)), contrast=60)
    if name == "checked":
        waves = np.sin(2 * np.pi * 32 * x / SIZE) * np.sin(2 * np.pi * 32 * y / SIZE)
        return _grey(np.tanh(5 * waves), contrast=60)
    dots = np.cos(2 * np.pi * 32 * x / SIZE) + np.cos(2 * np.pi * 32 * y / SIZE)
    return _grey(np.tanh(3 * (dots - 0.7)), contrast=60)


@cache
def texture(name: str) -> np.ndarray:
    """The seamless grey texture (SIZE, SIZE) uint8 of that name. Not to be written to."""
    return _draw(name)


@cache
def _turned(name: str, turn: int) -> np.ndarray:
    """The texture (SIZE, SIZE) turned and made finer by an integer matrix, hence still seamless."""
    a, b = _TURNS[turn]
    y, x = np.indices((SIZE, SIZE))
    return texture(name)[(a * y - b * x) % SIZE, (b * y + a * x) % SIZE]


@cache
def grain() -> np.ndarray:
    """Sensor noise (SIZE, SIZE, 3) uint8 around 128 with a standard deviation of 32 levels."""
    rng = np.random.default_rng(len(TEXTURES))
    noise = rng.standard_normal((SIZE, SIZE, 3)) + 0.7 * rng.standard_normal((SIZE, SIZE, 1))
    return _grey(noise, contrast=32)


def window(source: np.ndarray, *, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a window (height, width) at a random place out of a texture, repeated as needed."""
    if height > SIZE or width > SIZE:
        tiles = (-(-height // SIZE) + 1, -(-width // SIZE) + 1) + (1,) * (source.ndim - 2)
        source = np.tile(source, tiles)
    down, right = rng.random(2).tolist()
    top = int(down * (source.shape[0] - height + 1))
    left = int(right * (source.shape[1] - width + 1))
    return source[top : top + height, left : left + width]


def view(
    name: str, *, height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """A view (height, width) of a texture, turned at random, enlarged by ``scale`` in y and x."""
    turn = int(rng.integers(len(_TURNS)))
    coarser = math.hypot(*_TURNS[turn])
    part = window(
        _turned(name, turn),
        height=math.ceil(height / (scale[0] * coarser)),
        width=math.ceil(width / (scale[1] * coarser)),
        rng=rng,
    )
    return cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR)


def colour(grey: np.ndarray, base: Sequence[float], *, spread: float) -> np.ndarray:
    """Colour grey levels (H, W) with shades of a BGR colour: 1 - spread to 1 + spread times it.

    Returns:
        (H, W, 3) uint8.
    """
    shades = (1 + spread * _LEVELS) * base
    table = shades.clip(0, 255).astype(np.uint8)
    return cv2.LUT(cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR), table[None])
