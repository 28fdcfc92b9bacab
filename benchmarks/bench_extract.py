"""How fast is ``extract``, beside what the machine allows, a straightforward loop, and the loops that peers run?

    python benchmarks/bench_extract.py --data ../shared/flickr8k [--device cuda] [--out FILE.json]

ResNet50 and DistilBERT with random weights. Each contestant runs in a process of its own, one after the other, in
several rounds; the medians of their rates are compared. Loading models and libraries is not counted.

eager, openvino  the same with that backend, and the error of a sample's features against the plain models in float32
limit            on a processor: the same optimised models on ready-made tensors, and reading, decoding and
                 transforming alone, each with all cores: 1 / (the sum of both times); on a GPU: the models alone, on
                 tensors that lie there, and beside it what all cores decode, and which share of the operations a
                 second of large products of matrices the models reach
loop             Dataset, DataLoader with a worker a core, batches of 32, torchvision's transforms and model, captions
                 padded to 77 tokens, float32
clip-retrieval   its reader and mapper: batches of 256, workers, tokens one caption at a time padded to 77, normalised,
                 stored as float16
OpenAI-CLIP      the popular simple implementation: a row is a caption with its image, which is so encoded once a
                 caption; batches of 8 without workers; captions padded to the longest of all
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from itertools import repeat
from pathlib import Path

IMAGE, TEXT = "torchvision:resnet50@random", "hf:distilbert-base-uncased@random"
FIXED_LENGTH = 77


def main() -> None:
    """Parses the options and prints the result as JSON; or, as a contestant, its own rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--captions", type=int, default=600, help="that the slow loops encode; extract takes all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1, help="within a process, of each round")
    parser.add_argument("--size", default="500x375", help="of the larger images, made of the dataset's")
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="run the peers' loops too")
    parser.add_argument("--larger", action=argparse.BooleanOptionalAction, default=True, help="race on larger ones too")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants; the others are compared with the first")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--contestant", choices=sorted(CONTESTANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        for _ in range(options.repeats):
            print(json.dumps(CONTESTANTS[options.contestant](options)), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        own = tuple(options.only or ("extract", *backends(options.device), "limit", "loop"))
        peers = ("clip-retrieval", "OpenAI-CLIP") if options.peers and not options.only else ()
        sets = {"as they are": (options.data, own + peers)}
        if options.larger:
            sets[options.size] = (enlarged(options, Path(folder)), own)
        asked = {name: getattr(options, name) for name in ("pictures", "views", "dtype", "device")}
        result = {"machine": machine(options.device), **asked}
        result |= {name: race(options, *where) for name, where in sets.items()}
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def backends(device: str) -> tuple[str, ...]:
    """The backends that are raced on a device."""
    return ("eager", "openvino") if device == "cpu" else ()


def race(options, data: Path, names: tuple[str, ...]) -> dict:
    """Median rates of the contestants over the rounds, and what they come to beside each other."""
    rates: dict = {name: defaultdict(list) for name in names}
    for turn in range(options.rounds):
        for name in names:
            start = time.perf_counter()
            values = vars(options) | {"contestant": name, "data": data}
            of_race = ("out", "peers", "larger", "only")
            flags = [f"--{key}={value}" for key, value in values.items() if key not in of_race]
            done = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} ended with {done.returncode}")
            for line in done.stdout.splitlines():
                for what, value in json.loads(line).items():
                    rates[name][what].append(value)
            say(f"round {turn + 1}: {name} {time.perf_counter() - start:.0f} s")
    medians = {name: {what: statistics.median(found) for what, found in each.items()} for name, each in rates.items()}
    first = medians[names[0]]
    ratios = {}
    for name in names[1:]:
        ratio_of = {rate: round(first[rate] / medians[name][rate], 3) for rate in ("pictures/s", "captions/s")}
        ratios[f"{names[0]} / {name}"] = ratio_of
    return {"rates": {name: {what: shown(value) for what, value in each.items()} for name, each in medians.items()},
            "ratios": ratios, "every round": rates}  # fmt: skip


def shown(value: float) -> float:
    """A number to two places, or three digits of a small one."""
    return round(value, 2) if value >= 1 else float(f"{value:.3g}")


def extract(options, backend: str = "auto") -> dict:
    """The command's own rates; sealing and loading are in ``seconds``, of the whole extraction."""
    from onceover import cli  # sets what torch reads when it starts
    from onceover.configs.schema import ExtractConfig
    from onceover.extract.layouts import read_dataset
    from onceover.extract.pipeline import extract as run

    assert cli
    config = ExtractConfig(image_encoder=IMAGE, text_encoder=TEXT, views=options.views, dtype=options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        dataset = read_dataset(options.data).first(options.pictures)
        summary = run(dataset, Path(folder) / "s.h5", config, device=options.device, backend=backend)
        accuracy = {} if backend == "auto" else errors(Path(folder) / "s.h5", dataset.root)
    image, text = summary.speed["image"], summary.speed["text"]
    rates = {"pictures/s": image.rows / image.seconds, "captions/s": summary.captions / text.seconds}
    for kind, speed in summary.speed.items():
        whole = sum(speed.stages.values())
        rates |= {f"{kind}: {stage} %": 100 * seconds / whole for stage, seconds in speed.stages.items()}
    return rates | {"seconds": summary.seconds} | accuracy


def errors(path: Path, root: Path, count: int = 64) -> dict:
    """The errors of a sample of a store's features against the plain models', in units of the features' spread."""
    from onceover.extract.comparison import relative_error
    from onceover.extract.encoding.stored import stored_encoder
    from onceover.extract.pictures import decode
    from onceover.extract.store import FeatureStore

    error_of = {}
    with FeatureStore(path) as store:
        for kind in ("image", "text"):
            exact = store.recipes[kind] | {"dtype": "float32", "store_dtype": "float32"}
            settings = store.provenance["settings"]
            encoder = stored_encoder(kind, store.provenance[kind], exact, settings, store.tokenizer_files, plain=True)
            if kind == "image":
                data = [(root / path).read_bytes() for path in store.image_paths[:count]]
                again = [encoder.encode(encoder.pixels(decode(image, encoder.short_side))[None])[0] for image in data]
            else:
                again = encoder.encode(store.captions[:count])[0]
            error_of[f"{kind}: error"] = float(relative_error(store.features(kind)[:count], again))
    return error_of


def limit(options) -> dict:
    """The same models in the same arithmetic and batches, on tensors made before; and the work before, alone."""
    import torch

    from onceover import cli
    from onceover.base.threads import in_order
    from onceover.extract.backends import backend_for
    from onceover.extract.begin import BATCH_SIZE, SAMPLE
    from onceover.extract.computing import CAPTION_BLOCKS_ON_GPU
    from onceover.extract.encoding.image import ImageEncoder
    from onceover.extract.encoding.text import TextEncoder, by_length
    from onceover.extract.engines._forks import in_processes
    from onceover.extract.engines.processes import PIECE
    from onceover.extract.layouts import read_dataset
    from onceover.extract.pictures import decode
    from onceover.extract.plan import CAPTION_BLOCK, CAPTIONS_PER_IMAGE

    assert cli
    gpu, device = options.device != "cpu", torch.device(options.device)
    engine = "processes" if gpu else "threads"
    dataset = read_dataset(options.data).first(options.pictures)
    captions = list(dict.fromkeys(dataset.captions))
    size, streams = BATCH_SIZE[device.type], os.cpu_count() if gpu else torch.get_num_threads()

    def images_in(dtype: str):
        backend = backend_for("auto", "image", len(dataset.paths), engine, device)
        return ImageEncoder(
            IMAGE, layers="auto", views=options.views, dtype=dtype, device=options.device, backend=backend
        )

    def texts_in(dtype: str):
        backend = backend_for("auto", "text", len(captions), engine, device)
        return TextEncoder(TEXT, layers="auto", dtype=dtype, captions=captions, device=options.device, backend=backend)

    def read(paths: list[str]) -> torch.Tensor:
        side = preprocessing.short_side
        return torch.stack([preprocessing.pixels(decode((dataset.root / path).read_bytes(), side)) for path in paths])

    def timed(work, tasks) -> float:
        start = time.perf_counter()
        for _ in in_order(work, tasks, streams):
            pass
        return time.perf_counter() - start

    def on_the_card(work, batches) -> float:
        with torch.inference_mode():
            for turn in range(2):  # the first, with a few, warms up
                torch.cuda.synchronize()
                start = time.perf_counter()
                for batch in batches if turn else batches[:: max(1, len(batches) // 8)]:
                    work(batch)
                torch.cuda.synchronize()
        return time.perf_counter() - start

    preprocessing = images_in("float32").preprocessing
    sample = read(dataset.paths[: SAMPLE["image"]])
    images = chosen(options, images_in, lambda encoder: encoder.encode(sample))
    texts = chosen(options, texts_in, lambda encoder: encoder.encode(captions[: SAMPLE["text"]])[0])
    start = time.perf_counter()
    token_ids, _ = texts.tokenize(captions)
    tokenising, rows = time.perf_counter() - start, CAPTION_BLOCK * (CAPTION_BLOCKS_ON_GPU if gpu else 1)
    batches = [ids for first in range(0, len(token_ids), rows)
               for _, ids in by_length(token_ids[first : first + rows], size * CAPTIONS_PER_IMAGE)]  # fmt: skip
    shares = {}
    if gpu:
        few, start = dataset.paths[:4096], time.perf_counter()
        pieces = [few[first : first + PIECE] for first in range(0, len(few), PIECE)]
        read_all = sum(in_processes(lambda paths: len(read(paths)), pieces, streams))
        decoding = (time.perf_counter() - start) / read_all
        batch = sample.repeat(size // len(sample), 1, 1, 1, 1).to(device)
        encoding = on_the_card(images._features, [batch] * 40) / (40 * size)
        captioning = on_the_card(texts.outputs, [texts.padded(ids) for ids in batches]) / len(captions)
        for kind, encode, made, seconds, encoder in (
            ("pictures", images.encode, [batch.cpu()], encoding, images),
            ("captions", texts.encode_tokens, batches[:8], captioning, texts),
        ):
            count = sum(operations(encode, each) for each in made) / sum(map(len, made))
            shares[f"{kind}: % of products"] = 100 * count / seconds / products(device, encoder.recipe["dtype"])
        each_picture, each_caption = encoding, captioning
    else:
        paths = [dataset.paths[first : first + size] for first in range(0, len(dataset.paths), size)]
        pixels: list = [None] * len(paths)
        decoding = timed(lambda turn: pixels.__setitem__(turn, read(paths[turn])), range(len(paths)))
        decoding /= len(dataset.paths)
        timed(images.encode, pixels[:4])
        encoding = timed(images.encode, pixels) / len(dataset.paths)
        timed(texts.encode_tokens, batches[:4])
        captioning = timed(texts.encode_tokens, batches) / len(captions)
        each_picture, each_caption = decoding + encoding, tokenising / len(captions) + captioning
    return {
        "pictures/s": 1 / each_picture,
        "captions/s": len(dataset.captions) / len(captions) / each_caption,
        "images decoded/s": 1 / decoding,
        "captions tokenised/s": len(captions) / tokenising,
        "ms to decode an image": 1000 * decoding,
        "ms to encode an image": 1000 * encoding,
        **shares,
    }


def chosen(options, make, features):
    """The encoder that ``extract`` takes (``--dtype``)."""
    from onceover.extract.begin import AUTO_ERROR
    from onceover.extract.comparison import relative_error
    from onceover.extract.encoding.devices import fast_dtype

    exact = make("float32" if options.dtype == "auto" else options.dtype)
    if options.dtype != "auto" or not fast_dtype(exact.device):
        return exact
    fast = make(fast_dtype(exact.device))
    error = relative_error(features(fast), features(exact))
    say(f"{exact.recipe['architecture']}: {fast.recipe['dtype']} moves the features by {error:.3%}")
    return fast if error <= AUTO_ERROR else exact


def operations(work, batch) -> int:
    """Floating-point operations of a pass, of which a multiplication with its addition makes two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work(batch)
    return counter.get_total_flops()


def products(device, dtype: str) -> float:
    """Operations a second of a card's large products of matrices."""
    import torch

    side = 8192
    first, second = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        first @ second
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(times)


def loop(options) -> dict:
    """What one writes in an hour: images and captions apart, each once, in batches of 32."""
    import torch

    paths, captions, image_model, transforms, text_model, tokenizer = plain_models(options)
    loader = torch.utils.data.DataLoader(Pictures(paths, transforms), batch_size=32, num_workers=os.cpu_count())
    with torch.no_grad():
        start = time.perf_counter()
        features = torch.cat([image_model(batch.to(options.device)).cpu() for batch in loader])
        image_seconds = time.perf_counter() - start
        assert len(features) == len(paths)
        captions = captions[: options.captions]
        start = time.perf_counter()
        for first in range(0, len(captions), 32):
            batch = tokenizer(captions[first : first + 32], **padded(), return_tensors="pt").to(options.device)
            mean(text_model(**batch).last_hidden_state, batch["attention_mask"]).cpu()
        text_seconds = time.perf_counter() - start
    return {"pictures/s": len(paths) / image_seconds, "captions/s": len(captions) / text_seconds}


def clip_retrieval(options) -> dict:
    """Reader and mapper as its ``inference`` runs them on a folder, images and captions apart."""
    import torch

    paths, captions, image_model, transforms, text_model, tokenizer = plain_models(options)
    workers = {"batch_size": 256, "num_workers": os.cpu_count(), "prefetch_factor": 2}
    captions = captions[: options.captions]
    with torch.no_grad():
        start = time.perf_counter()
        for batch in torch.utils.data.DataLoader(Pictures(paths, transforms), **workers):
            half(image_model(batch.to(options.device)))
        image_seconds = time.perf_counter() - start
        start = time.perf_counter()
        for batch in torch.utils.data.DataLoader(Captions(captions, tokenizer), **workers):
            batch = {name: ids.to(options.device) for name, ids in batch.items()}
            half(mean(text_model(**batch).last_hidden_state, batch["attention_mask"]))
        text_seconds = time.perf_counter() - start
    return {"pictures/s": len(paths) / image_seconds, "captions/s": len(captions) / text_seconds}


def simple_clip(options) -> dict:
    """Rows of one caption and its picture: images a second are different ones, five rows each in Flickr8k."""
    import torch

    from onceover.extract.layouts import read_dataset

    dataset = read_dataset(options.data).first(options.captions // 5)
    _, _, image_model, transforms, text_model, tokenizer = plain_models(options)
    encoded = tokenizer(dataset.captions, padding=True, truncation=True, max_length=200)
    rows = [dataset.root / dataset.paths[picture] for picture in dataset.image_index]
    loader = torch.utils.data.DataLoader(Rows(rows, transforms, encoded), batch_size=8)
    spent = {"image": 0.0, "text": 0.0}
    with torch.no_grad():
        start = time.perf_counter()
        for batch in loader:
            batch = {name: each.to(options.device) for name, each in batch.items()}
            image_model(batch.pop("image")).cpu()
            spent["image"] -= start - (start := time.perf_counter())
            text_model(**batch).last_hidden_state[:, 0].cpu()
            spent["text"] -= start - (start := time.perf_counter())
    return {
        "pictures/s": len(dataset.paths) / spent["image"],
        "captions/s": len(dataset.captions) / spent["text"],
    }


CONTESTANTS = {
    "extract": extract,
    "eager": partial(extract, backend="eager"),
    "openvino": partial(extract, backend="openvino"),
    "limit": limit,
    "loop": loop,
    "clip-retrieval": clip_retrieval,
    "OpenAI-CLIP": simple_clip,
}


class Pictures:
    """Image files for a DataLoader."""

    def __init__(self, paths, transforms):
        self.paths, self.transforms = paths, transforms

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        from PIL import Image

        return self.transforms(Image.open(self.paths[row]).convert("RGB"))


class Captions:
    """Captions for a DataLoader, tokenised one by one to a fixed length."""

    def __init__(self, captions, tokenizer):
        self.captions, self.tokenizer = captions, tokenizer

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, row):
        found = self.tokenizer([self.captions[row]], **padded(), return_tensors="pt")
        return {name: found[name][0] for name in ("input_ids", "attention_mask")}


class Rows(Pictures):
    """Captions with their images, a row each."""

    def __init__(self, paths, transforms, encoded):
        super().__init__(paths, transforms)
        self.encoded = encoded

    def __getitem__(self, row):
        import torch

        item = {name: torch.tensor(self.encoded[name][row]) for name in ("input_ids", "attention_mask")}
        return item | {"image": super().__getitem__(row)}


def plain_models(options):
    """Paths, captions, and the two models as torchvision and transformers give them."""
    import torch
    from torchvision import models
    from transformers import DistilBertConfig, DistilBertModel

    from onceover.extract.encoding.vocabulary import dataset_tokenizer
    from onceover.extract.layouts import read_dataset

    dataset = read_dataset(options.data).first(options.pictures)
    tokenizer = dataset_tokenizer(dataset.captions)
    image_model = models.resnet50(weights=None).eval()
    image_model.fc = torch.nn.Identity()
    text_model = DistilBertModel(DistilBertConfig(vocab_size=len(tokenizer))).eval()
    transforms = models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    return (
        [dataset.root / path for path in dataset.paths],
        dataset.captions,
        image_model.to(options.device),
        transforms,
        text_model.to(options.device),
        tokenizer,
    )


def padded() -> dict:
    """The tokenizer's options for captions of a fixed length."""
    return {"padding": "max_length", "max_length": FIXED_LENGTH, "truncation": True, "return_token_type_ids": False}


def mean(hidden, mask):
    """The mean over a caption's tokens."""
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def half(features):
    """Unit length, float16."""
    features /= features.norm(dim=-1, keepdim=True)
    return features.cpu().half().numpy()


def enlarged(options, folder: Path) -> Path:
    """The dataset with images of another size, as JPEG of quality 90."""
    import csv

    from onceover.extract.layouts import read_dataset

    dataset = read_dataset(options.data).first(options.pictures)
    with ProcessPoolExecutor() as pool:
        size, each = tuple(map(int, options.size.split("x"))), len(dataset.paths)
        list(pool.map(enlarge, repeat(dataset.root), repeat(folder), dataset.paths, repeat(size, each), chunksize=16))
    with open(folder / "captions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "split"])
        for caption, picture in zip(dataset.captions, dataset.image_index.tolist(), strict=True):
            writer.writerow([dataset.paths[picture], caption, dataset.splits[picture]])
    return folder


def enlarge(root: Path, folder: Path, path: str, size: tuple[int, int]) -> None:
    """One image of another size."""
    from PIL import Image

    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.open(root / path).convert("RGB").resize(size).save(target, "JPEG", quality=90)


def machine(device: str) -> dict:
    """Where and with what this ran."""
    import torch

    from onceover.extract.encoding.devices import hardware

    libraries = {name: version(name) for name in ("torch", "torchvision", "transformers", "pillow")}
    card = {"card": hardware(torch.device(device))} if device.startswith("cuda") else {}
    return {"processor": hardware(torch.device("cpu")), "cores": os.cpu_count(), **card, **libraries}


def say(line: str) -> None:
    """What the user is told while it runs."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
