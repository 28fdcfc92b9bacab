"""Bytes of a picture file -> one upright RGB picture, its views, and its thumbnail. Pillow only, no torch."""

import io
import math
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from configs import OnceoverError

MAX_PIXELS = 178_956_970  # Pillow's own bound against decompression bombs: 512 MiB as RGB
MAX_BYTES = 2**29  # of a file
MAX_ASPECT = 16  # longer pictures are cut to it about their centre: scaling the short side up would fill the memory
REDUCED = 2  # times the pixels that are needed, what a JPEG decoded at a fraction of its size must have
THUMBNAIL_SIZE = 160  # pixels, the longer side
CROP_SHARE = 7 / 8  # of each side, what a corner view shows

_CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))  # left or right, top or bottom
WHOLE = "whole"  # a view that shows what an encoder's own centre crop cuts off
#: (what it shows, mirrored) for each view; None: the picture as the encoder's preprocessing takes it. They and the
#: corners are the ten of Krizhevsky et al. 2012.
VIEWS = (
    (None, False),
    (None, True),
    (WHOLE, False),
    (WHOLE, True),
    *((corner, False) for corner in _CORNERS),
    *((corner, True) for corner in _CORNERS),
)


class PictureError(OnceoverError):
    """Bytes that are not a usable picture."""


def needed(short_side: int, views: tuple) -> int:
    """Pixels that the shorter side of a picture has to have where its views are resized to ``short_side``."""
    corners = any(part not in (None, WHOLE) for part, _ in views)
    return math.ceil(short_side / CROP_SHARE) if corners else short_side


def decode(data: bytes, short_side: int | None = None) -> Image.Image:
    """The picture in ``data``, upright (EXIF), as 8-bit RGB; transparency is laid on white, 16 bits are scaled to 8.

    So are numbers of up to 65,535 and, where they are floats, of up to 1.

    Of an animation the first frame is taken. Colours are not converted between ICC profiles. A JPEG is decoded at a
    half, a quarter or an eighth of its size where its shorter side then still has ``REDUCED`` times ``short_side``
    pixels, which is faster and leaves the final resizing enough to average over.

    Raises:
        PictureError: empty, truncated, no picture at all, or larger than ``MAX_PIXELS``.
    """
    if not data:
        raise PictureError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; what it cannot decode, it raises
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(f"{image.width:,} x {image.height:,} pixels; at most {MAX_PIXELS:,} are decoded")
            if short_side:
                image.draft(None, (REDUCED * short_side,) * 2)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _limit_aspect(_to_rgb(image))
    except PictureError:
        raise
    except Image.DecompressionBombError as error:  # raised while the header is read, at the same bound
        raise PictureError(f"more than {MAX_PIXELS:,} pixels; that many are not decoded") from error
    except Image.UnidentifiedImageError as error:
        raise PictureError("not a picture in a known format") from error
    except Exception as error:  # decoders raise nearly anything on damaged input: OSError, SyntaxError, struct.error …
        raise PictureError(f"damaged picture: {' '.join(str(error).split()) or type(error).__name__}") from error


def read_picture(path: str | Path, short_side: int | None = None) -> Image.Image:
    """The picture in the file ``path``, as ``decode`` gives it.

    Raises:
        PictureError: no such file, a folder, or no usable picture; the path is named.
    """
    try:
        return decode(Path(path).read_bytes(), short_side)
    except PictureError as error:
        raise PictureError(f"{path} is no usable picture: {error}") from error
    except OSError as error:
        raise PictureError(f"{path} cannot be read: {error.strerror}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode in ("I", "F") and image.getextrema()[1] > 255):
        image = image.convert("F").point(lambda value: value * (255 / 65535) + 0)
    elif image.mode == "F" and image.getextrema()[1] <= 1:
        image = image.point(lambda value: value * 255 + 0)
    if image.mode in ("I", "F"):
        image = image.convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(canvas, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _limit_aspect(image: Image.Image) -> Image.Image:
    width, height = image.size
    bound = min(width, height) * MAX_ASPECT
    if max(width, height) <= bound:
        return image
    return ImageOps.fit(image, (min(width, bound), min(height, bound)))


def crop(image: Image.Image, corner: tuple[float, float] | None) -> Image.Image:
    """The part of ``image`` that a view shows: all of it, or ``CROP_SHARE`` of each side from a corner."""
    if corner is None:
        return image
    width, height = (max(1, round(side * CROP_SHARE)) for side in image.size)
    left, top = round(corner[0] * (image.width - width)), round(corner[1] * (image.height - height))
    return image.crop((left, top, left + width, top + height))


def inset(image: Image.Image, resized: int, shown: int) -> Image.Image:
    """All of ``image``, squashed to a square, as what remains of a larger one when its centre is cut out.

    A preprocessing that makes the shorter side ``resized`` pixels and cuts ``shown`` of them from the centre then shows
    the whole picture, and leaves its pixels alone.
    """
    square = image.resize((shown, shown), Image.Resampling.BICUBIC)
    canvas = square.resize((resized, resized), Image.Resampling.BICUBIC)
    canvas.paste(square, (round((resized - shown) / 2),) * 2)
    return canvas


def thumbnail(image: Image.Image) -> bytes:
    """A small JPEG of ``image`` for galleries and figures."""
    small = image.reduce(max(1, max(image.size) // THUMBNAIL_SIZE))
    small.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.HAMMING)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
