"""Images that are searched by: decoded from base64 within limits, and never written to disk."""

import base64
import binascii

from onceover.base.errors import OnceoverError
from onceover.extract.formats import open_image
from onceover.extract.pictures import PictureError, decode
from onceover.serve.limits import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS

_SHORT_SIDE = 224  # pixels; a JPEG need not be decoded at its full size to find out whether it is whole


class UploadError(OnceoverError):
    """An image that cannot be searched by."""


def uploaded_image(text: str) -> bytes:
    """The bytes of an image in base64, which were decoded once to see that they are an image.

    Raises:
        UploadError: no base64, too many bytes or pixels, or no usable image.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UploadError("the image is not in base64; encode the file's bytes") from error
    if len(data) > MAX_IMAGE_BYTES:
        raise UploadError(f"the image has more than {MAX_IMAGE_BYTES / 2**20:.0f} MiB; send a smaller one")
    _check_pixels(data)
    try:
        decode(data, _SHORT_SIDE)
    except PictureError as error:
        raise UploadError(f"this is no usable image: {error}") from error
    except MemoryError as error:
        raise UploadError("there is no room to decode the image; send a smaller one") from error
    return data


def _check_pixels(data: bytes) -> None:
    """Refuses an image of too many pixels before any is decoded; what cannot be opened is left to ``decode``."""
    try:
        with open_image(data) as image:
            pixels = image.width * image.height
    except Exception:  # Pillow raises nearly anything on damaged bytes, and ``decode`` tells what it is
        return
    if pixels > MAX_IMAGE_PIXELS:
        raise UploadError(f"the image has {pixels:,} pixels; at most {MAX_IMAGE_PIXELS:,} are taken: make it smaller")
