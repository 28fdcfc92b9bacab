"""Does everything that computes work on this GPU, with the processor's results, and how near is it to what it could be?

    python benchmarks/check_gpu.py [--device cuda] [--json FILE]     in a bare checkout, too; under five minutes
    python benchmarks/check_gpu.py --tiny                            the same code on a processor, in seconds

Drawn images, made-up features and random weights; nothing is downloaded, and faiss is not needed. Each part has a time
limit, and a part that fails leaves the others alone:

extract      images of 224 × 224 and of 500 × 375, and captions, each beside the encoder alone on tensors that lie on
             the device, in the same dtype and batches; a few of the features beside the processor's in float32
fit          an epoch beside its bare matrix products; the whole fit's rsum beside the processor's
sweep        an epoch of 64 stacked trials beside 64 epochs of one; a trial's rsum, of a whole sweep, beside the
             processor's
fine-tuning  a step beside forward and backward of the unfrozen layers alone; the first loss beside the processor's

A time is the median of several. The result is a table in Markdown; its ratio is the share of the speed beside it that
is reached, and for the sweep how many times as fast the stack is. The exit code is 1 where a part failed or disagrees
with the processor.
"""

import argparse
import contextlib
import dataclasses
import json
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from bench_extract import machine
from bench_finetune import bare, first_batch, prepare, tensors, training
from bench_fit import make_store, seconds_a_step, synchronize

ROOT = Path(__file__).resolve().parents[1]
RSUM = 6.0  # of 600, by which a fit may differ that rounds in another way
LOSS = {"float32": 1e-3, "bfloat16": 5e-2}  # relative, of a fine-tuning's first step
RATE = 1e-6  # learning rate of the steps that are timed
HEADER = ("what", "on the device", "beside", "ratio", "difference from the processor", "allowed", "verdict")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much each part has to do.

    Attributes:
        images, captions: that are encoded. compared: how many of them the processor encodes as well.
        sides: of the images, in pixels.
        image_encoder, text_encoder: specs. views: per image.
        train, held_out: images with made-up features. dims: of the features of a view and of a caption.
        heads: dimensions of embeddings. epochs: of a fit. trials: of a sweep.
        tuned: images of a fine-tuning step, and as many train images. width: of its encoders, as a share of the usual.
        rounds: repetitions that a median is taken of. seconds: that bare products are measured for.
    """

    images: int = 8000
    captions: int = 40_000
    compared: int = 64
    sides: tuple[tuple[int, int], ...] = ((224, 224), (500, 375))
    image_encoder: str = "torchvision:resnet50@random"
    text_encoder: str = "hf:distilbert-base-uncased@random"
    views: int = 2
    train: int = 6000
    held_out: int = 1000
    dims: tuple[int, int] = (3072, 2304)
    heads: int = 512
    epochs: int = 4
    trials: int = 64
    tuned: int = 256
    width: float = 1.0
    rounds: int = 3
    seconds: float = 2.0


TINY = Sizes(
    images=8,
    captions=24,
    compared=4,
    image_encoder="torchvision:shufflenet_v2_x0_5@random",
    train=96,
    held_out=32,
    dims=(48, 32),
    heads=16,
    epochs=2,
    trials=4,
    tuned=4,
    width=0.25,
    rounds=1,
    seconds=0.1,
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: of what is measured. measured: its speed on the device. beside: what it is compared with, and its speed.
        ratio: of both speeds.
        what: is compared with the processor's. difference: from it. allowed: how large it may be.
        failure: why there are no numbers; empty where there are.
    """

    name: str
    measured: str = ""
    beside: str = ""
    ratio: float = 0.0
    what: str = ""
    difference: float = 0.0
    allowed: float = 0.0
    failure: str = ""

    @property
    def verdict(self) -> str:
        """``agrees``, ``DISAGREES``, or that it failed and why."""
        if self.failure:
            return f"FAILED: {self.failure}"
        return "agrees" if self.difference <= self.allowed else "DISAGREES"

    def cells(self) -> tuple[str, ...]:
        """The row's texts, under ``HEADER``."""
        if self.failure:
            return (self.name, "", "", "", "", "", self.verdict)
        difference = f"{self.what}: {self.difference:.2g}"
        return (
            self.name,
            self.measured,
            self.beside,
            f"{self.ratio:.2f}",
            difference,
            f"{self.allowed:g}",
            self.verdict,
        )


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the check: ``run`` gives its row, within so many seconds."""

    name: str
    limit: int
    run: Callable[[], Row]


def main() -> None:
    """Parses the options, runs the parts and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda, cuda:1 or cpu. [default: cuda; with --tiny: cpu]")
    parser.add_argument("--tiny", action="store_true", help="check the script itself: small sizes, on a processor")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as JSON, too")
    options = parser.parse_args()
    device = options.device or ("cpu" if options.tiny else "cuda")
    use_checkout()
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA GPU here; --tiny runs the same code on the processor")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sizes = with_tiny_text_encoder(TINY, Path(folder) / "tiny") if options.tiny else Sizes()
        rows = [checked(part) for part in parts(sizes, device, Path(folder))]
    print(table(rows))
    if options.json:
        result = {"machine": machine(device), "device": device, "seconds": round(time.perf_counter() - start)}
        result["rows"] = [dataclasses.asdict(row) | {"verdict": row.verdict} for row in rows]
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    wrong = [row.name for row in rows if row.verdict != "agrees"]
    if wrong:
        sys.exit(f"error: failed, or other than on the processor: {', '.join(wrong)}")


