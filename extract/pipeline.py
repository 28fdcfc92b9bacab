"""Dataset -> encoders -> feature store: plans what is new, has it encoded shard by shard, and seals the store.

Nothing finished is lost when the process is killed: shards are whole files, and the plan, the batch size and the
compute dtype are fixed before the first one, so that a resumed store equals an uninterrupted one bit for bit, on the
same hardware.
"""

import contextlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.base.files import check_disk, digest, digest_of_columns, only_writer
from onceover.base.progress import say, warn
from onceover.base.texts import ChosenTexts, text_column
from onceover.configs.schema import ExtractConfig
from onceover.extract.changes import Stats, is_up_to_date, known_images
from onceover.extract.computing import encode_shards
from onceover.extract.dataset import Dataset
from onceover.extract.encoders import change_stamp, located, parse_spec, specs_of
from onceover.extract.extraction import Counts, Extraction, Options, Work
from onceover.extract.joined import is_joined
from onceover.extract.key_index import KeyIndex, different_texts
from onceover.extract.ledger import NOT_ENCODED, Failure
from onceover.extract.plan import shards_of
from onceover.extract.planning import captions_to_encode, columns_of, earlier_plan, new_plan, origin_of
from onceover.extract.publishing import finish_publishing
from onceover.extract.refusals import (
    refuse_other_features,
    refuse_other_shards,
    refuse_to_drop_rows,
    refuse_to_lose_images,
)
from onceover.extract.sealing import seal
from onceover.extract.shards import RowSources, describe_shard
from onceover.extract.store import KINDS, FeatureStore, StoreError, caption_ids, store_exists
from onceover.extract.store_form import FOLDER, StorePlace, store_place
from onceover.extract.summary import Summary, summary_of
from onceover.extract.unfinished import Unfinished
from onceover.extract.vanished import check_kept, keep_vanished, remove_kept

if TYPE_CHECKING:
    from onceover.extract.begin import Settings
    from onceover.extract.engines import Engine

ROW_BYTES = {"image": 8192, "text": 256}  # about what a row takes beside its features; a thumbnail makes the most of it
MAX_LOST = 0.5  # of the images whose features are kept, what may be unreadable without a refusal
_POOLING_NOTES = {
    "last": "a causal model, so a caption's feature is that of its last token",
    "cls": "a caption's feature is that of its first token, which the model was trained by",
}
_LIBRARIES = ("torch", "torchvision", "transformers", "numpy", "pillow", "h5py")


def extract(
    dataset: Dataset,
    path: str | Path,
    config: ExtractConfig,
    *,
    device: str | None = None,
    engine: str = "auto",
    backend: str = "auto",
    force: bool = False,
    retry_failures: bool = False,
    prune: bool = False,
    keep_vanished: bool = False,
    reuse: FeatureStore | None = None,
    tokenizer_files: dict[str, bytes] | None = None,
    encoders: Mapping[str, Callable[..., Any]] | None = None,
    check_encoder: Callable[[str, dict], None] = lambda kind, recipe: None,
) -> Summary:
    """Encodes what ``dataset`` has and the store at ``path`` lacks, and writes the store.

    A dataset of images alone, or of captions alone, needs and loads only the one encoder; the other features of its
    store have no rows.

    Args:
        path: of the store, a file or a folder, or the address of a folder (``extract.store_form``).
        engine: the name of an engine (``extract.engines``), or ``auto``.
        backend: the name of a backend (``extract.backends``), or ``auto``.
        force: replace features of another fingerprint, and discard an unfinished extraction of such.
        retry_failures: try the ledger's images again although their files have not changed.
        prune: drop rows of the store that ``dataset`` has no more.
        keep_vanished: where the dataset has rows of the store no more, keep their features beside the store
            (``FILE.h5.kept``), so that they need not be encoded again when they are back; ``prune`` drops these too.
        reuse: another store, whose rows are taken where the features' fingerprints agree.
        tokenizer_files: the vocabulary of a ``@random`` text encoder, where the captions shall not make it.
        encoders: by kind, functions that load an encoder, given ``device`` and ``backend``, in the place of the one
            that ``config`` names; they can be pickled.
        check_encoder: given each encoder's kind and recipe before anything is encoded; raises to refuse it.

    Raises:
        StoreError: other features are already there, rows would be dropped, no image can be encoded, or another
            process is writing.
        EncoderError: an encoder cannot be had.
    """
    start = time.monotonic()
    place = store_place(path)
    path = place.path
    options = Options(force, retry_failures, prune, keep_vanished)
    with only_writer(path, "the store"):
        Unfinished(path).claim()
        check_kept(path)
        with extraction_of(
            dataset,
            place,
            config,
            options,
            reuse=reuse,
            tokenizer_files=tokenizer_files,
            encoders=encoders,
            check_encoder=check_encoder,
        ) as extraction:
            old = extraction.old
            if old and backend != "auto":
                _tell_other_backend(old, backend)
            if old and is_done(extraction):
                _discard(extraction, old)
                if place.destination is not None:
                    finish_publishing(path, place.destination)
                if options.prune:
                    remove_kept(path)
                return summary_of(old, up_to_date=True)
            counts = _run(extraction, device, engine, backend)
        with FeatureStore(place.store) as store:
            summary = summary_of(store, up_to_date=False)
            _discard(extraction, store)
    summary.computed = counts.computed
    summary.reused = counts.reused
    summary.speed = counts.speed
    summary.seconds = time.monotonic() - start
    return summary


