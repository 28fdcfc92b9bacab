"""Every odd kind of image comes out upright, RGB, 8 bits, or is refused with a reason."""

import io
import os
import random
import struct
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from onceover.extract import formats, pictures
from onceover.extract.formats import FORMATS, MissingDecoder, why_no_decoder
from onceover.extract.pictures import VIEWS, PictureError, crop, decode, inset, needed, read_picture, thumbnail


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(mode="RGB", size=(40, 30)) -> Image.Image:
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0]).astype(np.uint8)
    return Image.merge("RGB", [Image.fromarray(channel) for channel in (ramp, ramp[::-1], ramp[:, ::-1])]).convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("1", "PNG"),
        ("LA", "PNG"),
        ("RGB", "WEBP"),
    ],
)
def test_every_mode_becomes_rgb(mode, kind):
    picture = decode(encode(photo(mode), kind))
    assert (picture.mode, picture.size) == ("RGB", (40, 30))


def test_cmyk_keeps_its_colours():
    difference = np.asarray(decode(encode(photo("CMYK"), "JPEG", quality=95)), float) - np.asarray(photo(), float)
    assert np.abs(difference).mean() < 6


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode):
    image = Image.new(mode, (8, 8), (0,) * len(mode))
    assert np.asarray(decode(encode(image, "PNG"))).min() == 255


def test_a_transparent_palette_is_laid_on_white():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30])
    assert np.asarray(decode(encode(image, "PNG", transparency=0))).min() == 255


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    values = np.asarray(decode(encode(Image.fromarray(ramp), kind)))[..., 0].ravel()
    np.testing.assert_allclose(values, np.linspace(0, 255, 256), atol=1.5)


def test_exif_rotation_is_applied():
    image = photo()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown rotated by a quarter
    picture = decode(encode(image, "JPEG", exif=exif, quality=95))
    assert picture.size == (30, 40)
    turned = image.transpose(Image.Transpose.ROTATE_270)
    assert np.abs(np.asarray(picture, float) - np.asarray(turned, float)).mean() < 6


