"""The folder of an unfinished extraction, ``FILE.h5.parts``: its settings, its plans and its finished shards."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from onceover.base.errors import OnceoverError
from onceover.base.files import (
    FileError,
    aside_folder,
    place_folder,
    read_json,
    read_record,
    remove_asides,
    remove_files,
    visible_names,
)
from onceover.base.hdf5 import raise_passing
from onceover.base.outputs import RECORD, Outputs
from onceover.extract.dataset import Dataset
from onceover.extract.formats import why_no_decoder
from onceover.extract.image_source import ImageSource
from onceover.extract.ledger import is_passing
from onceover.extract.plan import is_plan
from onceover.extract.shards import describe_shard, shard_failures, shard_files
from onceover.extract.store import KINDS, StoreError, parts_folder

_SETTINGS = "settings.json"
_PLANS = tuple(f"{kind}.plan.json" for kind in KINDS)


class Unfinished:
    """An unfinished extraction of the store at ``path``.

    Attributes:
        folder: where it lies; it need not be there.
    """

    def __init__(self, path: Path):
        self.folder = parts_folder(path)
        self._outputs = _outputs(self.folder)

    def claim(self) -> None:
        """Refuses a folder that is somebody else's.

        Raises:
            StoreError: it is a link, no folder, or holds something else.
        """
        if self.folder.parent.is_dir():
            remove_asides(self.folder.parent, self.folder.name)
        if self.folder.is_symlink():
            raise StoreError(f"{self.folder} is a link, and an extraction keeps its shards there; move it elsewhere")
        if self.folder.exists() and not self.folder.is_dir():
            raise StoreError(
                f"{self.folder} is where an extraction keeps its shards, and it is no folder; move it elsewhere"
            )
        if not self.folder.is_dir() or _SETTINGS in self._outputs.names():
            return
        if _are_settings(self.folder / _SETTINGS):  # an earlier version kept no record
            self._outputs.adopt(name for name in (_SETTINGS, *_PLANS) if (self.folder / name).is_file())
            return
        shards = {shard.name for shard in self.shards()}  # which a worker put there while the folder was removed
        strange = [name for name in visible_names(self.folder) if name not in shards]
        if strange:
            raise StoreError(
                f"{self.folder} is where an extraction keeps its shards, and it holds something else ({strange[0]}); "
                "move that elsewhere, or name another --store"
            )

    def shards(self, kind: str = "") -> list[Path]:
        """The finished shards, of one kind or of both, in their order."""
        return shard_files(self.folder, kind)

    def remove(self) -> None:
        """Removes settings, plans and shards; what else lies in the folder stays.

        A worker that is still busy may put shards there until the folder is gone.
        """
        self._remove_shards()
        self._outputs.remove(lambda name: name in _PLANS)
        self._outputs.remove(_SETTINGS.__eq__)  # last: what is left after a kill is still an extraction's
        remove_files(self.folder, [RECORD], everyones=True)
        while self.shards() and not self._is_begun():
            self._remove_shards()
            remove_files(self.folder, [])

    def _is_begun(self) -> bool:
        return (self.folder / _SETTINGS).exists()

    def _remove_shards(self) -> None:
        for shard in self.shards():
            shard.unlink(missing_ok=True)

    def remove_damaged_shards(self, shards: Iterable[Path] | None = None) -> list[str]:
        """Removes shards that are not as they were written, whose rows are then encoded again; why, for each.

        Args:
            shards: those that are looked at, by default all.

        Raises:
            OSError: one cannot be read, for a reason that may pass.
        """
        reasons = []
        for shard in self.shards() if shards is None else shards:
            try:
                describe_shard(shard)
            except OnceoverError as error:
                raise_passing(error, shard)
                reasons.append(str(error))
                shard.unlink()
        return reasons

    def remove_shards_with_passed_failures(self, dataset: Dataset, shards: Iterable[Path] | None = None) -> None:
        """Removes shards without images that could not be read then and can be read now; they are encoded again.

        Args:
            dataset: of the images.
            shards: those that are looked at, by default all of images.
        """
        failed = {}
        for shard in self.shards("image") if shards is None else shards:
            failed[shard] = {failure.id for failure in shard_failures(shard) if is_passing(failure)}
        paths = dataset.paths_of(set().union(*failed.values()))
        for shard, names in failed.items():
            if any(is_readable(dataset.images, paths[name]) for name in names if name in paths):
                shard.unlink()

    def settings(self) -> dict | None:
        """Device, backend, dtypes and batch size that it was begun with; None where there are none.

        That is so before it was begun, and where a kill came while it was removed. An extraction of an earlier version
        was begun with the backend ``eager``.

        Raises:
            FileError: they are damaged.
        """
        path = self.folder / _SETTINGS
        if not path.exists():
            return None
        begun = read_record(path, "the unfinished extraction's settings", strict=False)
        is_sound = isinstance(begun.get("device"), str) and isinstance(begun.get("batch_size"), int)
        earlier = {"backend": "eager", "backends": dict.fromkeys(KINDS, "eager")}
        begun = earlier | begun
        is_sound &= isinstance(begun["backend"], str) and isinstance(begun["backends"], dict)
        if not is_sound or not isinstance(begun.get("dtypes"), dict):
            raise FileError(f"{path} is damaged; remove {self.folder} and run the command again")
        return begun

    def is_shared(self) -> bool:
        """Whether workers share it, so that its settings stand before its first shard is finished."""
        try:
            settings = self.settings()
        except FileError:
            return False
        return settings is not None and "workers" in settings

    def plan(self, kind: str) -> dict:
        """The plan for the images or captions; empty where there is none.

        Raises:
            FileError: it is damaged.
        """
        path = self.folder / f"{kind}.plan.json"
        if not self._outputs.holds(path.name):
            return {}
        plan = read_record(path, "the plan", strict=False)
        return plan if is_plan(plan) else {}

    def write(self, settings: Mapping[str, Any], plans: Mapping[str, dict]) -> None:
        """Writes what it is begun with, and its plans by kind, where no worker has just begun it.

        Raises:
            StoreError: a worker has. OutputError: a file of somebody else's has the name of one.
        """
        if self.folder.is_dir():
            _write(self._outputs, settings, plans)
        elif not self.begin(settings, plans):
            raise StoreError(f"workers have just begun {self.folder}; run the command again to go on with it")

    def begin(self, settings: Mapping[str, Any], plans: Mapping[str, dict]) -> bool:
        """Makes the folder, which appears with settings and plans at once; any number of processes may try to.

        Returns:
            Whether this one was the first, so that its settings and plans are those that stand.
        """
        if self.shards() and not self._is_begun():  # of a worker that was busy when the folder was removed
            self._remove_shards()
            remove_files(self.folder, [])
        with aside_folder(self.folder) as aside:
            _write(_outputs(aside), settings, plans)
            return place_folder(aside, self.folder)


def _outputs(folder: Path) -> Outputs:
    return Outputs(folder, "move it elsewhere, or name another --store", keep_changed=False)


def _write(outputs: Outputs, settings: Mapping[str, Any], plans: Mapping[str, dict]) -> None:
    """Writes settings, which make a folder an extraction's, and plans by kind."""
    outputs.write_record(_SETTINGS, dict(settings))
    for kind, plan in plans.items():
        outputs.write_record(f"{kind}.plan.json", plan)


def is_readable(images: ImageSource, key: str) -> bool:
    """Whether the bytes of an image can be read at the moment, and what decodes them is installed."""
    try:
        return why_no_decoder(images.open(key)) is None
    except (OSError, OnceoverError):
        return False


def _are_settings(path: Path) -> bool:
    """Whether a file has what an extraction's settings have."""
    try:
        return {"device", "batch_size", "dtypes"} <= read_json(path, "settings").keys()
    except FileError:
        return False
