"""``onceover serve``: opens what is served, loads the models, and answers until Ctrl-C."""

import contextlib
import errno
import logging
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onceover.base.errors import OnceoverError
from onceover.base.extras import Extra
from onceover.base.formats import EMBEDDINGS
from onceover.base.progress import LOGGER, say, warn

if TYPE_CHECKING:
    import uvicorn

    from onceover.serve.site import Site

_PACKAGES = (Extra("serve", "fastapi", "fastapi"), Extra("serve", "uvicorn", "uvicorn"))
_GRACE = 1  # seconds that answers under way get when the server is stopped
_LAST_BATCH = 1.0  # seconds that the models get to finish a batch then


class ServeError(OnceoverError):
    """A place where the server cannot listen."""


def serve(
    run: str | Path | None = None,
    index: str | Path | Sequence[str | Path] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    split: str | None = None,
    rerank: str | None = None,
    roots: Sequence[str | Path] = (),
    batch_size: int = 64,
    device: str | None = None,
    encoders: dict[str, str | None] | None = None,
) -> None:
    """Serves the search page of a run or an index until Ctrl-C.

    Args:
        host, port: where to listen; port 0 takes a free one.
        split, rerank: of a run: only this split; the hubness correction.
        roots: folders that the images may have moved to.
        batch_size: queries answered together at most.
        encoders: by kind, the new location of an encoder that has moved.

    Raises:
        MissingPackageError: the extra ``serve`` is not installed. ServeError: the port is in use. And those of
        ``heads.searching.open_collection``.
    """
    for package in _PACKAGES:
        package.imported("onceover serve")
    from onceover.serve.hosts import is_open

    with contextlib.closing(listening(host, port)) as listener:
        say("loading the models")
        options: dict[str, Any] = {"split": split, "rerank": rerank, "device": device, "encoders": encoders}
        site = open_site(run, index, roots=roots, batch_size=batch_size, **options)
        if is_open(host):
            warn(f"{host} is open to the network: everybody who reaches this machine can search and see the images")
        nouns = {"image": "images", "text": "captions"}
        counts = ", ".join(f"{gallery.size:,} {nouns[gallery.kind]}" for gallery in site.info().galleries)
        with contextlib.suppress(KeyboardInterrupt):  # raised when the last answer is given
            say(f"ready: {_address(host, listener)} searches {counts}; Ctrl-C stops it")
            with _quiet_queries():
                server_of(site, host).run(sockets=[listener])
        with _quiet_queries(), contextlib.suppress(KeyboardInterrupt):  # a second one
            site.close(_LAST_BATCH)
    say("stopped")


def open_site(
    run: str | Path | None,
    index: str | Path | Sequence[str | Path] | None = None,
    *,
    roots: Sequence[str | Path] = (),
    batch_size: int = 64,
    **options: Any,
) -> "Site":
    """Opens what is served of a run or an index, and loads the models; options as ``open_collection``."""
    from onceover.heads.searching import named_indexes, open_collection
    from onceover.serve.site import Site

    collection = open_collection(run, index, **options)
    folders = named_indexes(index) if index else [collection.run.folder]
    splits = {} if index else _splits(collection.run.folder)
    site = Site(collection, folders, splits, roots, batch_size)
    site.engine.warm_up()
    return site


def server_of(site: "Site", host: str) -> "uvicorn.Server":
    """A server of the page and the API, for requests under the names that belong to ``host``."""
    import uvicorn

    from onceover.serve.api import create_app
    from onceover.serve.connections import Server
    from onceover.serve.limits import MAX_CONNECTIONS

    config = uvicorn.Config(
        create_app(site, host),
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE,
        ws="none",
    )
    return Server(config, site.engine.stop)


def _splits(run: Path) -> dict[str, str]:
    """The split of each image of a run, by its id."""
    from onceover.retrieval.embeddings import read_embeddings

    embeddings = read_embeddings(run / EMBEDDINGS)
    return dict(zip(embeddings.ids, embeddings.splits, strict=True))


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens, so that a port in use is told before models are loaded.

    Raises:
        ServeError: the port is in use, or the host is not this machine's.
    """
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(place[:2], family=family, backlog=256)
        # Connections inherit it. Else the second part of each answer would wait for 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except UnicodeError as error:  # an empty or too long part between dots
        raise ServeError(f"{host[:80]!r} is no name of a machine; --host 127.0.0.1 is this one") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = f"the port {port} is in use; name another one: --port {port + 1}"
        elif error.errno in (errno.EACCES, errno.EPERM):
            reason = f"the port {port} is not open to you; name one from 1024: --port 8000"
        else:
            reason = f"{host!r} is no address of this machine ({error.strerror}); --host 127.0.0.1 is"
        raise ServeError(reason) from error


def _address(host: str, listener: socket.socket) -> str:
    """The address of the page, as a browser on this machine takes it."""
    port = listener.getsockname()[1]
    name = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


@contextlib.contextmanager
def _quiet_queries() -> Iterator[None]:
    """Within, warnings about single queries are not printed: they would be of every key that somebody types."""
    before = LOGGER.level
    if before > logging.DEBUG:
        LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        LOGGER.setLevel(before)