def test_one_pixel_and_the_first_frame_of_an_animation():
    assert decode(encode(Image.new("RGB", (1, 1), "red"), "PNG")).getpixel((0, 0)) == (255, 0, 0)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("blue", "red")]
    assert decode(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (0, 0, 255)


def test_a_very_long_picture_is_cut_about_its_centre_so_that_resizing_cannot_fill_the_memory():
    image = Image.new("RGB", (5000, 2), "black")
    image.paste("white", (2400, 0, 2600, 2))
    picture = decode(encode(image, "PNG"))
    assert picture.size == (32, 2)
    assert np.asarray(picture).min() == 255


def test_a_very_large_picture_is_decoded_and_a_bomb_is_refused(monkeypatch):
    assert decode(encode(Image.new("L", (6000, 5000)), "PNG")).size == (6000, 5000)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    with pytest.raises(PictureError, match=r"40 x 30 pixels; at most 1,000 are decoded"):
        decode(encode(photo(), "PNG"))


def test_a_bomb_by_its_header_alone_is_refused():
    data = bytearray(encode(Image.new("L", (8, 8)), "PNG"))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    with pytest.raises(PictureError, match="more than 178,956,970 pixels; that many are not decoded"):
        decode(bytes(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello, I am a text file\n", "not an image in a known format"),
        (encode(photo(size=(400, 300)), "JPEG")[:2000], "damaged image"),
        (encode(photo(size=(400, 300)), "PNG")[:300], "damaged image"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 40, "not an image in a known format|damaged image"),
    ],
    ids=["zero bytes", "a text", "a truncated JPEG", "a truncated PNG", "a header alone"],
)
def test_what_is_no_picture_has_a_reason(data, reason):
    with pytest.raises(PictureError, match=reason) as error:
        decode(data)
    assert "\n" not in str(error.value)


def test_a_path_is_named_in_the_error(tmp_path):
    (tmp_path / "a.jpg").write_text("no")
    with pytest.raises(PictureError, match=r"a\.jpg is no usable image: not an image"):
        read_picture(tmp_path / "a.jpg")
    with pytest.raises(PictureError, match="cannot be read: No such file"):
        read_picture(tmp_path / "b.jpg")
    with pytest.raises(PictureError) as error:
        read_picture(tmp_path)
    assert str(error.value) == f"{tmp_path} is a folder; a regular file is needed; name an image file"


def test_views_are_the_whole_picture_its_corners_and_their_mirror_images():
    assert pictures.VIEWS[:4] == ((None, False), (None, True), ("whole", False), ("whole", True))
    assert len(set(pictures.VIEWS)) == 12
    image = photo(size=(80, 40))
    assert crop(image, None) is image
    boxes = {corner: crop(image, corner) for corner, _ in pictures.VIEWS[4:8]}
    assert {box.size for box in boxes.values()} == {(70, 35)}
    assert boxes[1.0, 1.0].getpixel((69, 34)) == image.getpixel((79, 39))
    assert boxes[0.0, 0.0].getpixel((0, 0)) == image.getpixel((0, 0))


def test_thumbnails_are_small_jpegs():
    small = Image.open(io.BytesIO(thumbnail(photo(size=(640, 320)))))
    assert (small.format, small.size) == ("JPEG", (160, 80))


@pytest.mark.parametrize(("size", "expected"), [((2000, 1500), (1000, 750)), ((4000, 3000), (1000, 750)),
                                                ((900, 700), (900, 700)), ((1500, 2000), (750, 1000))])  # fmt: skip
def test_a_large_jpeg_is_decoded_at_a_fraction_that_leaves_twice_what_is_needed(size, expected):
    data = encode(photo().resize(size), "JPEG", quality=95)
    assert decode(data, 256).size == expected
    assert decode(data).size == size


def test_a_fraction_shows_the_same_picture_and_only_jpegs_have_one():
    whole = photo().resize((2000, 1500), Image.Resampling.BICUBIC)
    data = encode(whole, "JPEG", quality=95)
    small = [
        np.asarray(decode(data, side).resize((256, 192), Image.Resampling.BILINEAR), float) for side in (None, 256)
    ]
    assert np.abs(small[0] - small[1]).mean() < 1
    assert decode(encode(whole, "PNG"), 16).size == (2000, 1500)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert decode(encode(whole, "JPEG", exif=turned), 256).size == (750, 1000)
    assert decode(encode(whole.convert("CMYK"), "JPEG"), 256).mode == "RGB"


def test_views_that_are_cropped_need_more_pixels():
    assert needed(224, VIEWS[:4]) == 224
    assert needed(224, VIEWS[:5]) == 256


def test_an_inset_picture_is_whole_again_once_its_canvas_is_cropped():
    image = Image.effect_noise((300, 200), 80).convert("RGB")
    canvas = inset(image, 256, 224)
    assert canvas.size == (256, 256)
    middle = np.asarray(canvas.crop((16, 16, 240, 240)))
    np.testing.assert_array_equal(middle, np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)))


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    return png[:33] + chunk(kind, data) + png[33:]


RAMP = np.linspace(0, 1, 256).reshape(16, 16)


def tiff(values: np.ndarray, tags: dict[int, int] | None = None, order: str = "<") -> bytes:
    """An uncompressed TIFF of numbers (H, W, C), whose kind of number is theirs."""
    height, width, channels = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    known = {256: width, 257: height, 259: 1, 262: 2 if channels > 2 else 1, 277: channels, 278: height}
    known |= {258: 8 * values.dtype.itemsize, 279: len(data), 339: kind} | (tags or {})
    behind = 8 + 2 + 12 * (len(known) + 1) + 4
    known[273] = behind + 6 * 2
    entries = b""
    for tag in sorted(known):
        number = struct.pack(f"{order}HHII", tag, 4, 1, known[tag])
        if tag in (258, 339) and channels > 2:
            number = struct.pack(f"{order}HHII", tag, 3, channels, behind + 6 * (tag == 339))
        elif tag in (258, 339):
            number = struct.pack(f"{order}HHIHH", tag, 3, channels, *[known[tag]] * channels, *[0] * (2 - channels))
        entries += number
    lists = struct.pack(f"{order}3H3H", *[known[258]] * 3, *[kind] * 3)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(known))
    return head + entries + bytes(4) + lists + data


