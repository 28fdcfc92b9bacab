"""The formats of images that are decoded: their suffixes, their first bytes, and the package that one may need."""

import functools
import io
from itertools import chain

from PIL import Image, ImageFile

from onceover.base.errors import OnceoverError

#: By Pillow's name of each format, the suffixes of its files. Files are told apart by their first bytes alone, and
#: Pillow or pillow-heif (HEIF) decodes them itself. Formats that start programs (EPS, WMF), have no signature (TGA),
#: or hold icons, textures or layers rather than photographs (ICO, DDS, PSD) are left out.
FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif", ".heics", ".heifs", ".hif"),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "QOI": (".qoi",),
}
IMAGE_SUFFIXES = frozenset(chain.from_iterable(FORMATS.values()))

_NO_HEIF = "needs pillow-heif: pip install 'onceover-retrieval[heif]'"
_NO_AVIF = "needs Pillow 11.3 or later: pip install --upgrade pillow"
#: the brands of an ISO base media file that say how its images are coded: AV1, and HEVC or anything
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_MAX_BRANDS = 100


class PictureError(OnceoverError):
    """Bytes that are not a usable image."""


class MissingDecoder(PictureError):
    """An image in a format that needs a package which is not installed; the message names it."""


def open_image(data: bytes) -> ImageFile.ImageFile:
    """The image in ``data``, its pixels not yet decoded.

    Raises:
        MissingDecoder: a package is needed. Exception: what Pillow raises.
    """
    missing = why_no_decoder(data)
    if missing:
        raise MissingDecoder(missing)
    if format_of(data) == "HEIF":
        from pillow_heif import HeifImageFile

        return HeifImageFile(io.BytesIO(data))  # registered nowhere: other users of Pillow see no change
    return Image.open(io.BytesIO(data), formats=_pillow_formats())


def why_no_decoder(data: bytes) -> str | None:
    """The package that the image in ``data`` needs and that is missing, and how to install it; else None."""
    kind = format_of(data)
    if kind == "AVIF" and kind not in _pillow_formats():
        return _NO_AVIF
    if kind == "HEIF":
        try:
            import pillow_heif  # noqa: F401
        except ImportError:
            return _NO_HEIF
    return None


def format_of(data: bytes) -> str | None:
    """The format that the first bytes of a file claim, one of ``FORMATS``; None where they claim none of them."""
    brands = _brands(data)
    if brands & _AVIF_BRANDS:
        return "AVIF"
    if brands & _HEIF_BRANDS:
        return "HEIF"
    for name in _pillow_formats():
        accept = Image.OPEN[name][1]
        if accept is not None and accept(data[:16].ljust(16, b"\0")) is True:
            return name
    return None


@functools.cache
def _pillow_formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this Pillow decodes; AVIF came with 11.3."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN and name != "HEIF")


def _brands(data: bytes) -> set[bytes]:
    """The brands of an ISO base media file; of any other, none."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), 16 + 4 * _MAX_BRANDS, len(data))
    return {data[8:12], *(data[start : start + 4] for start in range(16, end, 4))}
