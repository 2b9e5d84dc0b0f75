"""Grey textures that repeat without a seam, made once per process, and their colouring."""

from __future__ import annotations

from functools import cache, lru_cache

import cv2
import numpy as np

__all__ = ["FILLS", "STUFF_CLASSES", "TEXTURES", "colour", "grain", "texture", "view", "window"]

SIZE = 512
_LEVELS = np.linspace(0, 1, 256)[:, None]

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
def _tiled(name: str) -> np.ndarray:
    """The texture three times in each direction."""
    return np.tile(texture(name), (3, 3))


@lru_cache(maxsize=1)
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
    top = int(rng.integers(0, source.shape[0] - height + 1))
    left = int(rng.integers(0, source.shape[1] - width + 1))
    return source[top : top + height, left : left + width]


def view(
    name: str, *, height: int, width: int, scale: float, angle: float, rng: np.random.Generator
) -> np.ndarray:
    """A view (height, width) of a texture, enlarged by ``scale``, turned by ``angle`` radians."""
    source = _tiled(name)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    linear = np.array([[cos, -sin], [sin, cos]])
    centre = SIZE + rng.uniform(0, SIZE, 2)
    matrix = np.column_stack([linear, centre - linear @ (width / 2, height / 2)])
    # Inside the middle of the tiles no pixel is outside, and OpenCV has a much faster path without
    # wrapping.
    inside = np.hypot(height, width) / 2 / scale < SIZE - 2
    border = cv2.BORDER_CONSTANT if inside else cv2.BORDER_WRAP
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(source, matrix, (width, height), flags=flags, borderMode=border)


def colour(grey: np.ndarray, dark: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Map grey levels (H, W) linearly from BGR ``dark`` to ``light``: (H, W, 3) uint8."""
    table = (dark + (light - dark) * _LEVELS).clip(0, 255).astype(np.uint8)
    return cv2.LUT(cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR), table[None])
