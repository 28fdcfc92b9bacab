"""The files of transformers' tokenizers: saved to bytes, and loaded again from them."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onceover.extract.encoder_files import known_tokenizer_files, without_code


def saved_files(tokenizer: Any) -> dict[str, bytes]:
    """The files of a tokenizer by name, enough to make it again; they name no code of its own."""
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save_pretrained(name)
        saved = {path.name: path.read_bytes() for path in sorted(Path(name).iterdir()) if path.is_file()}
    return known_tokenizer_files(without_code(saved))


@contextlib.contextmanager
def folder_of(files: dict[str, bytes]) -> Iterator[Path]:
    """A folder with a tokenizer's files, as long as it is within.

    Raises:
        EncoderError: they name code that is to be run.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, data in known_tokenizer_files(files).items():
            (folder / file).write_bytes(data)
        yield folder


def load_tokenizer(files: dict[str, bytes]) -> Any:
    """transformers' tokenizer of such files; code of its own is never run."""
    from transformers import AutoTokenizer

    with folder_of(files) as folder:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
