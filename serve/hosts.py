"""The check of a request's ``Host``, and the headers that bound what a browser does with the page.

A page of another site can make a browser call this server under a name of its own (DNS rebinding). So only the names
that this machine is meant to have are answered. Under an address in numbers, which no such page can have, all are.
"""

import ipaddress
import re
import socket

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HOST = re.compile(r"(\[(?P<address>[0-9a-f:.%]+)\]|(?P<name>[^\s:/\[\]@]+))(:\d{0,5})?")
LOCAL = ("localhost", "127.0.0.1", "::1")
_EVERYWHERE = ("0.0.0.0", "::", "")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def is_open(host: str) -> bool:
    """Whether a server that listens at ``host`` can be reached from other machines."""
    try:
        return not ipaddress.ip_address(host or "0.0.0.0").is_loopback
    except ValueError:
        return host.lower().removesuffix(".") != "localhost"


class HostCheck:
    """Middleware that answers only requests for a name of this server, and adds headers to each answer.

    Args:
        host: what the server listens at.
    """

    def __init__(self, app: ASGIApp, host: str):
        self._app = app
        self._takes_addresses = is_open(host)
        self._names = {*LOCAL, host.lower().removesuffix(".")} - {""}
        if host in _EVERYWHERE:
            name = socket.gethostname().lower()
            self._names |= {name, f"{name}.local", socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or passes it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        name = host_name(Headers(scope=scope).get("host", ""))
        if name in self._names or (self._takes_addresses and _is_address(name)):
            await self._app(scope, receive, send_with_headers)
            return
        text = "this server does not answer under that name; use the address that it printed, or start it with --host"
        await JSONResponse({"error": text}, 400)(scope, receive, send_with_headers)


def host_name(header: str) -> str:
    """The name in a ``Host`` header, without its port, in lower case: ``[::1]:8000`` -> ``::1``; "" for no host."""
    parts = _HOST.fullmatch(header.strip().lower())
    if parts is None:
        return ""
    return (parts["address"] or parts["name"]).removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
