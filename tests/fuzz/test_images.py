"""Pictures, label maps and videos: decoded, or refused in one line without a crash."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from d2dense.data import reading
from d2dense.data.check import ImageFile, Report, check_images
from d2dense.inference.sources import frames, open_video
from tests.fuzz.harness import attempt, fuzz
from tests.fuzz.mutations import damaged_bytes


def _encoded(pixels, kind, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, *, depth: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    """A PNG that claims a size, with checksums that fit."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = _chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + body + _chunk(b"IEND", b"")


def _samples() -> list[bytes]:
    random = np.random.default_rng(0)
    colour = random.integers(0, 255, (20, 30, 3), dtype=np.uint8)
    grey, deep = colour[..., 0], colour[..., 0].astype(np.uint16) * 257
    exif = Image.Exif()
    exif[0x0112] = 6
    found = [
        _encoded(colour, kind) for kind in ("JPEG", "PNG", "BMP", "TIFF", "GIF", "WEBP", "PPM")
    ]
    found += [_encoded(grey, kind) for kind in ("JPEG", "PNG", "TIFF", "BMP", "GIF")]
    found += [_encoded(deep, "PNG"), _encoded(deep, "TIFF")]
    found += [_encoded(colour, "JPEG", exif=exif), _encoded(colour, "PNG", exif=exif)]
    found += [_encoded(colour, "JPEG", progressive=True), _encoded(colour, "WEBP", lossless=True)]
    found += [
        _encoded(colour, "TIFF", compression=name)
        for name in ("tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate")
    ]
    found += [_encoded(grey.astype(np.float32), "TIFF"), _encoded(colour, "JPEG2000")]
    palette = io.BytesIO()
    Image.fromarray(colour).quantize(16).save(palette, "PNG", transparency=0)
    frames_ = [Image.fromarray(colour), Image.fromarray(255 - colour)]
    moving = io.BytesIO()
    frames_[0].save(moving, "GIF", save_all=True, append_images=frames_[1:])
    return [*found, palette.getvalue(), moving.getvalue()]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n(%pipe%touch CANARY) (w) file\n%%EOF\n"
TOKENS = [b"\xff\xd8\xff", b"IHDR", b"\xff\xc0", b"GIF89a", b"II*\x00", b"RIFF", b"%!PS", b"BM"]


def _files(canary):
    small = st.integers(0, 40)
    sides = small | st.sampled_from([50_000, 13_000, 1, 2**31 - 1, 2**31, 2**32 - 1])
    lies = st.builds(
        _png,
        sides,
        sides,
        depth=st.sampled_from([1, 2, 4, 8, 16, 3]),
        colour=st.sampled_from([0, 2, 3, 4, 6, 5]),
        data=st.binary(max_size=200) | st.just(bytes(1 << 20)),
    )
    eps = EPS.replace(b"CANARY", str(canary.path).encode())
    others = st.binary(max_size=200) | st.sampled_from([b"", eps, b"P5 1000000 1000000 255\n"])
    damaged = damaged_bytes(_samples(), tokens=TOKENS)
    return damaged | damaged | lies | others


SUFFIXES = [".jpg", ".png", ".bmp", ".tif", ".gif", ".webp", ".ppm"]


def test_pictures(profile, canary, tmp_path):
    def read(case) -> None:
        data, suffix = case
        path = tmp_path / f"picture{suffix}"
        path.write_bytes(data)
        image = attempt(lambda: reading.read_image({"file_name": str(path)}, "BGR"))
        if image is not None:
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.size
        attempt(lambda: reading.read_image({"file_name": str(path), "height": 20}, "L"))
        size = attempt(lambda: reading.read_size(str(path)))
        assert image is None or size is not None
        report = Report("one")
        attempt(lambda: check_images(report, [ImageFile(str(path), (20, 30))], workers=1))
        report.text().encode()
        path.unlink()

    cases = st.tuples(_files(canary), st.sampled_from(SUFFIXES))
    fuzz(
        profile, cases, read, name="pictures", canary=canary, quick=150, factor=60,
    )  # fmt: skip


def test_label_maps(profile, canary, tmp_path):
    path = tmp_path / "map.png"
    image = np.zeros((20, 30, 3), np.uint8)

    def read(case) -> None:
        data, ignore = case
        path.write_bytes(data)
        labels = attempt(lambda: reading.read_label_map(str(path)))
        if labels is not None:
            assert labels.ndim == 2
            assert labels.dtype.kind in "iu"
        record = {"sem_seg_file_name": str(path), "sem_seg_classes": 7}
        record["sem_seg_ignore_label"] = ignore
        attempt(lambda: reading.read_sem_seg(record, image, 255))
        del record["sem_seg_classes"]
        found = attempt(lambda: reading.read_sem_seg(record, image, 255))
        assert found is None or found.shape == (20, 30)

    cases = st.tuples(_files(canary), st.sampled_from([255, 0, -1, 65535, 2**31 - 1]))
    fuzz(
        profile, cases, read, name="label maps", canary=canary, quick=80
    )  # fmt: skip


@pytest.mark.parametrize("side", [50_000, 13_000])
def test_a_picture_that_lies_about_its_size_takes_no_memory(tmp_path, side):
    """A header of 33 bytes asks for gigabytes; what is there is not even a row."""
    path = tmp_path / "bomb.png"
    path.write_bytes(_png(side, side, data=b"x"))

    def read(_) -> None:
        assert attempt(lambda: reading.read_image({"file_name": str(path)}, "BGR")) is None
        assert attempt(lambda: reading.read_label_map(str(path))) is None

    fuzz("quick", st.integers(0, 10**6), read, name=f"PNG of {side} x {side}", quick=10)


def test_videos(profile, canary, tmp_path):
    cv2 = pytest.importorskip("cv2")
    good = tmp_path / "good.avi"
    writer = cv2.VideoWriter(str(good), cv2.VideoWriter_fourcc(*"MJPG"), 5, (32, 24))
    for shade in (0, 100, 200):
        writer.write(np.full((24, 32, 3), shade, np.uint8))
    writer.release()
    path = tmp_path / "clip.avi"

    def read(data) -> None:
        path.write_bytes(data)

        def run() -> None:
            for index, frame in enumerate(frames(open_video(path))):
                assert frame.dtype == np.uint8
                if index > 20:
                    break

        attempt(run)

    files = damaged_bytes([good.read_bytes()], tokens=[b"RIFF", b"movi", b"idx1", b"00dc"])
    fuzz(profile, files | st.binary(max_size=100), read, name="videos", quick=25, factor=40)
