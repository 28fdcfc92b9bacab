"""A worker's share of an extraction: every N-th shard of a plan that all workers of a store read.

Nothing but the folder ``FILE.h5.parts`` is shared, on whatever file system, and no lock is needed: the first worker to
come makes the folder, with settings and plan in it, by one rename, and a shard that is there already is never replaced.
An extraction without a worker seals the store in the end.
"""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from onceover.base.addresses import is_address
from onceover.base.progress import say, warn
from onceover.base.worker import Worker, WorkerError
from onceover.configs.schema import ExtractConfig
from onceover.extract.computing import encode_shards
from onceover.extract.dataset import Dataset
from onceover.extract.extraction import Extraction, Options, Work
from onceover.extract.pipeline import (
    check_backend,
    check_room,
    extraction_of,
    full_memory_told,
    is_done,
    load_encoders,
)
from onceover.extract.plan import Shard, shards_of
from onceover.extract.planning import captions_to_encode, new_plan, origin_of
from onceover.extract.store import FeatureStore, StoreError, store_exists
from onceover.extract.store_form import store_place
from onceover.extract.summary import Speed
from onceover.extract.unfinished import Unfinished

_ORIGINS = {
    "listing": "images, captions, or the sizes and times of the images' files",
    "fingerprint": "the encoder or its settings",
    "columns": "thumbnails",
    "beside": "the store that is extended",
    "retry_failures": "--retry-failures",
    "batch": "the batch size",
}


@dataclass(frozen=True)
class Share:
    """The outcome of a worker.

    Attributes:
        path: of the store. worker: which one.
        sealed: whether the store is there and needs no worker.
        computed: rows that this call encoded, by kind. speed: by kind. seconds: of all.
        left: how many shards are not there yet, by worker; only of workers that have some.
    """

    path: Path
    worker: Worker
    sealed: bool = False
    computed: Mapping[str, int] = field(default_factory=dict)
    speed: Mapping[str, Speed] = field(default_factory=dict)
    seconds: float = 0.0
    left: Mapping[int, int] = field(default_factory=dict)

    def tell(self) -> None:
        """Tells the user what was encoded, and which workers are not done."""
        if self.sealed:
            return
        encoded = ", ".join(f"{count:,} {kind}" for kind, count in self.computed.items())
        say(f"rows encoded by worker {self.worker}: {encoded} in {self.seconds:.0f} s")
        for kind, speed in self.speed.items():
            say(f"{kind}: {speed}")
        if self.left:
            shown = [f"{number}/{self.worker.count} ({count:,})" for number, count in self.left.items()]
            say(f"workers that have shards left: {', '.join(shown)}")


def extract_share(
    dataset: Dataset,
    path: str | Path,
    config: ExtractConfig,
    worker: Worker,
    *,
    device: str | None = None,
    engine: str = "auto",
    backend: str = "auto",
    prune: bool = False,
    retry_failures: bool = False,
) -> Share:
    """Encodes a worker's shards of ``dataset``; all workers are given the same, and ``extract`` seals the store.

    Any number of workers may run at once, anywhere, and again after they were killed.

    Args:
        as for ``extract``.

    Raises:
        WorkerError: the store is shared by another number of workers, or was planned from something else.
        StoreError: other features are already there, or rows would be dropped.
        EncoderError: an encoder cannot be had.
    """
    start = time.monotonic()
    if is_address(path):
        raise WorkerError(
            f"workers share the folder in which a store is written, and {path} is an address; give them a --store in "
            f"a folder that all of them write to, and put it there at the end: onceover repack STORE --to {path}"
        )
    place = store_place(path)
    path = place.path
    unfinished = Unfinished(path)
    unfinished.claim()
    plans = {kind: unfinished.plan(kind) for kind in ("image", "text")}  # before it is seen whether there is a store
    options = Options(force=False, retry_failures=retry_failures, prune=prune, keep_vanished=False)
    with extraction_of(dataset, place, config, options) as extraction:
        if is_done(extraction):
            return Share(path, worker, sealed=True)
        if os.path.ismount(path):
            raise WorkerError(
                f"{path} is where a disk is mounted, and workers share a folder beside the store, which would lie on "
                f"another disk; name a store in it: {path / 'NAME.store'}"
            )
        work, captions, plans = _prepared(extraction, worker, plans, device, engine, backend)
        shards = {kind: shards_of(plans[kind], kind, unfinished.folder) for kind in work.make}
        own = {kind: worker.own(of_kind) for kind, of_kind in shards.items()}
        counts = [f"{len(own[kind]):,} of {len(of_kind):,} {kind} shards" for kind, of_kind in shards.items()]
        say(f"worker {worker}: {', '.join(counts)}")
        try:
            _encode(extraction, work, captions, own)
        except FileNotFoundError:
            if any(unfinished.plan(kind) for kind in own):
                raise
            _refuse_lost_plan(extraction)
            return Share(path, worker, sealed=True)
    seconds = time.monotonic() - start
    left = _left(worker, shards.values())
    return Share(path, worker, False, work.counts.computed, work.counts.speed, seconds, left)


