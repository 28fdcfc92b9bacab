"""Images of every kind, whole and damaged."""

import io
import random
import struct
import zlib

import numpy as np
from PIL import Image

from reliability.mutators import mutate_bytes

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "GIF": ("P", "L", "animated"),
    "BMP": ("RGB", "L", "P", "1"),
    "WEBP": ("RGB", "RGBA", "animated"),
    "TIFF": ("RGB", "RGBA", "CMYK", "L", "I;16", "F", "LAB", "1"),
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")


def draw_image(generator: random.Random) -> tuple[bytes, str]:
    """A small image in a random format and mode, with a name for its kind."""
    kind = generator.choice(FORMATS)
    mode = generator.choice(MODES[kind])
    size = (generator.choice((1, 2, 17, 40)), generator.choice((1, 3, 31, 40)))
    pixels = np.random.default_rng(generator.randrange(2**32)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    options: dict = {}
    if mode == "animated":
        options = {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]}
    elif mode == "I;16":
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    elif mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    else:
        image = image.convert(mode)
    if kind == "JPEG" and generator.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = generator.choice((1, 3, 6, 8, 99))
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue(), f"{kind} {mode}"


def png_of_size(width: int, height: int, rows: int = 1) -> bytes:
    """A PNG that claims a size and holds the compressed zeros of a few rows, or of all."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor = zlib.compressobj(9)
    packed = b"".join(compressor.compress(bytes(width + 1)) for _ in range(rows)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def odd_image(generator: random.Random) -> bytes:
    """Bytes that are no image, or an image that asks for more than it is."""
    choices = (
        b"",
        b"\0" * 1000,
        b"not an image",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n",
        b"%PDF-1.4\n",
        png_of_size(0, 0),
        png_of_size(1, 2**31 - 1),
        png_of_size(60_000, 60_000),
        png_of_size(30_000, 2, 2),
        png_of_size(2, 30_000, 30_000),
        png_of_size(9_000, 9_000, 10),
    )
    return generator.choice(choices)


def mutate_image(generator: random.Random) -> tuple[bytes, str]:
    """An image, damaged most of the time, and what was done."""
    way = generator.random()
    if way < 0.08:
        return odd_image(generator), "odd"
    data, kind = draw_image(generator)
    if way < 0.2:
        return data, f"{kind}, whole"
    return mutate_bytes(data, generator), f"{kind}, damaged"
