"""How a shard is encoded: it is read, batch by batch, computed, and written. What does it can be pickled.

``encoding(shard)`` does all of it. An engine that overlaps the steps calls ``read``, ``begin`` and ``write`` itself.
"""

import copy
import hashlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.base.files import FileError
from onceover.extract.formats import MissingDecoder
from onceover.extract.image_source import ImageSource
from onceover.extract.ledger import Failure
from onceover.extract.pictures import PictureError, thumbnail
from onceover.extract.plan import Shard
from onceover.extract.shards import RowSources, write_shard

if TYPE_CHECKING:
    from onceover.extract.encoding.image import ImageEncoder
    from onceover.extract.encoding.text import TextEncoder


class EncodeError(OnceoverError):
    """Features that cannot be stored."""


class Progress(NamedTuple):
    """Rows that are done since the last report, and the seconds that they took by stage: decode, encode, write."""

    rows: int
    seconds: dict[str, float]


class DecodedImages(NamedTuple):
    """Images that were read and decoded.

    Attributes:
        records: row, SHA-256 and thumbnail (JPEG, or empty) of each.
        pixels: uint8 (n, P, 3, H, W), of those that are to be encoded: the n whose content is not known.
        failures: row, reason, and whether it may pass, of those that could not be decoded.
        seconds: that it took.
    """

    records: list[tuple[int, str, bytes]]
    pixels: np.ndarray
    failures: list[tuple[int, str, bool]]
    seconds: float


class TokenisedCaptions(NamedTuple):
    """A batch of captions.

    Attributes:
        rows: of the captions. truncated: bool (B,), which were cut.
        unknown, tokens: int32 (B,), the tokens that the vocabulary lacks, and all tokens.
        token_ids: of each.
    """

    rows: list[int]
    truncated: np.ndarray
    unknown: np.ndarray
    tokens: np.ndarray
    token_ids: list[list[int]]

    def columns(self, features: np.ndarray) -> dict[str, Any]:
        """The columns of its records, with their features."""
        counts = {"truncated": self.truncated, "unknown": self.unknown, "tokens": self.tokens}
        return {"row": self.rows, **counts, "features": features}


class EncodedBatch(NamedTuple):
    """A batch with its features.

    Attributes:
        columns: of its records, ``row`` and ``features`` among them.
        failures: the records that got none.
        seconds: that went before encoding, by stage.
    """

    columns: dict[str, Any]
    failures: list[Failure]
    seconds: dict[str, float]

    @property
    def size(self) -> int:
        """How many rows it had."""
        return len(self.columns["row"]) + len(self.failures)


class Encoding(ABC):
    """Encodes shards of one kind. It can be pickled; the copy loads its encoder when it first needs it.

    Attributes:
        kind: ``image`` or ``text``.
    """

    kind: str

    def __init__(self, load: Callable[..., Any], encoder: Any = None):
        """``load`` gives the encoder, which is ``encoder`` where it is loaded already.

        It can be pickled, and takes the name of another device as ``device``.
        """
        self._load = load
        self._encoder = encoder
        self._lock = threading.RLock()

    def __getstate__(self) -> dict:
        state = self.__dict__ | {"_encoder": None}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._lock = threading.RLock()

    def on(self, device: str) -> "Encoding":
        """A copy that loads its encoder onto another device when it first needs it."""
        other = copy.copy(self)
        other._load = partial(self._load, device=device)
        return other

    @property
    def encoder(self) -> Any:
        """The encoder, which is loaded once."""
        if self._encoder is None:
            with self._lock:
                if self._encoder is None:
                    self._encoder = self._load()
        return self._encoder

    def __call__(self, shard: Shard, report: Callable[[Progress], None] = lambda _: None) -> None:
        """Encodes a shard and writes its file; ``report`` is told of each batch, and ends the work where it raises."""
        encoded = []
        for batch in self.read(shard):
            start = time.perf_counter()
            result = self.begin(batch)()
            seconds = result.seconds | {"encode": time.perf_counter() - start}
            encoded.append(result)
            report(Progress(result.size, seconds))
        start = time.perf_counter()
        self.write(shard, encoded)
        report(Progress(0, {"write": time.perf_counter() - start}))

    @abstractmethod
    def read(self, shard: Shard) -> Iterator[Any]:
        """The batches of a shard, as ``begin`` takes them."""

    @abstractmethod
    def begin(self, batch: Any) -> Callable[[], EncodedBatch]:
        """Begins to compute a batch's features; the call that is returned waits for them."""

    @abstractmethod
    def columns(self, rows: list[int]) -> dict[str, Any]:
        """The columns of rows that are known without encoding: ids or captions."""

    def write(self, shard: Shard, batches: list[EncodedBatch]) -> None:
        """Writes the file of a shard, whole or not at all, with its rows in the dataset's order."""
        columns = _joined([batch.columns for batch in batches])
        failures = list(chain.from_iterable(batch.failures for batch in batches))
        rows = columns.pop("row")
        write_shard(shard.file, self.kind, self.columns(rows) | columns, self.encoder.recipe, failures)


