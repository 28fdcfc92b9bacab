"""Messages about work in progress. They go to the logger ``onceover``, which a Python caller can redirect or silence.

The command line shows them on stderr; in Python nothing is shown unless logging is set up:
``logging.basicConfig(level=logging.INFO)``.
"""

import contextlib
import logging
from collections.abc import Iterator

LOGGER = logging.getLogger("onceover")


def say(message: str) -> None:
    """Tells the user what is going on."""
    LOGGER.info("%s", message)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Within, this process shows no messages, since another one that does the same work shows them."""
    LOGGER.addFilter(_refuse)
    try:
        yield
    finally:
        LOGGER.removeFilter(_refuse)


def _refuse(_record: logging.LogRecord) -> bool:
    return False
