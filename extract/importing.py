"""Features computed elsewhere -> feature store: arrays and captions, checked as an extraction's features are.

Memory stays at a block of rows: the arrays are read twice, once to check and hash them, once to copy them.
"""

import hashlib
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from onceover.base.files import check_disk, digest, only_writer
from onceover.base.progress import say
from onceover.configs.schema import ExtractConfig
from onceover.extract.arrays import Array, open_array
from onceover.extract.dataset import Dataset
from onceover.extract.dataset.reading import DEFAULT, ReadOptions
from onceover.extract.dataset.table import captioned
from onceover.extract.encoders import IMPORTED
from onceover.extract.import_encoders import (
    StatedEncoder,
    encode_captions,
    stated_image_encoder,
    stated_text_encoder,
)
from onceover.extract.import_sources import (
    ImportingError,
    ImportSource,
    source_of_lines,
    source_of_precomputed,
    source_of_table,
)
from onceover.extract.sealing import Rows, seal
from onceover.extract.store import FeatureStore, StoreError, dataset_fingerprint, store_exists
from onceover.extract.store_form import StorePlace, store_place
from onceover.extract.summary import Summary, summary_of

# random directions, and the share of a row's length by which equal rows may differ
_PROJECTIONS = 8
_SAME = 0.01
_MAX_VIEWS = 12  # of an image; an extraction makes no more
_OTHER_COLUMNS = 512  # bytes a row, about
_SAMPLE = 32  # rows by which an encoder is checked
_SETTINGS = ("text_layers", "text_pooling", "max_length")  # of an extraction of captions
REGIONS = ("mean",)  # ways in which the features of an image's regions are made one


