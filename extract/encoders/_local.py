"""Models that lie on this machine, in a folder or a file of weights: what several libraries do with them alike."""

import json
from pathlib import Path
from typing import Any

from onceover.base.files import MAX_TEXT, FileError, read_bytes
from onceover.extract.encoders import Spec, file_stamps


def spec_with_weights(text: str, library: str) -> Spec:
    """Parses ``LIBRARY:NAME_OR_FOLDER[@WEIGHTS]``; a folder's name may have an @ in it."""
    name = text.removeprefix(f"{library}:")
    if Path(name).is_dir():
        return Spec(text, library, name, "")
    if name.endswith("@random"):
        return Spec(text, library, name.removesuffix("@random"), "random")
    name, _, weights = name.partition("@")
    return Spec(text, library, name, weights)


def local_stamps(spec: Spec) -> list[list[Any]]:
    """The stamps of the files of a model's folder, or of its file of weights; none where neither is there."""
    if Path(spec.name).is_dir():
        return file_stamps(sorted(path for path in Path(spec.name).iterdir() if path.is_file()))
    return file_stamps([path for path in [Path(spec.weights)] if path.is_file()])


def folder_config(folder: Path) -> dict[str, Any]:
    """The settings in the ``config.json`` of a folder; none where it cannot be read."""
    try:
        config = json.loads(read_bytes(folder / "config.json", MAX_TEXT))
    except (OSError, FileError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
