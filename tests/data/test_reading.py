"""Every kind of picture is read as it looks, or refused by name."""

from __future__ import annotations

import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

from d2dense.data.reading import SampleError, be_strict, read_image, read_label_map, read_size


def smooth(channels: int = 3) -> np.ndarray:
    """A smooth picture (40, 56, C), which JPEG keeps within a few grey levels."""
    y, x = np.mgrid[:40, :56]
    planes = [4 * x + y, 220 - 3 * x - y, 5 * y + 20, 255 - 2 * y - x][:channels]
    return np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8)


def read(path, image_format="RGB") -> np.ndarray:
    return read_image({"file_name": str(path)}, image_format)


def assert_reads(path, expected: np.ndarray, tolerance: float = 0) -> None:
    """Compare (H, W, 3) RGB in every channel order, and the grey of ITU-R 601."""
    expected = np.asarray(expected, np.float64)
    for image_format, wanted in (
        ("RGB", expected),
        ("BGR", expected[:, :, ::-1]),
        ("L", (expected @ [0.299, 0.587, 0.114])[..., None]),
    ):
        found = read(path, image_format)
        assert found.dtype == np.uint8
        np.testing.assert_allclose(found, wanted, atol=tolerance + (image_format == "L"))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "gif", "jpg", "ppm"])
def test_containers(tmp_path, suffix):
    pixels = smooth()
    options = {"webp": {"lossless": True}, "jpg": {"quality": 98, "subsampling": 0}}
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **options.get(suffix, {}))
    tolerance = {"gif": 24, "jpg": 6}.get(suffix, 0)
    if suffix == "gif":  # 256 colours
        assert np.abs(read(tmp_path / "a.gif").astype(int) - pixels).mean() < tolerance
    else:
        assert_reads(tmp_path / f"a.{suffix}", pixels, tolerance)


def test_progressive_and_grey_jpegs(tmp_path):
    Image.fromarray(smooth()).save(tmp_path / "p.jpg", progressive=True, quality=98, subsampling=0)
    assert_reads(tmp_path / "p.jpg", smooth(), 6)
    grey = smooth()[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "g.jpg", quality=98)
    assert_reads(tmp_path / "g.jpg", np.repeat(grey[..., None], 3, axis=2), 3)


def test_cmyk_is_inverted_where_adobe_does(tmp_path):
    ink = smooth(4)
    ink[..., 3] //= 3
    white = 255 - ink.astype(np.float64)
    expected = white[..., :3] * white[..., 3:] / 255
    for name, options in (("a.tif", {}), ("a.jpg", {"quality": 98, "subsampling": 0})):
        Image.fromarray(ink, "CMYK").save(tmp_path / name, **options)
        assert_reads(tmp_path / name, expected, 2 if name == "a.tif" else 8)
    # an Adobe file holds 255 - ink; OpenCV reads it with code of its own
    theirs = cv2.imread(str(tmp_path / "a.jpg"))[:, :, ::-1].astype(int)
    assert np.abs(read(tmp_path / "a.jpg").astype(int) - theirs).mean() < 3


