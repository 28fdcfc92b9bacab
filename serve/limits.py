"""The bounds of what the search page takes from a request, and the refusal of bodies that are larger."""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_IMAGE_BYTES = 16 * 2**20  # of an image that is searched by
MAX_IMAGE_PIXELS = 50_000_000
MAX_BODY = 24 * 2**20  # bytes of a request; an image takes a third more in base64
MAX_TERMS = 16  # of a query
MAX_HITS = 200
MAX_WEIGHT = 100.0
MAX_CONNECTIONS = 256
MAX_WAITING = 1024  # queries; further ones are refused until there is room


class BodyLimit:
    """Middleware that reads a request's body, in chunks or at once, and refuses one of more than ``MAX_BODY`` bytes.

    Nothing beyond the limit is kept, and nothing is written to disk.
    """

    def __init__(self, app: ASGIApp, most: int = MAX_BODY):
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or passes it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _stated_length(scope) > self._most:
            await self._refusal()(scope, receive, send)
            return
        body = bytearray()
        is_complete = False
        while not is_complete:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > self._most:
                await self._refusal()(scope, receive, send)
                return
            is_complete = not message.get("more_body", False)
        await self._app(scope, _replayed(bytes(body), receive), send)

    def _refusal(self) -> JSONResponse:
        text = f"the request has more than {self._most / 2**20:,.0f} MiB; send a smaller image"
        return JSONResponse({"error": text}, 413, {"Connection": "close"})


def _stated_length(scope: Scope) -> int:
    """The length that a request states; 0 where it states none, or something else than a number."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body that was read already, and then what ``receive`` gives."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        if messages:
            return messages.pop()
        return await receive()

    return replay
