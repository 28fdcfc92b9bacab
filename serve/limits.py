"""The bounds of what the search server takes."""

import warnings

from onceover.extract.formats import open_image

MAX_IMAGE_BYTES = 8 * 2**20  # of an image that is searched by
MAX_IMAGE_PIXELS = 16_000_000
MAX_BODY = 12 * 2**20  # bytes of a request; an image takes a third more in base64
MAX_BODIES = 64 * 2**20  # bytes of all requests that are being answered
BODY_TIME = 60.0  # seconds that the body of a request may take to arrive
MAX_DECODED = 2  # images decoded at the same time; one takes up to 200 MB
MAX_TERMS = 16  # of a query
MAX_HITS = 200
MAX_WEIGHT = 100.0
MIN_WEIGHT = 1e-6  # of the largest weight in a query
MAX_CONNECTIONS = 256
MAX_WAITING = 1024  # queries; further ones are refused until there is room


def pixels_of(data: bytes) -> int:
    """How many pixels an image has, by its header; 0 where that cannot be read, and is left to who decodes it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of many pixels; they are counted here
            with open_image(data) as image:
                return image.width * image.height
    except Exception:  # Pillow raises nearly anything on damaged bytes
        return 0
