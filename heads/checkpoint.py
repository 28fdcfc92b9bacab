"""Reads and writes a run folder: settings, heads, history, provenance, and the state of an interrupted fit.

Heads are safetensors; the resume state is read with ``weights_only``. Nothing handed over by a user is unpickled.
"""

import contextlib
import csv
import dataclasses
import errno
import hashlib
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from onceover.base.files import digest, file_sha256, forgiving, forgiving_file, open_regular, uninterrupted
from onceover.base.formats import (
    CONFIG,
    EMBEDDINGS,
    FINETUNED,
    HEADS,
    HISTORY,
    PROVENANCE,
    RESUME,
    RUN_FORMAT,
    RUN_VERSION,
    TOKENIZER,
)
from onceover.base.hdf5 import stated_checksum
from onceover.base.progress import LOGGER
from onceover.configs.schema import Config, ModelConfig, load_config
from onceover.extract.encoder_files import known_tokenizer_files
from onceover.extract.store import changed_settings
from onceover.heads.models import DualHeads, Ensemble, as_one, members_of, weights_of
from onceover.heads.provenance import RunError, checked_file, read_provenance
from onceover.heads.replacement import remove_run, run_files
from onceover.retrieval.metrics import rsum_text

_OF_MEMBER = ("loss", "weight")  # of a member's settings in run.json, those that are none of ``model``


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run: its folder, settings (an ensemble's: its first member's), heads (eval mode) and provenance."""

    folder: Path
    config: Config
    heads: DualHeads | Ensemble
    provenance: dict

    def __repr__(self) -> str:
        encoders = " and ".join(self.provenance["encoders"][kind]["encoder"] for kind in ("image", "text"))
        dimensions = f"{sum(member['embedding_dim'] for member in self.provenance['members']):,} dimensions"
        chosen = self.provenance["selection"]
        return f"<Run {self.folder}: {encoders}, {dimensions}; {rsum_text(chosen['rsum'])} on {chosen['split']}>"

    @property
    def saw_validation(self) -> bool:
        """Whether the heads were fitted on the validation images as well, once these had chosen."""
        return self.config.training.refit

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The text encoder's tokenizer, file by file; none where the features were imported."""
        names = [name for name in self.provenance["files"] if name.startswith(f"{TOKENIZER}/")]
        files = {Path(name).name: checked_file(self.folder, name, self.provenance) for name in sorted(names)}
        return known_tokenizer_files(files)

    def trained_pair(self) -> "Run":
        """The run with its trained pair of heads alone, without what was added to it in closed form.

        Raises:
            RunError: several pairs were trained.
        """
        if len(self.provenance["best_epochs"]) > 1:
            raise RunError(
                f"{self.folder} is an ensemble of several trained pairs of heads, and one is needed: fit with "
                "training.members=1"
            )
        heads = members_of(self.heads)[0]
        return dataclasses.replace(self, heads=heads, provenance=self.provenance | {"members": member_settings(heads)})

    def load_encoder(self, kind: str, spec: str | None, device: str | None, *, plain: bool = False) -> Any:
        """The image or text encoder with the settings of the run.

        Args:
            spec: where the encoder is now, if it has moved. plain: as it was saved, in float32.
        """
        return self.encoder_loader(kind, spec)(device=device, plain=plain)

    def encoder_loader(self, kind: str, spec: str | None) -> Callable[..., Any]:
        """A function that loads the encoder of a kind, given ``device``, ``plain`` and ``backend``; can be pickled.

        Args:
            spec: where the encoder is now, if it has moved.
        """
        from onceover.extract.encoding.stored import stored_encoder

        return partial(
            stored_encoder,
            kind,
            self.provenance["encoders"][kind],
            self.provenance["recipes"][kind],
            self.provenance["extract"],
            self.tokenizer_files if kind == "text" else {},
            spec=spec,
        )

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
    """Loads a finished run with its heads.

    Raises:
        RunError: not there, unfinished or damaged.

    Example:
        >>> run = onceover.load_run("runs/first")
        >>> run.config.model.embedding_dim
        16
    """
    folder = Path(folder)
    provenance = read_provenance(folder)
    LOGGER.debug("opened the run %s", folder)
    config = load_config(folder / CONFIG)
    return Run(folder, config, load_heads(folder, provenance), provenance)


def run_at(run: Run | str | Path) -> Run:
    """Loads a run by its folder; returns one that is loaded already."""
    return run if isinstance(run, Run) else load_run(run)


def load_heads(folder: Path, provenance: dict) -> DualHeads | Ensemble:
    """Loads the heads in a folder, in eval mode.

    Args:
        provenance: its ``dims``, ``members`` and ``files`` name the shapes, the settings and the checksums.

    Raises:
        RunError: not there, not as they were written, or of another shape.
    """
    data = checked_file(folder, HEADS, provenance)
    dims = (provenance["dims"]["image"], provenance["dims"]["text"])
    members = []
    weights = []
    for settings in provenance["members"]:
        model = ModelConfig(**{name: value for name, value in settings.items() if name not in _OF_MEMBER})
        members.append(DualHeads(*dims, model, settings.get("loss", "contrastive")))
        weights.append(settings.get("weight", 1 / len(provenance["members"])))
    heads = as_one(members, weights)
    try:
        heads.load_state_dict(safetensors.torch.load(data))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise RunError(f"{folder / HEADS} is damaged or of other settings than {CONFIG}; fit again") from error
    return heads