def _refuse_lost_plan(extraction: Extraction) -> None:
    """Refuses to take a plan that is gone for the end of the extraction, where the store lacks what was planned.

    Raises:
        WorkerError: it does; the plan was removed by an extraction of other images.
    """
    place = extraction.place
    if store_exists(place.store):
        with FeatureStore(place.store, mend=True) as store:
            options = replace(extraction.options, retry_failures=False)
            if is_done(replace(extraction, old=store, options=options)):
                return
    raise WorkerError(
        f"the plan in {extraction.unfinished.folder} was removed while this worker was following it, and {place.store} "
        "lacks what was planned; run the command again"
    )


def _prepared(
    extraction: Extraction, worker: Worker, plans: dict[str, dict], device: str | None, engine: str, backend: str
) -> tuple[Work, Sequence[str], dict[str, dict]]:
    """Loads the encoders, and takes up the plans of the worker that came first, or makes them where this one does.

    Returns:
        The means to encode, the captions to be encoded, and the plans by kind.
    """
    from onceover.extract.begin import begin_settings
    from onceover.extract.encoding.devices import log_device, pick_devices
    from onceover.extract.engines import engine_for

    unfinished = extraction.unfinished
    devices = pick_devices(device)
    picked = devices[0]
    log_device(picked)
    engine_name, chosen = engine_for(engine, devices)
    check_backend(backend)
    for _ in range(2):
        settings = begin_settings(unfinished, extraction.config, picked, backend, worker=worker)
        with full_memory_told(extraction, settings):
            work = load_encoders(extraction, settings, engine_name, chosen)
        captions = captions_to_encode(extraction, work)
        if any(plans.values()):
            _check_plans(extraction, work, captions, plans)
            return work, captions, plans
        plans = {kind: new_plan(extraction, work, kind, captions, worker.count) for kind in work.make}
        check_room(extraction, work)
        if unfinished.begin(settings, plans):
            return work, captions, plans
        plans = {kind: unfinished.plan(kind) for kind in work.make}  # of another worker, which was first
        if any(plans.values()) and unfinished.settings() == settings:  # else the encoders are loaded by its settings
            _check_plans(extraction, work, captions, plans)
            return work, captions, plans
    raise StoreError(
        f"{unfinished.folder} holds what is left of an extraction that was ended; run the command without --worker, "
        "or remove that folder"
    )


def _check_plans(extraction: Extraction, work: Work, captions: Sequence[str], plans: Mapping[str, dict]) -> None:
    """Refuses plans that were made from something else than what this worker was given.

    Raises:
        WorkerError: they were.
    """
    for kind in work.make:
        origin = origin_of(extraction, work, kind, captions)
        changed = [key for key, value in origin.items() if plans[kind].get(key) != value]
        if changed:
            raise WorkerError(
                f"{extraction.unfinished.folder} was planned for something else than this worker was given ({kind}: "
                f"{', '.join(_ORIGINS[key] for key in changed)}); give it the command of the others, run the command "
                "without --worker, or name another --store"
            )


def _encode(extraction: Extraction, work: Work, captions: Sequence[str], own: Mapping[str, list[Shard]]) -> None:
    """Has the shards of a worker encoded that are not there yet, or no longer as they should be."""
    dataset = extraction.dataset
    unfinished = extraction.unfinished
    for kind, shards in own.items():
        there = [shard.file for shard in shards if shard.file.exists()]
        for reason in unfinished.remove_damaged_shards(there):
            warn(f"encoding a damaged shard again: {reason}")
        if kind == "image":
            sound = [file for file in there if file.exists()]
            unfinished.remove_shards_with_passed_failures(dataset, sound)
        with full_memory_told(extraction, work.settings):
            encode_shards(extraction, work, kind, captions, shards, sum(shard.size for shard in shards))


def _left(worker: Worker, shards: Iterable[list[Shard]]) -> dict[int, int]:
    """How many shards are not there yet, by the number of the worker, of those that have some."""
    left: dict[int, int] = {}
    for of_kind in shards:
        for number in range(1, worker.count + 1):
            own = Worker(number, worker.count).own(of_kind)
            missing = sum(not shard.file.exists() for shard in own)
            if missing:
                left[number] = left.get(number, 0) + missing
    return dict(sorted(left.items()))