class ImageEncoding(Encoding):
    """Encodes shards of images.

    Args:
        load: gives the encoder. encoder: it, where it is loaded already.
        images: where their bytes come from.
        ids: of all images of the dataset, by row. paths: their keys in ``images``.
        stats: the sizes and times (mtime_ns) of their files, int64 (N, 2).
        known: contents that have features already.
        batch_size: images in a batch.
        thumbnails: whether they are kept.
        store_dtype: of the features on the disk.
    """

    kind = "image"

    def __init__(
        self,
        load: Callable[[], "ImageEncoder"],
        encoder: "ImageEncoder | None",
        *,
        images: ImageSource,
        ids: Sequence[str],
        paths: Sequence[str],
        stats: np.ndarray,
        known: RowSources,
        batch_size: int,
        thumbnails: bool,
        store_dtype: str,
    ):
        super().__init__(load, encoder)
        self.batch_size = batch_size
        self._images = images
        self._ids = ids
        self._paths = paths
        self._stats = stats
        self._known = known
        self._thumbnails = thumbnails
        self._store_dtype = store_dtype

    def read(self, shard: Shard) -> Iterator[list[DecodedImages]]:
        """The batches of a shard, each in one piece."""
        for rows in self.batches(shard):
            yield [self.decode(rows)]

    def batches(self, shard: Shard) -> list[list[int]]:
        """The rows of each batch of a shard."""
        rows = shard.rows
        size = self.batch_size
        return [rows[number * size : (number + 1) * size] for number in shard.batches]

    def decode(self, rows: list[int]) -> DecodedImages:
        """Reads and decodes images, and makes their pixels as the network takes them."""
        start = time.perf_counter()
        preprocessing = self.encoder.preprocessing
        records: list[tuple[int, str, bytes]] = []
        pixels: list[np.ndarray] = []
        failures: list[tuple[int, str, bool]] = []
        reads = self._images.reads([self._paths[row] for row in rows])
        for row, read in zip(rows, reads, strict=True):
            try:
                data = read()
                image, make_pixels = preprocessing.read(data)
                sha256 = hashlib.sha256(data).hexdigest()
                if sha256 not in self._known:
                    pixels.append(make_pixels().numpy())
            except (PictureError, FileError) as error:
                failures.append((row, str(error), isinstance(error, MissingDecoder)))
                continue
            except OSError as error:
                failures.append((row, error.strerror or str(error), True))
                continue
            except MemoryError:
                failures.append((row, "not enough memory to decode it", True))
                continue
            records.append((row, sha256, thumbnail(image) if self._thumbnails else b""))
        stacked = np.stack(pixels) if pixels else np.zeros(0)
        return DecodedImages(records, stacked, failures, time.perf_counter() - start)

    def begin(self, batch: list[DecodedImages]) -> Callable[[], EncodedBatch]:
        """Begins to compute the features of a batch, which comes in pieces, but for what is known."""
        import torch

        from onceover.extract.encoding.devices import joined

        encoder = self.encoder
        pixels = [torch.from_numpy(piece.pixels) for piece in batch if len(piece.pixels)]
        new_features = encoder.begin(joined(pixels, encoder.device)) if pixels else list

        def finish() -> EncodedBatch:
            records = list(chain.from_iterable(piece.records for piece in batch))
            failed = chain.from_iterable(piece.failures for piece in batch)
            failures = [self._failure(*failure) for failure in failed]
            features = self._with_known(records, new_features())
            seconds = {"decode": sum(piece.seconds for piece in batch)}
            return self._encoded(records, features, failures, seconds)

        return finish

    def _with_known(self, records: list[tuple[int, str, bytes]], new_features: Any) -> np.ndarray:
        """The features of all records, of which those that are new were computed."""
        if len(new_features) == len(records):
            return np.asarray(new_features)
        new = iter(new_features)
        features = []
        for _, sha256, _ in records:
            if sha256 in self._known:
                features.append(self._known.gather(("features",), self._known.find([sha256]))["features"][0])
            else:
                features.append(next(new))
        return np.asarray(features)

    def _encoded(
        self,
        records: list[tuple[int, str, bytes]],
        features: np.ndarray,
        failures: list[Failure],
        seconds: dict[str, float],
    ) -> EncodedBatch:
        """The batch, whose records with features that are not finite have failed."""
        is_finite = np.isfinite(features).all(axis=tuple(range(1, features.ndim)))
        for number in np.flatnonzero(~is_finite):
            dtypes = f"computed in {self.encoder.recipe['dtype']}, stored as {self._store_dtype}"
            failures.append(self._failure(records[number][0], f"its features are not finite ({dtypes})"))
        sound = [record for record, is_sound in zip(records, is_finite, strict=True) if is_sound]
        columns: dict[str, Any] = {"row": [row for row, _, _ in sound], "sha256": [sha256 for _, sha256, _ in sound]}
        if self._thumbnails:
            columns["thumbnail"] = [small for _, _, small in sound]
        columns["features"] = features if is_finite.all() else features[is_finite]
        return EncodedBatch(columns, failures, seconds)

    def _failure(self, row: int, reason: str, may_pass: bool = False) -> Failure:
        """A row of the ledger; of a fault that may pass without the file's size and time: it is tried again."""
        stat = () if may_pass else self._stats[row].tolist()
        return Failure(self._ids[row], "image", reason, *stat)

    def columns(self, rows: list[int]) -> dict[str, Any]:
        """Ids, sizes and modification times."""
        return {
            "id": [self._ids[row] for row in rows],
            "size": self._stats[rows, 0],
            "mtime_ns": self._stats[rows, 1],
        }


