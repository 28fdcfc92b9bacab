"""The server's connections: idle ones are closed, and requests that are under way when it is stopped are refused."""

import asyncio
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER_TIME = 10.0  # seconds that a connection may be open without a whole request


class Stoppable:
    """Middleware that answers a request that is given up, since the server is stopped, with the status 503."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, and answers it if nobody else does."""
        has_begun = False

        async def noted_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted_send)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            if not has_begun:
                text = "the server is stopping; try again when it runs"
                await JSONResponse({"error": text}, 503)(scope, receive, send)


class Server(uvicorn.Server):
    """A server that closes connections that bring no request, and that stops at once.

    Args:
        stop: called when it is to end, so that queries that wait are refused.
    """

    def __init__(self, config: uvicorn.Config, stop: Callable[[], None]):
        super().__init__(config)
        self._stop = stop
        self._idle: dict[tuple[object, object], float] = {}

    async def on_tick(self, counter: int) -> bool:
        """Closes, each second, the connections that have been waiting for a request for too long."""
        if counter % 10 == 0:
            self._close_idle(time.monotonic())
        return await super().on_tick(counter)

    def _close_idle(self, now: float) -> None:
        idle: dict[tuple[object, object], float] = {}
        for connection in list(self.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            if cycle is not None and not cycle.response_complete:
                continue
            since = self._idle.get((connection, cycle), now)
            idle[connection, cycle] = since
            if now - since > HEADER_TIME:
                connection.transport.abort()
        self._idle = idle

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to end at a signal; a second one ends at once."""
        if self.should_exit:
            self.force_exit = True
        super().handle_exit(sig, frame)

    async def shutdown(self, *arguments: object, **options: object) -> None:
        """Gives up all requests, which are answered with 503, and closes the connections."""
        self._stop()
        for task in list(self.server_state.tasks):
            task.cancel()
        await super().shutdown(*arguments, **options)  # type: ignore[arg-type]
