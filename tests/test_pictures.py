"""The one way to open a picture: what a viewer shows, as 8-bit RGB; what cannot be used is one line with its name."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pmod_cli.pictures import _EAR, PictureError, as_rgb, examine_image, notes_of, open_image


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def two_halves(mode="RGB"):
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    return image.convert(mode)


@pytest.mark.parametrize(
    ("orientation", "size", "corner"),
    [(1, (20, 10), 0), (3, (20, 10), 2), (6, (10, 20), 0), (8, (10, 20), 2)],
)
def test_exif_orientation(orientation, size, corner):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = open_image(saved(two_halves(), "JPEG", exif=exif, quality=95))
    assert picture.size == size
    pixel = picture.getpixel((1, 1))
    assert max(range(3), key=lambda band: pixel[band]) == corner
    assert ("turned by its EXIF orientation" in notes_of(picture)) == (orientation != 1)


def test_greyscale_of_more_than_8_bits():
    ramp = np.linspace(0, 65535, 256).reshape(16, 16)
    picture = open_image(saved(Image.fromarray(ramp.astype(np.uint16))))
    values = np.asarray(picture)[..., 0]
    assert values.min() == 0
    assert values.max() == 255
    assert len(np.unique(values)) > 200
    unit = as_rgb(Image.fromarray((ramp / 65535).astype(np.float32)))
    assert np.abs(np.asarray(unit)[..., 0].astype(int) - values).max() <= 1
    assert notes_of(unit) == ["float greyscale scaled"]


def test_what_is_transparent_lies_on_white():
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (2, 2, 6, 6))
    picture = open_image(saved(image))
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((3, 3)) == (0, 0, 0)
    palette = two_halves("P")
    picture = open_image(saved(palette, transparency=palette.getpixel((0, 0))))
    assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_palette_cmyk_and_animation():
    for mode, kind in (("P", "GIF"), ("CMYK", "JPEG"), ("L", "PNG"), ("1", "PNG")):
        assert open_image(saved(two_halves(mode), kind)).mode == "RGB"
    frames = [two_halves(), Image.new("RGB", (20, 10), "white")]
    picture = open_image(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert picture.getpixel((1, 1))[0] > 200
    assert any("animation" in note for note in notes_of(picture))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"no picture", "not an image that Pillow can read"),
        (saved(two_halves())[:60], "truncated|broken|cut|not an image"),
        (saved(Image.new("RGB", (1, 1500))), "1 x 1500: one side is more than 100 times the other"),
        (saved(Image.new("1", (13000, 13000))), "13000 x 13000 are more than 110,000,000 pixels"),
    ],
)
def test_what_cannot_be_used(content, reason):
    with pytest.raises(PictureError, match=reason) as error:
        open_image(content, "folder/photo.png")
    assert "folder/photo.png" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_huge_text_chunks_are_one_line():
    text = PngImagePlugin.PngInfo()
    for number in range(70):
        text.add_text(f"k{number}", "x" * 2**20, zip=True)
    with pytest.raises(PictureError, match="photo"):
        open_image(saved(two_halves(), pnginfo=text), "photo")


def test_an_address_is_named_as_such():
    with pytest.raises(PictureError, match="a URL"):
        open_image("https://example.org/a.png")


def _scene(size=(90, 61)):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def _jpegs():
    scene = _scene()
    turned = Image.Exif()
    turned[0x0112] = 6
    yield "baseline", saved(scene, "JPEG")
    yield "progressive", saved(scene, "JPEG", progressive=True)
    yield "grey", saved(scene.convert("L"), "JPEG")
    yield "CMYK", saved(scene.convert("CMYK"), "JPEG")
    yield "restart markers", saved(scene, "JPEG", restart_marker_blocks=3)
    yield "turned", saved(scene, "JPEG", exif=turned)
    yield "tiny", saved(scene.resize((5, 3)), "JPEG")
    yield "one colour", saved(Image.new("RGB", (90, 61), "red"), "JPEG")
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # a single grey at an eighth of the size
    yield "stripes", saved(Image.fromarray(stripes), "JPEG", quality=100)


@pytest.mark.parametrize(
    ("kind", "content"), list(_jpegs()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_quick_look_finds_what_opening_does(kind, content):
    """At an eighth of the size, files that are cut short, or broken in the middle, are found as well."""
    rng = np.random.default_rng(1)
    cuts = [*range(len(content) - 12, len(content) + 1), *rng.integers(20, len(content), 40).tolist()]
    broken = []
    for place in rng.integers(20, len(content), 40).tolist():
        broken.append(content[:place] + rng.bytes(6) + content[place + 6 :])
    refused = 0
    for part in [*(content[:cut] for cut in cuts), *broken]:
        found = []
        for look in (open_image, examine_image):
            try:
                picture = look(part, "x.jpg")
                notes = picture.notes if look is examine_image else notes_of(picture)
                found.append((picture.width, picture.height, *notes))
            except PictureError as error:
                found.append(str(error).split("(")[0])  # how many bytes are left may differ
        assert found[0] == found[1]
        refused += isinstance(found[0], str)
    assert refused >= 40


def test_threads_hear_their_own_warnings():
    from concurrent.futures import ThreadPoolExecutor

    filters = list(warnings.filters)
    odd = PngImagePlugin.PngInfo()
    palette = Image.new("P", (30, 30))
    palette.info["transparency"] = bytes([0, 120])
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((3, 3), 1)
    loud, quiet = saved(palette, "PNG", pnginfo=odd), saved(two_halves())

    def say(source):
        with _EAR.listening() as heard:
            if source is loud:
                warnings.warn("loud", stacklevel=1)
            picture = open_image(source, "x")
            return [str(each.message) for each in heard], notes_of(picture)

    expected = {id(source): say(source) for source in (loud, quiet)}
    assert expected[id(loud)][0] == ["loud"]
    assert expected[id(quiet)] == ([], [])
    with ThreadPoolExecutor(4) as pool:
        for source, found in zip([loud, quiet] * 50, pool.map(say, [loud, quiet] * 50), strict=True):
            assert found == expected[id(source)]
    assert warnings.filters == filters
