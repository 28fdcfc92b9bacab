"""Turns the errors of other libraries, which raise many kinds, into errors of one line."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from onceover.base.errors import OnceoverError, first_line
from onceover.extract.encoders import EncoderError, Spec

_SYSTEM_ERROR = re.compile(r"\(os error (\d{1,4})\)")


def reason(error: BaseException) -> str:
    """An error's text for a message: on one line, and cut."""
    line = " ".join(first_line(error).split()) or type(error).__name__
    return f"{line:.200}"


@contextlib.contextmanager
def loading(spec: Spec) -> Iterator[None]:
    """Turns whatever libraries raise on a damaged model or tokenizer into an error of one line.

    A full disk or memory is not the model's fault: those errors pass as they are.
    """
    try:
        with system_errors(tempfile.gettempdir()):
            yield
    except (OnceoverError, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit):
        raise
    except OSError as error:
        if error.errno is not None:  # the system's own; transformers raises others, without a number
            raise
        raise EncoderError(f"{spec.text}: {_unusable(spec)} ({reason(error)})") from error
    except BaseException as error:  # tokenizers' panics are no Exception
        raise EncoderError(f"{spec.text}: {_unusable(spec)} ({reason(error)})") from error


@contextlib.contextmanager
def system_errors(folder: str | Path) -> Iterator[None]:
    """Turns system errors that libraries in Rust pass on as text back into ``OSError``."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        number = _SYSTEM_ERROR.search(str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(folder)) from error


def _unusable(spec: Spec) -> str:
    """The fault of a model that cannot be loaded, for a message."""
    if Path(spec.name).exists():
        return "the folder holds no usable model"
    return "the model or its tokenizer cannot be loaded"
