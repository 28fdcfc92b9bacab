"""The drivers of addresses such as ``s3://bucket/data``: fsspec's file systems, and what their errors mean to a user.

A driver is asked for within each process anew, since its connections do not outlive a fork.
"""

import contextlib
import errno
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from onceover.base.errors import OnceoverError, first_line

Result = TypeVar("Result")

WAIT = 20.0  # seconds for the first answer of a host
#: the package that has the driver, where it is not fsspec's own
PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    "hf": "huggingface_hub",
    "smb": "smbprotocol",
}
_EXAMPLES = ("s3", "gs", "az", "hf", "https", "memory")
_CREDENTIALS = {
    "s3fs": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE; for public data FSSPEC_S3_ANON=true",
    "gcsfs": "run gcloud auth application-default login; for public data set FSSPEC_GS_TOKEN=anon",
    "adlfs": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "huggingface_hub": "set HF_TOKEN",
    "aiohttp": "name an address that can be read without logging in, or download it",
}
_ANY_CREDENTIALS = "give credentials as the documentation of its driver says"
_NETWORK = {"s3fs": "check the network, and AWS_ENDPOINT_URL where the store is not Amazon's"}
_ANY_NETWORK = "check the network and the name of the host"

# Errors of libraries that may not be installed, by the names of their classes.
_NO_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),
    *("TokenRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError", "NoAuthTokenError"),
    *("DefaultCredentialsError", "RefreshError", "ClientAuthenticationError", "GatedRepoError"),
}
_UNREACHABLE = {
    *("EndpointConnectionError", "ConnectTimeoutError", "ConnectTimeout", "ReadTimeoutError", "ReadTimeout"),
    *("ProxyConnectionError", "SSLError", "ConnectionClosedError", "HTTPClientError", "ServiceRequestError"),
    *("ClientConnectorError", "ClientConnectorDNSError", "ServerTimeoutError", "ServerDisconnectedError"),
    *("ConnectionTimeoutError", "ClientOSError", "FSTimeoutError", "ConnectError"),
}
_REFUSED = {401, 403}
_NO_SUCH_PART = {416, "416", "InvalidRange"}

_shared: dict[tuple[int, str], Any] = {}  # drivers that threads may share, by process and host
_answered: set[tuple[int, str]] = set()


class AddressError(OnceoverError):
    """An address that cannot be opened: of an unknown kind, without its driver, or not to be reached."""


def _after_fork() -> None:
    """Has fsspec start its thread again in a forked process, which does not inherit it; old releases need that."""
    asyn = sys.modules.get("fsspec.asyn")
    if asyn is not None:
        asyn.reset_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def kind_of(text: str) -> str:
    """The kind of an address: ``s3`` of ``s3://bucket/data``."""
    return text.partition("://")[0].lower()


def host_of(text: str) -> str:
    """An address up to its bucket or host: ``s3://bucket``."""
    rest = text.partition("://")[2]
    return f"{kind_of(text)}://{rest.partition('/')[0]}"


def check_driver(text: str) -> None:
    """Refuses an address that has no driver here.

    Raises:
        AddressError: of an unknown kind, or the driver's package is not installed, which is named.
    """
    import fsspec

    kind = kind_of(text)
    try:
        fsspec.get_filesystem_class(kind)
    except ImportError as error:
        package = PACKAGES.get(kind)
        mend = f"pip install {package}" if package else first_line(error)
        raise AddressError(f"{text}: the package that reads {kind}:// is missing: {mend}") from error
    except ValueError as error:
        kinds = ", ".join(f"{known}://" for known in _EXAMPLES)
        raise AddressError(f"{text}: no kind of address is called {kind}://; some are {kinds}") from error


def driver_of(text: str) -> Any:
    """The file system of fsspec that an address is read with, of this process.

    Raises:
        AddressError: no driver is installed. Any other error is the driver's own.
    """
    key = (os.getpid(), host_of(text))
    driver = _shared.get(key)
    if driver is not None:
        return driver
    check_driver(text)
    from fsspec.core import url_to_fs

    driver, _ = url_to_fs(text)
    if driver.async_impl:  # others hold a connection that is a single thread's; fsspec keeps one for each
        driver = _shared.setdefault(key, driver)
    return driver


def forget(text: str) -> None:
    """Forgets the listings that the driver of an address keeps, so that it is looked up again."""
    driver = _shared.get((os.getpid(), host_of(text)))
    if driver is not None:
        driver.invalidate_cache()


def ask(text: str, work: Callable[[Any], Result]) -> Result:
    """The result of ``work``, which is given the driver of an address; its errors become errors of one line.

    The first answer of a host is waited for ``WAIT`` seconds; later ones as long as the driver does.

    Raises:
        AddressError: without an answer, or without credentials. FileNotFoundError, PermissionError, OSError: others.
    """
    key = (os.getpid(), host_of(text))
    if key in _answered:
        with _explaining(text):
            return work(driver_of(text))
    with _explaining(text):
        try:
            result = _within(WAIT, lambda: work(driver_of(text)))
        except (FileNotFoundError, PermissionError):
            _answered.add(key)
            raise
    _answered.add(key)
    return result


