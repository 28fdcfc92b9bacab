"""Bytes of an image file -> one upright RGB image, its views, and its thumbnail. Pillow only, no torch."""

import contextlib
import hashlib
import io
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageFile, ImageOps

from onceover.base.files import FileError, read_bytes
from onceover.extract.formats import MissingDecoder, PictureError, format_of, open_image
from onceover.extract.levels import is_dark, is_wide, joined_bytes, low_bytes_mode, narrowed, use_raw_mode
from onceover.extract.mending import JPEG_END, JPEG_SIGNATURE, has_all_scans, tails, without_metadata

MAX_PIXELS = 178_956_970  # Pillow's own bound against decompression bombs: 512 MiB as RGB
MAX_BYTES = 2**29  # of a file; an uncompressed image of ``MAX_PIXELS`` takes as many
LARGE_PIXELS = 24_000_000  # images of more are decoded one at a time
MAX_ASPECT = 16  # longer images are cut to it about their centre: scaling the short side up would fill the memory
_JPEGS = ("JPEG", "MPO")
_UNKNOWN = "not an image in a known format"
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


def needed(short_side: int, views: Sequence[tuple]) -> int:
    """Pixels that the shorter side of an image has to have where its views are resized to ``short_side``."""
    corners = any(part not in (None, WHOLE) for part, _ in views)
    return math.ceil(short_side / CROP_SHARE) if corners else short_side


def decode(data: bytes, short_side: int | None = None) -> Image.Image:
    """The image in ``data``, upright (EXIF), as 8-bit RGB; transparency is laid on white.

    Values of more than 8 bits are scaled, by the image's own largest value: white is the largest value of 8, 10, 12, 14
    or 16 bits, the smallest that holds all (``levels.white_level``); of floats it is 1, or up to 32 their largest.

    Of an animation the first frame is taken. Colours are not converted between ICC profiles. A JPEG is decoded at a
    half, a quarter or an eighth of its size where its shorter side then still has ``REDUCED`` times ``short_side``
    pixels, which is faster and leaves the final resizing enough to average over.

    What is wrong with metadata alone is passed over: EXIF that cannot be read, chunks of a PNG, segments of a JPEG
    and tags of a TIFF that no pixel depends on, and the two bytes that end a JPEG.

    Raises:
        PictureError: empty, truncated, no image at all, or larger than ``MAX_PIXELS``; a fault of the bytes. A
            ``MissingDecoder`` where a package is needed to decode it.
        MemoryError: no room for it now.
    """
    if not data:
        raise PictureError("empty file")
    try:
        return _decoded(data, short_side)
    except MissingDecoder:
        raise
    except PictureError as error:
        failure: PictureError = error
    for mended in _mended(data):
        try:
            return _decoded(mended, short_side)
        except PictureError as error:
            failure = error
    raise failure


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
            if short_side and image.format in _JPEGS:
                image.draft(None, (REDUCED * short_side,) * 2)
            if not image.info.get("progressive"):  # whose coefficients are held in full
                pixels = image.width * image.height
            with _large_images.held() if pixels > LARGE_PIXELS else contextlib.nullcontext():
                return _limit_aspect(_to_rgb(_loaded(image, data)))
    except (PictureError, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # raised while the header is read, at the same bound
        raise PictureError(f"more than {MAX_PIXELS:,} pixels; that many are not decoded") from error
    except Image.UnidentifiedImageError as error:
        kind = format_of(data)
        is_known = kind not in (None, "PPM")  # whose signature is two letters
        reason = f"damaged image, or a {kind} of a kind that Pillow does not decode" if is_known else _UNKNOWN
        raise PictureError(reason) from error
    except Exception as error:  # decoders raise nearly anything on damaged input: OSError, SyntaxError, struct.error …
        if "out of memory" in str(error):  # a decoder's own code for it
            raise MemoryError(str(error)) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f"damaged image: {reason:.200}") from error


def _opened(data: bytes) -> ImageFile.ImageFile:
    """The image in ``data``, its pixels not yet decoded.

    Raises:
        PictureError: more than ``MAX_PIXELS``; and what Pillow raises.
    """
    image = open_image(data)
    _check_size(image)
    return image


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise PictureError(f"{image.width:,} x {image.height:,} pixels; at most {MAX_PIXELS:,} are decoded")


def _loaded(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """The image in ``data``, opened as ``image``, with its pixels, upright."""
    low_mode = low_bytes_mode(image)
    image.load()
    _check_size(image)  # HEIF's is known only now
    _turn_upright(image)
    if low_mode is None or not is_dark(image):
        return image
    low = _opened(data)
    use_raw_mode(low, low_mode)
    low.load()
    _turn_upright(low)
    return joined_bytes(image, low)


def _turn_upright(image: Image.Image) -> None:
    """Applies EXIF's orientation, where there is one that can be read."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # nearly anything, on damaged EXIF: SyntaxError, struct.error, ValueError …
        return


def _mended(data: bytes) -> Iterator[bytes]:
    """The file without its metadata, and the same with the end that a JPEG lacks, as far as these apply."""
    plain = without_metadata(data)
    if plain != data:
        yield plain
    if plain.startswith(JPEG_SIGNATURE):
        whole = _with_end(plain)
        if whole is not None:
            yield whole


def _with_end(data: bytes) -> bytes | None:
    """A JPEG that has all its pixels and lacks only its end marker, with that marker; None for any other."""
    if data.endswith(JPEG_END):
        return None
    body = data.removesuffix(b"\xff")
    if not has_all_scans(body):
        return None
    mended = body + JPEG_END
    expected = _digest_of_pixels(mended)
    if expected is None:
        return None
    for tail in tails(body):
        if _digest_of_pixels(body + tail + JPEG_END) != expected:
            return None
    return mended


def _digest_of_pixels(data: bytes) -> bytes | None:
    try:
        with warnings.catch_warnings(), _large_images.held():
            warnings.simplefilter("ignore")
            return hashlib.sha256(_opened(data).tobytes()).digest()
    except MemoryError:
        raise
    except Exception:  # whatever a decoder raises: these are not all pixels
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if is_wide(image):
        image = narrowed(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
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
    return jpeg_of(small)


def jpeg_of(image: Image.Image, quality: int = 85) -> bytes:
    """The bytes of an RGB image as a JPEG. ``quality``: 1 to 95."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
