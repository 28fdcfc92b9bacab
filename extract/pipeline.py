"""Dataset -> encoders -> feature store: plans what is new, encodes it shard by shard, seals the store.

Nothing finished is lost when the process is killed: shards are whole files, and the plan, the batch size and the
number of threads are fixed before the first one, so that a resumed store equals an uninterrupted one bit for bit.
"""

import hashlib
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configs.schema import ExtractConfig
from extract import Failure
from extract.datasets import Dataset
from extract.files import digest, only_writer, read_json, remove_folder, write_json
from extract.pictures import PictureError, decode, thumbnail
from extract.specs import identity, parse_spec
from extract.store import (
    KINDS,
    FeatureStore,
    RowSources,
    StoreError,
    caption_ids,
    changed_settings,
    parts_folder,
    seal,
    shard_fingerprint,
    write_shard,
)

SHARD_ROWS = {"image": 128, "text": 1024}  # what a kill can cost: some seconds of work
BATCH_SIZE = {"cpu": 16, "cuda": 128, "mps": 64}
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
    seconds: float = 0.0


def extract(
    dataset: Dataset,
    path: str | Path,
    config: ExtractConfig,
    *,
    device: str | None = None,
    force: bool = False,
    retry_failures: bool = False,
    tokenizer_files: dict[str, bytes] | None = None,
    check_encoder: Callable[[str, dict], None] = lambda kind, recipe: None,
    say: Say = lambda _: None,
) -> Summary:
    """Encodes what ``dataset`` has and the store at ``path`` lacks, and writes the store.

    A dataset of pictures alone, or of captions alone, needs and loads only the one encoder; the other features of its
    store have no rows.

    Args:
        tokenizer_files: the vocabulary of a ``@random`` text encoder, where the captions shall not make it.
        check_encoder: given each encoder's kind and recipe before anything is encoded; raises to refuse it.
        force: replace features of another fingerprint, and discard an unfinished extraction of such.
        retry_failures: try the ledger's pictures again although their files have not changed.
        say: receives what the user should be told before the work starts.

    Raises:
        StoreError: other features are already there, no picture can be encoded, or another process is writing.
        EncoderError: an encoder cannot be had.
    """
    start = time.monotonic()
    path = Path(path)
    parts = parts_folder(path)
    stats = [_stat(dataset.root / name) for name in dataset.paths]
    left_out = [failure[:3] for failure in dataset.failures]
    listing = digest(
        [dataset.ids, dataset.paths, dataset.splits, dataset.captions, dataset.image_index.tolist(), stats, left_out]
    )
    request = _request(config)
    with only_writer(path, "the store"):
        old = FeatureStore(path) if path.exists() else None
        try:
            if (
                old
                and not retry_failures
                and (old.provenance["listing"], old.provenance["request"]) == (listing, request)
            ):
                if all(shard_fingerprint(shard)[1] in old.fingerprints.values() for shard in parts.glob("*.h5")):
                    remove_folder(parts)  # else another extraction is under way there
                return summary_of(old, up_to_date=True)
            job = _Job(
                dataset,
                stats,
                listing,
                config,
                path,
                parts,
                old,
                device,
                force,
                retry_failures,
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
        remove_folder(parts)
    summary.computed, summary.reused = job.computed, job.reused
    summary.seconds = time.monotonic() - start
    return summary


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


def _stat(path: Path) -> tuple[int, int]:
    """Size in bytes and modification time in ns; (-1, -1) where the file cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _request(config: ExtractConfig) -> dict:
    """What is asked for, told without loading an encoder: when it and the dataset's listing agree, nothing is new."""
    return {
        "image": identity(parse_spec(config.image_encoder), config.seed),
        "text": identity(parse_spec(config.text_encoder), config.seed),
        "settings": [config.views, config.text_pooling, config.max_length, config.dtype, config.thumbnails],
    }


@dataclass
class _Job:
    """One extraction: the images, then the captions of those that could be encoded, then the seal."""

    dataset: Dataset
    stats: list[tuple[int, int]]
    listing: str
    config: ExtractConfig
    path: Path
    parts: Path
    old: FeatureStore | None
    device: str | None
    force: bool
    retry_failures: bool
    tokenizer_files: dict[str, bytes] | None
    check_encoder: Callable[[str, dict], None]
    say: Say
    computed: dict[str, int] = field(default_factory=dict)
    reused: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        import torch

        from extract.encoders import ImageEncoder, TextEncoder, pick_device

        self.settings = self._settings(str(pick_device(self.device)), torch.get_num_threads())
        torch.set_num_threads(self.settings["threads"])
        common = {"dtype": self.config.dtype, "seed": self.config.seed, "device": self.settings["device"]}
        pictures = text = None
        if self.dataset.ids:
            pictures = ImageEncoder(self.config.image_encoder, views=self.config.views, **common)
        if self.dataset.captions:
            text = TextEncoder(
                self.config.text_encoder,
                pooling=self.config.text_pooling,
                max_length=self.config.max_length,
                captions=self.dataset.captions,
                tokenizer_files=self.tokenizer_files or self._kept_vocabulary(),
                **common,
            )
        recipes = {kind: encoder.recipe if encoder else {} for kind, encoder in (("image", pictures), ("text", text))}
        for kind, recipe in recipes.items():
            if recipe:
                self.check_encoder(kind, recipe)
                self._refuse_other_features(kind, recipe)
        write_json(self.parts / "settings.json", self.settings)

        sources, keys = self._encode_images(pictures) if pictures else (RowSources("image", "", ()), [])
        kept = [row for row, key in enumerate(keys) if key in sources]
        lost = {row: sources.failures[self.dataset.ids[row]] for row, key in enumerate(keys) if key not in sources}
        if lost and not kept:
            first = next(iter(lost.values()))
            raise StoreError(
                f"none of the {len(lost):,} pictures could be encoded; the first: {first.id}: {first.reason}"
            )
        mine = np.isin(self.dataset.image_index, [-1, *kept])
        captions = [self.dataset.captions[row] for row in np.flatnonzero(mine)]
        text_sources = RowSources("text", "", ())
        if text:
            text_sources = self._encode_captions(text, list(dict.fromkeys(captions)))

        position = np.full(len(self.dataset.ids) + 1, -1)  # the last one: of captions without a picture
        position[kept] = np.arange(len(kept))
        names = caption_ids(self.dataset.ids, self.dataset.image_index) if lost else []
        orphans = [Failure(names[row], "caption", "its picture could not be encoded") for row in np.flatnonzero(~mine)]
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

    def _settings(self, device: str, threads: int) -> dict:
        """Batch size, threads and device, kept by a resumed run: features differ in the last bits between them."""
        wanted = {
            "batch_size": self.config.batch_size or BATCH_SIZE.get(device.partition(":")[0], 16),
            "threads": threads,
            "device": device,
        }
        if not any(self.parts.glob("*.h5")):
            return wanted
        begun = read_json(self.parts / "settings.json", "the unfinished extraction's settings")
        if begun["device"] != device:
            if not self.force:
                raise StoreError(
                    f"{self.parts} was begun on {begun['device']}; go on with --device {begun['device']}, "
                    "or discard it with --force"
                )
            remove_folder(self.parts)
            return wanted
        self.say(f"going on with the unfinished extraction in {self.parts}")
        if begun != wanted:
            self.say(f"as it was begun: batches of {begun['batch_size']}, {begun['threads']} threads")
        return begun

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
        for shard in sorted(self.parts.glob(f"{kind}-*.h5")):
            if shard_fingerprint(shard) == (kind, digest(recipe)):
                continue
            if not self.force:
                raise StoreError(
                    f"{self.parts} holds an unfinished extraction of other {kind} features; "
                    "run that command again, or discard it with --force"
                )
            shard.unlink()

    def _sources(self, kind: str, recipe: dict, columns: tuple[str, ...]) -> RowSources:
        sources = RowSources(kind, digest(recipe), columns)
        for file in (*([self.path] if self.old else []), *sorted(self.parts.glob(f"{kind}-*.h5"))):
            sources.add(file)
        return sources

    def _shards(self, kind: str, recipe: dict, listing: str, columns: tuple[str, ...], choose: Callable[[], list[int]]):
        """(file, items) of each shard. The plan of an unfinished run over the same listing is taken up again."""
        file = self.parts / f"{kind}.plan.json"
        plan = read_json(file, "the plan") if file.exists() else {}
        wanted = {"listing": listing, "fingerprint": digest(recipe), "columns": list(columns)}
        if not wanted.items() <= plan.items():
            plan = wanted | {"rows": SHARD_ROWS[kind], "todo": choose()}
            write_json(file, plan)
        tag, rows, todo = digest(plan)[:12], plan["rows"], plan["todo"]
        return [
            (self.parts / f"{kind}-{tag}-{start // rows:05d}.h5", todo[start : start + rows])
            for start in range(0, len(todo), rows)
        ]

    def _encode_images(self, encoder) -> tuple[RowSources, list[str | None]]:
        columns = ("thumbnail",) if self.config.thumbnails else ()
        sources = self._sources("image", encoder.recipe, columns)
        shards = self._shards("image", encoder.recipe, self.listing, columns, lambda: self._new_images(sources))
        self._announce(
            "image", shards, f"{self.config.image_encoder}, {self.config.views} views", len(self.dataset.ids)
        )

        def encode(items: list[int], bar: tqdm) -> tuple[dict, list[Failure]]:
            return self._image_rows(encoder, items, bar)

        self._compute("image", shards, encoder.recipe, encode)
        sources = self._sources("image", encoder.recipe, columns)
        return sources, self._content_keys(sources)

    def _encode_captions(self, encoder, captions: list[str]) -> RowSources:
        columns = ("truncated",)
        sources = self._sources("text", encoder.recipe, columns)
        listing = digest(captions)
        shards = self._shards(
            "text",
            encoder.recipe,
            listing,
            columns,
            lambda: [row for row, text in enumerate(captions) if text not in sources],
        )
        self._announce("text", shards, self.config.text_encoder, len(captions))

        def encode(items: list[int], bar: tqdm) -> tuple[dict, list[Failure]]:
            texts = [captions[row] for row in items]
            features, truncated = encoder.encode(texts, self.settings["batch_size"])
            bar.update(len(items))
            if not np.isfinite(features).all():
                raise StoreError(f"{self.config.text_encoder} gives numbers that are not finite; try --dtype float32")
            return {"caption": texts, "truncated": truncated, "features": features}, []

        self._compute("text", shards, encoder.recipe, encode)
        return self._sources("text", encoder.recipe, columns)

    def _announce(self, kind: str, shards: list, what: str, total: int) -> None:
        new, noun = sum(len(items) for _, items in shards), "pictures" if kind == "image" else "different captions"
        done = sum(len(items) for file, items in shards if file.exists())
        self.computed[kind], self.reused[kind] = new - done, total - new + done
        if new - done:
            settings = self.settings
            where = f"{settings['device']}, {settings['threads']} threads, batches of {settings['batch_size']}"
            old = f" ({total - new + done:,} are there already)" if total - new + done else ""
            self.say(f"encoding {new - done:,} {noun}{old} with {what} on {where}")

    def _compute(self, kind: str, shards: list, recipe: dict, encode: Callable) -> None:
        import torch

        total = sum(len(items) for _, items in shards)
        done = sum(len(items) for file, items in shards if file.exists())
        with tqdm(total=total, initial=done, desc=kind, unit=" rows", disable=None if total > done else True) as bar:
            for file, items in shards:
                if not file.exists():
                    try:
                        columns, failures = encode(items, bar)
                    except torch.OutOfMemoryError as error:
                        size = self.settings["batch_size"]
                        raise StoreError(
                            f"batches of {size} do not fit the memory of {self.settings['device']}; "
                            f"run again with --batch-size {max(1, size // 2)}"
                        ) from error
                    write_shard(file, kind, columns, recipe, failures)

    def _new_images(self, sources: RowSources) -> list[int]:
        todo = []
        for row, key in enumerate(self._content_keys(sources)):
            if key not in sources and (self.retry_failures or not self._failed_before(sources, row)):
                todo.append(row)
        return todo

    def _failed_before(self, sources: RowSources, row: int) -> bool:
        """Whether the ledger holds this picture and its file has not changed since."""
        failure = sources.failures.get(self.dataset.ids[row])
        return failure is not None and (failure.size, failure.mtime_ns) == self.stats[row]

    def _content_keys(self, sources: RowSources) -> list[str | None]:
        """Each picture's SHA-256 where it can be in ``sources``: by size and time first, else by hashing its bytes."""
        keys: list[str | None] = []
        for row, (name, path) in enumerate(zip(self.dataset.ids, self.dataset.paths, strict=True)):
            key = sources.keys_by_stat.get((name, *self.stats[row]))
            if key is None and len(sources) and not self._failed_before(sources, row):
                try:
                    key = hashlib.sha256((self.dataset.root / path).read_bytes()).hexdigest()
                except OSError:
                    key = None  # the picture is read again for encoding, where the failure goes into the ledger
            keys.append(key)
        return keys

    def _image_rows(self, encoder, items: list[int], bar: tqdm) -> tuple[dict, list[Failure]]:
        import torch

        size = self.settings["batch_size"]
        done, failures = [], []  # done: (row, SHA-256, thumbnail, features)
        for start in range(0, len(items), size):
            pixels, batch = [], []
            for row in items[start : start + size]:
                try:
                    data = (self.dataset.root / self.dataset.paths[row]).read_bytes()
                    picture = decode(data)
                    pixels.append(encoder.pixels(picture))
                except (PictureError, OSError) as error:
                    reason = error.strerror if isinstance(error, OSError) else str(error)
                    failures.append(self._failure(row, reason or str(error)))
                    continue
                small = thumbnail(picture) if self.config.thumbnails else b""
                batch.append((row, hashlib.sha256(data).hexdigest(), small))
            for record, features in zip(batch, encoder.encode(torch.stack(pixels)) if batch else (), strict=True):
                if np.isfinite(features).all():
                    done.append((*record, features))
                else:
                    failures.append(self._failure(record[0], "its features are not finite"))
            bar.update(len(items[start : start + size]))
        rows, hashes, thumbnails, features = (list(column) for column in zip(*done, strict=True)) if done else [[]] * 4
        columns = {
            "id": [self.dataset.ids[row] for row in rows],
            "sha256": hashes,
            "size": np.array([self.stats[row][0] for row in rows], dtype=np.int64),
            "mtime_ns": np.array([self.stats[row][1] for row in rows], dtype=np.int64),
            "features": np.stack(features) if features else np.zeros((0,), dtype=np.float32),
        }
        return columns | ({"thumbnail": thumbnails} if self.config.thumbnails else {}), failures

    def _failure(self, row: int, reason: str) -> Failure:
        return Failure(self.dataset.ids[row], "image", reason, *self.stats[row])

    def _provenance(self) -> dict:
        """What made the store. A kind of which nothing was computed keeps the provenance it had."""
        made = {**self.settings, "python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}
        kinds = {}
        for kind, spec in (("image", self.config.image_encoder), ("text", self.config.text_encoder)):
            kept = self.old is not None and not self.computed.get(kind) and not self.force
            kinds[kind] = (self.old.provenance[kind] if kept else made) | {
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