class Features:
    """The chosen rows of an array, from which ``seal`` copies them into the store.

    Attributes:
        row: the shape of a row: (V, D) of an image, (D,) of a caption.
        sha256: of the rows' bytes; contents: of each image's row, by its name; zeros: rows that are zeros alone.
        sampled: some of the chosen rows, by their number among these, evenly spaced.
    """

    def __init__(self, kind: str, array: Array, chosen: np.ndarray, owners: list[str] | None = None):
        """Reads the whole array once.

        Args:
            chosen: the rows for the store, ascending. owners: the image of each row of the array.

        Raises:
            ArrayError: numbers that are not finite. ImportingError: rows of one image that differ.
        """
        self.kind = kind
        self.array = array
        self.row = (1, *array.shape[1:]) if kind == "image" and len(array.shape) == 2 else array.shape[1:]
        self.nbytes = len(chosen) * int(np.prod(self.row)) * np.dtype(array.dtype).itemsize
        self._is_chosen = np.zeros(len(array), bool)
        self._is_chosen[chosen] = True
        self._sketches: dict[str, np.ndarray] = {}
        self.contents: dict[str, str] = {}
        self.zeros = 0
        self.sampled: dict[int, np.ndarray] = {}
        wanted = set(np.linspace(0, len(chosen) - 1, _SAMPLE).astype(int).tolist())
        state = hashlib.sha256()
        count = 0
        for rows, block in array.blocks(f"checking {kind}"):
            chosen_rows = block[self._is_chosen[rows]]
            for number in wanted.intersection(range(count, count + len(chosen_rows))):
                self.sampled[number] = chosen_rows[number - count].reshape(self.row)
            count += len(chosen_rows)
            state.update(chosen_rows.data)
            self.zeros += int((~chosen_rows.any(axis=tuple(range(1, chosen_rows.ndim)))).sum())
            if owners is not None:
                self._add_contents(owners[rows], block)
        self.sha256 = state.hexdigest()

    def _add_contents(self, owners: list[str], block: np.ndarray) -> None:
        """Notes each image's content; its other rows may differ by the rounding of an encoder's batches.

        They are compared by a few random projections, so that no row stays in memory.
        """
        rows = block.reshape(len(block), -1).astype(np.float32)
        directions = np.random.default_rng(0).standard_normal((rows.shape[1], _PROJECTIONS), np.float32)
        sketches = rows @ directions
        norms = np.linalg.norm(rows, axis=1)
        for name, values, sketch, norm in zip(owners, block, sketches, norms, strict=True):
            if not name:
                continue
            self.contents.setdefault(name, hashlib.sha256(values).hexdigest())
            if np.abs(self._sketches.setdefault(name, sketch) - sketch).max() > _SAME * norm:
                raise ImportingError(
                    f"{self.array.source}: rows of the image {name} differ; give one row for each different image"
                )

    def blocks(self, keys: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """The chosen rows, one for each of ``keys``, with the columns that a store has for them."""
        for rows, block in self.array.blocks(f"writing {self.kind}"):
            chosen_rows = block[self._is_chosen[rows]]
            columns = {"features": chosen_rows.reshape(len(chosen_rows), *self.row)}
            if self.kind == "text":
                columns["truncated"] = np.zeros(len(chosen_rows), bool)
            yield columns


@dataclass(frozen=True)
class PreparedFeatures:
    """The features of one kind, ready to be written into the store.

    Attributes:
        rows: what they are copied from. nbytes: the bytes that they take. recipe, provenance: as a store has them.
        settings: those of an extraction that belong to this kind. tokenizer_files: of a text encoder.
    """

    rows: Rows
    recipe: dict
    provenance: dict
    nbytes: int
    settings: dict[str, Any] = field(default_factory=dict)
    tokenizer_files: dict[str, bytes] = field(default_factory=dict)


def import_features(
    image_features: Path | None,
    text_features: Path | None,
    captions: Path | None,
    path: Path,
    *,
    precomputed: Path | None = None,
    captions_per_image: int | None = None,
    image_ids: Path | None = None,
    regions: str | None = None,
    name: str | None = None,
    data: Path | None = None,
    image_encoder: str | None = None,
    text_encoder: str | None = None,
    config: ExtractConfig | None = None,
    device: str | None = None,
    force: bool = False,
    reading: ReadOptions = DEFAULT,
) -> Summary:
    """Writes the store ``path``. Row i of the text features belongs to row i of the captions.

    The image features have a row for each different image of the caption table, in the order of their first appearance,
    or one for each row of the table, or one for each line of ``image_ids``, or an array for each image's name.

    Args:
        text_features: None: the captions are encoded with ``text_encoder``.
        precomputed: a folder with ``SPLIT_ims.npy`` and ``SPLIT_caps.txt`` instead of image features and captions.
        captions_per_image: the captions are the lines of a text file, so many for each image.
        regions: ``mean``: the image features are (N, R, D), of R regions of an image, and their mean is taken.
        name: what to call unknown encoders; as the file or folder of image features by default.
        data: where the images' names lead from; the captions' folder by default.
        image_encoder, text_encoder: the encoders that made the features; a sample is encoded to check it, for which
            the images have to be at hand.
        config: settings of the encoders, and the seed of the split, where the captions have none.
        device: as ``pick_device``.
        force: replace a store of other features, images or captions.
        reading: the caption table's columns, where they have other names than the usual ones.

    Raises:
        ArrayError, DatasetError: files that cannot be read or used. ImportingError: they do not belong together, or are
            not of the encoder that is named.
        EncoderError: an encoder cannot be had.
        StoreError: another store is there. FileError: no room, or another process is writing.
    """
    start = time.monotonic()
    place = store_place(path)
    path = place.path
    if text_features is None and text_encoder is None:
        raise ImportingError(
            "there are no text features; name them (--text-features), or an encoder for the captions (--text-encoder)"
        )
    config = config or ExtractConfig()
    config = replace(
        config,
        image_encoder=image_encoder or config.image_encoder,
        text_encoder=text_encoder or config.text_encoder,
    )
    source = _source(image_features, captions, precomputed, captions_per_image, image_ids, reading)
    if regions is not None and regions not in REGIONS:
        raise ImportingError(f"regions are taken together by their mean, not by {regions!r:.80}; use regions='mean'")
    if regions is not None:
        source = replace(source, images=source.images.mean_of_regions())
    _check_views(source.images)
    text_array = open_array(text_features, (2,)) if text_features is not None else None
    if text_array is not None and len(text_array) != len(source.rows):
        raise ImportingError(
            f"{text_features} has {len(text_array):,} rows, and {source.captions} has {len(source.rows):,}; each "
            "caption has one"
        )
    root = data or _folder_of(source.captions)
    dataset, of_captions = captioned(list(source.rows), source.captions, root, source.ids, config.seed)
    say(f"importing features of {len(dataset.ids):,} images and {len(dataset.captions):,} captions")
    images = Features("image", source.images, _first_rows(dataset.ids, source.owners), source.owners)
    texts = Features("text", text_array, of_captions) if text_array is not None else None
    dataset.notes.extend(_note_on_zeros(images, texts))
    for note in dataset.notes:
        say(note)
    unknown = f"{IMPORTED}:{name or (precomputed or image_features or path).stem}"
    stated = _check_image_encoder(images, dataset, config, device) if image_encoder is not None else None
    prepared_images = _prepared(images, unknown, config, stated)
    prepared_texts = None
    if texts is not None:
        stated = _check_text_encoder(texts, dataset, config, device) if text_encoder is not None else None
        prepared_texts = _prepared(texts, unknown, config, stated)
    up_to_date = _write(place, dataset, images, prepared_images, prepared_texts, config, device, force)
    with FeatureStore(place.store) as store:
        summary = summary_of(store, up_to_date)
    summary.seconds = time.monotonic() - start
    return summary


def _first_rows(ids: Sequence[str], owners: list[str]) -> np.ndarray:
    """The first row of each image, int64 (N,), where ``owners`` has the image of each row."""
    first: dict[str, int] = {}
    for row, name in enumerate(owners):
        first.setdefault(name, row)
    return np.array([first[name] for name in ids])


def _note_on_zeros(images: Features, texts: Features | None) -> list[str]:
    """A note on features that are zeros alone, where there are some."""
    of_images = images.zeros
    of_captions = texts.zeros if texts is not None else 0
    if not of_images and not of_captions:
        return []
    counts = f"features that are zeros alone: {of_images:,} images, {of_captions:,} captions"
    return [f"{counts}; evaluate refuses a split with such, since they have no direction"]


def _check_image_encoder(
    images: Features, dataset: Dataset, config: ExtractConfig, device: str | None
) -> StatedEncoder:
    """The image encoder that the user names, which gives the features of a sample.

    Raises:
        ImportingError: it gives others, or the images are not at hand.
    """
    rows, stored = _sample(images)
    return stated_image_encoder(config, images.array.source, stored, dataset, rows, device)


def _check_text_encoder(texts: Features, dataset: Dataset, config: ExtractConfig, device: str | None) -> StatedEncoder:
    """The text encoder that the user names, which gives the features of a sample.

    Raises:
        ImportingError: it gives others.
    """
    rows, stored = _sample(texts)
    captions = [dataset.captions[row] for row in rows]
    return stated_text_encoder(config, texts.array.source, stored, captions, device)


def _source(
    image_features: Path | None,
    captions: Path | None,
    precomputed: Path | None,
    captions_per_image: int | None,
    image_ids: Path | None,
    reading: ReadOptions,
) -> ImportSource:
    """The features and captions to import, in whichever of the three forms they are given.

    Raises:
        ImportingError: there are no image features or captions, or too many.
    """
    if precomputed is not None:
        if image_features is not None or captions is not None or image_ids is not None:
            raise ImportingError(
                "--precomputed names a folder with the image features and captions of all splits; leave out "
                "--image-features, --captions and --image-ids"
            )
        return source_of_precomputed(precomputed, captions_per_image)
    if image_features is None or captions is None:
        raise ImportingError(
            "name the image features and the captions (--image-features, --captions), or a folder with both "
            "(--precomputed); images are encoded by extract"
        )
    if captions_per_image is not None:
        return source_of_lines(image_features, captions, captions_per_image, image_ids)
    return source_of_table(image_features, captions, image_ids, reading)


def _folder_of(captions: Path) -> Path:
    """The folder of the captions: the one they lie in, or the precomputed features' own."""
    return captions if captions.is_dir() and not any(captions.glob("*.parquet")) else captions.absolute().parent


def _sample(features: Features) -> tuple[list[int], np.ndarray]:
    """Some rows, by their numbers among the store's, and their features."""
    rows = sorted(features.sampled)
    return rows, np.stack([features.sampled[row] for row in rows])


def _check_views(images: Array) -> None:
    """Refuses regions of images: training would draw one at random, as if it showed the whole image.

    Raises:
        ImportingError: more rows an image than an image has views.
    """
    if len(images.shape) == 3 and images.shape[1] > _MAX_VIEWS:
        raise ImportingError(
            f"{images.source} has {images.shape[1]} rows per image, more than the {_MAX_VIEWS} views that there are; "
            "if they are regions of it, --regions mean takes their mean"
        )


def _prepared(
    features: Features, unknown: str, config: ExtractConfig, stated: StatedEncoder | None
) -> PreparedFeatures:
    """Imported features with their recipe and provenance.

    Args:
        unknown: the name that stands for an unknown encoder. stated: the encoder, where it is known.
    """
    provenance: dict[str, Any] = {"encoder": unknown, "seed": config.seed, "python": platform.python_version()}
    provenance |= {library: version(library) for library in ("numpy", "h5py")}
    provenance["source"] = str(features.array.source.resolve())
    recipe: dict[str, Any] = {
        "architecture": "imported",
        "name": unknown.partition(":")[2],
        "features": features.sha256,
        "shape": list(features.row),
        "dtype": features.array.dtype,
        "store_dtype": features.array.dtype,
        "weights": "unknown",
        "pooling": "unknown",
    }
    settings: dict[str, Any] = {f"{features.kind}_encoder": unknown}
    if features.kind == "image":
        settings["views"] = features.row[0]
    if stated is None:
        return PreparedFeatures(features, recipe, provenance, features.nbytes, settings)
    provenance |= {"encoder": stated.spec, "differs_by": stated.error}
    settings |= stated.settings | {f"{features.kind}_encoder": stated.spec}
    recipe["encoder"] = stated.recipe
    return PreparedFeatures(features, recipe, provenance, features.nbytes, settings, stated.tokenizer_files)


@contextmanager
def _encoded_captions(
    dataset: Dataset, place: StorePlace, config: ExtractConfig, device: str | None
) -> Iterator[PreparedFeatures]:
    """Encodes the captions and gives their features; the file that holds them is removed once they are written."""
    before = FeatureStore(place.store) if store_exists(place.store) else None
    try:
        encoded = encode_captions(dataset, place.path, config, before, device)
    finally:
        if before is not None:
            before.close()
    store = encoded.store
    provenance = store.provenance["text"]
    settings = {key: getattr(config, key) for key in _SETTINGS} | {"text_encoder": provenance["encoder"]}
    row_bytes = store.text_features.nbytes // len(store.captions)
    nbytes = row_bytes * len(dataset.captions)
    yield PreparedFeatures(encoded.rows(), store.recipes["text"], provenance, nbytes, settings, store.tokenizer_files)
    encoded.remove()


def _write(
    place: StorePlace,
    dataset: Dataset,
    images: Features,
    image: PreparedFeatures,
    text: PreparedFeatures | None,
    config: ExtractConfig,
    device: str | None,
    force: bool,
) -> bool:
    """Writes the store; returns True where it is there already and nothing was written.

    Args:
        text: None: the captions are encoded, once it is known that the store may be written.

    Raises:
        StoreError: another store is there.
    """
    path = place.path
    contents = [images.contents[name] for name in dataset.ids]
    content = dataset_fingerprint(dataset.ids, contents, dataset.splits, dataset.captions, dataset.image_index)
    known = {"image": digest(image.recipe), "dataset": content}
    with only_writer(path, "the store"):
        _refuse_other(place.store, known, force)
        if text is not None:
            return _sealed(place, dataset, contents, {"image": image, "text": text}, known, config, force)
        with _encoded_captions(dataset, place, config, device) as encoded:
            return _sealed(place, dataset, contents, {"image": image, "text": encoded}, known, config, force)


def _refuse_other(path: Path, fingerprints: dict[str, str], force: bool) -> bool:
    """Whether a store with these fingerprints is there.

    Raises:
        StoreError: one of others is there, without ``force``.
    """
    if not store_exists(path):
        return False
    with FeatureStore(path) as old:
        if fingerprints.items() <= old.fingerprints.items():
            return True
    if not force:
        raise StoreError(f"{path} holds other features or captions; name another --store, or use --force")
    return False


def _sealed(
    place: StorePlace,
    dataset: Dataset,
    contents: list[str],
    kinds: dict[str, PreparedFeatures],
    fingerprints: dict[str, str],
    config: ExtractConfig,
    force: bool,
) -> bool:
    """Writes the store; returns True where it is there already and nothing was written."""
    path = place.path
    if _refuse_other(place.store, fingerprints | {"text": digest(kinds["text"].recipe)}, force):
        return True
    others = _OTHER_COLUMNS * (len(dataset.ids) + len(dataset.captions))
    features = sum(prepared.nbytes for prepared in kinds.values())
    check_disk(path, features + others)
    unknown = np.full(len(dataset.ids), -1, np.int64)
    settings = asdict(config) | {"thumbnails": False}
    for prepared in kinds.values():
        settings |= prepared.settings
    seal(
        path,
        form=place.form_for(features),
        destination=place.destination,
        images={
            "id": dataset.ids,
            "path": dataset.paths,
            "split": dataset.splits,
            "sha256": contents,
            "size": unknown,
            "mtime_ns": unknown,
        },
        texts={"caption": dataset.captions, "image_index": dataset.image_index},
        sources={kind: prepared.rows for kind, prepared in kinds.items()},
        recipes={kind: prepared.recipe for kind, prepared in kinds.items()},
        provenance={
            **dataset.provenance(),
            "settings": settings,
            "listing": None,  # no extraction finds its own here
            "request": None,
            **{kind: prepared.provenance for kind, prepared in kinds.items()},
        },
        failures=dataset.failures,
        tokenizer_files=kinds["text"].tokenizer_files,
    )
    return False
