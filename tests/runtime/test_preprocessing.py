"""Decoding, resizing and cropping against Pillow's and torchvision's own."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional

from deployopt.errors import ArtifactError, UsageError
from deployopt.runtime.preprocessing import Preprocessing, apply, decode, to_feed, with_channels

PIXELS = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)


@settings(deadline=None)
@given(st.integers(8, 80), st.integers(8, 80), st.integers(8, 40), st.integers(0, 20), st.booleans())
def test_resize_and_crop_are_torchvisions(height: int, width: int, size: int, margin: int, grey: bool) -> None:
    image = np.random.default_rng(height * 100 + width).integers(0, 256, (height, width, 1 if grey else 3), np.uint8)
    picture = Image.fromarray(image[..., 0] if grey else image)
    resized = functional.resize(picture, [size + margin], antialias=True)
    expected = np.asarray(functional.center_crop(resized, [size, size])).reshape(size, size, -1)
    found = apply(image, Preprocessing(size, 1 if grey else 3, size + margin))
    np.testing.assert_array_equal(found, expected)


def test_without_resize_the_aspect_is_given_up() -> None:
    expected = np.asarray(functional.resize(Image.fromarray(PIXELS), [16, 16], antialias=True))
    np.testing.assert_array_equal(apply(PIXELS, Preprocessing(16)), expected)


def test_an_image_of_the_right_size_is_left_alone() -> None:
    np.testing.assert_array_equal(apply(PIXELS[:16, :16], Preprocessing(16)), PIXELS[:16, :16])


def test_a_crop_larger_than_the_resized_image_is_refused() -> None:
    with pytest.raises(UsageError, match="resize 8 is smaller than image_size 16"):
        apply(PIXELS, Preprocessing(16, 3, 8))


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def test_a_file_and_its_bytes_decode_alike(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(PIXELS)))
    np.testing.assert_array_equal(decode(tmp_path / "a.png"), PIXELS)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(PIXELS))), PIXELS)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_colour_mode_becomes_rgb_or_grey(mode: str) -> None:
    picture = Image.fromarray(PIXELS).convert("L").convert("I").convert("I;16") if mode == "I;16" else Image.fromarray(PIXELS).convert(mode)
    data = encoded(picture, "TIFF" if mode == "CMYK" else "PNG")
    assert decode(data).shape == (37, 53, 3)
    assert decode(data, channels=1).shape == (37, 53, 1)


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    np.testing.assert_allclose(decode(encoded(Image.fromarray(levels)), channels=1)[..., 0], levels / 257, atol=1)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° clockwise to see it upright
    data = encoded(Image.fromarray(PIXELS), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data), np.rot90(PIXELS, -1))


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "cut.jpg").write_bytes(encoded(Image.fromarray(PIXELS), "JPEG")[:200])
    for name in ("text.jpg", "cut.jpg"):
        with pytest.raises(ArtifactError, match=rf"{name}: cannot be decoded as an image"):
            decode(tmp_path / name)
    with pytest.raises(ArtifactError, match=r"absent\.png: no such image"):
        decode(tmp_path / "absent.png")
    with pytest.raises(ArtifactError, match="the given bytes: cannot be decoded"):
        decode(b"hello")


def test_channels_convert_as_pillow_does() -> None:
    grey = np.asarray(Image.fromarray(PIXELS).convert("L"))[..., None]
    assert abs(with_channels(PIXELS, 1).astype(int) - grey).max() <= 1  # Pillow truncates a fixed-point sum
    np.testing.assert_array_equal(with_channels(grey, 3), np.repeat(grey, 3, -1))
    with pytest.raises(UsageError, match="images have 4 channels, wanted 3"):
        with_channels(np.zeros((2, 2, 4), np.uint8), 3)


def test_the_feed_is_planes_in_0_to_1() -> None:
    feed = to_feed(PIXELS[None])
    assert (feed.shape, feed.dtype) == ((1, 3, 37, 53), np.float32)
    assert feed.flags.c_contiguous
    np.testing.assert_allclose(feed[0, 1, 5, 7], PIXELS[5, 7, 1] / 255, rtol=1e-6)


def test_json_round_trip() -> None:
    preprocessing = Preprocessing(224, 3, 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing
    assert isinstance(preprocessing.to_json()["mean"], list)