def use_checkout() -> None:
    """Makes this checkout the package ``onceover``, installed or not."""
    sys.path.insert(0, str(ROOT))
    import cli  # does so, as for `python cli.py`, and sets what torch reads when it starts

    assert cli


def with_tiny_text_encoder(sizes: Sizes, folder: Path) -> Sizes:
    """The sizes with a text encoder of one layer, whose settings are written into a folder."""
    from onceover.extract.encoders.huggingface import write_example

    return dataclasses.replace(sizes, text_encoder=write_example(folder)["text"])


def parts(sizes: Sizes, device: str, folder: Path) -> list[Part]:
    """The parts of the check, in their order; each works in a folder of its own."""

    def part(name: str, limit: int, run: Callable[..., Row], *args) -> Part:
        work = folder / name.replace(" ", "-")
        return Part(name, limit, lambda: run(name, sizes, device, work, *args))

    checks = [part(f"extract {width}×{height}", 45, check_images, (width, height)) for width, height in sizes.sides]
    return [
        *checks,
        part("extract captions", 60, check_captions),
        part("fit", 40, check_fit),
        part(f"sweep of {sizes.trials}", 60, check_sweep),
        part("fine-tuning step", 45, check_finetuning),
    ]


def checked(part: Part) -> Row:
    """A part's row, or one that says why it failed."""
    start = time.perf_counter()
    try:
        with within(part.limit):
            row = part.run()
    except Exception as error:  # whatever it is, the other parts go on
        traceback.print_exc()
        reason = " ".join(str(error).split()).replace("|", "/")
        row = Row(part.name, failure=f"{type(error).__name__}: {reason[:200]}")
    print(f"{part.name}: {time.perf_counter() - start:.0f} s of at most {part.limit} s", file=sys.stderr, flush=True)
    return row


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Ends what takes longer.

    Raises:
        TimeoutError: it took longer.
    """

    def stop(*_) -> None:
        raise TimeoutError(f"it took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def median_seconds(work: Callable[[], object], rounds: int, device: str) -> float:
    """Median seconds of a piece of work, the device waited for, after a round that warms up."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def table(rows: list[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = [HEADER, tuple("---" for _ in HEADER), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Encoded(NamedTuple):
    """Extracted features of one kind: rows a second, (N, …), their compute dtype, and the tokenizer's files."""

    rate: float
    features: np.ndarray
    dtype: str
    tokenizer_files: dict[str, bytes]


