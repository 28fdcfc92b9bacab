"""Queries as people write them: read line by line, told apart as texts and images, checked, and made into sums."""

import codecs
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import BinaryIO, NamedTuple

from onceover.base.addresses import is_address
from onceover.base.progress import warn
from onceover.configs.schema import ConfigError
from onceover.extract.pictures import read_picture
from onceover.retrieval.search import AT_ONCE, Query, SearchError, Term, check_encoding

MAX_QUERY = 10_000  # characters of a query
MINUS_WEIGHT = 0.5  # of all terms that are subtracted, together; those that are added weigh 1
_READ = 2**16  # bytes read at a time
_IMAGE_NAME = re.compile(r"\S+\.(jpe?g|png|gif|bmp|webp|tiff?)", re.IGNORECASE)


class Mode(NamedTuple):
    """A way to search: the kind of the query and the kind of the items that are found, ``image`` or ``text``."""

    query: str
    gallery: str


MODES = {
    "text2image": Mode("text", "image"),
    "image2text": Mode("image", "text"),
    "image2image": Mode("image", "image"),
    "text2text": Mode("text", "text"),
}


def mode_of(name: str) -> Mode:
    """The way to search of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in MODES:
        raise ConfigError(f"there is no mode {name!r:.80}; take one of {', '.join(MODES)}")
    return MODES[name]


def check_query(query: str, mode: str) -> None:
    """Refuses a query that cannot be meant for ``mode``, before any model is loaded.

    Raises:
        SearchError: an empty query, a text where an image's path is wanted, an image where a text is, or bytes that
            are no text.
    """
    _check_content(query)
    if mode_of(mode).query == "image":
        _check_image_query(query, mode)
    else:
        _check_text_query(query, mode)


def _check_content(query: str) -> None:
    if not query.strip():
        raise SearchError("the query is empty; give a text or an image's path")
    if len(query) > MAX_QUERY:
        raise SearchError(f"the query has {len(query):,} characters; shorten it to {MAX_QUERY:,} at most")


def _check_image_query(query: str, mode: str) -> None:
    if is_address(query) or _is_file(query):  # an address is looked for when it is read
        return
    problem = "is a folder" if os.path.isdir(query) else "is no file"  # noqa: PTH112
    raise SearchError(f"{query[:200]!r} {problem}; {mode} takes an image's path (for a text: --mode text2image)")


def _check_text_query(query: str, mode: str) -> None:
    check_encoding(query)
    mend = "to search by an image, add --mode image2text (finds captions) or image2image (finds images)"
    is_file = _is_file(query)
    if is_file and "." in query:
        raise SearchError(f"{query!r} is a file; {mend}")
    if is_address(query) and _IMAGE_NAME.fullmatch(query.strip()):
        raise SearchError(f"{query[:200]!r} is an address; {mend}")
    if not is_file and _IMAGE_NAME.fullmatch(query.strip()):
        raise SearchError(f"there is no file {query!r}; {mode} takes a text; {mend}")


def _is_file(query: str) -> bool:
    return os.path.isfile(query)  # noqa: PTH113 (False, not an error, for a text too long to be a path)


def term_of(value: str, weight: float) -> Term:
    """The term that a text, or the path or address of an image, stands for.

    Raises:
        SearchError: it is empty, a folder, an image file that is not there, or bytes that are no text.
    """
    _check_content(value)
    if is_address(value) or (_is_file(value) and "." in value):
        return Term(image=value, weight=weight)
    if _IMAGE_NAME.fullmatch(value.strip()):
        raise SearchError(f"there is no file {value[:200]!r}; give an image's path, or a text")
    if os.sep in value and os.path.isdir(value):  # noqa: PTH112
        raise SearchError(f"{value[:200]!r} is a folder; give an image's path, or a text")
    check_encoding(value)
    return Term(text=value, weight=weight)


def further_terms(with_: Sequence[str], minus: Sequence[str], weight: float) -> tuple[Term, ...]:
    """The terms that are added to a query of the weight ``weight``, and subtracted from it; images are decoded.

    All that is added weighs 1 - ``weight``, all that is subtracted ``MINUS_WEIGHT``, each in equal parts.

    Raises:
        SearchError: a weight outside [0, 1]; and those of ``term_of``. PictureError: no usable image.
    """
    if not 0 <= weight <= 1:
        raise SearchError(f"the weight is {weight}; it is the query's share, 0 to 1")
    terms = [term_of(value, (1 - weight) / len(with_)) for value in with_]
    terms += [term_of(value, -MINUS_WEIGHT / len(minus)) for value in minus]
    for term in terms:
        if isinstance(term.image, str):
            read_picture(term.image)
    return tuple(terms)


def query_of(value: str, mode: str, weight: float, further: tuple[Term, ...]) -> Query:
    """The query that searches by ``value``, a text or the path of an image by ``mode``, and by further terms."""
    if mode_of(mode).query == "image":
        return Query((Term(image=value, weight=weight), *further))
    return Query((Term(text=value, weight=weight), *further))


def read_queries(file: BinaryIO, name: str) -> Iterator[list[str]]:
    """Yields queries, one a line, in batches of those that are there; empty lines are left out, counted at the end.

    Each batch is what one read gives, so that a line of a pipe is passed on when it arrives.

    Raises:
        SearchError: no UTF-8, a line longer than ``MAX_QUERY`` characters, or no queries.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    rest = ""
    line_count = 0
    query_count = 0
    is_end = False
    while not is_end:
        data = file.read1(_READ)  # type: ignore[attr-defined]  # which every buffered file has
        is_end = not data
        try:
            *lines, rest = (rest + decoder.decode(data, final=is_end)).split("\n")
        except UnicodeDecodeError as error:
            raise SearchError(f"{name} is not UTF-8; convert it, for example with iconv") from error
        if is_end and rest:
            lines.append(rest)
        for number, line in enumerate([*lines, rest], line_count + 1):
            if len(line) > MAX_QUERY:
                raise SearchError(
                    f"{name}, line {number:,} has more than {MAX_QUERY:,} characters; write one query a line"
                )
        line_count += len(lines)
        queries = [query for line in lines if (query := line.strip())]
        query_count += len(queries)
        yield from batched(queries)
    if not query_count:
        raise SearchError(f"{name} holds no queries; write one a line")
    if line_count > query_count:
        warn(f"empty lines left out: {line_count - query_count}")


def batched(queries: Iterable[str]) -> Iterator[list[str]]:
    """Batches of queries that are searched together."""
    remaining = iter(queries)
    while batch := list(islice(remaining, AT_ONCE)):
        yield batch


def checked(batches: Iterable[list[str]], mode: str) -> Iterator[list[str]]:
    """Checks batches of queries against ``mode`` and passes them on; images are decoded.

    Raises:
        SearchError: a query of the wrong kind (``check_query``). PictureError: no usable image.
    """
    for batch in batches:
        for query in batch:
            check_query(query, mode)
        if mode_of(mode).query == "image":
            for path in batch:
                read_picture(path)
        yield batch
