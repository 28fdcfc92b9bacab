"""Dataset -> encoders -> feature store: plans what is new, encodes it shard by shard, seals the store.

Where the processor encodes, batches go through a pool of threads, each of which reads, decodes and encodes one batch in
a single stream of arithmetic, so that every core has work at any time and none waits for another. Where a GPU encodes,
processes read and decode, and this one keeps the GPU fed, with a batch begun before the last is waited for. Some
threads write the shards meanwhile.

Nothing finished is lost when the process is killed: shards are whole files, and the plan, the batch size and the
arithmetic are fixed before the first one, so that a resumed store equals an uninterrupted one bit for bit, on the same
hardware.
"""

import contextlib
import hashlib
import os
import platform
import shlex
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from onceover.base.errors import OnceoverError
from onceover.base.files import (
    FileError,
    check_disk,
    digest,
    link_target,
    only_writer,
    remove_files,
)
from onceover.base.memory import peak_memory, total_memory
from onceover.base.threads import Speed, ahead, deaths_told, in_order, in_processes, shared, shares
from onceover.configs.schema import ExtractConfig
from onceover.extract.dataset import Dataset
from onceover.extract.encoders import change_stamp as identity
from onceover.extract.encoders import parse_spec
from onceover.extract.image_source import ImageSource
from onceover.extract.ledger import NOT_ENCODED, Failure, is_passing
from onceover.extract.pictures import PictureError, decode, thumbnail
from onceover.extract.store import (
    KINDS,
    FeatureStore,
    RowSources,
    StoreError,
    caption_ids,
    changed_settings,
    describe_shard,
    kept_folder,
    seal,
    shard_files,
    write_shard,
)
from onceover.extract.unfinished import Unfinished, is_readable

if TYPE_CHECKING:
    from onceover.extract.encoding.preprocessing import Preprocessing

SHARD_ROWS = {"image": 128, "text": 1024}  # what a kill can cost: some seconds of work
ON_A_GPU = {"image": 4, "text": 2}  # times that many there
PIECE = 16  # images that a process decodes at a time for a GPU
MOST_PROCESSES = 64  # each holds some files open, and up to two pieces of memory
WRITERS = 3  # threads: while one waits for the disk, others prepare and write; so many shards are held in memory
TOKENIZERS = 4  # processes; more take longer to begin than they save
BATCH_SIZE = {"cpu": 16, "cuda": 128, "mps": 64}
CAPTIONS_PER_PICTURE = 4  # in a batch: a caption takes that much less memory and time
ROW_BYTES = {"image": 8192, "text": 256}  # about what a row takes beside its features; a thumbnail makes the most of it
SAMPLE = {"image": 32, "text": 256}  # records that ``--dtype auto`` decides by
AUTO_ERROR = 0.014  # of the features' spread: below it, 99 of 100 nearest neighbours stay (docs/results.md)
MOST_LOST = 0.5  # of the images whose features are kept, what may be unreadable without a refusal
_LIBRARIES = ("torch", "torchvision", "transformers", "numpy", "pillow", "h5py")

Say = Callable[[str], None]


@dataclass
class Summary:
    """What an extraction did. ``computed`` and ``reused`` count rows by kind."""

    path: Path
    up_to_date: bool
    images: int
    captions: int
    failures: list[Failure]
    truncated: int
    duplicates: list[tuple[str, ...]]
    computed: dict[str, int] = field(default_factory=dict)
    reused: dict[str, int] = field(default_factory=dict)
    speed: dict[str, Speed] = field(default_factory=dict)
    seconds: float = 0.0

    def lines(self) -> Iterator[str]:
        """The lines to show the user: how many rows, how fast, what was left out and why, and what looks wrong."""
        rows = f"{self.images:,} images, {self.captions:,} captions"
        if self.computed:
            encoded = ", ".join(f"{count:,} {kind}" for kind, count in self.computed.items())
            reused = ", ".join(f"{count:,} {kind}" for kind, count in self.reused.items())
            rows += f"; rows encoded: {encoded} in {self.seconds:.0f} s; reused: {reused}"
        yield rows
        for kind, speed in self.speed.items():
            yield f"{kind}: {speed}"
        if self.truncated:
            yield f"{self.truncated:,} captions are longer than the text encoder takes and were cut"
        yield from self._left_out()
        for group in self.duplicates[:3]:
            yield f"warning: the same image lies in several splits: {', '.join(group)}"
        if len(self.duplicates) > 3:
            yield f"warning: {len(self.duplicates) - 3:,} more images lie in several splits"

    def _left_out(self) -> Iterator[str]:
        """A line for each stage and kind of reason, with the first row that it kept out."""
        alike: dict[tuple[str, str], list[Failure]] = {}
        for failure in self.failures:
            alike.setdefault((failure.stage, failure.reason.partition(":")[0]), []).append(failure)
        for (stage, reason), failures in alike.items():
            yield (
                f"left out: {len(failures):,} at stage {stage}: {reason} (the first: {failures[0].id}); "
                f"list: onceover info {shlex.quote(str(self.path))}"
            )