def member_settings(heads: DualHeads | Ensemble) -> list[dict]:
    """The settings of each pair of heads with its loss and its weight, as ``load_heads`` takes them."""
    settings = []
    for member, weight in zip(members_of(heads), weights_of(heads), strict=True):
        settings.append(dataclasses.asdict(member.config) | {"loss": member.loss, "weight": weight})
    return settings


def begin(folder: Path, state: dict) -> None:
    """Starts an unfinished run that is no more than ``state``; of the folder's files those of a run are removed."""
    run_files(folder).set_aside(RESUME)
    save_resume(folder, state)  # first: what is left after a kill is a run too
    remove_run(folder)


def save_settings(folder: Path, config: Config, tokenizer_files: dict[str, bytes]) -> None:
    """Writes the settings and the tokenizer, the part of a run that is known before it starts."""
    import yaml

    outputs = run_files(folder)
    outputs.write_text(CONFIG, yaml.safe_dump(config.to_dict(), sort_keys=False))
    for name, data in known_tokenizer_files(tokenizer_files).items():
        outputs.write_bytes(f"{TOKENIZER}/{name}", data)


def save_heads(folder: Path, heads: DualHeads | Ensemble, fingerprints: dict[str, str]) -> str:
    """Writes the heads as safetensors; returns the name of their space, a digest of heads and features."""
    data = safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in heads.state_dict().items()})
    run_files(folder).write_bytes(HEADS, data)
    name = [hashlib.sha256(data).hexdigest(), fingerprints["image"], fingerprints["text"]]
    weights = weights_of(heads)
    if len(set(weights)) > 1:  # the heads of earlier versions, whose weights were equal, keep their name
        name += [repr(weight) for weight in weights]
    return digest(name)


def save_history(folder: Path, rows: list[dict]) -> None:
    """Writes the history, a row per epoch; recalls are blank after epochs without validation."""
    buffer = io.StringIO()
    longest = list(max(rows, key=lambda row: len([*row])))
    writer = csv.DictWriter(buffer, fieldnames=longest, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    run_files(folder).write_text(HISTORY, buffer.getvalue())


def save_provenance(folder: Path, provenance: dict) -> None:
    """Writes ``run.json``, whose presence means that the run is finished, and drops the resume state.

    Raises:
        RunError: a file of the run is missing.
    """
    record = {"format": RUN_FORMAT, "format_version": RUN_VERSION, **provenance, "files": files_of_run(folder)}
    if not (folder / EMBEDDINGS).is_file():
        raise RunError(f"{folder / EMBEDDINGS} was removed while the run was being written; fit again")
    outputs = run_files(folder)
    outputs.write_record(PROVENANCE, record | {"embeddings": stated_checksum(folder / EMBEDDINGS)})
    outputs.remove(lambda name: name == RESUME)


def files_of_run(folder: Path) -> dict[str, str]:
    """SHA-256 by name of the files that a run is checked by when it is read.

    Raises:
        RunError: one is missing.
    """
    names = [CONFIG, HEADS]
    if (folder / HISTORY).exists():
        names.append(HISTORY)
    if (folder / TOKENIZER).is_dir():
        names += sorted(name for name in run_files(folder).names() if name.startswith(f"{TOKENIZER}/"))
    try:
        return {name: file_sha256(folder / name) for name in names}
    except FileNotFoundError as error:
        raise RunError(f"{error.filename} was removed while the run was being written; fit again") from error


def save_resume(folder: Path, state: dict) -> None:
    """Writes the state to resume from. Its file marks the folder as an unfinished run."""
    with run_files(folder).file(RESUME) as aside, forgiving(aside) as file, uninterrupted():
        torch.save(state, file)


def save_state(path: Path, state: dict) -> None:
    """Writes tensors and plain values as torch does, whole or not at all."""
    with forgiving_file(path) as file, uninterrupted():
        torch.save(state, file)


def load_state(path: Path) -> dict:
    """Reads a file of ``save_state``, with its tensors on the CPU. Only tensors and plain values are unpickled.

    Raises:
        ValueError: it is damaged, or something else.
    """
    try:
        with open_regular(path) as file:
            with zipfile.ZipFile(file) as archive:  # torch does not compare the checksums that it writes
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"{damaged} does not match its checksum")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch and zipfile raise many kinds on a damaged archive, EINVAL for a seek before 0
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(next(iter(str(error).splitlines()), type(error).__name__)) from error
    if not isinstance(state, dict):
        raise ValueError("it holds no state")
    return state


def load_resume(folder: Path, request: str) -> dict | None:
    """Reads the state of an interrupted fit; None where there is none, or one of another request with nothing in it.

    Raises:
        RunError: it is of another request, or cannot be read.
    """
    path = folder / RESUME
    if not path.exists():
        return None
    try:
        state = load_state(path)
    except ValueError as error:
        raise RunError(f"{path} cannot be read ({error}); fit again with --force") from error
    if state.get("request") == request:
        return state
    if state.keys() <= {"request", "memory"} and not (folder / FINETUNED).exists():
        return None
    raise RunError(f"{folder} holds an interrupted fit of other settings or features; name another, or --force")


def load_begun(work: Path, request: str, force: bool) -> dict | None:
    """Reads the state of the run that was begun in ``work`` (``replacement.working_folder``); None to start anew.

    ``force`` gives up a run that cannot be resumed. A finished run that is to be replaced is not touched.


    Raises:
        RunError: an unfinished run of another request, or one that cannot be read, without ``force``.
    """
    if not force:
        return load_resume(work, request)
    with contextlib.suppress(RunError):
        return load_resume(work, request)
    return None