def check_images(name: str, sizes: Sizes, device: str, folder: Path, side: tuple[int, int]) -> Row:
    """Extraction of images of one size, beside the image encoder alone."""
    import torch

    from onceover.configs.schema import ExtractConfig
    from onceover.extract.begin import BATCH_SIZE
    from onceover.extract.dataset.alone import read_images
    from onceover.extract.encoding.image import ImageEncoder
    from onceover.extract.pictures import decode

    draw_images(folder / "data", sizes.images, side)
    dataset = read_images(folder / "data")
    batch_size = min(BATCH_SIZE[torch.device(device).type], sizes.images)
    config = ExtractConfig(image_encoder=sizes.image_encoder, views=sizes.views, batch_size=batch_size, dtype="auto")
    encoded = extracted("image", dataset, config, device, folder, sizes.rounds)
    expected = extracted("image", dataset.first(sizes.compared), exact(config), "cpu", folder / "cpu", 1)
    options = {"layers": config.image_layers, "views": config.views, "dtype": encoded.dtype}
    encoder = ImageEncoder(config.image_encoder, **options, device=device)
    files = [folder / "data" / path for path in dataset.paths[:batch_size]]
    images = [decode(file.read_bytes(), encoder.short_side) for file in files]
    pixels = torch.stack([encoder.pixels(image) for image in images]).to(device)
    batches = max(1, sizes.images // batch_size)

    def encode() -> None:
        with torch.inference_mode():
            for _ in range(batches):
                encoder._features(pixels)

    alone = batches * batch_size / median_seconds(encode, sizes.rounds, device)
    return extraction_row(name, "images", encoded, expected, alone)


def check_captions(name: str, sizes: Sizes, device: str, folder: Path) -> Row:
    """Extraction of captions, beside the text encoder alone."""
    import torch

    from onceover.configs.schema import ExtractConfig
    from onceover.extract.begin import BATCH_SIZE
    from onceover.extract.dataset.alone import read_captions
    from onceover.extract.encoding.text import TextEncoder, by_length
    from onceover.extract.plan import CAPTIONS_PER_IMAGE

    folder.mkdir()
    captions = made_up_captions(sizes.captions)
    (folder / "captions.txt").write_text("\n".join(captions))
    (folder / "few.txt").write_text("\n".join(captions[: sizes.compared]))
    batch_size = BATCH_SIZE[torch.device(device).type]
    config = ExtractConfig(text_encoder=sizes.text_encoder, batch_size=batch_size, dtype="auto")
    encoded = extracted("text", read_captions(folder / "captions.txt"), config, device, folder, sizes.rounds)
    files = encoded.tokenizer_files
    few = read_captions(folder / "few.txt")
    expected = extracted("text", few, exact(config), "cpu", folder / "cpu", 1, files)
    options = {"layers": config.text_layers, "dtype": encoded.dtype, "tokenizer_files": files}
    encoder = TextEncoder(config.text_encoder, **options, device=device)
    token_ids, _ = encoder.tokenize(captions)
    batches = [encoder.padded(ids) for _, ids in by_length(token_ids, batch_size * CAPTIONS_PER_IMAGE)]

    def encode() -> None:
        with torch.inference_mode():
            for batch in batches:
                encoder._compute(batch)

    alone = len(captions) / median_seconds(encode, sizes.rounds, device)
    return extraction_row(name, "captions", encoded, expected, alone)


def exact(config):
    """The settings that the processor's features are computed with."""
    return dataclasses.replace(config, dtype="float32", batch_size=None)


def extracted(
    kind: str, dataset, config, device: str, folder: Path, rounds: int, tokenizer_files: dict[str, bytes] | None = None
) -> Encoded:
    """Extracts a dataset anew in each round; the median rate is without loading models and sealing stores."""
    from onceover.extract.pipeline import extract
    from onceover.extract.store import FeatureStore

    folder.mkdir(exist_ok=True)
    rates = []
    for number in range(rounds):
        path = folder / f"{number}.h5"
        summary = extract(dataset, path, config, device=device, tokenizer_files=tokenizer_files)
        rates.append(summary.speed[kind].rows / summary.speed[kind].seconds)
    with FeatureStore(path) as store:
        rows = store.image_features if kind == "image" else store.text_features
        return Encoded(statistics.median(rates), rows[:], store.recipes[kind]["dtype"], store.tokenizer_files)


def extraction_row(name: str, noun: str, encoded: Encoded, expected: Encoded, alone: float) -> Row:
    """The row of an extraction. ``expected``: of the first rows, by the processor. ``alone``: rows a second."""
    from onceover.extract.comparison import relative_error
    from onceover.extract.verify import TOLERANCE

    return Row(
        name,
        measured=f"{encoded.rate:,.0f} {noun}/s in {encoded.dtype}",
        beside=f"encoder alone: {alone:,.0f} {noun}/s",
        ratio=encoded.rate / alone,
        what="features, of their spread",
        difference=relative_error(encoded.features[: len(expected.features)], expected.features),
        allowed=TOLERANCE[encoded.dtype],
    )


def draw_images(folder: Path, count: int, side: tuple[int, int]) -> None:
    """Draws scenes of coloured shapes, no two alike, as JPEGs of ``side`` (width, height), with all cores."""
    folder.mkdir(parents=True)
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:  # children know the checkout's package
        list(pool.map(draw_image, repeat(folder), range(count), repeat(side), chunksize=16))


def draw_image(folder: Path, number: int, side: tuple[int, int]) -> None:
    """One of ``draw_images``."""
    from onceover.extract.synthetic import all_scenes

    scenes = all_scenes()
    image = scenes[number % len(scenes)].draw(np.random.default_rng(number))
    image.resize(side).save(folder / f"{number:05}.jpg", quality=90)


def made_up_captions(count: int) -> list[str]:
    """Captions of random words, about as long as Flickr8k's."""
    generator = np.random.default_rng(0)
    words = np.array(["".join(generator.choice(list("abcdefghijklmnop"), 6)) for _ in range(2000)])
    lengths = generator.normal(11.8, 3.9, count).round().clip(4, 35).astype(int)
    return [" ".join(generator.choice(words, length)) for length in lengths]


def fit_config(sizes: Sizes):
    """The settings of the fits: the default ones, shorter, and without a second fit on all images."""
    from onceover.configs.schema import load_config

    return load_config(ROOT / "configs/config.yaml", [*short_fit(sizes), "training.refit=false"])


def short_fit(sizes: Sizes) -> list[str]:
    """The settings of fits that differ from the default ones."""
    return [
        f"model.embedding_dim={sizes.heads}",
        f"training.num_epochs={sizes.epochs}",
        "training.batch_size=256",
    ]


def epoch_seconds(store, configs: list, device: str, rounds: int) -> float:
    """Median seconds of an epoch of trials that are trained together."""
    import torch

    from onceover.heads.stacking import train_epochs
    from onceover.heads.training_data import TrainingData

    data = TrainingData(store, store.roles(), torch.device(device), 2**34)
    trials = [data.new_trial(config) for config in configs]
    chunks, image_index = data.chunks_of(configs[0])
    return median_seconds(lambda: train_epochs(trials, chunks, image_index, 1), rounds, device)


def check_fit(name: str, sizes: Sizes, device: str, folder: Path) -> Row:
    """A fit: an epoch beside its bare products, and the rsum beside the processor's."""
    import torch

    from onceover.extract.store import FeatureStore
    from onceover.heads.stacking import steps_per_epoch
    from onceover.heads.training import fit
    from onceover.heads.training_data import TrainingData

    folder.mkdir()
    make_store(folder, sizes.train, sizes.held_out, sizes.dims)
    config = fit_config(sizes)
    with FeatureStore(folder / "store.h5") as store:
        rsum = fit(store, folder / "run", config, device=device)["selection"]["rsum"]
        rsum_on_cpu = fit(store, folder / "cpu", config)["selection"]["rsum"]
        epoch = epoch_seconds(store, [config], device, sizes.rounds)
        roles = store.roles()
        data = TrainingData(store, roles, torch.device("cpu"), 2**34)
        steps = steps_per_epoch(*data.chunks_of(config), config.training)
    images = len(roles.train) / steps
    products = steps * seconds_a_step(config, images, dims=sizes.dims, seconds=sizes.seconds, device=device)
    return Row(
        name,
        measured=f"{1000 * epoch:,.1f} ms per epoch",
        beside=f"bare products: {1000 * products:,.1f} ms",
        ratio=products / epoch,
        what=f"rsum {rsum:.1f}",
        difference=abs(rsum - rsum_on_cpu),
        allowed=RSUM,
    )


def check_sweep(name: str, sizes: Sizes, device: str, folder: Path) -> Row:
    """A sweep: an epoch of all trials, stacked, beside as many epochs of one; and a trial's rsum."""
    from onceover.extract.store import FeatureStore
    from onceover.heads.grid import expand, trial_name
    from onceover.heads.sweep import sweep
    from onceover.retrieval.leaderboard import Judge

    folder.mkdir()
    make_store(folder, sizes.train, sizes.held_out, sizes.dims)
    temperatures = ",".join(f"{value:.4f}" for value in np.linspace(0.03, 0.12, sizes.trials))
    once = [*short_fit(sizes), f"training.check_every={sizes.epochs}"]
    settings = expand(None, once, [f"model.temperature={temperatures}"], seeds=1)
    configs = [setting.configs[0] for setting in settings]
    with FeatureStore(folder / "store.h5") as store:
        results = sweep(store, folder / "sweep", settings, Judge(), device=device)
        expected = sweep(store, folder / "cpu", settings[:1], Judge())
        stacked = epoch_seconds(store, configs, device, sizes.rounds)
        alone = epoch_seconds(store, configs[:1], device, sizes.rounds)
    name_of_first = trial_name(configs[0])
    rsum = results[name_of_first]["history"][-1]["rsum"]
    rsum_on_cpu = expected[name_of_first]["history"][-1]["rsum"]
    return Row(
        name,
        measured=f"{1000 * stacked:,.1f} ms per epoch",
        beside=f"{len(configs)} × one fit: {1000 * len(configs) * alone:,.1f} ms",
        ratio=len(configs) * alone / stacked,
        what=f"rsum {rsum:.1f}",
        difference=abs(rsum - rsum_on_cpu),
        allowed=RSUM,
    )


def check_finetuning(name: str, sizes: Sizes, device: str, folder: Path) -> Row:
    """A fine-tuning step, beside forward and backward of the unfrozen layers alone; and the first step's loss."""
    import torch

    from onceover.extract.encoding.devices import native_bfloat16
    from onceover.extract.store import FeatureStore

    folder.mkdir()
    prepare(folder, sizes.tuned, held_out=max(8, sizes.tuned // 4), width=sizes.width)
    dtype = "bfloat16" if native_bfloat16(torch.device(device)) else "float32"
    with FeatureStore(folder / "store.h5") as store:
        batch = first_batch(store, sizes.tuned)
        work = training(store, folder, sizes.tuned, sizes.tuned, device)
        loss = work.train(work.loader.load(0, 0, batch), RATE)
        on_cpu = training(store, folder, sizes.tuned, sizes.tuned)
        loss_on_cpu = on_cpu.train(on_cpu.loader.load(0, 0, batch), RATE)
        step = median_seconds(lambda: work.train(work.loader.load(0, 0, batch), RATE), sizes.rounds, device)
        ready = tensors(work.loader.load(0, 0, batch), device)
        image, text = (work.towers[kind].encoder.model for kind in ("image", "text"))

        def alone() -> None:
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"):
                bare(image, text, *ready)

        forward_backward = median_seconds(alone, sizes.rounds, device)
    return Row(
        name,
        measured=f"{sizes.tuned / step:,.0f} images/s in {dtype}",
        beside=f"forward and backward alone: {sizes.tuned / forward_backward:,.0f} images/s",
        ratio=forward_backward / step,
        what=f"loss {loss:.3f}, relative",
        difference=abs(loss - loss_on_cpu) / abs(loss_on_cpu),
        allowed=LOSS[dtype],
    )


if __name__ == "__main__":
    main()