def extract(
    dataset: Dataset,
    path: str | Path,
    config: ExtractConfig,
    *,
    device: str | None = None,
    force: bool = False,
    retry_failures: bool = False,
    prune: bool = False,
    keep_vanished: bool = False,
    reuse: FeatureStore | None = None,
    tokenizer_files: dict[str, bytes] | None = None,
    check_encoder: Callable[[str, dict], None] = lambda kind, recipe: None,
    say: Say = lambda _: None,
) -> Summary:
    """Encodes what ``dataset`` has and the store at ``path`` lacks, and writes the store.

    A dataset of images alone, or of captions alone, needs and loads only the one encoder; the other features of its
    store have no rows.

    Args:
        reuse: another store, whose rows are taken where the features' fingerprints agree.
        tokenizer_files: the vocabulary of a ``@random`` text encoder, where the captions shall not make it.
        check_encoder: given each encoder's kind and recipe before anything is encoded; raises to refuse it.
        force: replace features of another fingerprint, and discard an unfinished extraction of such.
        retry_failures: try the ledger's images again although their files have not changed.
        prune: drop rows of the store that ``dataset`` has no more.
        keep_vanished: where the dataset has rows of the store no more, keep their features beside the store
            (``FILE.h5.kept``), so that they need not be encoded again when they are back; ``prune`` drops these too.
        say: receives what the user should be told before the work starts.

    Raises:
        StoreError: other features are already there, rows would be dropped, no image can be encoded, or another
            process is writing.
        EncoderError: an encoder cannot be had.
    """
    start = time.monotonic()
    path = link_target(path)
    unfinished = Unfinished(path)
    stats = [dataset.images.stat(key) for key in dataset.paths]
    left_out = [failure[:3] for failure in dataset.failures]
    listing = digest(
        [dataset.ids, dataset.paths, dataset.splits, dataset.captions, dataset.image_index.tolist(), stats, left_out]
    )
    request = _request(config)
    with only_writer(path, "the store"):
        unfinished.claim()
        _refuse_link(kept_folder(path))
        old = FeatureStore(path) if path.exists() else None
        try:
            if old and not retry_failures and _is_up_to_date(old, dataset, listing, request):
                _discard(unfinished, old, say)
                if prune:
                    _remove_kept(path)
                return summary_of(old, up_to_date=True)
            job = _Job(
                dataset,
                stats,
                listing,
                config,
                path,
                unfinished,
                old,
                device,
                force,
                retry_failures,
                prune,
                keep_vanished,
                reuse,
                tokenizer_files,
                check_encoder,
                say,
            )
            job.run()
        finally:
            if old:
                old.close()
        with FeatureStore(path) as store:
            summary = summary_of(store, up_to_date=False)
            _discard(unfinished, store, say)
    summary.computed, summary.reused, summary.speed = job.computed, job.reused, job.speed
    summary.seconds = time.monotonic() - start
    return summary


def _is_up_to_date(old: FeatureStore, dataset: Dataset, listing: str, request: dict) -> bool:
    """Whether a store holds what is asked for, and no image that could not be read then can be read now."""
    if (old.provenance["listing"], old.provenance["request"]) != (listing, request):
        return False
    paths = dict(zip(dataset.ids, dataset.paths, strict=True))
    passing = [failure.id for failure in old.failures if failure.stage == "image" and is_passing(failure)]
    return not any(is_readable(dataset.images, paths[name]) for name in passing if name in paths)


def _remove_kept(path: Path, but: frozenset[str] = frozenset()) -> None:
    """Removes features that were kept of rows that had vanished, ``but`` those in some files."""
    folder = kept_folder(path)
    remove_files(folder, [file.name for file in shard_files(folder) if file.name not in but])


def summary_of(store: FeatureStore, up_to_date: bool) -> Summary:
    """What there is to say of a finished store."""
    return Summary(
        path=store.path,
        up_to_date=up_to_date,
        images=len(store.image_ids),
        captions=len(store.captions),
        failures=store.failures,
        truncated=int(store.truncated.sum()),
        duplicates=store.duplicates_across_splits(),
    )


def _refuse_link(folder: Path) -> None:
    """Refuses a link where features are kept, and removed later.

    Raises:
        StoreError: it is one.
    """
    if folder.is_symlink():
        raise StoreError(f"{folder} is a link, and an extraction keeps features there; move it elsewhere")


def _discard(unfinished: Unfinished, store: FeatureStore, say: Say) -> None:
    """Removes the shards whose rows went into the store; those of another, larger extraction stay, and are told of."""
    known = {kind: set(keys) for kind, keys in (("image", store.sha256), ("text", store.captions))}
    kept = 0
    for shard in unfinished.shards():
        try:
            kind, fingerprint, keys = describe_shard(shard)
        except OnceoverError as error:
            say(f"a shard of another extraction is left alone: {error}")
            kept += 1
            continue
        if fingerprint == store.fingerprints[kind] and (not keys or not known[kind].isdisjoint(keys)):
            shard.unlink()
        else:
            kept += len(keys)
    if kept:
        where = unfinished.folder
        say(f"{kept:,} rows of another unfinished extraction stay in {where}, for when that is gone on with")
    else:
        unfinished.remove()


def _joined(batches: list[dict[str, list | np.ndarray]]) -> dict[str, list | np.ndarray]:
    """The columns of batches, one after the other, in the order of ``row``."""
    filled = [columns for columns in batches if len(columns["row"])] or batches[:1]
    order = np.argsort([row for columns in filled for row in columns["row"]])
    ascending, joined = (np.diff(order) == 1).all(), {}
    for name, first in filled[0].items():
        if isinstance(first, np.ndarray):
            whole = np.concatenate([columns[name] for columns in filled])
            joined[name] = whole if ascending else whole[order]
        else:
            whole = [value for columns in filled for value in columns[name]]
            joined[name] = [whole[place] for place in order]
    return joined


