"""HTML pages: templates, styles and scripts are files of this folder; Jinja2 fills them and escapes every value.

A page that is written to disk is one file: ``{{ source("page.css") | safe }}`` puts a style or script into it, and
``{{ jpeg | data_url }}`` an image. ``{{ value | tojson }}`` writes data that a script reads.
"""

import base64
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """Fills a template of this folder; text in ``values`` is escaped, and a value that is missing is an error."""
    return _environment().get_template(template).render(**values)


def source(name: str) -> str:
    """The text of a style or script of this folder."""
    return (FOLDER / name).read_text(encoding="utf-8")


def data_url(image: bytes, media_type: str = "image/jpeg") -> str:
    """An image as an address that holds its bytes."""
    return f"data:{media_type};base64,{base64.b64encode(image).decode()}"


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
    )
    environment.globals["source"] = source
    environment.filters["data_url"] = data_url
    return environment
