"""The JSON API and the page's files, as a FastAPI application. It reads, and changes nothing."""

import asyncio
import functools
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from onceover import __version__
from onceover.analysis import pages
from onceover.base.errors import OnceoverError
from onceover.retrieval.search import Query as SearchQuery
from onceover.retrieval.search import Term
from onceover.serve.batching import BusyError
from onceover.serve.bodies import BodyLimit
from onceover.serve.connections import Stoppable
from onceover.serve.engine import Question
from onceover.serve.hosts import HostCheck
from onceover.serve.limits import MAX_DECODED
from onceover.serve.lookup import NoItemError
from onceover.serve.messages import (
    ErrorMessage,
    HitsMessage,
    ImageTerm,
    InfoMessage,
    ItemMessage,
    ItemTerm,
    Kind,
    MapMessage,
    SearchMessage,
    TextTerm,
)
from onceover.serve.paired import item_name
from onceover.serve.site import Site
from onceover.serve.uploads import uploaded_image

_REASONS = {
    400: "The query cannot be answered.",
    404: "There is no such item.",
    408: "The request took too long to arrive.",
    413: "The request is too large.",
    422: "The request is not of this form.",
    503: "The server is busy, or is stopping.",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorMessage, "description": reason} for status, reason in _REASONS.items()
}
_JPEG: dict[str, Any] = {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}}
_IMAGES: dict[int | str, dict[str, Any]] = {200: _JPEG, **_ERRORS}
_PLAIN = {  # what is said of a value, by the type of what is wrong, in place of the library's own words
    "string_pattern_mismatch": "is empty; write one",
    "string_too_short": "is empty; give one",
    "string_too_long": "has more than {max_length:,} characters; shorten it",
    "string_type": "is no text",
    "json_invalid": "is no JSON",
    "missing": "is missing",
    "extra_forbidden": "is no setting",
    "too_short": "is empty; give at least one term",
    "too_long": "has more than {max_length:,} terms; remove some",
    "list_type": "is no list",
    "literal_error": "has to be {expected}",
    "finite_number": "is no finite number",
    "float_type": "is no number",
    "int_type": "is no whole number",
    "greater_than_equal": "is below {ge:,}; raise it",
    "less_than_equal": "is above {le:,}; lower it",
}
_SUBJECTS = {"terms": "the query", "top_k": "top_k", "min_score": "min_score"}
Id = Annotated[str, Query(min_length=1, max_length=4096, description="The item's id.")]
Stamp = Annotated[str, Query(max_length=64, description="The stamp of /api/info; with it, the image may be kept.")]


