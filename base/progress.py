"""Messages about work under way. They go to the logger ``onceover``, which a Python caller can redirect or silence.

The command line shows them on stderr; in Python nothing is shown unless logging is set up:
``logging.basicConfig(level=logging.INFO)``.
"""

import logging

LOGGER = logging.getLogger("onceover")


def say(message: str) -> None:
    """Tells the user what is going on."""
    LOGGER.info("%s", message)