def png16(values: np.ndarray, *chunks: bytes) -> bytes:
    """A PNG of 16-bit numbers (H, W, C)."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    rest = [*chunks, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(rest)


def levels(data: bytes) -> np.ndarray:
    """The grey levels of an image of 256 pixels."""
    pixels = np.asarray(decode(data)).reshape(256, 3)
    assert (pixels == pixels[:, :1]).all()
    return pixels[:, 0].astype(int)


WIDE = {
    "8 bits in 16": tiff((RAMP * 255).astype(np.uint16)[..., None]),
    "10 bits in 16": tiff((RAMP * 1023).astype(np.uint16)[..., None]),
    "12 bits in 16": tiff((RAMP * 4095).astype(np.uint16)[..., None]),
    "12 bits in 16, big-endian": tiff((RAMP * 4095).astype(np.uint16)[..., None], order=">"),
    "12 bits in a PNG": png16((RAMP * 4095).astype(np.uint16)[..., None]),
    "14 bits in 16": tiff((RAMP * 16383).astype(np.uint16)[..., None]),
    "16 bits": tiff((RAMP * 65535).astype(np.uint16)[..., None]),
    "16 bits, big-endian": tiff((RAMP * 65535).astype(np.uint16)[..., None], order=">"),
    "16 bits where 0 is white": tiff((RAMP[::-1, ::-1] * 65535).astype(np.uint16)[..., None], {262: 0}),
    "signed 16 bits": tiff((RAMP * 4095 - 1024).astype(np.int16)[..., None]),
    "32 bits": tiff((RAMP * (2**31 - 1)).astype(np.int32)[..., None]),
    "unsigned 32 bits": tiff((RAMP * (2**32 - 1)).astype(np.uint32)[..., None]),
    "floats to 1": tiff(RAMP.astype(np.float32)[..., None]),
    "floats to 1, big-endian": tiff(RAMP.astype(np.float32)[..., None], order=">"),
    "floats that overshoot 1": tiff((RAMP * 1.02).astype(np.float32)[..., None]),
    "floats of light": tiff((RAMP * 3.7).astype(np.float32)[..., None]),
    "floats to 255": tiff((RAMP * 255).astype(np.float32)[..., None]),
    "floats that overshoot 255": tiff((RAMP * 256.5).astype(np.float32)[..., None]),
    "floats to 65,535": tiff((RAMP * 65535).astype(np.float32)[..., None]),
    "floats from -1 to 1": tiff((RAMP * 2 - 1).astype(np.float32)[..., None]),
    "huge floats": tiff(((RAMP - 0.5) * 6e38).astype(np.float32)[..., None]),
    "PFM": b"Pf\n16 16\n-1.0\n" + RAMP[::-1].astype("<f4").tobytes(),
    "PGM of 12 bits": b"P5\n16 16\n4095\n" + (RAMP * 4095).astype(">u2").tobytes(),
    "PGM of 16 bits": b"P5\n16 16\n65535\n" + (RAMP * 65535).astype(">u2").tobytes(),
    "JPEG 2000": encode(Image.fromarray((RAMP * 65535).astype(np.uint16)), "JPEG2000", irreversible=False),
}


@pytest.mark.parametrize("data", WIDE.values(), ids=WIDE)
def test_values_of_more_than_8_bits_are_scaled_so_that_the_largest_depth_that_is_used_is_white(data):
    np.testing.assert_allclose(levels(data), np.arange(256), atol=1)


@pytest.mark.parametrize("largest", [255, 1023, 4095, 16383, 65535])
@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_16_bits_are_scaled_as_greys_are(channels, largest):
    values = np.repeat((RAMP * largest).astype(np.uint16)[..., None], channels, axis=2)
    values[..., 3:] = 65535
    for data in (png16(values), *(tiff(values[..., :3], order=order) for order in "<>")):
        np.testing.assert_allclose(levels(data), np.arange(256), atol=1)
    coloured = values * np.array([1, 0.5, 0, 1][:channels])
    picture = np.asarray(decode(png16(coloured.astype(np.uint16)))).reshape(256, 3)
    np.testing.assert_allclose(picture, np.arange(256)[:, None] * [1, 0.5, 0], atol=1.5)


def test_what_a_file_says_of_its_largest_value_counts():
    values = (RAMP * 1000).astype(np.uint16)[..., None]
    assert levels(tiff(values)).max() == 249  # of 10 bits
    assert levels(tiff(values, {281: 4095})).max() == 62
    assert levels(tiff(values, {281: 65535})).max() == 4
    assert levels(b"P5\n16 16\n65535\n" + values.astype(">u2").tobytes()).max() == 4


def test_turned_and_transparent_greys_of_16_bits():
    values = np.linspace(0, 65535, 200).reshape(10, 20, 1).astype(np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert decode(encode(Image.fromarray(values[..., 0]), "PNG", exif=turned)).size == (10, 20)
    clear = np.asarray(decode(png16(values, chunk(b"tRNS", b"\0\0"))))
    assert clear[0, 0].tolist() == [255, 255, 255]
    assert clear[0, 1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_have_a_reason(value):
    values = RAMP.astype(np.float32)[..., None].copy()
    values[3, 3] = value
    with pytest.raises(PictureError) as error:
        decode(tiff(values))
    assert str(error.value) == "it has pixels that are no finite numbers"


def test_premultiplied_transparency_is_laid_on_white_too():
    if (b"II", 1, (1,), 1, (8, 8), (1,)) not in TiffImagePlugin.OPEN_INFO:
        pytest.skip("this Pillow decodes no premultiplied grey")
    grey = np.stack([RAMP * 200, np.full((16, 16), 255)], axis=-1).astype(np.uint8)
    np.testing.assert_allclose(levels(tiff(grey, {338: 1})), np.linspace(0, 200, 256), atol=1)
    grey[..., 1] = 0
    assert set(levels(tiff(grey, {338: 1}))) == {255}


def test_a_known_kind_of_file_that_is_not_decoded_is_named():
    with pytest.raises(PictureError) as error:
        decode(tiff(RAMP[..., None]))
    assert str(error.value) == "damaged image, or a TIFF of a kind that Pillow does not decode"


def test_constant_images_stay_black_or_white():
    for value, level in ((0, 0), (65535, 255)):
        assert set(levels(tiff(np.full((16, 16, 1), value, np.uint16)))) == {level}
        assert set(levels(tiff(np.full((16, 16, 3), value, np.uint16)))) == {level}
    assert set(levels(tiff(np.full((16, 16, 1), -5, np.float32)))) == {0}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "TIFF"])
def test_broken_exif_costs_the_orientation_alone(kind):
    whole = encode(photo(), kind, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0")
    broken = whole.replace(b"II*\0\x08\0\0\0\0\0\0\0\0\0", b"no TIFF at all")
    if kind == "PNG":
        broken = with_chunk(encode(photo(), kind), b"eXIf", b"no TIFF at all")
    np.testing.assert_array_equal(np.asarray(decode(broken)), np.asarray(decode(encode(photo(), kind))))


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (b"zTXt", b"Comment\0\0" + zlib.compress(b" " * 2**21)),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b" " * 2**21)),
        (b"iCCP", b"profile\0\0" + zlib.compress(b" " * 2**21)),
        (b"iCCP", b"profile\0\7" + zlib.compress(b" ")),
        (b"tEXt", b"Comment\0" + b" " * (65 * 2**20)),
    ],
    ids=["text", "XMP", "profile", "unknown compression", "long"],
)
def test_trap_texts_and_profiles_of_a_png_never_cost_its_pixels(kind, data):
    plain = encode(photo(), "PNG")
    np.testing.assert_array_equal(np.asarray(decode(with_chunk(plain, kind, data))), np.asarray(photo()))
    with pytest.raises(PictureError, match="damaged image"):
        decode(with_chunk(plain, kind, data)[:-40])


@pytest.mark.parametrize("kind", [b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"acTL", b"tIME", b"\xff\0ab"], ids=repr)
def test_trap_no_broken_chunk_beside_the_pixels_of_a_png_costs_it(kind):
    for broken in (chunk(kind, b"1"), chunk(kind, b"1" * 9)[:-4] + b"none"):
        data = encode(photo(), "PNG")
        np.testing.assert_array_equal(np.asarray(decode(data[:33] + broken + data[33:])), np.asarray(photo()))


def test_a_png_that_is_mended_stays_upright():
    turned = Image.Exif()
    turned[0x0112] = 6
    data = with_chunk(encode(photo(), "PNG", exif=turned), b"gAMA", b"")
    assert decode(data).size == (30, 40)


@pytest.mark.parametrize(
    ("marker", "segment"),
    [(0xE0, b"JFIF"), (0xE0, b"JFIF\0\1"), (0xE2, b"ICC_PROFILE\0"), (0xEE, b"Adobe"), (0xEE, b"Adobe\0\x64")],
    ids=repr,
)
def test_trap_no_broken_segment_beside_the_pixels_of_a_jpeg_costs_it(marker, segment):
    turned = Image.Exif()
    turned[0x0112] = 6
    data = encode(photo(), "JPEG", exif=turned)
    broken = data[:2] + struct.pack(">BBH", 0xFF, marker, len(segment) + 2) + segment + data[2:]
    for end in (len(broken), -2):  # and without its end
        np.testing.assert_array_equal(np.asarray(decode(broken[:end])), np.asarray(decode(data)))


@pytest.mark.parametrize("tag", [270, 700, 34675])
def test_trap_no_broken_tag_beside_the_pixels_of_a_tiff_costs_it(tag):
    values = np.asarray(photo())
    data = tiff(values, {tag: 8, 274: 6})
    place = data.index(struct.pack("<HHI", tag, 4, 1)) + 2
    for broken in (struct.pack("<HII", 2, 2**31, 2**31), struct.pack("<HII", 12, 3, 8), struct.pack("<HII", 99, 1, 0)):
        picture = decode(data[:place] + broken + data[place + 10 :])
        np.testing.assert_array_equal(np.asarray(picture), np.rot90(values, -1))


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"subsampling": 0}], ids=str
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_trap_a_jpeg_without_its_end_is_taken_and_one_without_a_pixel_is_not(mode, options):
    image = Image.effect_noise((61, 45), 60).convert(mode)
    data = encode(image, "JPEG", **options)
    expected = np.asarray(decode(data))
    for cut in (1, 2):
        np.testing.assert_array_equal(np.asarray(decode(data[:-cut])), expected)
    for cut in (*range(4, 40), *range(40, len(data), 97)):
        with pytest.raises(PictureError, match=r"damaged image|not an image"):
            decode(data[:-cut])


def test_trap_a_progressive_jpeg_without_its_last_scan_is_refused():
    data = encode(Image.effect_noise((61, 45), 60), "JPEG", progressive=True)
    with pytest.raises(PictureError, match="damaged image: image file is truncated"):
        decode(data[: data.rindex(b"\xff\xda")])


def test_trap_no_format_starts_a_program(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    (tmp_path / "x.jpg").write_bytes(encode(photo(), "EPS"))
    with pytest.raises(PictureError) as error:
        read_picture(tmp_path / "x.jpg")
    assert str(error.value) == f"{tmp_path / 'x.jpg'} is no usable image: not an image in a known format"


def heic(image, **options) -> bytes:
    """``image`` as HEIC: one of Pillow, or (mode, array)."""
    pillow_heif = pytest.importorskip("pillow_heif")
    if not pillow_heif.libheif_info()["HEIF"]:
        pytest.skip("this pillow-heif only reads")
    if isinstance(image, Image.Image):
        file = pillow_heif.from_pillow(image)
    else:
        mode, values = image
        file = pillow_heif.from_bytes(mode, values.shape[1::-1], values.tobytes())
    buffer = io.BytesIO()
    file.save(buffer, quality=95, chroma=444, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_the_formats_of_photographs_are_decoded(kind):
    Image.init()
    if kind == "HEIF":
        data = heic(photo())
    elif kind in Image.SAVE:
        data = encode(photo(), kind)
    else:
        pytest.skip(f"this Pillow writes no {kind}")
    picture = decode(data)
    assert (picture.mode, picture.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(picture, float) - np.asarray(photo(), float)).mean() < 8


def test_the_suffixes_are_those_that_pillow_knows_for_the_formats():
    Image.init()
    for suffix, kind in Image.registered_extensions().items():
        if kind in FORMATS:
            assert suffix in FORMATS[kind]
    assert len(formats.IMAGE_SUFFIXES) == sum(map(len, FORMATS.values()))
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in formats.IMAGE_SUFFIXES)


def test_heic_is_upright_laid_on_white_and_of_8_bits():
    wide = np.repeat(np.linspace(0, 65535, 1200).reshape(30, 40, 1), 3, axis=2).astype(np.uint16)
    assert np.abs(np.asarray(decode(heic(("RGB;16", wide))), float) - wide / 257).max() < 4  # 10 bits
    assert np.asarray(decode(heic(Image.new("RGBA", (16, 16), (0, 0, 0, 0))))).min() > 250
    turned = Image.Exif()
    turned[0x0112] = 6
    picture = decode(heic(photo(), exif=turned.tobytes()))
    expected = photo().transpose(Image.Transpose.ROTATE_270)
    assert np.abs(np.asarray(picture, float) - np.asarray(expected, float)).mean() < 6
    assert "HEIF" not in Image.OPEN  # a user's own Pillow is left as it is


def test_an_image_that_needs_a_package_names_it(monkeypatch):
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(MissingDecoder) as error:
        decode(data)
    assert str(error.value) == "needs pillow-heif: pip install 'onceover-retrieval[heif]'"
    monkeypatch.setattr(formats, "_pillow_formats", lambda: ("JPEG",))
    assert why_no_decoder(data.replace(b"heic", b"avif")) == (
        "needs Pillow 11.3 or later: pip install --upgrade pillow"
    )
    assert why_no_decoder(b"\xff\xd8\xff") is None


def test_heif_is_bounded_and_damage_of_it_is_a_reason(monkeypatch):
    data = heic(photo())
    place = data.index(b"ispe") + 8
    with pytest.raises(PictureError, match="damaged image"):
        decode(data[:place] + struct.pack(">II", 60_000, 60_000) + data[place + 8 :])
    for end in range(12, len(data), 5):
        with pytest.raises(PictureError, match="damaged image"):
            decode(data[:end])
    choose = random.Random(0)
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(choose.choice([1, 4, 20])):
            damaged[choose.randrange(len(data))] = choose.randrange(256)
        try:
            assert decode(bytes(damaged)).mode == "RGB"
        except PictureError as error:
            assert "\n" not in str(error)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    with pytest.raises(PictureError, match="40 x 30 pixels; at most 1,000 are decoded"):
        decode(data)


def test_trap_special_and_giant_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    with pytest.raises(PictureError) as error:
        read_picture(tmp_path / "fifo.jpg")
    assert str(error.value) == (f"{tmp_path / 'fifo.jpg'} is a FIFO; a regular file is needed; name an image file")
    with open(tmp_path / "big.jpg", "wb") as file:
        file.truncate(40 * 2**30)
    with pytest.raises(PictureError) as error:
        read_picture(tmp_path / "big.jpg")
    assert str(error.value) == (
        f"{tmp_path / 'big.jpg'} has 42,949,672,960 bytes; at most 536,870,912 are read; name an image file"
    )


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when reading image file")])
def test_trap_a_want_of_memory_is_no_fault_of_the_image(monkeypatch, error):
    data = encode(photo(), "PNG")

    def load(_):
        raise error

    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(MemoryError):
        decode(data)


def test_large_images_are_decoded_one_at_a_time_and_small_ones_are_not(monkeypatch):
    monkeypatch.setattr(pictures, "LARGE_PIXELS", 1000)
    inside = []
    most = []
    convert = pictures._to_rgb

    def watched(image):
        inside.append(image.size)
        most.append(len(inside))
        time.sleep(0.02)
        converted = convert(image)
        inside.pop()
        return converted

    monkeypatch.setattr(pictures, "_to_rgb", watched)

    def decode_in_threads(data):
        most.clear()
        threads = [threading.Thread(target=decode, args=(data,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return max(most)

    assert decode_in_threads(encode(photo(), "PNG")) == 1
    assert decode_in_threads(encode(photo(size=(20, 20)), "PNG")) > 1


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="locks between processes need Linux")
def test_trap_a_process_that_is_killed_while_it_decodes_a_large_image_frees_the_others():
    lock = pictures._OneAtATime()
    read, write = os.pipe()
    with lock.held():
        child = os.fork()
        if child == 0:
            with lock.held():  # the parent's thread does not hold it here, its process does
                os.write(write, b"x")
                time.sleep(60)
            os._exit(0)
        os.set_blocking(read, False)
        time.sleep(0.1)
        with pytest.raises(BlockingIOError):
            os.read(read, 1)
    os.set_blocking(read, True)
    assert os.read(read, 1) == b"x"
    os.kill(child, 9)
    os.waitpid(child, 0)
    with lock.held():
        pass
    os.close(read)
    os.close(write)
