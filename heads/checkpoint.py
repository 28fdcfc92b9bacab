"""The run folder: settings, heads, history, provenance, and the state that an interrupted fit goes on from.

Heads are safetensors; the resume state is read with ``weights_only``. Nothing handed over by a user is unpickled.
"""

import csv
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from configs.formats import (
    CONFIG,
    EMBEDDINGS,
    ENCODERS,
    ERRORS,
    EVALUATION,
    FINETUNED,
    HEADS,
    HISTORY,
    PROVENANCE,
    RESUME,
    RUN_FORMAT,
    RUN_VERSION,
    SHUFFLED,
    TOKENIZER,
)
from configs.schema import Config, ModelConfig, load_config
from extract.files import digest, read_json, remove_folder, whole_file, write_json, write_text
from extract.store import changed_settings
from heads.models import DualHeads, Ensemble
from heads.provenance import RunError, read_provenance

TRIAL = ".trial"  # a folder in which fine-tuning tries whether the encoders can be saved


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, settings (an ensemble's: its first member's), heads (eval mode) and provenance."""

    folder: Path
    config: Config
    heads: DualHeads | Ensemble
    provenance: dict

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The text encoder's tokenizer, file by file; none where the features were imported."""
        return {path.name: path.read_bytes() for path in sorted((self.folder / TOKENIZER).glob("*"))}

    def check_space(self, space: str) -> None:
        """Refuses vectors that other heads have made.

        Raises:
            RunError: they are of another space.
        """
        if space != self.provenance["space"]:
            raise RunError(f"the vectors were not made by the heads of {self.folder}; fit again, or name their own run")

    def check_encoder(self, kind: str, recipe: dict) -> None:
        """Refuses an encoder that is not the one whose features the heads were fitted on.

        Raises:
            RunError: its fingerprint differs.
        """
        if digest(recipe) == self.provenance["fingerprints"][kind]:
            return
        changed = changed_settings(recipe, self.provenance["recipes"][kind])
        raise RunError(
            f"the {kind} encoder is not the one that {self.folder} was fitted with (they differ in: {changed}); "
            "restore that encoder, or extract and fit again"
        )


def load_run(folder: str | Path) -> Run:
    """A finished run with its heads.

    Raises:
        RunError: not there, unfinished or damaged.
    """
    folder = Path(folder)
    provenance = read_provenance(folder)
    config = load_config(folder / CONFIG)
    return Run(folder, config, load_heads(folder, provenance), provenance)


def load_heads(folder: Path, provenance: dict) -> DualHeads | Ensemble:
    """The heads in a folder, in eval mode, of the ``dims`` and ``members`` that a provenance names.

    Raises:
        RunError: not there, damaged or of another shape.
    """
    dims = provenance["dims"]["image"], provenance["dims"]["text"]
    members = [DualHeads(*dims, ModelConfig(**settings)) for settings in provenance["members"]]
    heads = members[0] if len(members) == 1 else Ensemble(members)
    try:
        heads.load_state_dict(safetensors.torch.load_file(folder / HEADS))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise RunError(f"{folder / HEADS} is missing, damaged or of other settings than {CONFIG}; fit again") from error
    return heads.eval()


def holds_run(folder: Path) -> bool:
    """Whether ``folder`` is a run of this program, finished or not, whatever its version."""
    if (folder / RESUME).is_file():
        return True
    return (folder / PROVENANCE).is_file() and read_json(folder / PROVENANCE, "run.json").get("format") == RUN_FORMAT


def claim_folder(folder: Path, force: bool) -> None:
    """Sees that nothing but a run is in a folder; ``force`` removes what that consists of.

    Raises:
        RunError: it holds something else.
    """
    if folder.exists() and any(folder.iterdir()) and not holds_run(folder):
        raise RunError(f"{folder} is not empty and no run; name a new folder")
    if force:
        begin(folder, {})


def begin(folder: Path, state: dict) -> None:
    """Makes a folder an unfinished run that is no more than ``state``; what a run consists of is removed, no more."""
    save_resume(folder, state)  # first: what is left after a kill is a run too
    for name in (PROVENANCE, FINETUNED, CONFIG, HEADS, HISTORY, EMBEDDINGS):
        (folder / name).unlink(missing_ok=True)
    for file in (*folder.glob(EVALUATION.format("*")), *folder.glob(ERRORS.format("*"))):
        file.unlink()
    for name in (SHUFFLED, TOKENIZER, ENCODERS, TRIAL):
        remove_folder(folder / name)


def save_settings(folder: Path, config: Config, tokenizer_files: dict[str, bytes]) -> None:
    """Writes the settings and the tokenizer, the part of a run that is known before it starts."""
    import yaml

    write_text(folder / CONFIG, yaml.safe_dump(config.to_dict(), sort_keys=False))
    for name, data in tokenizer_files.items():
        with whole_file(folder / TOKENIZER / name) as aside:
            aside.write_bytes(data)


def save_heads(folder: Path, heads: DualHeads | Ensemble, fingerprints: dict[str, str]) -> str:
    """Writes the heads as safetensors; returns the name of their space, a digest of heads and features."""
    data = safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in heads.state_dict().items()})
    with whole_file(folder / HEADS) as aside:
        aside.write_bytes(data)
    return digest([hashlib.sha256(data).hexdigest(), fingerprints["image"], fingerprints["text"]])


def save_history(folder: Path, rows: list[dict]) -> None:
    """Writes the history, one row an epoch; what was not measured after an epoch is left blank."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(max(rows, key=len)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / HISTORY, buffer.getvalue())


def save_provenance(folder: Path, provenance: dict) -> None:
    """Writes ``run.json``, whose presence means that the run is finished, and drops the resume state."""
    write_json(folder / PROVENANCE, {"format": RUN_FORMAT, "format_version": RUN_VERSION, **provenance})
    (folder / RESUME).unlink(missing_ok=True)


def save_resume(folder: Path, state: dict) -> None:
    """Writes the state after an epoch. From the first file on it marks the folder as an unfinished run."""
    with whole_file(folder / RESUME) as aside:
        torch.save(state, aside)


def load_resume(folder: Path, request: str) -> dict | None:
    """The state of an interrupted fit, or None where there is none, or one of another request with nothing to keep.

    Raises:
        RunError: it is of another request, or cannot be read.
    """
    path = folder / RESUME
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on a damaged archive
        raise RunError(f"{path} cannot be read; fit again with --force") from error
    if state.get("request") == request:
        return state
    if state.keys() <= {"request", "memory"} and not (folder / FINETUNED).exists():
        return None
    raise RunError(f"{folder} holds an interrupted fit of other settings or features; name another, or --force")
