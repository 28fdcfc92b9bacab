"""Images that are searched by: taken from base64 within limits, decoded once, and never written to disk."""

import base64
import binascii

from onceover.base.errors import OnceoverError
from onceover.extract.pictures import PictureError
from onceover.serve.engine import Engine
from onceover.serve.limits import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, pixels_of
from onceover.serve.vectors import Upload

_SMALLER = "make it smaller; 1,024 pixels are more than enough"


class UploadError(OnceoverError):
    """An image that cannot be searched by."""


def uploaded_image(text: str, engine: Engine) -> Upload:
    """An image in base64, decoded, and made as small as the image encoder takes it.

    Raises:
        UploadError: no base64, too many bytes or pixels, or no usable image. SearchError: images are not taken here.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UploadError("the image is not in base64; encode the file's bytes") from error
    if len(data) > MAX_IMAGE_BYTES:
        raise UploadError(f"the image has more than {MAX_IMAGE_BYTES / 2**20:.0f} MiB; {_SMALLER}")
    pixels = pixels_of(data)
    if pixels > MAX_IMAGE_PIXELS:
        raise UploadError(f"the image has {pixels:,} pixels, more than {MAX_IMAGE_PIXELS:,}; {_SMALLER}")
    try:
        return engine.upload(data)
    except PictureError as error:
        reason = str(error).removeprefix("the image is no usable image: ")
        raise UploadError(f"this is no usable image: {reason}; send another file, such as a JPEG or PNG") from error
    except MemoryError as error:
        raise UploadError(f"there is no room to decode the image; {_SMALLER}") from error
