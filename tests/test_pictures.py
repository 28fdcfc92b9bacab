"""Every odd kind of image comes out upright, RGB, 8 bits, or is refused with a reason."""

import io
import os
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from onceover.extract import pictures
from onceover.extract.formats import FORMATS
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


def test_floats_up_to_1_are_scaled_to_8_bits():
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    levels = np.asarray(decode(encode(Image.fromarray(ramp), "TIFF")))[..., 0].ravel()
    np.testing.assert_allclose(levels, np.arange(256), atol=1)


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    return png[:33] + chunk(kind, data) + png[33:]


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


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in ("JPEG", "HEIF")])
def test_the_formats_of_photographs_are_decoded(kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    picture = decode(encode(photo(), kind))
    assert (picture.mode, picture.size) == ("RGB", (40, 30))


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
