"""Images whose values need more than 8 bits -> 8 bits, scaled by a white level, never clipped."""

from typing import Any

import numpy as np
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

from onceover.extract.formats import PictureError

_DEPTHS = (8, 10, 12, 14, 16)  # bits of sensors and files
_TOLERANCE = 1.1  # times a level, what still counts as that level: resampling overshoots
_RADIANCE = 32  # floats up to it are meant relative to 1, with highlights beyond it
_MAX_SAMPLE_VALUE = 281  # TIFF's tag
_UNSIGNED = 1  # TIFF's sample format


def white_level(largest: float, *, is_float: bool) -> float:
    """The value that is shown as white, by the largest value of an image (and what its file says of it).

    That is the maximum of 8, 10, 12, 14 or 16 bits, the smallest that holds ``largest``; beyond 16 bits ``largest``
    itself. Of floats it is 1, or ``largest`` where that is at most 32. Nothing is brighter than white.
    """
    if is_float and largest <= _RADIANCE:
        return max(1.0, largest)
    for bits in _DEPTHS:
        level = 2.0**bits - 1
        if largest <= _TOLERANCE * level:
            return max(level, largest)
    return largest


def is_wide(image: Image.Image) -> bool:
    """Whether an image has one channel of more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def narrowed(image: Image.Image) -> Image.Image:
    """A wide image as 8-bit grey: zero becomes black and the white level white.

    Where values are negative, the smallest becomes black and the largest white. What a PNG marks as transparent
    becomes white.

    Raises:
        PictureError: it has pixels that are no numbers, or infinite.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and image.format == "TIFF" and _first(tags.get(SAMPLEFORMAT)) in (None, _UNSIGNED):
        values = values.view(np.uint32)  # Pillow's are signed
    is_float = values.dtype.kind == "f"
    smallest = float(values.min())
    largest = float(values.max())
    if not np.isfinite([smallest, largest]).all():
        raise PictureError("it has pixels that are no finite numbers")
    low = min(0.0, smallest)
    high = largest if low < 0 else white_level(max(largest, _stated_maximum(image, tags)), is_float=is_float)
    grey = _scaled(values, low, high)
    if _first(tags.get(PHOTOMETRIC_INTERPRETATION)) == 0:  # zero is white, which Pillow heeds in 8 bits alone
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """``values`` as 8 bits, from ``low`` (0) to ``high`` (255)."""
    scale = 255 / (high - low) if high > low else 0.0
    scaled = np.multiply(values, scale, dtype=np.float32)
    scaled += 0.5 - low * scale
    return np.clip(scaled, 0, 255, out=scaled).astype(np.uint8)


def _stated_maximum(image: Image.Image, tags: dict) -> float:
    """The largest value that a file says is possible, where it says so; else 0.

    16 bits of a PNG or a TIFF say nothing: cameras' 12 bits are stored in them as they are.
    """
    if image.format in ("PPM", "JPEG2000"):
        return 0.0 if image.mode == "F" else 65535.0  # to which Pillow has scaled what the file says
    bits = _first(tags.get(BITSPERSAMPLE)) or 0
    largest = _first(tags.get(_MAX_SAMPLE_VALUE)) or 0
    return float(max(largest, 2**bits - 1 if bits in (10, 12, 14) else 0))


def _first(value: object) -> int | None:
    """A tag's only or first value, where it is a whole number."""
    if isinstance(value, tuple) and value:
        value = value[0]
    return value if isinstance(value, int) else None


def low_bytes_mode(image: ImageFile.ImageFile) -> str | None:
    """The raw mode that gives the lower bytes of an image with 16 bits a channel, or None of any other.

    It must not be loaded yet. Pillow gives the higher bytes, and they are black where 12 bits are stored as 16.
    """
    if image.format not in ("PNG", "TIFF") or image.mode not in ("RGB", "RGBA") or not image.tile:
        return None
    mode = _raw_mode(image.tile[0])
    if mode[:-1] not in ("RGB;16", "RGBA;16", "RGBX;16"):
        return None
    is_little = mode[-1] == "L" or (mode[-1] == "N" and np.little_endian)
    return mode[:-1] + ("B" if is_little else "L")


def _raw_mode(tile: tuple) -> str:
    arguments = tile[3]
    mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return mode if isinstance(mode, str) else ""


def use_raw_mode(image: ImageFile.ImageFile, mode: str) -> None:
    """Has an image that is not loaded yet decoded in another raw mode."""
    changed: list[Any] = []
    for tile in image.tile:
        codec, extents, offset, arguments = tile
        others = arguments[1:] if isinstance(arguments, tuple) else None
        make = getattr(tile, "_make", tuple)  # a plain tuple before Pillow 11
        changed.append(make((codec, extents, offset, mode if others is None else (mode, *others))))
    image.tile = changed


def is_dark(high: Image.Image) -> bool:
    """Whether an image, the higher bytes of 16 bits, has no value of more than 14 bits."""
    return bool(np.asarray(high)[..., :3].max() < 2**6)


def joined_bytes(high: Image.Image, low: Image.Image) -> Image.Image:
    """An image with 16 bits a channel as 8 bits, from its higher and lower bytes; its colours share a white level."""
    values = np.asarray(high).astype(np.uint16) << 8
    values |= np.asarray(low)
    channels = [_scaled(values[..., :3], 0, white_level(float(values[..., :3].max()), is_float=False))]
    if values.shape[2] == 4:
        channels.append(_scaled(values[..., 3:], 0, white_level(float(values[..., 3].max()), is_float=False)))
    return Image.fromarray(np.concatenate(channels, axis=2))
