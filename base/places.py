"""Places that a user names: paths of this machine, and addresses such as ``s3://bucket/data`` that fsspec knows.

An address is a ``UPath`` of universal_pathlib. It has the methods of a path, so that code that only reads (``is_dir``,
``glob``, ``open``, ``/``) works on both.
"""

import re
from pathlib import Path
from typing import cast

from onceover.base.errors import OnceoverError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class PlaceError(OnceoverError):
    """An address that cannot be opened: of an unknown kind, without its driver, or not to be reached."""


def is_address(name: str | Path) -> bool:
    """Whether a name is an address, and no path of this machine."""
    return _ADDRESS.match(str(name)) is not None


def place(name: str | Path) -> Path:
    """The path or the address of that name; ``file://`` gives a path.

    Raises:
        PlaceError: an address of an unknown kind, or one whose driver is not installed.
    """
    text = str(name)
    if not is_address(text):
        return Path(name)
    import fsspec
    from upath import UPath

    kind = text.partition("://")[0]
    if kind == "file":
        return Path(text.removeprefix("file://"))
    try:
        fsspec.get_filesystem_class(kind)
    except ImportError as error:
        raise PlaceError(f"{text}: {error}, for example with pip") from error
    except ValueError as error:
        kinds = ", ".join(f"{known}://" for known in ("s3", "gs", "az", "hf", "https", "memory"))
        raise PlaceError(f"{text}: no kind of address is called {kind}://; some are {kinds}") from error
    return cast(Path, UPath(text))