@contextlib.contextmanager
def extraction_of(
    dataset: Dataset,
    place: StorePlace,
    config: ExtractConfig,
    options: Options,
    *,
    reuse: FeatureStore | None = None,
    tokenizer_files: dict[str, bytes] | None = None,
    encoders: Mapping[str, Callable[..., Any]] | None = None,
    check_encoder: Callable[[str, dict], None] = lambda kind, recipe: None,
) -> Iterator[Extraction]:
    """Gives an extraction into the store at ``place``; a store that is there is open until the end.

    Raises:
        EncoderError: an encoder that cannot be.
    """
    images = dataset.images
    stats = np.fromiter((images.stat(key) for key in dataset.paths), np.dtype((np.int64, 2)), len(dataset.paths))
    request = _request(config, dataset)  # an encoder that cannot be is refused before anything is written
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(FeatureStore(place.store, mend=True)) if store_exists(place.store) else None
        yield Extraction(
            dataset,
            stats,
            _listing(dataset, stats),
            request,
            config,
            place,
            Unfinished(place.path),
            options,
            old,
            reuse,
            tokenizer_files,
            encoders or {},
            check_encoder,
        )


def is_done(extraction: Extraction) -> bool:
    """Whether the store has all that is asked for, so that nothing is to be encoded."""
    old = extraction.old
    if old is None or extraction.options.retry_failures:
        return False
    return is_up_to_date(old, extraction.dataset, extraction.listing, extraction.request)


def _tell_other_backend(store: FeatureStore, backend: str) -> None:
    """Tells that features of a store that another backend has computed stay as they are."""
    for kind in KINDS:
        earlier = store.provenance[kind].get("backend", backend)
        if earlier != backend:
            say(
                f"the {kind} features that are there were computed by {earlier}, and stay: those of {backend} would be "
                "the same but for rounding"
            )


def _listing(dataset: Dataset, stats: Stats) -> str:
    """A digest of all that a dataset lists, by which a store is known to be up to date."""
    left_out = [failure[:3] for failure in dataset.failures]
    index = dataset.image_index
    return digest_of_columns([dataset.ids, dataset.paths, dataset.splits, dataset.captions, index, stats, left_out])


def _request(config: ExtractConfig, dataset: Dataset) -> dict:
    """The features that are asked for, without loading an encoder: where they and the listing agree, nothing is new.

    The encoder of a kind of which the dataset has nothing need not be there.
    """
    return {
        "image": _stamp(config.image_encoder, config.seed, bool(dataset.ids)),
        "text": _stamp(config.text_encoder, config.seed, bool(dataset.captions)),
        "settings": [
            config.image_layers,
            config.text_layers,
            config.views,
            config.text_pooling,
            config.max_length,
            config.thumbnails,
            config.dtype,
            config.store_dtype,
            *_prefixes(config),
        ],
    }


