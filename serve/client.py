"""The client of a search server: ``onceover.Client``."""

import base64
from typing import Any

from PIL import Image

from onceover.analysis.hits_shown import Hits
from onceover.base.errors import OnceoverError
from onceover.base.files import read_bytes
from onceover.extract.pictures import THUMBNAIL_SIZE, decode, named_errors
from onceover.retrieval.search import Hit, Query, Term
from onceover.serve.limits import MAX_IMAGE_BYTES

TIMEOUT = 60.0  # seconds


class ClientError(OnceoverError):
    """A server that does not answer, or that refuses a query; the text is the server's own."""


class Client:
    """Searches on a server that ``onceover serve`` started, with the queries and hits of a search on this machine.

    Args:
        url: the address that the server printed. timeout: seconds to wait for an answer.

    Example:
        >>> client = onceover.Client("http://127.0.0.1:8000")  # doctest: +SKIP
        >>> for hit in client.search("a dog in the snow", top_k=3):  # doctest: +SKIP
        ...     print(hit.score, hit.path)
    """

    def __init__(self, url: str, timeout: float = TIMEOUT):
        import requests

        self._url = url.rstrip("/")
        self._timeout = timeout
        self._session = requests.Session()

    def info(self) -> dict[str, Any]:
        """What the server searches: its encoders, its galleries with their sizes, and which queries it takes.

        Raises:
            ClientError: no answer.
        """
        return self._answer("GET", "/api/info")

    def search(
        self, query: Query | str, top_k: int = 5, min_score: float | None = None, *, gallery: str = "image"
    ) -> list[Hit]:
        """Finds the best ``top_k`` hits, best first; in a notebook they show themselves with their images.

        Args:
            query: a text, or a sum of terms. A term's image is a file's path or its bytes, and is sent; an item is one
                of the gallery that is searched.
            min_score: leave out hits with a lower score.
            gallery: ``image`` or ``text``: find images, or captions.

        Raises:
            ClientError: no answer, or a refusal. PictureError: an image that cannot be read.
        """
        terms = [Term(text=query)] if isinstance(query, str) else query.terms
        message = {
            "terms": [_message(term, gallery) for term in terms],
            "gallery": gallery,
            "top_k": top_k,
            "min_score": min_score,
        }
        hits = []
        images: dict[str, str | None] = {}
        for values in self._answer("POST", "/api/search", json=message)["hits"]:
            images[values["id"]] = values.pop("image")
            hits.append(Hit(**values))
        return Hits(hits, gallery, lambda hit, size: self._image(images[hit.id], size))

    def _image(self, name: str | None, size: int) -> Image.Image | None:
        """An image of the server's, its longer side at most ``size`` pixels; None where there is none."""
        if name is None:
            return None
        view = "thumbnail" if size <= THUMBNAIL_SIZE else "view"
        answer = self._request("GET", f"/api/items/image/{view}", params={"id": name})
        if not answer.ok:
            return None
        image = decode(answer.content, size)
        image.thumbnail((size, size))
        return image

    def _request(self, method: str, path: str, **options: Any) -> Any:
        import requests

        try:
            return self._session.request(method, self._url + path, timeout=self._timeout, **options)
        except requests.RequestException as error:
            raise ClientError(
                f"{self._url} does not answer ({type(error).__name__}); start it: onceover serve --run DIR"
            ) from error

    def _answer(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer = self._request(method, path, **options)
        try:
            values = answer.json()
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise ClientError(f"{self._url} is no search server: it answered {answer.status_code} and no JSON")
        if not answer.ok:
            raise ClientError(str(values.get("error", f"{self._url} answered {answer.status_code}")))
        return values


def _message(term: Term, gallery: str) -> dict[str, Any]:
    """A term as the server takes it."""
    kind, value = term.source
    if kind == "image":
        return {"image": base64.b64encode(_image_bytes(value)).decode(), "weight": term.weight}
    if kind == "item":
        return {"item": value, "kind": gallery, "weight": term.weight}
    return {"text": value, "weight": term.weight}


def _image_bytes(image: str | bytes) -> bytes:
    """The bytes of an image file that is given by its path or address, or by its bytes."""
    if isinstance(image, bytes):
        return image
    with named_errors(image):
        return read_bytes(image, MAX_IMAGE_BYTES)
