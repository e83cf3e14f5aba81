"""Every stored form of a picture becomes the same 8-bit RGB picture, or a refusal that names the example."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from hf_dpvision.data.images import read_image, to_rgb
from hf_dpvision.errors import DataRefused


def _stored(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


GREY = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16"])
def test_every_usual_mode_becomes_rgb_and_always_the_same(mode):
    image = Image.fromarray(GREY.astype(np.uint16) * 257) if mode == "I;16" else None
    image = image or Image.fromarray(COLOUR).convert("L" if mode == "I" else "RGB").convert(mode)
    first, second = to_rgb(image), to_rgb(image.copy())
    assert first.mode == "RGB" and first.size == (6, 4)
    assert np.array_equal(np.asarray(first), np.asarray(second))


def test_sixteen_bit_grey_keeps_its_upper_eight_bits():
    image = Image.open(io.BytesIO(_stored(Image.fromarray(GREY.astype(np.uint16) * 257))))
    assert image.mode.startswith("I")
    assert np.array_equal(np.asarray(to_rgb(image))[..., 0], GREY)


def test_transparent_pixels_lie_over_white():
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    solid = Image.new("RGBA", (2, 2), (10, 20, 30, 255))
    assert np.asarray(to_rgb(clear)).tolist() == np.full((2, 2, 3), 255).tolist()
    assert np.asarray(to_rgb(solid))[0, 0].tolist() == [10, 20, 30]


def test_palette_with_transparency_lies_over_white():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30] + [0] * 765)
    stored = Image.open(io.BytesIO(_stored(image, transparency=0)))
    assert np.asarray(to_rgb(stored))[0, 0].tolist() == [255, 255, 255]


def test_a_mode_without_a_fixed_range_is_refused_by_name():
    with pytest.raises(DataRefused, match="mode 'F'"):
        to_rgb(Image.fromarray(GREY.astype(np.float32)))


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    upright = read_image(_stored(Image.fromarray(COLOUR), "JPEG", exif=exif), 0)
    assert upright.size == (4, 6)


def test_bytes_path_struct_picture_and_pixels_agree(tmp_path):
    stored = _stored(Image.fromarray(COLOUR))
    path = tmp_path / "picture.png"
    path.write_bytes(stored)
    forms = [
        stored,
        str(path),
        {"bytes": stored, "path": None},
        {"bytes": None, "path": str(path)},
        Image.fromarray(COLOUR),
        COLOUR,
        COLOUR.tolist(),
        COLOUR.transpose(2, 0, 1),
    ]
    for form in forms:
        assert np.array_equal(np.asarray(read_image(form, 0)), COLOUR)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("L", (3, 3), value) for value in (0, 255)]
    stored = _stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(read_image(stored, 0)).max() == 0


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"not an image",
        _stored(Image.fromarray(COLOUR))[:60],
        {"bytes": None, "path": None},
        "no/such/file.png",
        np.array([[0.5, 0.2]]),
        np.array([[np.nan]]),
        np.array([[-1, 300]]),
        np.zeros((2, 3, 4, 5), dtype=np.uint8),
        np.zeros((0, 0), dtype=np.uint8),
    ],
)
def test_an_unreadable_image_is_named_by_its_index(value):
    with pytest.raises(DataRefused, match="example 17 of part 'train'"):
        read_image(value, 17)
