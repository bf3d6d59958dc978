"""Pixels, grids, metadata, names."""

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nanodiff.config import UserError
from nanodiff.output import images

RECORD = {"prompt": "a cat", "negative_prompt": None, "steps": 5, "scheduler": "ddim", "guidance_scale": 7.5, "seed": 3,
          "width": 8, "height": 8, "model": "m"}  # fmt: skip


def test_pixels_round_trip_exactly():
    array = np.arange(3 * 16 * 16).reshape(16, 16, 3).astype(np.uint8)
    pixels = images.to_pixels(Image.fromarray(array))[None]
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert np.array_equal(np.asarray(images.to_pil(pixels)[0]), array)


def test_rounding_and_clamping():
    values = torch.tensor([-5.0, -1.0, -0.997, 0.0, 0.5, 1.0, 9.0]).view(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert images.to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 0, 128, 191, 255, 255]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60))
def test_metadata_survives_any_text(tmp_path, text):
    """Also a prompt that imitates the other chunk's lines: ours is JSON of its own."""
    record = RECORD | {"prompt": text + "\nNegative prompt: x\nSteps: 1, Seed: 9, Size: 1x1"}
    images.save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", record)
    assert images.read_record(tmp_path / "a.png") == record


def test_a1111_parameters(tmp_path):
    images.save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", RECORD | {"negative_prompt": "dog", "model": "a, b"})
    text = Image.open(tmp_path / "a.png").text["parameters"]
    assert text.splitlines() == [
        "a cat",
        "Negative prompt: dog",
        'Steps: 5, Sampler: DDIM, Schedule type: Uniform, CFG scale: 7.5, Seed: 3, Size: 8x8, Model: "a, b", RNG: CPU',
    ]


@pytest.mark.parametrize("kind", ["none", "broken", "deep", "list", "not png"])
def test_reading_foreign_metadata(tmp_path, kind):
    from PIL.PngImagePlugin import PngInfo

    info, path = PngInfo(), tmp_path / "a.png"
    if kind == "not png":
        path.write_bytes(b"hello")
    else:
        if kind != "none":
            info.add_text(images.CHUNK, {"broken": "{", "deep": "[" * 90_000, "list": "[1]"}[kind])
        Image.new("RGB", (2, 2)).save(path, pnginfo=info)
    with pytest.raises(UserError, match=str(path)):
        images.read_record(path)


@pytest.mark.parametrize(
    ("mode", "value"),
    [("L", 200), ("P", 3), ("RGBA", (255, 0, 0, 0)), ("CMYK", (0, 0, 0, 0)), ("1", 1), ("I;16", 65535), ("LA", (9, 0))],
)
def test_every_mode_becomes_rgb(tmp_path, mode, value):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new(mode, (5, 4), value).save(tmp_path / f"a.{suffix}")
    image = images.open_image(tmp_path / f"a.{suffix}")
    assert image.mode == "RGB" and image.size == (5, 4)
    if mode in ("RGBA", "LA", "CMYK", "I;16", "1"):
        assert image.getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert images.open_image(tmp_path / "a.jpg").size == (4, 6)


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"0" * 50])
def test_unreadable(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(UserError, match="not a readable image"):
        images.open_image(tmp_path / "a.png")


def test_truncated_jpeg(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="truncated"):
        images.open_image(tmp_path / "a.jpg")


def test_decompression_bomb(tmp_path):
    Image.new("1", (10_000, 9_000)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="too many"):
        images.open_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a cat, on/a mat", "a_cat_on_a_mat"),
        ("../../x", "x"),
        ("😀" * 500, "empty"),
        ("-rf", "rf"),
        ("", "empty"),
        ("\0", "empty"),
        ("x" * 300, "x" * 80),
    ],
)
def test_slug(text, want):
    assert images.slug(text) == want


def test_grid_shape_and_labels():
    sheet = images.grid([Image.new("RGB", (10, 6), "red")] * 5, nrow=3, labels=["a\x1b"] * 5)
    assert sheet.size == (3 * 14 + 4, 2 * (6 + 14 + 4) + 4)
    assert json.dumps(sheet.getpixel((5, 19))) == "[255, 0, 0]"


@pytest.mark.parametrize(("name", "kind"), [("a.jpg", "JPEG"), ("a.webp", "WEBP"), ("a.png", "PNG"), ("a", "PNG"), ("a.xyz", "PNG")])  # fmt: skip
def test_a_sheet_is_of_the_kind_its_name_says(tmp_path, name, kind):
    images.save_named(Image.new("RGB", (8, 8), "red"), tmp_path / name)
    assert Image.open(tmp_path / name).format == kind


def test_a_sheet_that_its_format_cannot_hold_is_a_png(tmp_path, capsys):
    long = Image.new("RGB", (1, 16384))
    images.save_named(long, tmp_path / "sheet.webp")
    assert Image.open(tmp_path / "sheet.webp").format == "PNG"
    assert "1x16384 pixels are more than WEBP can have (16383 a side)" in capsys.readouterr().err
    images.save_named(long.crop((0, 0, 1, 16383)), tmp_path / "sheet.webp")
    assert Image.open(tmp_path / "sheet.webp").format == "WEBP"


def test_the_suffix_is_of_what_the_bytes_are():
    for kind, suffix in (
        ("JPEG", ".jpg"),
        ("PNG", ".png"),
        ("GIF", ".gif"),
        ("TIFF", ".tif"),
        ("PPM", ".ppm"),
        ("WEBP", ".webp"),
        ("MPO", ".jpg"),
    ):
        data, more = (
            io.BytesIO(),
            {"save_all": True, "append_images": [Image.new("RGB", (4, 4))]} if kind == "MPO" else {},
        )
        Image.new("RGB", (4, 4)).save(data, kind, **more)
        assert images.suffix_of(data.getvalue()) == suffix, kind
    assert [images.bare(n) for n in ("a.JPG", "dish_0.5", "b/c.v2.png", "x")] == ["a", "dish_0.5", "b/c.v2", "x"]