def _prefixes(config: ExtractConfig) -> list[str | None]:
    """The texts before captions and queries, if there are any; earlier versions knew none."""
    prefixes = [config.caption_prefix, config.query_prefix]
    return prefixes if any(prefixes) else []


def _stamp(text: str, seed: int, is_needed: bool) -> Any:
    """The change stamp of an encoder, or those of several joined ones; None where it is not needed.

    Raises:
        EncoderError: it is needed, and is of no known form or unknown.
    """
    if not is_needed:
        return None
    stamps = [change_stamp(parse_spec(spec), seed) for spec in specs_of(text)]
    return stamps[0] if len(stamps) == 1 else stamps


def _discard(extraction: Extraction, store: FeatureStore) -> None:
    """Removes the shards whose rows went into the store; those of another, larger extraction stay, and are told of.

    So does the plan that workers have made of another dataset, or of this one when it had grown.

    The captions of images that could not be encoded are left out of the store, and need no shards either.
    """
    unfinished = extraction.unfinished
    known = {kind: KeyIndex() for kind in KINDS}
    if unfinished.shards():
        for kind, keys in (("image", store.sha256), ("text", store.captions), ("text", extraction.dataset.captions)):
            known[kind].add(keys, np.zeros(len(keys), np.int64))
        store.forget()
    others = 0
    for shard in unfinished.shards():
        try:
            kind, fingerprint, keys = describe_shard(shard)
        except OnceoverError as error:
            warn(f"a shard of another extraction is left alone: {error}")
            others += 1
            continue
        if fingerprint == store.fingerprints[kind] and (not keys or (known[kind].first(keys) >= 0).any()):
            shard.unlink()
        else:
            others += len(keys)
    if others:
        where = unfinished.folder
        say(f"{others:,} rows of another unfinished extraction stay in {where}, for when that is gone on with")
    elif _is_planned_for_others(extraction):
        say(
            f"{unfinished.folder} stays, since workers planned it for other images, captions or times of files; remove "
            "it if nobody goes on with it"
        )
    else:
        unfinished.remove()


def _is_planned_for_others(extraction: Extraction) -> bool:
    """Whether workers share a plan that was made of another dataset, or of this one in another state."""
    if not extraction.unfinished.is_shared():
        return False
    return earlier_plan(extraction, "image").get("listing", extraction.listing) != extraction.listing


def _run(extraction: Extraction, device: str | None, engine: str, backend: str) -> Counts:
    """Loads the encoders, has what is new encoded, and seals the store."""
    from onceover.extract.begin import begin_settings
    from onceover.extract.encoding.devices import log_device, pick_devices
    from onceover.extract.engines import engine_for

    unfinished = extraction.unfinished
    for reason in unfinished.remove_damaged_shards():
        warn(f"encoding a damaged shard again: {reason}")
    unfinished.remove_shards_with_passed_failures(extraction.dataset)
    devices = pick_devices(device)
    picked = devices[0]
    log_device(picked)
    engine_name, chosen = engine_for(engine, devices)
    check_backend(backend)
    settings = begin_settings(unfinished, extraction.config, picked, backend, force=extraction.options.force)
    with full_memory_told(extraction, settings):
        work = load_encoders(extraction, settings, engine_name, chosen)
        for kind in work.make:
            refuse_other_shards(kind, work.encoder(kind).recipe, unfinished, extraction.options.force)
        captions, plans = _plans(extraction, work)
        return _encode_all(extraction, work, captions, plans)


def check_backend(name: str) -> None:
    """Refuses an unknown backend.

    Raises:
        RegistryError: there is none of that name.
    """
    from onceover.extract.backends import AUTO, BACKENDS

    if name != AUTO:
        BACKENDS.load(name)