def _split(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _request(config: ExtractConfig) -> dict:
    """What is asked for, told without loading an encoder: when it and the dataset's listing agree, nothing is new."""
    return {
        "image": identity(parse_spec(config.image_encoder), config.seed),
        "text": identity(parse_spec(config.text_encoder), config.seed),
        "settings": [
            config.image_layers,
            config.text_layers,
            config.views,
            config.text_pooling,
            config.max_length,
            config.thumbnails,
            config.dtype,
            config.store_dtype,
        ],
    }


class _Read(NamedTuple):
    """Images read and decoded: (row, SHA-256, thumbnail) of each; the pixels of those that are to be encoded;
    (row, reason, whether it may pass) of what failed; seconds that it took."""

    records: list[tuple[int, str, bytes]]
    pixels: np.ndarray
    failures: list[tuple[int, str, bool]]
    seconds: float


class _Encoded(NamedTuple):
    """One batch: columns of its records, ``row`` and ``features`` among them; what failed; seconds by stage."""

    columns: dict[str, list | np.ndarray]
    failures: list[Failure]
    seconds: dict[str, float]


@dataclass
class _Reader:
    """The work before an image encoder, wherever it is done. ``known``: the contents that have features already."""

    images: ImageSource
    paths: list[str]
    preprocessing: "Preprocessing"
    known: frozenset[str]
    thumbnails: bool

    def __call__(self, rows: list[int]) -> _Read:
        start = time.perf_counter()
        records, pixels, failures = [], [], []
        for row in rows:
            try:
                data = self.images.open(self.paths[row])
                picture, key = decode(data, self.preprocessing.short_side), hashlib.sha256(data).hexdigest()
                if key not in self.known:
                    pixels.append(self.preprocessing.pixels(picture).numpy())
            except (PictureError, FileError) as error:
                failures.append((row, str(error), False))
                continue
            except OSError as error:
                failures.append((row, error.strerror or str(error), True))
                continue
            except MemoryError:
                failures.append((row, "not enough memory to decode it", True))
                continue
            records.append((row, key, thumbnail(picture) if self.thumbnails else b""))
        stacked = np.stack(pixels) if pixels else np.zeros(0)
        return _Read(records, stacked, failures, time.perf_counter() - start)


@dataclass
class _Job:
    """One extraction: the images, then the captions of those that could be encoded, then the seal."""

    dataset: Dataset
    stats: list[tuple[int, int]]
    listing: str
    config: ExtractConfig
    path: Path
    unfinished: Unfinished
    old: FeatureStore | None
    device: str | None
    force: bool
    retry_failures: bool
    prune: bool
    keep_vanished: bool
    reuse: FeatureStore | None
    tokenizer_files: dict[str, bytes] | None
    check_encoder: Callable[[str, dict], None]
    say: Say
    computed: dict[str, int] = field(default_factory=dict)
    reused: dict[str, int] = field(default_factory=dict)
    speed: dict[str, Speed] = field(default_factory=dict)
    _free_since: float = 0.0

    def run(self) -> None:
        import torch

        from onceover.extract.encoding.devices import hardware, pick_device

        for reason in self.unfinished.remove_damaged_shards():
            self.say(f"encoding a damaged shard again: {reason}")
        paths = dict(zip(self.dataset.ids, self.dataset.paths, strict=True))
        self.unfinished.remove_shards_with_passed_failures(self.dataset.images, paths)
        device = pick_device(self.device)
        self.settings = self._settings(str(device), hardware(device))
        try:
            self._run()
        except torch.OutOfMemoryError as error:
            half = max(1, (self.settings["batch_size"] or BATCH_SIZE["cpu"]) // 2)
            anew = " --force, which encodes all anew" if self.unfinished.shards() else ""
            raise StoreError(
                f"the memory of {self.settings['device']} is full; make room there and run the command again, or give "
                f"it --batch-size {half}{anew}"
            ) from error

    def _run(self) -> None:
        from onceover.extract.encoding.image import ImageEncoder
        from onceover.extract.encoding.text import TextEncoder

        common = {
            "store_dtype": self.config.store_dtype,
            "seed": self.config.seed,
            "device": self.settings["device"],
        }
        pictures = text = None
        if self.dataset.ids:
            make = partial(
                ImageEncoder,
                self.config.image_encoder,
                layers=self.config.image_layers,
                views=self.config.views,
                **common,
            )
            pictures = self._in_best_dtype("image", make, self._sample_features)
        if self.dataset.captions:
            make = partial(
                TextEncoder,
                self.config.text_encoder,
                layers=self.config.text_layers,
                pooling=self.config.text_pooling,
                max_length=self.config.max_length,
                captions=self.dataset.captions,
                tokenizer_files=self.tokenizer_files or self._kept_vocabulary(),
                **common,
            )
            sample = list(dict.fromkeys(self.dataset.captions))[: SAMPLE["text"]]
            text = self._in_best_dtype("text", make, lambda encoder: encoder.encode(sample)[0])
        recipes = {kind: encoder.recipe if encoder else {} for kind, encoder in (("image", pictures), ("text", text))}
        for kind, recipe in recipes.items():
            if recipe:
                self.check_encoder(kind, recipe)
                self._refuse_other_features(kind, recipe)
        self._refuse_to_drop_rows()
        if not self.settings["batch_size"]:
            self.settings["batch_size"] = self._fitting_batch(pictures, text)
        self.unfinished.write_settings(self.settings)
        self._check_room(pictures, text)

        sources, keys = self._encode_images(pictures) if pictures else (RowSources("image", "", ()), [])
        kept = [row for row, key in enumerate(keys) if key in sources]
        lost = {row: sources.failures[self.dataset.ids[row]] for row, key in enumerate(keys) if key not in sources}
        if lost and not kept:
            first = next(iter(lost.values()))
            raise StoreError(
                f"none of the {len(lost):,} images could be encoded; the first: {first.id}: {first.reason}"
            )
        self._refuse_to_lose_images(lost)
        mine = np.isin(self.dataset.image_index, [-1, *kept])
        captions = [self.dataset.captions[row] for row in np.flatnonzero(mine)]
        text_sources = RowSources("text", "", ())
        if text:
            text_sources = self._encode_captions(text, list(dict.fromkeys(captions)))

        position = np.full(len(self.dataset.ids) + 1, -1)  # the last one: of captions without an image
        position[kept] = np.arange(len(kept))
        vanished = frozenset[str]()
        if self.keep_vanished and not self.prune:
            vanished = self._keep_vanished(sources, {keys[row] for row in kept}, recipes["image"])
            vanished |= self._keep_vanished(text_sources, set(captions), recipes["text"])
        names = caption_ids(self.dataset.ids, self.dataset.image_index) if lost else []
        orphans = [Failure(names[row], "caption", NOT_ENCODED) for row in np.flatnonzero(~mine)]
        seal(
            self.path,
            images={
                "id": [self.dataset.ids[row] for row in kept],
                "path": [self.dataset.paths[row] for row in kept],
                "split": [self.dataset.splits[row] for row in kept],
                "sha256": [keys[row] for row in kept],
                "size": np.array([self.stats[row][0] for row in kept], dtype=np.int64),
                "mtime_ns": np.array([self.stats[row][1] for row in kept], dtype=np.int64),
            },
            texts={"caption": captions, "image_index": position[self.dataset.image_index[mine]].astype(np.int64)},
            sources={"image": sources, "text": text_sources},
            recipes=recipes,
            provenance=self._provenance(),
            failures=[*self.dataset.failures, *lost.values(), *orphans],
            tokenizer_files=text.tokenizer_files if text else {},
        )
        _remove_kept(self.path, vanished)

    def _refuse_to_drop_rows(self) -> None:
        """Refuses to write a store without rows that are in the one that is there.

        An image with another name and the same content is no lost one.

        Raises:
            StoreError: the dataset lacks some.
        """
        if self.old is None or self.force or self.prune or self.keep_vanished:
            return
        ids = set(self.dataset.ids)
        lost = [row for row, name in enumerate(self.old.image_ids) if name not in ids]
        if lost:
            contents = self._contents_of_new(ids.difference(self.old.image_ids))
            lost = [row for row in lost if self.old.sha256[row] not in contents]
        captions = set(self.old.captions).difference(self.dataset.captions)
        counts = {"images": len(lost), "different captions": len(captions)}
        if lost or captions:
            rows = " and ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
            raise StoreError(
                f"{self.path} holds {rows} that {self.dataset.root} has no more, or that were not asked for, and that "
                "would be dropped: name another --store, or drop them with --prune"
            )

    def _contents_of_new(self, names: set[str]) -> set[str]:
        """SHA-256 of the images with some names, those that can be read."""
        contents = set()
        for name, path in zip(self.dataset.ids, self.dataset.paths, strict=True):
            if name in names:
                with contextlib.suppress(OSError, OnceoverError):
                    contents.add(hashlib.sha256(self.dataset.images.open(path)).hexdigest())
        return contents

    def _refuse_to_lose_images(self, failures: dict[int, Failure]) -> None:
        """Refuses to write a store without images that it has and that cannot be read or decoded any more.

        Where the features of what is gone are kept (``keep_vanished``), so many have to be lost that a disk may fail.

        Raises:
            StoreError: there are some.
        """
        if self.old is None or self.force or self.prune:
            return
        stored = set(self.old.image_ids)
        lost = [failure for failure in failures.values() if failure.id in stored]
        if not lost or (self.keep_vanished and len(lost) <= MOST_LOST * len(stored)):
            return
        raise StoreError(
            f"{len(lost):,} images of {self.path} cannot be read now and would be dropped (the first: {lost[0].id}: "
            f"{lost[0].reason}); mend that and run the same command again, or drop them with --prune"
        )

    def _keep_vanished(self, sources: RowSources, present: set[str | None], recipe: dict) -> frozenset[str]:
        """Writes the rows of earlier stores that the dataset has no more into shards beside the store.

        Returns:
            The names of the shards.
        """
        gone = [key for key in sources if key not in present]
        origins = {key: origin for origin, key in sources.keys_by_stat.items()}
        folder, names = kept_folder(self.path), set()
        for number, keys in enumerate(_split(gone, SHARD_ROWS.get(sources.kind, 1))):
            names.add(name := f"{sources.kind}-{digest(keys)[:12]}-{number:05d}.h5")
            if (folder / name).exists():
                continue
            columns = {column: sources.gather(column, keys) for column in ("features", *sources.columns)}
            if sources.kind == "image":
                rows = [origins[key] for key in keys]
                columns |= {"sha256": keys, "id": [row[0] for row in rows]}
                columns |= {"size": np.array([row[1] for row in rows], np.int64)}
                columns |= {"mtime_ns": np.array([row[2] for row in rows], np.int64)}
            else:
                columns["caption"] = keys
            if "thumbnail" in columns:
                columns["thumbnail"] = [value.tobytes() for value in columns["thumbnail"]]
            write_shard(folder / name, sources.kind, columns, recipe, [])
        return frozenset(names)

    @property
    def _before(self) -> FeatureStore | None:
        """The store whose features are gone on with, if there is one."""
        return (None if self.force else self.old) or self.reuse

    def _settings(self, device: str, hardware: str) -> dict:
        """Device, arithmetic and batch size, kept by a resumed run: features differ in the last bits between them.

        So they do between one processor, or card, and another, which is told.

        Each batch is one stream of arithmetic, so that the number of cores changes nothing. What is not known yet is
        null, or missing.
        """
        wanted = {"device": device, "hardware": hardware, "batch_size": self.config.batch_size, "dtypes": {}}
        if not self.unfinished.shards():
            return wanted
        begun = self.unfinished.settings()
        if begun is None:
            self.unfinished.remove()
            return wanted
        if begun["device"] != device and not self.force:
            raise StoreError(
                f"{self.unfinished.folder} was begun on {begun['device']}; go on with --device {begun['device']}, "
                "or discard it with --force"
            )
        if begun["device"] != device or (self.force and wanted["batch_size"] not in (None, begun["batch_size"])):
            self.unfinished.remove()
            return wanted
        self.say(f"going on with the unfinished extraction in {self.unfinished.folder}")
        if begun.get("hardware", hardware) != hardware:
            self.say(f"begun on {begun['hardware']}; {hardware} may round the last bits of what is left in another way")
        if wanted["batch_size"] not in (None, begun["batch_size"]):
            self.say(f"as it was begun: batches of {begun['batch_size']}")
        return begun

    def _in_best_dtype(self, kind: str, make: Callable, sample: Callable):
        """The encoder in the arithmetic that was asked for, or has been used, or that a sample shows to be enough."""
        from onceover.extract.comparison import relative_error
        from onceover.extract.encoding.devices import fast_dtype

        known = self._before.recipes[kind] if self._before else {}
        dtype = self.config.dtype if self.config.dtype != "auto" else None
        dtype = dtype or self.settings["dtypes"].get(kind) or known.get("dtype")
        encoder = make(dtype=dtype or "float32")
        if dtype is None and (fast := fast_dtype(encoder.device)):
            faster = make(dtype=fast)
            error = relative_error(sample(faster), sample(encoder))
            encoder = faster if error <= AUTO_ERROR else encoder
            self.say(
                f"{kind}: {fast} would move the features by {error:.2%} of their spread (at most {AUTO_ERROR:.2%}): "
                f"encoding in {encoder.recipe['dtype']}"
            )
        self.settings["dtypes"][kind] = encoder.recipe["dtype"]
        return encoder

    def _sample_features(self, encoder) -> np.ndarray:
        """Features of the first images that can be decoded."""
        import torch

        pixels = []
        for path in self.dataset.paths:
            with contextlib.suppress(PictureError, FileError, OSError, MemoryError):  # the ledger gets it later
                pixels.append(encoder.pixels(decode(self.dataset.images.open(path), encoder.short_side)))
            if len(pixels) == SAMPLE["image"]:
                break
        if not pixels:
            return np.zeros((0, 1))
        return np.concatenate([encoder.encode(batch) for batch in torch.stack(pixels).split(BATCH_SIZE["cpu"])])

    def _fitting_batch(self, pictures, text) -> int:
        """The usual batch size of the device, halved until batches fit its memory; found by trying."""
        import torch

        from onceover.extract.encoding.devices import STREAMS

        size = BATCH_SIZE.get(self.settings["device"].partition(":")[0], BATCH_SIZE["cpu"])
        room, abreast = total_memory() / 2 / self._streams(), STREAMS if "cuda" in self.settings["device"] else 1
        while size > 1:
            tried = (partial(trial, size * abreast) for trial in self._trials(pictures, text).values())
            try:
                if max(map(peak_memory, tried)) <= room:
                    break
            except torch.OutOfMemoryError:
                pass
            size //= 2
            self.say(f"batches of {2 * size} would not fit the memory of {self.settings['device']}: trying {size}")
        return size

    def _trials(self, pictures, text) -> dict[str, Callable[[int], np.ndarray]]:
        """What encodes a batch of each kind, as large as it can become."""
        import torch

        trials = {}
        if pictures:
            pixels = pictures.pixels(Image.new("RGB", (256, 256)))
            trials["image"] = lambda size: pictures.encode(torch.stack([pixels] * size))
        if text:
            longest = text.tokenize([max(self.dataset.captions, key=len)])[0]
            trials["text"] = lambda size: text.encode_tokens(longest * size * CAPTIONS_PER_PICTURE)
        return trials

    @property
    def _apart(self) -> bool:
        """Whether something else than the processor encodes, for which processes decode."""
        return self.settings["device"] != "cpu"

    def _streams(self) -> int:
        """Batches under way at a time: one a core that encodes, or processes that decode for a GPU."""
        import torch

        if not self._apart:
            return torch.get_num_threads()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return min(cores, MOST_PROCESSES)

    def _shard_rows(self, kind: str) -> int:
        return SHARD_ROWS[kind] * (ON_A_GPU[kind] if self._apart else 1)

    def _check_room(self, pictures, text) -> None:
        """Refuses to begin what would not fit the disk: the shards, and beside them, for a moment, the whole store."""
        needed, old = 0, self._before
        for kind, trial in self._trials(pictures, text).items():
            row = trial(1)[0].nbytes + ROW_BYTES[kind]
            rows = len(self.dataset.ids if kind == "image" else self.dataset.captions)
            known = len((old.image_ids if kind == "image" else old.captions) if old else ())
            known += self._shard_rows(kind) * len(self.unfinished.shards(kind))
            needed += row * (rows + max(0, rows - known))
        check_disk(self.path, needed)

    def _kept_vocabulary(self) -> dict[str, bytes] | None:
        """The vocabulary of a @random encoder comes from the captions; captions that join later do not change it."""
        if not parse_spec(self.config.text_encoder).random or self.old is None or self.force:
            return None
        same = self.old.provenance["text"]["encoder"] == parse_spec(self.config.text_encoder).located()
        return self.old.tokenizer_files if same else None

    def _refuse_other_features(self, kind: str, recipe: dict) -> None:
        if self.old and self.old.fingerprints[kind] != digest(recipe) and not self.force:
            changed = changed_settings(recipe, self.old.recipes[kind])
            raise StoreError(
                f"{self.path} holds other {kind} features (they differ in: {changed}); "
                "name another --store, or replace them with --force"
            )
        for shard in self.unfinished.shards(kind):
            if describe_shard(shard)[1] == digest(recipe):
                continue
            if not self.force:
                raise StoreError(
                    f"{self.unfinished.folder} holds an unfinished extraction of other {kind} features; "
                    "run that command again, or discard it with --force"
                )
            shard.unlink()

    def _stored(self, kind: str, recipe: dict, columns: tuple[str, ...]) -> RowSources:
        """The rows of earlier stores that can be taken over."""
        sources = RowSources(kind, digest(recipe), columns)
        for store in (self.old, self.reuse):
            if store:
                sources.add(store.path)
        for shard in shard_files(kept_folder(self.path), kind):
            sources.add(shard)
        return sources

    def _sources(self, kind: str, recipe: dict, columns: tuple[str, ...]) -> RowSources:
        """The same, and those of this extraction's shards."""
        sources = self._stored(kind, recipe, columns)
        for shard in self.unfinished.shards(kind):
            sources.add(shard)
        return sources

    def _shards(self, kind: str, recipe: dict, listing: str, columns: tuple[str, ...], choose: Callable[[], list[int]]):
        """(file, items) of each shard. An unfinished run's plan, made from the same things, is taken up again."""
        try:
            plan = self.unfinished.plan(kind)
        except FileError as error:  # finished shards are taken over all the same
            self.say(f"planning anew: {error}")
            plan = {}
        beside = [store.fingerprints for store in (self.old, self.reuse) if store]
        wanted = {"listing": listing, "fingerprint": digest(recipe), "columns": list(columns), "beside": beside}
        wanted["retry_failures"] = self.retry_failures
        if not wanted.items() <= plan.items():
            plan = wanted | {"rows": self._shard_rows(kind), "todo": choose()}
            self.unfinished.write_plan(kind, plan)
        tag, rows, todo = digest(plan)[:12], plan["rows"], plan["todo"]
        return [
            (self.unfinished.folder / f"{kind}-{tag}-{start // rows:05d}.h5", todo[start : start + rows])
            for start in range(0, len(todo), rows)
        ]

    def _encode_images(self, encoder) -> tuple[RowSources, list[str | None]]:
        columns = ("thumbnail",) if self.config.thumbnails else ()
        sources = self._sources("image", encoder.recipe, columns)
        shards = self._shards("image", encoder.recipe, self.listing, columns, lambda: self._new_images(sources))
        self._announce(
            "image", shards, f"{self.config.image_encoder}, {len(encoder.recipe['views'])} views", len(self.dataset.ids)
        )
        known = self._stored("image", encoder.recipe, ())
        bare = sum(key not in sources for key in known)
        if bare:
            self.say(f"{bare:,} images have features already, and only get their thumbnails")
        read = _Reader(self.dataset.images, self.dataset.paths, encoder.preprocessing, frozenset(known), bool(columns))
        self._compute(
            "image",
            shards,
            encoder.recipe,
            encoded=partial(self._encoded_pictures, read, partial(self._begin_pictures, encoder, known)),
            columns=lambda rows: {
                "id": [self.dataset.ids[row] for row in rows],
                "size": np.array([self.stats[row][0] for row in rows], dtype=np.int64),
                "mtime_ns": np.array([self.stats[row][1] for row in rows], dtype=np.int64),
            },
        )
        sources = self._sources("image", encoder.recipe, columns)
        return sources, self._content_keys(sources)

    def _encode_captions(self, encoder, captions: list[str]) -> RowSources:
        from onceover.extract.encoding.devices import STREAMS
        from onceover.extract.encoding.text import by_length

        columns = ("truncated",)
        sources = self._sources("text", encoder.recipe, columns)
        shards = self._shards(
            "text",
            encoder.recipe,
            digest(captions),
            columns,
            lambda: [row for row, text in enumerate(captions) if text not in sources],
        )
        self._announce("text", shards, self.config.text_encoder, len(captions))

        def batches(shard: tuple[Path, list[int]]) -> list[tuple]:
            file, rows = shard
            token_ids, truncated = encoder.tokenize([captions[row] for row in rows])
            made = by_length(token_ids, self.settings["batch_size"] * CAPTIONS_PER_PICTURE)
            return [(file, [rows[place] for place in places], truncated[places], ids) for places, ids in made]

        def begin(task) -> Callable[[], tuple[Path, _Encoded]]:
            (file, rows, truncated, token_ids), start = task, time.perf_counter()
            features = encoder.begin(token_ids)
            return lambda: (file, finish(rows, truncated, features(), start))

        def finish(rows, truncated, features, start) -> _Encoded:
            if not np.isfinite(features).all():
                raise StoreError(
                    f"{self.config.text_encoder} gives numbers that are not finite or do not fit "
                    f"{self.config.store_dtype}; try --dtype float32 --store-dtype float32"
                )
            columns = {"row": rows, "truncated": truncated, "features": features}
            return _Encoded(columns, [], {"encode": self._since(start)})

        def encoded(shards: Iterator) -> Iterator[tuple[Path, _Encoded]]:
            if self._apart:
                os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's threads would not outlive the fork
                planned = in_processes(batches, shards, min(TOKENIZERS, self._streams()))
                return ahead(begin, (task for tasks in planned for task in tasks), STREAMS)
            tasks = chain.from_iterable(map(batches, shards))
            return in_order(lambda task: begin(task)(), tasks, self._streams())

        self._compute(
            "text", shards, encoder.recipe, encoded, lambda rows: {"caption": [captions[row] for row in rows]}
        )
        return self._sources("text", encoder.recipe, columns)

    def _announce(self, kind: str, shards: list, what: str, total: int) -> None:
        new, noun = sum(len(items) for _, items in shards), "images" if kind == "image" else "different captions"
        done = sum(len(items) for file, items in shards if file.exists())
        self.computed[kind], self.reused[kind] = new - done, total - new + done
        if new - done:
            settings = self.settings
            size = settings["batch_size"] * (CAPTIONS_PER_PICTURE if kind == "text" else 1)
            fed = f"{self._streams()} processes decode, " if kind == "image" else ""
            abreast = fed if self._apart else f"{self._streams()} at a time, "
            where = f"{settings['device']}, {abreast}batches of {size}"
            old = f" ({total - new + done:,} are there already)" if total - new + done else ""
            self.say(f"encoding {new - done:,} {noun}{old} with {what} on {where}")

    def _compute(self, kind: str, shards: list, recipe: dict, encoded: Callable, columns: Callable):
        """Encodes the shards that are not there yet and writes each as soon as its last batch is done.

        ``encoded``: (file, rows) of each shard -> (file, ``_Encoded``) of its batches, in the shards' order.
        ``columns``: rows -> the columns of a shard that are known without encoding.
        """
        sizes = {file: len(rows) for file, rows in shards}
        total, done = sum(sizes.values()), sum(size for file, size in sizes.items() if file.exists())
        spent: Counter[str] = Counter(write=0.0)
        begun = time.perf_counter()

        def write(file: Path, batches: list[_Encoded]) -> float:
            start = time.perf_counter()
            made = _joined([batch.columns for batch in batches])
            failures = [failure for batch in batches for failure in batch.failures]
            write_shard(file, kind, columns(made.pop("row")) | made, recipe, failures)
            return (time.perf_counter() - start) / (WRITERS if self._apart else 1)

        def whole_shards() -> Iterator[tuple[Path, list[_Encoded]]]:
            shard, rows = [], 0
            for file, batch in batches:
                shard.append(batch)
                size = len(batch.columns["row"]) + len(batch.failures)
                spent.update(batch.seconds)
                bar.set_postfix_str(shares(spent), refresh=False)
                bar.update(size)
                if (rows := rows + size) == sizes[file]:
                    yield file, shard
                    shard, rows = [], 0

        bar = tqdm(total=total, initial=done, desc=kind, unit=" rows", disable=None if total > done else True)
        batches = encoded(shard for shard in shards if not shard[0].exists())
        with deaths_told(), bar, ThreadPoolExecutor(WRITERS) as writers, contextlib.closing(batches):
            writing: deque[Future] = deque()
            for shard in whole_shards():
                while writing and (writing[0].done() or len(writing) == WRITERS):  # what failed ends it now
                    spent["write"] += writing.popleft().result()
                writing.append(writers.submit(write, *shard))
            spent["write"] += sum(future.result() for future in writing)
        if total > done:
            self.speed[kind] = Speed(total - done, time.perf_counter() - begun, dict(spent))

    def _new_images(self, sources: RowSources) -> list[int]:
        todo = []
        for row, key in enumerate(self._content_keys(sources)):
            if key not in sources and (self.retry_failures or not self._failed_before(sources, row)):
                todo.append(row)
        return todo

    def _failed_before(self, sources: RowSources, row: int) -> bool:
        """Whether the ledger holds this image and its file has not changed since."""
        failure = sources.failures.get(self.dataset.ids[row])
        if failure is None or is_passing(failure):
            return False
        return (failure.size, failure.mtime_ns) == self.stats[row]

    def _content_keys(self, sources: RowSources) -> list[str | None]:
        """Each image's SHA-256 where it can be in ``sources``: by size and time first, else by hashing its bytes."""
        keys: list[str | None] = []
        for row, (name, path) in enumerate(zip(self.dataset.ids, self.dataset.paths, strict=True)):
            key = sources.keys_by_stat.get((name, *self.stats[row]))
            if key is None and len(sources) and not self._failed_before(sources, row):
                try:
                    key = hashlib.sha256(self.dataset.images.open(path)).hexdigest()
                except (OSError, FileError):
                    key = None  # the image is read again for encoding, where the failure goes into the ledger
            keys.append(key)
        return keys

    def _encoded_pictures(self, read: _Reader, begin: Callable, shards: Iterator) -> Iterator[tuple[Path, _Encoded]]:
        """(file, rows) of each shard -> (file, ``_Encoded``) of its batches. ``begin``: as ``_begin_pictures``."""
        from onceover.extract.encoding.devices import STREAMS

        tasks = ((file, batch) for file, rows in shards for batch in _split(rows, self.settings["batch_size"]))
        if not self._apart:
            yield from in_order(lambda task: begin((task[0], [read(task[1])]))(), tasks, self._streams())
            return
        sample = read.preprocessing.pixels(Image.new("RGB", (256, 256))).numpy()
        held = 2 * self._streams() + self.settings["batch_size"] // PIECE + 3  # pieces under way and in a batch
        places = shared((held, PIECE, *sample.shape), sample.dtype)
        batches: deque[tuple[Path, int]] = deque()

        def pieces() -> Iterator[tuple[int, list[int]]]:
            numbers = count()
            for file, rows in tasks:
                parts = _split(rows, PIECE)
                batches.append((file, len(parts)))
                for part in parts:
                    yield next(numbers), part

        def read_apart(piece: tuple[int, list[int]]) -> tuple[tuple[int, int], _Read]:
            place, found = piece[0] % held, read(piece[1])
            size = len(found.pixels)
            if size:
                places[place, :size] = found.pixels
            return (place, size), found._replace(pixels=found.pixels[:0])

        def joined() -> Iterator[tuple[Path, list[_Read]]]:
            with contextlib.closing(in_processes(read_apart, pieces(), self._streams())) as found:
                done = (each._replace(pixels=places[place, :size]) for (place, size), each in found)
                for first in done:
                    file, number = batches.popleft()
                    yield file, [first, *islice(done, number - 1)]

        yield from ahead(begin, joined(), STREAMS)

    def _begin_pictures(self, encoder, known: RowSources, task: tuple[Path, list[_Read]]) -> Callable:
        """Begins to encode a batch, but for what is ``known``; the call that is returned gives (file, ``_Encoded``)."""
        import torch

        from onceover.extract.encoding.devices import joined

        (file, pieces), start = task, time.perf_counter()
        pixels = [torch.from_numpy(piece.pixels) for piece in pieces if len(piece.pixels)]
        features = encoder.begin(joined(pixels, encoder.device)) if pixels else list

        def finish() -> tuple[Path, _Encoded]:
            failures = [self._failure(*failure) for piece in pieces for failure in piece.failures]
            records, found = [record for piece in pieces for record in piece.records], features()
            if len(found) < len(records):
                new = iter(found)
                found = [known.gather("features", [key])[0] if key in known else next(new) for _, key, _ in records]
            found = np.asarray(found)
            finite = np.isfinite(found).all(axis=tuple(range(1, found.ndim)))
            dtypes = f"computed in {encoder.recipe['dtype']}, stored as {self.config.store_dtype}"
            for place in np.flatnonzero(~finite):
                failures.append(self._failure(records[place][0], f"its features are not finite ({dtypes})"))
            kept = [record for record, fits in zip(records, finite, strict=True) if fits]
            columns = {"row": [row for row, _, _ in kept], "sha256": [key for _, key, _ in kept]}
            if self.config.thumbnails:
                columns["thumbnail"] = [small for _, _, small in kept]
            decode = sum(piece.seconds for piece in pieces) / (self._streams() if self._apart else 1)
            columns["features"] = found if finite.all() else found[finite]
            return file, _Encoded(columns, failures, {"decode": decode, "encode": self._since(start)})

        return finish

    def _since(self, start: float) -> float:
        """Seconds since a batch was begun; where a GPU takes one after the other, since the one before it was done."""
        now = time.perf_counter()
        if self._apart:
            start, self._free_since = max(start, self._free_since), now
        return now - start

    def _failure(self, row: int, reason: str, may_pass: bool = False) -> Failure:
        """A row of the ledger; of a fault that may pass without the file's size and time: it is tried again."""
        stat = () if may_pass else self.stats[row]
        return Failure(self.dataset.ids[row], "image", reason, *stat)

    def _provenance(self) -> dict:
        """What made the store. A kind of which nothing was computed keeps the provenance it had."""
        made = {
            **self.settings,
            "streams": self._streams(),
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        }
        kinds = {}
        for kind, spec in (("image", self.config.image_encoder), ("text", self.config.text_encoder)):
            kept = self._before is not None and not self.computed.get(kind)
            speed = self.speed.get(kind)
            pace = {"rows_per_second": round(speed.rows / speed.seconds, 1)} if speed else {}
            kinds[kind] = (self._before.provenance[kind] if kept else made | pace) | {
                "encoder": parse_spec(spec).located(),
                "seed": self.config.seed,
            }
        return {
            "data": str(self.dataset.root.resolve()),
            "layout": self.dataset.layout,
            "notes": self.dataset.notes,
            "splits": dict(Counter(self.dataset.splits)),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "settings": {key: getattr(self.config, key) for key in self.config.__dataclass_fields__},
            "listing": self.listing,
            "request": _request(self.config),
            **{kind: kinds[kind] for kind in KINDS},
        }
