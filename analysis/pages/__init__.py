"""HTML pages: templates, styles and scripts are files of this folder; Jinja2 fills them and escapes every value.

A page that is written to disk is one file: ``{{ source("page.css") | safe }}`` puts a style or script into it, and
``{{ jpeg | data_url }}`` an image. ``{{ value | tojson }}`` writes data that a script reads.
"""

import base64
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onceover.analysis.pages.tables import minus

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = Path(__file__).parent
_CONTROLS = dict.fromkeys((*range(0x7F, 0xA0), *range(0xD800, 0xE000)), "\N{REPLACEMENT CHARACTER}")
_CONTROLS |= {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n\r"}  # ␛ for an escape


def render(template: str, **values: Any) -> str:
    """Fills a template of this folder; a value that is missing is an error.

    Text in ``values`` is escaped, and control characters in it are shown as symbols.
    """
    return _environment().get_template(template).render(**values)


def source(name: str) -> str:
    """The text of a style or script of this folder."""
    return (FOLDER / name).read_text(encoding="utf-8")


def data_url(image: bytes, media_type: str = "image/jpeg") -> str:
    """An image as an address that holds its bytes."""
    return f"data:{media_type};base64,{base64.b64encode(image).decode()}"


def _visible(value: Any) -> Any:
    """A value with symbols in place of control characters, which HTML does not allow."""
    return value.translate(_CONTROLS) if type(value) is str else value


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_visible,
    )
    environment.globals["source"] = source
    environment.filters["data_url"] = data_url
    environment.filters["minus"] = minus
    return environment
