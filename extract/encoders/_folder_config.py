"""What a model's folder says about itself, without loading the model: by that its library is known."""

import json
from pathlib import Path
from typing import Any

from onceover.base.files import MAX_TEXT, FileError, read_bytes


def folder_config(folder: Path) -> dict[str, Any]:
    """The settings in the ``config.json`` of a folder; none where it cannot be read."""
    try:
        config = json.loads(read_bytes(folder / "config.json", MAX_TEXT))
    except (OSError, FileError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