class TextEncoding(Encoding):
    """Encodes shards of captions.

    Args:
        load: gives the encoder. encoder: it, where it is loaded already.
        captions: all of the dataset, by row, each once.
        batch_size: captions in a batch.
        described: the encoder's specification, and ``store_dtype``, that of the features on the disk, for errors.
    """

    kind = "text"

    def __init__(
        self,
        load: Callable[[], "TextEncoder"],
        encoder: "TextEncoder | None",
        *,
        captions: Sequence[str],
        batch_size: int,
        described: str,
        store_dtype: str,
    ):
        super().__init__(load, encoder)
        self._captions = captions
        self._batch_size = batch_size
        self._described = described
        self._store_dtype = store_dtype
        self._block: tuple[int, list[TokenisedCaptions]] | None = None

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_block": None}

    def read(self, shard: Shard) -> Iterator[TokenisedCaptions]:
        """The batches of a shard; those of its block are made once for shards that follow each other."""
        encoder = self.encoder
        rows = shard.rows
        with self._lock:
            if self._block is None or self._block[0] != rows[0]:
                self._block = (rows[0], self._tokenised(encoder, rows))
            batches = self._block[1]
        yield from batches[shard.batches.start : shard.batches.stop]

    def _tokenised(self, encoder: "TextEncoder", rows: list[int]) -> list[TokenisedCaptions]:
        """The batches of a block: captions of similar length together."""
        from onceover.extract.encoding.text import by_length

        token_ids, truncated = encoder.tokenize([self._captions[row] for row in rows])
        batches = []
        for numbers, ids in by_length(token_ids, self._batch_size):
            counts = encoder.unknown_tokens(ids)
            batches.append(TokenisedCaptions([rows[number] for number in numbers], truncated[numbers], *counts, ids))
        return batches

    def begin(self, batch: TokenisedCaptions) -> Callable[[], EncodedBatch]:
        """Begins to compute the features of a batch.

        Raises:
            EncodeError: of the call that is returned: features that are not finite.
        """
        new_features = self.encoder.begin(batch.token_ids)

        def finish() -> EncodedBatch:
            features = new_features()
            if not np.isfinite(features).all():
                raise EncodeError(
                    f"{self._described} gives numbers that are not finite or do not fit {self._store_dtype}; "
                    "try --dtype float32 --store-dtype float32"
                )
            return EncodedBatch(batch.columns(features), [], {})

        return finish

    def columns(self, rows: list[int]) -> dict[str, Any]:
        """The captions."""
        return {"caption": [self._captions[row] for row in rows]}


def _joined(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """The columns of batches, one after the other, in the order of ``row``."""
    filled = [columns for columns in batches if len(columns["row"])] or batches[:1]
    order = np.argsort(list(chain.from_iterable(columns["row"] for columns in filled)))
    is_ascending = bool((np.diff(order) == 1).all())
    joined: dict[str, Any] = {}
    for name, first in filled[0].items():
        if isinstance(first, np.ndarray):
            whole = np.concatenate([columns[name] for columns in filled])
            joined[name] = whole if is_ascending else whole[order]
        else:
            values = list(chain.from_iterable(columns[name] for columns in filled))
            joined[name] = [values[number] for number in order]
    return joined
