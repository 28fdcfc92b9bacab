"""The client of a search server: ``onceover.Client``."""

import base64
import hashlib
import json
import math
import operator
from typing import Any

from PIL import Image

from onceover.analysis.hits_shown import Hits
from onceover.base.errors import OnceoverError
from onceover.base.files import read_bytes
from onceover.base.progress import warn
from onceover.extract.pictures import MAX_BYTES, THUMBNAIL_SIZE, PictureError, decode, jpeg_of, named_errors
from onceover.retrieval.search import Hit, Query, Term
from onceover.serve.limits import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, pixels_of

TIMEOUT = 60.0  # seconds
MAX_ANSWER = 64 * 2**20  # bytes
_SENT_SIZE = 1024  # pixels, the longer side of an image that is sent smaller than it is
_BUSY = "the server is busy; try again"


class ClientError(OnceoverError):
    """A server that does not answer or that refuses a query, or a call that makes no query."""


class Client:
    """Searches on a server that ``onceover serve`` started, with the queries and hits of a search on this machine.

    Args:
        url: the address that the server printed. timeout: seconds to wait for an answer.

    Raises:
        ClientError: ``url`` is no address.

    Example:
        >>> client = onceover.Client("http://127.0.0.1:8000")  # doctest: +SKIP
        >>> for hit in client.search("a dog in the snow", top_k=3):  # doctest: +SKIP
        ...     print(hit.score, hit.path)
    """

    def __init__(self, url: str, timeout: float = TIMEOUT):
        import requests

        self._url = str(url).rstrip("/")
        if not self._url.startswith(("http://", "https://")):
            raise ClientError(
                f"{self._url!r} is no address of a server; give the one that it printed: http://HOST:PORT"
            )
        self._timeout = _number("timeout", timeout)
        self._session = requests.Session()

    def info(self) -> dict[str, Any]:
        """What the server searches: its encoders, its galleries with their sizes, and which queries it takes.

        Raises:
            ClientError: no answer.
        """
        values = self._answer("GET", "/api/info")
        if not isinstance(values.get("galleries"), list) or not isinstance(values.get("encoders"), dict):
            raise self._wrong("its description lacks galleries or encoders")
        return values

    def search(
        self, query: Query | str, top_k: int = 5, min_score: float | None = None, *, gallery: str = "image"
    ) -> list[Hit]:
        """Finds the best ``top_k`` hits, best first; in a notebook they show themselves with their images.

        Args:
            query: a text, or a sum of terms. A term's image is a file's path or its bytes, and is sent (smaller, where
                it is larger than the server takes); an item is one of the gallery that is searched.
            min_score: leave out hits with a lower score.
            gallery: ``image`` or ``text``: find images, or captions.

        Raises:
            ClientError: no answer, a refusal, or arguments that make no query. PictureError: an image that cannot be
            read.
        """
        if not isinstance(query, str | Query):
            raise ClientError(f"a query is a text or an onceover Query; this one is {type(query).__name__}")
        terms = [Term(text=query)] if isinstance(query, str) else query.terms
        message = {
            "terms": [_message(term, gallery) for term in terms],
            "gallery": gallery,
            "top_k": _whole_number("top_k", top_k),
            "min_score": None if min_score is None else _number("min_score", min_score),
        }
        answer = self._answer("POST", "/api/search", json=message)
        found = answer.get("hits")
        if not isinstance(found, list):
            raise self._wrong("its answer has no hits")
        if answer.get("note"):
            warn(str(answer["note"]))
        hits = [self._hit(values) for values in found]
        images = {hit.id: values.get("image") for hit, values in zip(hits, found, strict=True)}
        return Hits(hits, gallery, lambda hit, size: self._image(images.get(hit.id), size))

    def _hit(self, values: Any) -> Hit:
        """A hit of an answer; further values are passed over."""
        try:
            hit = Hit(
                operator.index(values["rank"]),
                float(values["score"]),
                values["id"],
                values["path"],
                list(values["captions"]),
                list(values["same"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self._wrong("a hit lacks what belongs to it") from error
        if not all(isinstance(text, str) for text in (hit.id, hit.path, *hit.captions, *hit.same)):
            raise self._wrong("a hit lacks what belongs to it")
        return hit

    def _image(self, name: Any, size: int) -> Image.Image | None:
        """An image of the server's, its longer side at most ``size`` pixels; None where there is none."""
        if not isinstance(name, str):
            return None
        view = "thumbnail" if size <= THUMBNAIL_SIZE else "view"
        status, data = self._request("GET", f"/api/items/image/{view}", params={"id": name})
        if status != 200:
            return None
        try:
            image = decode(data, size)
        except PictureError:
            return None
        image.thumbnail((size, size))
        return image

    def _request(self, method: str, path: str, **options: Any) -> tuple[int, bytes]:
        """The status and the body of an answer."""
        import requests

        options |= {"timeout": self._timeout, "allow_redirects": False, "stream": True}
        data = bytearray()
        try:
            with self._session.request(method, self._url + path, **options) as answer:
                for chunk in answer.iter_content(2**16):
                    data += chunk
                    if len(data) > MAX_ANSWER:
                        raise self._wrong(f"its answer has more than {MAX_ANSWER / 2**20:.0f} MiB")
        except (requests.RequestException, OSError, ValueError) as error:
            raise ClientError(
                f"{self._url} does not answer ({type(error).__name__}); start it: onceover serve --run DIR"
            ) from error
        return answer.status_code, bytes(data)

    def _answer(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """The values of an answer in JSON.

        Raises:
            ClientError: no answer, no JSON, or a refusal.
        """
        status, data = self._request(method, path, **options)
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            values = None
        if status == 503 and not isinstance(values, dict):
            raise ClientError(_BUSY)
        if not isinstance(values, dict):
            raise self._wrong(f"it answered {status} and no JSON object")
        if status != 200:
            raise ClientError(str(values.get("error", f"{self._url} answered {status}"))[:1000])
        return values

    def _wrong(self, reason: str) -> ClientError:
        return ClientError(f"{self._url} is no search server of this version: {reason}")


def _message(term: Any, gallery: str) -> dict[str, Any]:
    """A term as the server takes it."""
    if not isinstance(term, Term):
        raise ClientError(f"the terms of a query are Terms; this one is {type(term).__name__}")
    kind, value = term.source
    weight = _number("weight", term.weight)
    if kind == "image":
        sent, sha256 = _image_bytes(value)
        message = {"image": base64.b64encode(sent).decode(), "weight": weight}
        return message | {"sha256": term.sha256 or sha256}
    if kind == "item":
        return {"item": value, "kind": gallery, "weight": weight}
    return {"text": value, "weight": weight}


def _image_bytes(image: str | bytes) -> tuple[bytes, str]:
    """The bytes of an image file, given by its path, its address or its bytes; of a large one, those of a smaller.

    The SHA-256 of the file comes with them.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        data = bytes(image)
        name = "the image"
    else:
        name = image
        with named_errors(name):
            data = read_bytes(image, MAX_BYTES)
    sha256 = hashlib.sha256(data).hexdigest()
    if len(data) <= MAX_IMAGE_BYTES and pixels_of(data) <= MAX_IMAGE_PIXELS:
        return data, sha256
    with named_errors(name):
        small = decode(data, _SENT_SIZE)
    small.thumbnail((_SENT_SIZE, _SENT_SIZE), Image.Resampling.LANCZOS)
    return jpeg_of(small, 95), sha256


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ClientError(f"{name} is {value!r:.100}; give a number")
    return number


def _whole_number(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise ClientError(f"{name} is {value!r:.100}; give a whole number") from error