@contextlib.contextmanager
def full_memory_told(extraction: Extraction, settings: "Settings") -> Iterator[None]:
    """Turns what torch raises where a device's memory is full into an error with a way out."""
    import torch

    from onceover.extract.begin import BATCH_SIZE

    try:
        yield
    except torch.OutOfMemoryError as error:
        half = max(1, (settings["batch_size"] or BATCH_SIZE["cpu"]) // 2)
        anew = " --force, which encodes all anew" if extraction.unfinished.shards() else ""
        raise StoreError(
            f"the memory of {settings['device']} is full; make room there and run the command again, or give "
            f"it --batch-size {half}{anew}"
        ) from error


def _plans(extraction: Extraction, work: Work) -> tuple[Sequence[str], dict[str, dict]]:
    """The captions that are to be encoded, and the plans by kind: those that are there, or new ones, written down.

    Raises:
        FileError: the disk has no room.
    """
    captions = captions_to_encode(extraction, work)
    plans = {}
    for kind in work.make:
        plans[kind] = earlier_plan(extraction, kind)
        if not origin_of(extraction, work, kind, captions).items() <= plans[kind].items():
            plans[kind] = new_plan(extraction, work, kind, captions, processes=1)
    check_room(extraction, work)
    extraction.unfinished.write(work.settings, plans)
    return captions, plans


def load_encoders(extraction: Extraction, settings: "Settings", engine_name: str, engine: "Engine") -> Work:
    """Loads the encoders that are needed, and completes the settings that all shards share.

    Raises:
        StoreError: features or rows of the store would be lost.
    """
    import torch

    from onceover.extract.begin import SAMPLE, fitting_batch, in_best_dtype, sample_features, trials

    dataset = extraction.dataset
    captions = different_texts(dataset.captions)[: SAMPLE["text"]]
    samples: dict[str, Callable[[Any], np.ndarray]] = {
        "image": partial(sample_features, dataset),
        "text": lambda encoder: encoder.encode(captions)[0],
    }
    recipes = extraction.before.recipes if extraction.before else {}
    make = _makers(extraction, settings)
    encoders: dict[str, Any] = {}
    findings: dict[str, dict] = {}
    for kind, maker in make.items():
        before = recipes.get(kind, {}).get("dtype")
        backend = _backend(extraction, kind, settings, engine_name)
        dtype = extraction.config.dtype
        check = partial(_findings, extraction, kind)
        encoders[kind], findings[kind] = in_best_dtype(
            kind, maker, samples[kind], settings, dtype, before, backend, check
        )
    if "text" in encoders and not is_joined(encoders["text"].recipe):
        _tell_text_choices(extraction.config, encoders["text"].recipe)
    for kind, encoder in encoders.items():
        extraction.check_encoder(kind, encoder.recipe)
        refuse_other_features(kind, encoder.recipe, extraction.old, extraction.options.force)
    if extraction.old is not None and not _may_lose_rows(extraction.options):
        refuse_to_drop_rows(extraction.old, dataset)
    device = torch.device(settings["device"])
    image = encoders.get("image")
    text = encoders.get("text")
    if not settings["batch_size"]:
        encode = trials(image, text, dataset.captions)
        settings["batch_size"] = fitting_batch(encode, device, engine.workers(device))
    return Work(settings, engine_name, engine, image, text, make, findings)


def _findings(extraction: Extraction, kind: str, encoder: Any) -> dict:
    """The findings of an encoder's check: those that stand in the store that is gone on with, or new ones.

    Raises:
        EncoderError: the encoder is of no use.
    """
    from onceover.extract.encoder_checks import check_captions, check_images

    if is_joined(encoder.recipe):
        return {}  # each of them was checked when the store that was joined was made
    dataset = extraction.dataset
    before = extraction.before
    earlier: dict = {}
    if before is not None and before.fingerprints[kind] == digest(encoder.recipe):
        earlier = before.provenance[kind].get("check", {})
    if kind == "text":
        return check_captions(encoder, extraction.config.text_encoder, dataset.captions, earlier)
    return earlier or check_images(encoder, extraction.config.image_encoder, dataset.images, dataset.paths)


def _tell_text_choices(config: ExtractConfig, recipe: dict) -> None:
    """Tells which pooling was chosen where that is not the usual mean, and that fewer tokens are taken than asked."""
    if config.text_pooling == "auto" and recipe["pooling"] in _POOLING_NOTES:
        say(f"text: {_POOLING_NOTES[recipe['pooling']]}; set extract.text_pooling for another pooling")
    if recipe["max_length"] < config.max_length != ExtractConfig.max_length:
        say(
            f"text: captions are cut at {recipe['max_length']:,} tokens, the most that {config.text_encoder} takes; "
            f"extract.max_length is {config.max_length:,}"
        )


def _makers(extraction: Extraction, settings: "Settings") -> dict[str, Callable[..., Any]]:
    """By the kinds that are needed, a function that loads the encoder, given dtype and backend."""
    from onceover.extract.encoding.image import ImageEncoder
    from onceover.extract.encoding.text import TextEncoder

    dataset = extraction.dataset
    config = extraction.config
    common: dict[str, Any] = {"store_dtype": config.store_dtype, "seed": config.seed, "device": settings["device"]}
    make: dict[str, Callable[..., Any]] = {}
    if extraction.encoders:
        needed = [kind for kind, rows in (("image", dataset.ids), ("text", dataset.captions)) if rows]
        return {kind: partial(_loaded, extraction.encoders[kind], device=settings["device"]) for kind in needed}
    if dataset.ids:
        make["image"] = partial(
            ImageEncoder, config.image_encoder, layers=config.image_layers, views=config.views, **common
        )
    if dataset.captions:
        make["text"] = partial(
            TextEncoder,
            config.text_encoder,
            layers=config.text_layers,
            pooling=config.text_pooling,
            max_length=config.max_length,
            caption_prefix=config.caption_prefix,
            query_prefix=config.query_prefix,
            captions=dataset.captions,
            tokenizer_files=extraction.tokenizer_files or _stored_vocabulary(extraction),
            **common,
        )
    return make


def _loaded(load: Callable[..., Any], *, device: str, dtype: str, backend: str) -> Any:
    """The encoder that ``load`` gives, whose recipe has its own ``dtype``; it can be pickled as a ``partial``."""
    return load(device=device, backend=backend)


def _backend(extraction: Extraction, kind: str, settings: "Settings", engine_name: str) -> str:
    """The name of the backend for a kind: the one that it was begun with, or one for the rows to be encoded."""
    import torch

    from onceover.extract.backends import backend_for

    begun = settings["backends"].get(kind)
    if begun is not None:
        return begun
    rows, known = _rows(extraction, kind, is_same_encoder=_has_name_of(extraction, kind, extraction.before))
    return backend_for(settings["backend"], kind, rows - known, engine_name, torch.device(settings["device"]))


def _rows(extraction: Extraction, kind: str, *, is_same_encoder: bool) -> tuple[int, int]:
    """About how many rows of a kind the dataset has, and how many features there are already.

    Args:
        is_same_encoder: whether the features that are there are of the encoder that is asked for.
    """
    rows = len(extraction.dataset.ids if kind == "image" else extraction.dataset.captions)
    known = sum(len(describe_shard(shard)[2]) for shard in extraction.unfinished.shards(kind))
    if extraction.before is not None and is_same_encoder:
        known += len(extraction.before.features(kind))
    return rows, known


def _has_name_of(extraction: Extraction, kind: str, store: FeatureStore | None) -> bool:
    """Whether the encoder that is asked for has the name of the one that made a store's features."""
    if store is None:
        return False
    if extraction.encoders:  # those of the store itself
        return True
    config = extraction.config
    spec = config.image_encoder if kind == "image" else config.text_encoder
    return store.provenance[kind]["encoder"] == located(spec)


def _may_lose_rows(options: Options) -> bool:
    """Whether the user wants rows to be dropped, or their features are kept."""
    return options.force or options.prune or options.keep_vanished


def _stored_vocabulary(extraction: Extraction) -> dict[str, bytes] | None:
    """The vocabulary of a @random encoder comes from the captions; captions that join later do not change it."""
    old = extraction.old
    if not parse_spec(extraction.config.text_encoder).random or old is None or extraction.options.force:
        return None
    if not _has_name_of(extraction, "text", old):
        return None
    return old.tokenizer_files


def check_room(extraction: Extraction, work: Work) -> None:
    """Refuses to begin what would not fit the disk: the shards, and beside them, for a moment, a store of one file.

    Raises:
        FileError: the disk has no room.
    """
    from onceover.extract.begin import trials

    shards = 0
    whole = 0
    features = 0
    for kind, trial in trials(work.image, work.text, extraction.dataset.captions).items():
        feature_bytes = trial(1)[0].nbytes
        before = extraction.before.fingerprints[kind] if extraction.before else ""
        rows, known = _rows(extraction, kind, is_same_encoder=before == digest(work.encoder(kind).recipe))
        shards += (feature_bytes + ROW_BYTES[kind]) * max(0, rows - known)
        whole += (feature_bytes + ROW_BYTES[kind]) * rows
        features += feature_bytes * rows
    is_folder = extraction.place.form_for(features) == FOLDER
    check_disk(extraction.path, shards if is_folder else shards + whole)


def _encode_all(extraction: Extraction, work: Work, captions: Sequence[str], plans: dict[str, dict]) -> Counts:
    """Has the images and the captions encoded, and seals the store with the captions of images that could be.

    Args:
        captions: that are to be encoded, each once.
        plans: by kind; each is taken out, so that its rows are in memory until they are encoded, and no longer.
    """
    dataset = extraction.dataset
    options = extraction.options
    recipes = {kind: work.encoder(kind).recipe if work.encoder(kind) else {} for kind in KINDS}
    image_sources = RowSources("image", "", ())
    positions = np.full(len(dataset.ids), -1)  # of the images among their sources
    if work.image is not None:
        _encode(extraction, work, "image", captions, plans.pop("image"))
        image_sources = extraction.sources("image", recipes["image"], columns_of(extraction, "image"))
        positions = known_images(dataset, extraction.stats, image_sources)
        image_sources.forget_stats()
    rows = np.flatnonzero(positions >= 0)
    lost = {row: image_sources.failures[dataset.ids[row]] for row in np.flatnonzero(positions < 0).tolist()}
    if lost and not len(rows):
        first = next(iter(lost.values()))
        raise StoreError(f"none of the {len(lost):,} images could be encoded; the first: {first.id}: {first.reason}")
    if extraction.old is not None and not (options.force or options.prune):
        refuse_to_lose_images(extraction.old, list(lost.values()), MAX_LOST if options.keep_vanished else 0)
    new_row = np.full(len(dataset.ids) + 1, -1)  # of each image; the last one: of captions without an image
    new_row[rows] = np.arange(len(rows))
    has_image = (dataset.image_index < 0) | (new_row[dataset.image_index] >= 0)
    text_sources = RowSources("text", "", ())
    if work.text is not None:
        _encode(extraction, work, "text", captions, plans.pop("text"))
        text_sources = extraction.sources("text", recipes["text"], columns_of(extraction, "text"))
    contents = ChosenTexts(image_sources.contents, positions[rows])
    stored_captions = ChosenTexts(text_column(dataset.captions), np.flatnonzero(has_image))
    vanished = frozenset[str]()
    if options.keep_vanished and not options.prune:
        vanished = keep_vanished(extraction.path, image_sources, image_sources.find(contents), recipes["image"])
        present = text_sources.find(dataset.captions)
        vanished |= keep_vanished(extraction.path, text_sources, present, recipes["text"])
    names = caption_ids(dataset.ids, dataset.image_index) if lost else []
    orphans = [Failure(names[row], "caption", NOT_ENCODED) for row in np.flatnonzero(~has_image)]
    seal(
        extraction.path,
        form=extraction.place.form_for(image_sources.nbytes(len(rows)) + text_sources.nbytes(len(stored_captions))),
        destination=extraction.place.destination,
        images=_image_columns(extraction, rows, contents),
        texts={"caption": stored_captions, "image_index": new_row[dataset.image_index[has_image]].astype(np.int64)},
        sources={"image": image_sources, "text": text_sources},
        recipes=recipes,
        provenance=_provenance(extraction, work),
        failures=[*dataset.failures, *lost.values(), *orphans],
        tokenizer_files=work.text.tokenizer_files if work.text else {},
    )
    if options.prune:
        remove_kept(extraction.path)
    elif options.keep_vanished:
        remove_kept(extraction.path, {kind: digest(recipe) for kind, recipe in recipes.items()}, vanished)
    return work.counts


def _encode(extraction: Extraction, work: Work, kind: str, captions: Sequence[str], plan: dict) -> None:
    """Has the rows of a plan encoded."""
    total = len(extraction.dataset.ids if kind == "image" else captions)
    folder = extraction.unfinished.folder
    shards = shards_of(plan, kind, folder)
    encode_shards(extraction, work, kind, captions, shards, total)
    missing = [shard.file for shard in shards if not shard.file.exists()]
    if missing:
        raise StoreError(
            f"{len(missing):,} of {len(shards):,} {kind} shards are not in {folder} (the first: {missing[0].name}), "
            f"although the engine {work.engine_name} has finished; all machines that encode need this folder at the "
            "same path; then run the command again"
        )


def _image_columns(extraction: Extraction, rows: np.ndarray, contents: Sequence[str]) -> dict[str, Any]:
    """The columns of the store's images beside their features.

    Args:
        rows: of the dataset, those that are stored. contents: the SHA-256 of each of these.
    """
    dataset = extraction.dataset
    return {
        "id": ChosenTexts(text_column(dataset.ids), rows),
        "path": ChosenTexts(text_column(dataset.paths), rows),
        "split": ChosenTexts(text_column(dataset.splits), rows),
        "sha256": contents,
        "size": extraction.stats[rows, 0],
        "mtime_ns": extraction.stats[rows, 1],
    }


def _encoder_provenance(encoder: Any) -> dict[str, Any]:
    """The backend of an encoder, OpenVINO's version where it is that, and the parts of joined encoders.

    Empty without an encoder.
    """
    if encoder is None:
        return {}
    record: dict[str, Any] = {"backend": encoder.backend}
    if "openvino" in encoder.backend.split(", "):
        record["openvino"] = version("openvino")
    if is_joined(encoder.recipe):
        record["parts"] = encoder.parts
    return record


def _backends_together(earlier: dict, now: dict) -> dict[str, str]:
    """The backends of features of which some were there before."""
    names = [record["backend"] for record in (earlier, now) if "backend" in record]
    backends = list(dict.fromkeys(", ".join(names).split(", ")))
    together = {"backend": ", ".join(backends)}
    if "openvino" in earlier:
        together["openvino"] = earlier["openvino"]
    return together


@cache  # packages' metadata are long texts
def _library_versions() -> dict[str, str]:
    """The versions of the libraries that features may depend on."""
    return {name: version(name) for name in _LIBRARIES}


def _provenance(extraction: Extraction, work: Work) -> dict:
    """The provenance of the store. A kind of which nothing was computed keeps the one it had."""
    dataset = extraction.dataset
    config = extraction.config
    now = {
        **{name: value for name, value in work.settings.items() if name not in ("backend", "backends")},
        "engine": work.engine_name,
        "streams": work.engine.workers(work.device()),
        "python": platform.python_version(),
        **_library_versions(),
    }
    by_kind = {}
    for kind, spec in (("image", config.image_encoder), ("text", config.text_encoder)):
        of_kind = now | _encoder_provenance(work.encoder(kind))
        speed = work.counts.speed.get(kind)
        if speed is not None:
            of_kind["rows_per_second"] = round(speed.rows / speed.seconds, 1)
        if extraction.before is not None:
            earlier = extraction.before.provenance[kind]
            if not work.counts.computed.get(kind):
                of_kind = earlier
            elif work.counts.reused.get(kind):
                of_kind |= _backends_together(earlier, of_kind)
        if work.findings.get(kind):
            of_kind = of_kind | {"check": work.findings[kind]}
        by_kind[kind] = of_kind | {"encoder": located(spec), "seed": config.seed}
    return {
        **dataset.provenance(),
        "settings": {key: getattr(config, key) for key in config.__dataclass_fields__},
        "listing": extraction.listing,
        "request": extraction.request,
        **{kind: by_kind[kind] for kind in KINDS},
    }