def _within(seconds: float, work: Callable[[], Result]) -> Result:
    """The result of ``work``, from a thread that is left behind where it takes too long.

    Raises:
        TimeoutError: it does.
    """
    results: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((True, work()))
        except BaseException as error:
            results.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        succeeded, result = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds") from None
    if not succeeded:
        raise result
    return result  # type: ignore[no-any-return]


def read_part(text: str, start: int, size: int) -> bytes:
    """At most ``size`` bytes of a file from ``start`` on; none where the file ends before.

    Raises:
        AddressError: not to be reached. OSError: not there, not to be read, or the server gives no parts of files.
    """
    if size <= 0:
        return b""
    try:
        return ask(text, lambda driver: _part(driver, text, start, size))
    except OSError as error:
        if any(_code(cause) in _NO_SUCH_PART for cause in _causes(error)):
            return b""
        raise


def _part(driver: Any, text: str, start: int, size: int) -> bytes:
    path = driver._strip_protocol(text)
    if kind_of(text) not in ("http", "https"):
        part: bytes = driver.cat_file(path, start=start, end=start + size)
        return part
    # a web server may answer with the whole file, however large
    headers = {"Range": f"bytes={start}-{start + size - 1}"} if start else {}
    chunks = []
    with driver.open(path, "rb", block_size=0, size=size, headers=headers) as stream:
        if start and stream.r.status != 206:
            raise OSError(errno.ENOTSUP, "its server gives files only as a whole; download it")
        while size > 0:
            chunk = stream.read(size)
            if not chunk:
                break
            chunks.append(chunk)
            size -= len(chunk)
    return b"".join(chunks)


@contextlib.contextmanager
def _explaining(text: str) -> Iterator[None]:
    """Turns an error of a driver into one that says what is wrong and how to mend it."""
    try:
        yield
    except OnceoverError:
        raise
    except Exception as error:  # drivers raise nearly anything
        raise _explained(text, error) from error


def _explained(text: str, error: Exception) -> Exception:
    """The error to raise for one of a driver's."""
    package = PACKAGES.get(kind_of(text), "")
    causes = list(_causes(error))
    names = {parent.__name__ for cause in causes for parent in type(cause).__mro__}
    codes = {_code(cause) for cause in causes}
    reasons = [reason for reason in map(first_line, causes) if reason not in text and text not in reason]
    reason = reasons[0] if reasons else first_line(error)
    if names & _NO_CREDENTIALS:
        return AddressError(f"{text}: {reason}; {_CREDENTIALS.get(package, _ANY_CREDENTIALS)}")
    if "NoSuchBucket" in codes:
        return AddressError(f"{text}: there is no bucket of that name; {_NETWORK.get(package, _ANY_NETWORK)}")
    if isinstance(error, PermissionError) or codes & _REFUSED:
        mend = _CREDENTIALS.get(package, _ANY_CREDENTIALS)
        return PermissionError(errno.EACCES, f"access is refused ({reason}); {mend}", text)
    for cause in causes:
        if isinstance(cause, ConnectionError | socket.gaierror | TimeoutError) or names & _UNREACHABLE:
            return AddressError(f"{text} cannot be reached ({reason}); {_NETWORK.get(package, _ANY_NETWORK)}")
    if isinstance(error, FileNotFoundError) and not any(isinstance(code, int) and code >= 500 for code in codes):
        return FileNotFoundError(errno.ENOENT, "no such file", text)
    if isinstance(error, OSError) and error.strerror and error.errno:
        return OSError(error.errno, error.strerror, text)
    return OSError(errno.EIO, reason, text)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _code(error: BaseException) -> str | int | None:
    """The code that a server gave an error: an HTTP status, or a word of S3."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        code = response.get("Error", {}).get("Code")
        return code if isinstance(code, str | int) else None
    for name in ("status", "status_code", "code"):
        for holder in (error, response):
            code = getattr(holder, name, None)
            if isinstance(code, int):
                return code
    return None


def download(text: str, path: "os.PathLike[str]") -> None:
    """Copies a file at an address to a path; what is written there when it fails is not whole.

    Raises:
        AddressError: not to be reached. OSError: not there, or not to be read or written.
    """
    ask(text, lambda driver: driver.get_file(driver._strip_protocol(text), os.fspath(path)))


def upload(path: "os.PathLike[str]", text: str) -> None:
    """Copies a file to an address; an object store shows it when it is whole, others may show a part of it.

    Raises:
        AddressError: not to be reached. OSError: not to be read or written.
    """
    ask(text, lambda driver: driver.put_file(os.fspath(path), driver._strip_protocol(text)))


def remove(text: str) -> None:
    """Removes a file at an address, if it is there.

    Raises:
        AddressError: not to be reached. OSError: not to be removed.
    """
    with contextlib.suppress(FileNotFoundError):
        ask(text, lambda driver: driver.rm_file(driver._strip_protocol(text)))
