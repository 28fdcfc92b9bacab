"""The bodies of requests: read within limits, and refused where they are larger or slower."""

import asyncio

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onceover.serve.limits import BODY_TIME, MAX_BODIES, MAX_BODY


class BodyLimit:
    """Middleware that reads a request's body, in chunks or at once, and refuses one that is too large or too slow.

    The bodies of all requests have a common bound, too. Nothing beyond the limits is kept, and nothing is written to
    disk.
    """

    def __init__(self, app: ASGIApp, most: int = MAX_BODY, together: int = MAX_BODIES, seconds: float = BODY_TIME):
        self._app = app
        self._most = most
        self._together = together
        self._seconds = seconds
        self._held = 0  # bytes of bodies that are in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or passes it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        try:
            async with asyncio.timeout(self._seconds):
                refusal = await self._read(scope, receive, body)
        except TimeoutError:
            refusal = _refusal(408, "the request took too long to arrive; send a smaller image")
        try:
            if refusal is not None:
                await refusal(scope, receive, send)
                return
            await self._app(scope, _replayed(bytes(body), receive), send)
        finally:
            self._held -= len(body)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> JSONResponse | None:
        """Reads a request's body; returns why it is refused, or None."""
        too_large = _refusal(413, f"the request has more than {self._most / 2**20:,.0f} MiB; send a smaller image")
        if _stated_length(scope) > self._most:
            return too_large
        while True:
            message = await receive()
            chunk = message.get("body", b"")
            if len(body) + len(chunk) > self._most:
                return too_large
            if self._held + len(chunk) > self._together:
                return _refusal(503, "the server is busy with other large requests; try again")
            body += chunk
            self._held += len(chunk)
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return None


def _refusal(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status, {"Connection": "close"})


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