def test_palettes(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    index = smooth()[:, :, 0]
    picture = Image.fromarray(index, "P")
    picture.putpalette(colours.tobytes())
    picture.save(tmp_path / "plain.png")
    picture.save(tmp_path / "one.png", transparency=int(index[0, 0]))
    picture.save(tmp_path / "many.png", transparency=bytes(range(256)))
    for name in ("plain", "one", "many"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_reads(tmp_path / f"{name}.png", colours[index])


def test_alpha_is_dropped(tmp_path):
    pixels, alpha = smooth(), smooth()[:, :, 2:]
    Image.fromarray(np.dstack([pixels, alpha])).save(tmp_path / "rgba.png")
    assert_reads(tmp_path / "rgba.png", pixels)
    Image.fromarray(np.dstack([pixels[:, :, :1], alpha]), "LA").save(tmp_path / "la.png")
    assert_reads(tmp_path / "la.png", np.repeat(pixels[:, :, :1], 3, axis=2))
    Image.fromarray(pixels).save(tmp_path / "rgb.png", transparency=tuple(pixels[0, 0].tolist()))
    assert_reads(tmp_path / "rgb.png", pixels)


def test_one_bit(tmp_path):
    bits = smooth()[:, :, 0] > 99
    for suffix in ("png", "tif", "bmp"):
        Image.fromarray(bits).save(tmp_path / f"a.{suffix}")
        assert_reads(tmp_path / f"a.{suffix}", np.repeat(bits[..., None] * 255.0, 3, axis=2))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_with_and_without_alpha(tmp_path, suffix):
    deep = smooth(4).astype(np.uint16) * 257 + 30
    path = str(tmp_path / f"a.{suffix}")
    for pixels in (deep[..., 0], deep[..., :3], deep):
        expected = pixels.reshape(40, 56, -1)[..., :3] / 257
        assert cv2.imwrite(path, pixels)
        found = read(path, "BGR")
        np.testing.assert_allclose(found, np.broadcast_to(expected, (40, 56, 3)), atol=1)


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif", "png"])
def test_of_several_frames_the_first_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(
        tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=50, **options
    )
    assert_reads(tmp_path / f"a.{suffix}", np.full((10, 20, 3), [255, 0, 0]), 1)


# what a viewer does to the stored pixels, by EXIF's definition of row 0 and column 0
TURNS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", TURNS)
def test_orientations(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"webp": {"lossless": True}, "jpg": {"quality": 98, "subsampling": 0}}
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(smooth()).save(path, exif=exif, **options.get(suffix, {}))
    expected = TURNS[orientation](smooth())
    assert_reads(path, expected, 6 if suffix == "jpg" else 0)
    height, width = expected.shape[:2]
    read_image({"file_name": str(path), "height": height, "width": width}, "BGR")
    if orientation >= 5 and suffix != "tif":
        with pytest.raises(SampleError, match="before its EXIF orientation"):
            read_image({"file_name": str(path), "height": width, "width": height}, "BGR")


def test_damaged_exif_is_no_reason_to_fail_or_to_warn(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(smooth()).save(
        path, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", quality=98
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        be_strict()
        assert read(path).shape == (40, 56, 3)
    assert not caught


def test_no_truncation_of_a_jpeg_goes_unnoticed(tmp_path):
    """Whatever is cut off, the file is refused or every pixel is there."""
    Image.fromarray(smooth()).save(tmp_path / "whole.jpg")
    content, whole = (tmp_path / "whole.jpg").read_bytes(), read(tmp_path / "whole.jpg")
    path = tmp_path / "cut.jpg"
    refused = 0
    for length in range(len(content)):
        path.write_bytes(content[:length])
        try:
            np.testing.assert_array_equal(read(path), whole)
        except SampleError:
            refused += 1
    assert refused > len(content) - 20


def test_random_damage_is_a_sample_error_or_a_picture(tmp_path):
    rng = np.random.default_rng(0)
    for suffix in ("jpg", "png", "tif", "gif", "webp", "bmp"):
        Image.fromarray(smooth()).save(tmp_path / f"a.{suffix}")
        content = np.frombuffer((tmp_path / f"a.{suffix}").read_bytes(), np.uint8)
        path = tmp_path / f"bad.{suffix}"
        for _ in range(60):
            damaged = content.copy()
            places = rng.integers(0, min(len(content), 400), rng.integers(1, 8))
            damaged[places] = rng.integers(0, 256, len(places))
            path.write_bytes(damaged.tobytes())
            for function in (read, lambda path: read_label_map(str(path))):
                assert outcome(function, path) in (np.ndarray, path.name)


def outcome(function, path):
    """Return the type of the result, or the file that the error names."""
    try:
        return type(function(path))
    except SampleError as error:
        return path.name if path.name in str(error) else str(error)


def test_postscript_is_not_run_whatever_its_name(tmp_path):
    """It is a program; PIL would hand it to Ghostscript."""
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    for function in (read, read_label_map, read_size):
        with pytest.raises(SampleError, match="not a picture"):
            function(str(path))


def test_large_pictures_are_read_without_a_warning(tmp_path, monkeypatch):
    Image.fromarray(smooth()).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 56 - 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(tmp_path / "a.png")
        read_size(str(tmp_path / "a.png"))
    assert not caught
