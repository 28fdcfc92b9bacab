"""The settings that an extraction is begun with and keeps when it is resumed: device, backend, dtypes, batch size.

Features differ in the last bits between them, so that they are fixed before the first shard.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NotRequired, TypedDict, TypeVar, cast

import numpy as np
import torch
from PIL import Image

from onceover.base.files import FileError
from onceover.base.memory import peak_memory, total_memory
from onceover.base.progress import say, warn
from onceover.base.worker import Worker, WorkerError
from onceover.configs.schema import ExtractConfig
from onceover.extract.backends import AUTO
from onceover.extract.comparison import relative_error
from onceover.extract.dataset import Dataset
from onceover.extract.encoding.devices import STREAMS, fast_dtype, hardware
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.text import TextEncoder
from onceover.extract.image_source import ImageSource
from onceover.extract.pictures import PictureError
from onceover.extract.plan import batch_rows
from onceover.extract.store import StoreError
from onceover.extract.unfinished import Unfinished

T = TypeVar("T")
BATCH_SIZE = {"cpu": 16, "cuda": 128, "mps": 64}
SAMPLE = {"image": 32, "text": 256}  # records that ``--dtype auto`` decides by
AUTO_ERROR = 0.014  # of the features' spread: below it, 99 of 100 nearest neighbours stay (docs/results.md)


class Settings(TypedDict):
    """The settings of an extraction; the batch size is None until it is known.

    ``backend`` is the one that was asked for; ``backends`` and ``dtypes`` are those that compute, by kind. ``workers``
    is how many processes share it, where they do (``--worker``).
    """

    device: str
    hardware: str
    backend: str
    batch_size: int | None
    backends: dict[str, str]
    dtypes: dict[str, str]
    workers: NotRequired[int]


def begin_settings(
    unfinished: Unfinished,
    config: ExtractConfig,
    device: torch.device,
    backend: str,
    *,
    force: bool = False,
    worker: Worker | None = None,
) -> Settings:
    """The settings of an extraction: those of an unfinished one, or new ones.

    One processor or GPU differs from another in the last bits, too, which is told. Those that workers share stand
    before the first shard is finished, others from then on.

    Args:
        backend: the name of a backend, or ``auto``, which an unfinished extraction has chosen already.
        worker: the worker that asks for them.

    Raises:
        StoreError: it was begun on another kind of device or by another backend, and ``force`` does not discard it.
        WorkerError: other workers share it. FileError: it is damaged.
    """
    name = hardware(device)
    wanted = Settings(
        device=str(device), hardware=name, backend=backend, batch_size=config.batch_size, backends={}, dtypes={}
    )
    if worker is not None:
        wanted["workers"] = worker.count
    elif not unfinished.shards() and not unfinished.is_shared():
        return wanted
    begun = unfinished.settings()
    if begun is None:
        if worker is None:
            unfinished.remove()
        return wanted
    mend = "discard it with --force"
    if worker is not None:
        mend = f"name another --store, or remove {unfinished.folder} to begin anew"
    begun_type = torch.device(begun["device"]).type
    is_elsewhere = begun_type != device.type
    if is_elsewhere and not force:
        raise StoreError(f"{unfinished.folder} was begun on {begun_type}; go on with --device {begun_type}, or {mend}")
    is_other_backend = backend not in (AUTO, begun["backend"]) and {backend} != set(begun["backends"].values())
    if is_other_backend and not force:
        raise StoreError(f"{unfinished.folder} was begun with --backend {begun['backend']}; go on with that, or {mend}")
    if worker is not None and begun.get("workers", worker.count) != worker.count:
        raise WorkerError(
            f"{unfinished.folder} is shared by {begun['workers']} workers, and this is worker {worker}; start workers "
            f"1/{begun['workers']} to {begun['workers']}/{begun['workers']}, or go on without --worker"
        )
    is_other_size = config.batch_size not in (None, begun["batch_size"])
    if is_elsewhere or is_other_backend or (force and is_other_size):
        unfinished.remove()
        return wanted
    doing = "going on with the unfinished" if worker is None else "doing a share of the"
    say(f"{doing} extraction in {unfinished.folder}")
    if begun.get("hardware", name) != name:
        warn(f"begun on {begun['hardware']}; {name} may round the last bits of what is left in another way")
    if is_other_size:
        say(f"as it was begun: batches of {begun['batch_size']}")
    return cast(Settings, {"hardware": name} | begun | {"device": str(device)})


def in_best_dtype(
    kind: str,
    make: Callable[..., Any],
    sample: Callable[[Any], np.ndarray],
    settings: Settings,
    wanted: str,
    before: str | None,
    backend: str,
    check: Callable[[Any], dict],
) -> tuple[Any, dict]:
    """The encoder of a kind in the compute dtype that was asked for, or was used before, or that a sample shows to do.

    With it come the findings of its check, which precedes the comparison of dtypes.

    Args:
        make: gives the encoder in a ``dtype`` by a ``backend``. sample: gives the features of a few records.
        settings: the dtype and the backend are noted there.
        wanted: ``auto`` or a dtype. before: that of features that are gone on with.
        backend: the name of the backend to compute by.
        check: gives findings about an encoder, and raises to refuse it.
    """
    dtype = settings["dtypes"].get(kind) or before
    if wanted != "auto":
        dtype = wanted
    encoder = make(dtype=dtype or "float32", backend=backend)
    findings = check(encoder)
    fast = fast_dtype(encoder.device)
    if dtype is None and fast is not None:
        faster = make(dtype=fast, backend=encoder.backend)
        error = relative_error(sample(faster), sample(encoder))
        if error <= AUTO_ERROR:
            encoder = faster
        say(
            f"{kind}: {fast} would move the features by {error:.2%} of their spread (at most {AUTO_ERROR:.2%}): "
            f"encoding in {encoder.recipe['dtype']}"
        )
    settings["dtypes"][kind] = encoder.recipe["dtype"]
    settings["backends"][kind] = encoder.backend
    return encoder, findings


def readable_images(images: ImageSource, keys: Sequence[str], read: Callable[[bytes], T]) -> Iterator[T]:
    """The images of some keys, read by ``read``; those that cannot be read are passed over, and fail again later."""
    for key in keys:
        try:
            image = read(images.open(key))
        except (PictureError, FileError, OSError, MemoryError):
            continue
        yield image


def sample_features(dataset: Dataset, encoder: ImageEncoder) -> np.ndarray:
    """Features of the first images of a dataset that can be decoded."""
    pixels = list(islice(readable_images(dataset.images, dataset.paths, encoder.read), SAMPLE["image"]))
    if not pixels:
        return np.zeros((0, 1))
    return np.concatenate([encoder.encode(batch) for batch in torch.stack(pixels).split(BATCH_SIZE["cpu"])])


def trials(
    image_encoder: ImageEncoder | None, text_encoder: TextEncoder | None, captions: Sequence[str]
) -> dict[str, Callable[[int], np.ndarray]]:
    """By kind, a function that encodes a batch of so many images, or captions for them, as large as it can become."""
    encode: dict[str, Callable[[int], np.ndarray]] = {}
    if image_encoder is not None:
        pixels = image_encoder.pixels(Image.new("RGB", (256, 256)))
        encode["image"] = lambda size: image_encoder.encode(torch.stack([pixels] * size))
    if text_encoder is not None:
        longest = text_encoder.tokenize([max(captions, key=len)])[0]
        encode["text"] = lambda size: text_encoder.encode_tokens(longest * batch_rows("text", size))
    return encode


def fitting_batch(encode: dict[str, Callable[[int], np.ndarray]], device: torch.device, workers: int) -> int:
    """The usual batch size of a device, halved until batches fit its memory; tried with the functions of ``trials``."""
    size = BATCH_SIZE.get(device.type, BATCH_SIZE["cpu"])
    memory_limit = total_memory() / 2 / workers
    at_once = STREAMS if device.type == "cuda" else 1
    while size > 1:
        tried = (partial(trial, size * at_once) for trial in encode.values())
        try:
            if max(map(peak_memory, tried)) <= memory_limit:
                break
        except torch.OutOfMemoryError:
            pass
        size //= 2
        say(f"batches of {2 * size} would not fit the memory of {device}: trying {size}")
    return size
