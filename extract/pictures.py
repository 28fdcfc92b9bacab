"""Bytes of an image file -> one upright RGB image, its views, and its thumbnail. Pillow only, no torch."""

import contextlib
import functools
import hashlib
import io
import itertools
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from onceover.base.errors import OnceoverError
from onceover.base.files import FileError, read_bytes

MAX_PIXELS = 178_956_970  # Pillow's own bound against decompression bombs: 512 MiB as RGB
MAX_BYTES = 2**29  # of a file; an uncompressed image of ``MAX_PIXELS`` takes as many
LARGE_PIXELS = 24_000_000  # images of more are decoded one at a time
#: what Pillow decodes itself and by a signature; others start programs (EPS) or take nearly any bytes for theirs (TGA)
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "JPEG2000", "PPM")
MAX_ASPECT = 16  # longer images are cut to it about their centre: scaling the short side up would fill the memory
REDUCED = 2  # times the pixels that are needed, what a JPEG decoded at a fraction of its size must have
THUMBNAIL_SIZE = 160  # pixels, the longer side
CROP_SHARE = 7 / 8  # of each side, what a corner view shows

_CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))  # left or right, top or bottom
WHOLE = "whole"  # a view that shows what an encoder's own centre crop cuts off
#: (what it shows, mirrored) for each view; None: the image as the encoder's preprocessing takes it. They and the
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
    """Bytes that are not a usable image."""


def needed(short_side: int, views: Sequence[tuple]) -> int:
    """Pixels that the shorter side of an image has to have where its views are resized to ``short_side``."""
    corners = any(part not in (None, WHOLE) for part, _ in views)
    return math.ceil(short_side / CROP_SHARE) if corners else short_side


def decode(data: bytes, short_side: int | None = None) -> Image.Image:
    """The image in ``data``, upright (EXIF), as 8-bit RGB; transparency is laid on white, 16 bits are scaled to 8.

    So are numbers of up to 65,535 and, where they are floats, of up to 1.

    Of an animation the first frame is taken. Colours are not converted between ICC profiles. A JPEG is decoded at a
    half, a quarter or an eighth of its size where its shorter side then still has ``REDUCED`` times ``short_side``
    pixels, which is faster and leaves the final resizing enough to average over.

    What is wrong with metadata alone is passed over: EXIF that cannot be read, texts and colour profiles of a PNG, and
    the two bytes that end a JPEG.

    Raises:
        PictureError: empty, truncated, no image at all, or larger than ``MAX_PIXELS``; a fault of the bytes.
        MemoryError: no room for it now.
    """
    if not data:
        raise PictureError("empty file")
    try:
        return _decoded(data, short_side)
    except PictureError:
        mended = _mended(data)
        if mended is None:
            raise
        return _decoded(mended, short_side)


def read_picture(path: str | Path, short_side: int | None = None) -> Image.Image:
    """The image in the file ``path``, as ``decode`` gives it.

    Raises:
        PictureError: no such file, a folder, a special file, or no usable image; the path is named.
        MemoryError: no room for it now.
    """
    return decode_named(lambda: read_bytes(path, MAX_BYTES), path, short_side)


def decode_named(read: Callable[[], bytes], name: str | Path, short_side: int | None = None) -> Image.Image:
    """The image whose bytes ``read`` gives, as ``decode`` gives it; ``name`` says in errors which one it is.

    Raises:
        PictureError: it cannot be read or decoded; the image is named.
        MemoryError: no room for it now.
    """
    with named_errors(name):
        return decode(read(), short_side)


@contextlib.contextmanager
def named_errors(name: str | Path) -> Iterator[None]:
    """Turns what goes wrong when an image is read and decoded into an error that names it.

    Raises:
        PictureError: it cannot be read or decoded. MemoryError: no room for it now.
    """
    try:
        yield
    except PictureError as error:
        raise PictureError(f"{name} is no usable image: {error}") from error
    except FileError as error:
        raise PictureError(f"{error}; name an image file") from error
    except OSError as error:
        raise PictureError(f"{name} cannot be read: {error.strerror or error}") from error


class _OneAtATime:
    """A lock between the threads of this process and of those that are forked from it; one that is killed frees it."""

    def __init__(self):
        self._threads = threading.Lock()
        self._descriptor: int | None = None
        if hasattr(os, "memfd_create"):  # Linux; elsewhere the threads of a process alone wait for each other
            with contextlib.suppress(OSError):
                self._descriptor = os.memfd_create("onceover-large-images")
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Waits for the others, and makes them wait."""
        with self._threads, self._locked():
            yield

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._descriptor is None:
            yield
            return
        import fcntl

        with contextlib.suppress(OSError):  # no lock is no reason to fail
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def _renew(self) -> None:
        """In a fork: another thread may have held the lock, and is not there."""
        self._threads = threading.Lock()


_large_images = _OneAtATime()


def _decoded(data: bytes, short_side: int | None) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; what it cannot decode, it raises
            image = _opened(data)
            pixels = image.width * image.height
            if short_side:
                image.draft(None, (REDUCED * short_side,) * 2)
            if not image.info.get("progressive"):  # whose coefficients are held in full
                pixels = image.width * image.height
            with _large_images.held() if pixels > LARGE_PIXELS else contextlib.nullcontext():
                image.load()
                _turn_upright(image)
                return _limit_aspect(_to_rgb(image))
    except (PictureError, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # raised while the header is read, at the same bound
        raise PictureError(f"more than {MAX_PIXELS:,} pixels; that many are not decoded") from error
    except Image.UnidentifiedImageError as error:
        raise PictureError("not an image in a known format") from error
    except Exception as error:  # decoders raise nearly anything on damaged input: OSError, SyntaxError, struct.error …
        if "out of memory" in str(error):  # a decoder's own code for it
            raise MemoryError(str(error)) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f"damaged image: {reason:.200}") from error


def _opened(data: bytes) -> Image.Image:
    """The image in ``data``, its pixels not yet decoded.

    Raises:
        PictureError: more than ``MAX_PIXELS``; and what Pillow raises.
    """
    image = Image.open(io.BytesIO(data), formats=_formats_here())
    if image.width * image.height > MAX_PIXELS:
        raise PictureError(f"{image.width:,} x {image.height:,} pixels; at most {MAX_PIXELS:,} are decoded")
    return image


def _turn_upright(image: Image.Image) -> None:
    """Applies EXIF's orientation, where there is one that can be read."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # nearly anything, on damaged EXIF: SyntaxError, struct.error, ValueError …
        return