def create_app(site: Site, host: str) -> FastAPI:
    """The application that serves a site under the names that belong to ``host``, where it listens."""
    app = FastAPI(
        title="onceover",
        version=__version__,
        summary="Searches images and captions.",
        openapi_url="/api/openapi.json",
        docs_url=None,  # it loads its scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(BodyLimit)
    app.add_middleware(Stoppable)
    app.add_middleware(HostCheck, host=host)
    app.add_exception_handler(OnceoverError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(Exception, _answer_fault)
    _add_api(app, site)
    _add_page(app)
    return app


def _add_api(app: FastAPI, site: Site) -> None:
    decoders = asyncio.Semaphore(MAX_DECODED)

    async def term_of(message: TextTerm | ItemTerm | ImageTerm) -> Term:
        if isinstance(message, TextTerm):
            return Term(text=message.text, weight=message.weight)
        if isinstance(message, ItemTerm):
            site.items.check(message.kind, message.item)
            return Term(item=item_name(message.kind, message.item), weight=message.weight)
        async with decoders:
            upload = await run_in_threadpool(uploaded_image, message.image, site.engine)
        return Term(image=upload, weight=message.weight, sha256=message.sha256)

    @app.get("/api/info", responses={status: _ERRORS[status] for status in (400, 413)})
    def info() -> InfoMessage:
        """What is served: encoders, galleries with their sizes, and which queries are taken."""
        return site.info()

    @app.post("/api/search", responses=_ERRORS)
    async def search(message: SearchMessage) -> HitsMessage:
        """The items that are nearest to a query, best first."""
        terms = tuple([await term_of(term) for term in message.terms])
        question = Question(SearchQuery(terms), message.gallery, message.top_k, message.min_score)
        answer = await asyncio.wrap_future(site.engine.ask(question))
        hits = [site.items.shown(message.gallery, hit) for hit in answer.hits]
        return HitsMessage.model_validate({"hits": hits, "best_score": answer.best_score, "note": answer.note})

    @app.get("/api/items/image/thumbnail", response_class=Response, responses=_IMAGES)
    def thumbnail(id: Id, stamp: Stamp = "") -> Response:
        """A small JPEG of an image."""
        return _jpeg(site.items.thumbnail(id), stamp == site.stamp)

    @app.get("/api/items/image/view", response_class=Response, responses=_IMAGES)
    def view(id: Id, stamp: Stamp = "") -> Response:
        """A JPEG of an image, at most 1,024 pixels wide and high."""
        return _jpeg(site.items.view(id), stamp == site.stamp)

    @app.get("/api/items/{kind}", responses=_ERRORS)
    def item(kind: Kind, id: Id) -> ItemMessage:
        """An image with its captions, or a caption with its image."""
        return ItemMessage.model_validate(site.items.item(kind, id), from_attributes=True)

    @app.get("/api/map", responses={status: _ERRORS[status] for status in (400, 404, 413)})
    def points() -> MapMessage:
        """A map of at most 1,000 images with a caption each; ask again until it is complete."""
        return site.map()


def _jpeg(data: bytes, is_current: bool) -> Response:
    """An answer that a browser may keep where its address names what is served now."""
    caching = "private, max-age=86400, immutable" if is_current else "no-cache"
    return Response(data, media_type="image/jpeg", headers={"Cache-Control": caching})


def _add_page(app: FastAPI) -> None:
    files = {
        "/": (page_file("index.html"), "text/html"),
        "/page.css": (pages.source("page.css") + page_file("page.css"), "text/css"),
        "/page.js": (page_file("page.js"), "text/javascript"),
        "/map.css": (pages.source("map.css"), "text/css"),
        "/map.js": (pages.source("map.js"), "text/javascript"),
    }
    for path, (text, media_type) in files.items():
        answer = functools.partial(_static, text, media_type)
        app.add_api_route(path, answer, methods=["GET", "HEAD"], include_in_schema=False, response_class=Response)


def page_file(name: str) -> str:
    """The text of a file of the page."""
    from importlib.resources import files

    return (files("onceover.serve") / name).read_text(encoding="utf-8")


def _static(text: str, media_type: str) -> Response:
    return Response(text, media_type=media_type, headers={"Cache-Control": "no-cache"})


def _answer_error(request: Request, error: Exception) -> JSONResponse:
    """An error that the user can mend."""
    status = 400
    if isinstance(error, NoItemError):
        status = 404
    if isinstance(error, BusyError):
        status = 503
    return JSONResponse({"error": " ".join(str(error).split())}, status)


def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    text = str(error.detail)
    if error.status_code == 404:
        text = "there is nothing under this address; /api/openapi.json lists what there is"
    return JSONResponse({"error": text}, error.status_code, error.headers)


def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    """A request that is not of the form that the description states: the first thing that is wrong."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = first["loc"]
    name = str(place[-1])
    subject = _SUBJECTS.get(name, f"the {name}") if first["type"] != "json_invalid" else "the body"
    text = first["msg"]
    if first["type"] in _PLAIN:
        text = f"{subject} {_PLAIN[first['type']]}".format_map(first.get("ctx", {}))
    if len(place) > 2 and isinstance(place[2], int):
        text = f"term {place[2] + 1}: {text}"
    return JSONResponse({"error": text}, 422)


def _answer_fault(request: Request, error: Exception) -> JSONResponse:
    text = "a fault of the program; the terminal that it was started in says more: please report that"
    return JSONResponse({"error": text}, 500)