def _mended(data: bytes) -> bytes | None:
    """The same pixels without what is wrong beside them; None where nothing is known that could help."""
    if data.startswith(_PNG_SIGNATURE):
        shorter = _without_texts(data)
        return shorter if len(shorter) < len(data) else None
    return _with_end(data) if data.startswith(_JPEG_SIGNATURE) else None


_MAX_PARTS = 10_000  # chunks of a PNG or segments of a JPEG that are looked at
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}  # texts and the colour profile: no pixel depends on them


def _without_texts(data: bytes) -> bytes:
    """A PNG without its texts and its colour profile; what follows an incomplete chunk is left as it is."""
    parts = [_PNG_SIGNATURE]
    position = len(_PNG_SIGNATURE)
    while position + 12 <= len(data) and len(parts) < _MAX_PARTS:
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            break
        if data[position + 4 : position + 8] not in _PNG_TEXTS:
            parts.append(data[position:end])
        position = end
    return b"".join([*parts, data[position:]])


_JPEG_SIGNATURE = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
_TAILS = 6  # what is put behind a JPEG to see whether pixels are missing
_TAIL_BYTES = 2**12  # an MCU of any bytes takes a few hundred
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # but for restarts, which lie within a scan


def _with_end(data: bytes) -> bytes | None:
    """A JPEG that has all its pixels and lacks but the marker that ends it, with that; None for any other."""
    if data.endswith(_JPEG_END):
        return None
    body = data.removesuffix(b"\xff")
    if not _has_all_scans(body):
        return None
    mended = body + _JPEG_END
    expected = _digest_of_pixels(mended)
    if expected is None:
        return None
    for number in range(_TAILS):
        if _digest_of_pixels(body + _tail(body, number) + _JPEG_END) != expected:
            return None
    return mended


def _tail(body: bytes, number: int) -> bytes:
    """Bytes that behind the last pixel of a JPEG change none, and would give others in the place of missing ones.

    With every second ``number`` they stand behind the restart marker that is next.
    """
    noise = hashlib.shake_128(bytes([number])).digest(_TAIL_BYTES).replace(b"\xff", b"\xfe")
    if number % 2 == 0:
        return noise
    scan = body.rfind(b"\xff\xda")
    places = [body.rfind(bytes([0xFF, 0xD0 + restart]), scan) for restart in range(8)]
    following = (places.index(max(places)) + 1) % 8 if max(places) >= 0 else 0
    return bytes([0xFF, 0xD0 + following]) + noise


def _digest_of_pixels(data: bytes) -> bytes | None:
    try:
        with warnings.catch_warnings(), _large_images.held():
            warnings.simplefilter("ignore")
            return hashlib.sha256(_opened(data).tobytes()).digest()
    except MemoryError:
        raise
    except Exception:  # whatever a decoder raises: these are not all pixels
        return None


def _has_all_scans(data: bytes) -> bool:
    """Whether the scans of a JPEG bring every coefficient of every component, to its last bit."""
    missing: set[tuple[int, int]] = set()
    position = len(_JPEG_SIGNATURE)
    scans = 0
    for _ in range(_MAX_PARTS):
        marker = _JPEG_MARKER.search(data, position)
        if marker is None:
            break
        kind = data[marker.start() + 1]
        start = marker.end() + 2
        segment = data[start : marker.end() + int.from_bytes(data[marker.end() : start], "big")]
        position = start + len(segment)
        if kind in (0xC0, 0xC1, 0xC2) and len(segment) > 5:
            components = segment[6:18:3]
            missing = set(itertools.product(components, range(64)))
        if kind == 0xDA and len(segment) >= 4:
            first, last, bits = segment[-3:]
            scans += 1
            if bits & 0x0F == 0:
                missing -= set(itertools.product(segment[1:-3:2][:4], range(first, min(last, 63) + 1)))
    return scans > 0 and not missing


def _largest(image: Image.Image) -> float:
    """The largest number in an image of one channel."""
    _, largest = image.getextrema()
    assert not isinstance(largest, tuple)
    return largest


@functools.cache
def _formats_here() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this Pillow has; AVIF came with 11.3."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image) -> Image.Image:
    is_wide = image.mode in ("I", "F")
    if image.mode.startswith("I;16") or (is_wide and _largest(image) > 255):
        image = image.convert("F").point(lambda value: value * (255 / 65535) + 0)
    elif image.mode == "F" and _largest(image) <= 1:
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
    left = round(corner[0] * (image.width - width))
    top = round(corner[1] * (image.height - height))
    return image.crop((left, top, left + width, top + height))


def inset(image: Image.Image, resized: int, shown: int) -> Image.Image:
    """All of ``image``, squashed to a square, as what remains of a larger one when its centre is cut out.

    A preprocessing that makes the shorter side ``resized`` pixels and cuts ``shown`` of them from the centre then shows
    the whole image, and leaves its pixels alone.
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
