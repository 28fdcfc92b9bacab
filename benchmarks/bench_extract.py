"""How fast is ``extract``, beside what the machine allows, a straightforward loop, and the loops that peers run?

    python benchmarks/bench_extract.py --data ../shared/flickr8k [--out FILE.json]

ResNet50 and DistilBERT with random weights, one view. Each contestant runs in a process of its own, one after the
other, in several rounds; the medians of their rates are compared. Loading models and libraries is not counted.

limit            the same optimised models on ready-made tensors, and reading, decoding and transforming alone, each
                 with all cores: 1 / (the sum of both times)
loop             Dataset, DataLoader with a worker a core, batches of 32, torchvision's transforms and model, captions
                 padded to 77 tokens, float32
clip-retrieval   its reader and mapper: batches of 256, workers, tokens one caption at a time padded to 77, normalised,
                 stored as float16
OpenAI-CLIP      the popular simple implementation: a row is a caption with its picture, which is so encoded once a
                 caption; batches of 8 without workers; captions padded to the longest of all
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

IMAGE, TEXT = "torchvision:resnet50@random", "hf:distilbert-base-uncased@random"
FIXED_LENGTH = 77


def main() -> None:
    """Parses the options and prints the result as JSON; or, as a contestant, its own rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--captions", type=int, default=600, help="that the slow loops encode; extract takes all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="500x375", help="of the larger pictures, made of the dataset's")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="run the peers' loops too")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--contestant", choices=sorted(CONTESTANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(CONTESTANTS[options.contestant](options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        larger = enlarged(options, Path(folder))
        own = ("extract", "limit", "loop")
        sets = {
            "as they are": (options.data, tuple(CONTESTANTS) if options.peers else own),
            options.size: (larger, own),
        }
        result = {"machine": machine(), "pictures": options.pictures, "dtype": options.dtype}
        result |= {name: race(options, *where) for name, where in sets.items()}
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def race(options, data: Path, names: tuple[str, ...]) -> dict:
    """Median rates of the contestants over the rounds, and what they come to beside each other."""
    rates: dict = {name: defaultdict(list) for name in names}
    for turn in range(options.rounds):
        for name in names:
            start = time.perf_counter()
            values = vars(options) | {"contestant": name, "data": data}
            flags = [f"--{key}={value}" for key, value in values.items() if key not in ("out", "peers")]
            done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            for what, value in json.loads(done.stdout.splitlines()[-1]).items():
                rates[name][what].append(value)
            print(f"round {turn + 1}: {name} {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    medians = {name: {what: statistics.median(found) for what, found in each.items()} for name, each in rates.items()}
    mine = medians["extract"]
    ratios = {
        f"extract / {name}": {what: round(mine[what] / medians[name][what], 3) for what in ("pictures/s", "captions/s")}
        for name in names[1:]
    }
    return {"rates": {name: {what: round(value, 2) for what, value in each.items()} for name, each in medians.items()},
            "ratios": ratios, "every round": rates}  # fmt: skip


def extract(options) -> dict:
    """The command's own rates; sealing and loading are in ``seconds``, of the whole extraction."""
    import cli  # sets what torch reads when it starts
    from configs.schema import ExtractConfig
    from extract.datasets import read_dataset
    from extract.pipeline import extract as run

    assert cli
    config = ExtractConfig(image_encoder=IMAGE, text_encoder=TEXT, views=1, dtype=options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        dataset = read_dataset(options.data).first(options.pictures)
        summary = run(
            dataset, Path(folder) / "s.h5", config, device="cpu", say=lambda line: print(line, file=sys.stderr)
        )
    image, text = summary.speed["image"], summary.speed["text"]
    rates = {"pictures/s": image.rows / image.seconds, "captions/s": summary.captions / text.seconds}
    for kind, speed in summary.speed.items():
        whole = sum(speed.stages.values())
        rates |= {f"{kind}: {stage} %": 100 * seconds / whole for stage, seconds in speed.stages.items()}
    return rates | {"seconds": summary.seconds}


def limit(options) -> dict:
    """The same models in the same arithmetic and batches, on tensors made before; and the work before, alone."""
    import torch

    import cli
    from extract.datasets import read_dataset
    from extract.encoders import ImageEncoder, TextEncoder, by_length
    from extract.inference import relative_error
    from extract.pictures import decode
    from extract.pipeline import AUTO_ERROR, BATCH_SIZE, CAPTIONS_PER_PICTURE
    from extract.streams import in_order

    assert cli
    dataset = read_dataset(options.data).first(options.pictures)
    images = ImageEncoder(IMAGE, layers="auto", views=1, device="cpu")
    captions = list(dict.fromkeys(dataset.captions))
    texts = {
        dtype: TextEncoder(TEXT, layers="auto", dtype=dtype, captions=captions, device="cpu")
        for dtype in ("float32", "bfloat16")
    }
    sample = [texts[dtype].encode(captions[:256])[0] for dtype in ("bfloat16", "float32")]
    chosen = "bfloat16" if options.dtype == "auto" and relative_error(*sample) <= AUTO_ERROR else "float32"
    size, streams = BATCH_SIZE["cpu"], torch.get_num_threads()

    def read(path: str) -> torch.Tensor:
        return images.pixels(decode((dataset.root / path).read_bytes(), images.short_side))

    def timed(work, tasks) -> tuple[float, list]:
        start = time.perf_counter()
        made = list(in_order(work, tasks, streams))
        return time.perf_counter() - start, made

    paths = [dataset.paths[start : start + size] for start in range(0, len(dataset.paths), size)]
    decoding, pixels = timed(lambda batch: torch.stack([read(path) for path in batch]), paths)
    timed(images.encode, pixels[:4])
    encoding, _ = timed(images.encode, pixels)
    start = time.perf_counter()
    token_ids, _ = texts[chosen].tokenize(captions)
    tokens = time.perf_counter() - start
    batches = [ids for first in range(0, len(token_ids), 1024)
               for _, ids in by_length(token_ids[first : first + 1024], size * CAPTIONS_PER_PICTURE)]  # fmt: skip
    timed(texts[chosen].encode_tokens, batches[:4])
    seconds, _ = timed(texts[chosen].encode_tokens, batches)
    return {
        "pictures/s": len(dataset.paths) / (decoding + encoding),
        "captions/s": len(dataset.captions) / (tokens + seconds),
        "ms to decode a picture": 1000 * decoding / len(dataset.paths),
        "ms to encode a picture": 1000 * encoding / len(dataset.paths),
    }


def loop(options) -> dict:
    """What one writes in an hour: pictures and captions apart, each once, in batches of 32."""
    import torch

    paths, captions, image_model, transforms, text_model, tokenizer = plain_models(options)
    loader = torch.utils.data.DataLoader(Pictures(paths, transforms), batch_size=32, num_workers=os.cpu_count())
    with torch.no_grad():
        start = time.perf_counter()
        features = torch.cat([image_model(batch) for batch in loader])
        image_seconds = time.perf_counter() - start
        assert len(features) == len(paths)
        captions = captions[: options.captions]
        start = time.perf_counter()
        for first in range(0, len(captions), 32):
            batch = tokenizer(captions[first : first + 32], **padded(), return_tensors="pt")
            mean(text_model(**batch).last_hidden_state, batch["attention_mask"])
        text_seconds = time.perf_counter() - start
    return {"pictures/s": len(paths) / image_seconds, "captions/s": len(captions) / text_seconds}


def clip_retrieval(options) -> dict:
    """Reader and mapper as its ``inference`` runs them on a folder, pictures and captions apart."""
    import torch

    paths, captions, image_model, transforms, text_model, tokenizer = plain_models(options)
    workers = {"batch_size": 256, "num_workers": os.cpu_count(), "prefetch_factor": 2}
    captions = captions[: options.captions]
    with torch.no_grad():
        start = time.perf_counter()
        for batch in torch.utils.data.DataLoader(Pictures(paths, transforms), **workers):
            half(image_model(batch))
        image_seconds = time.perf_counter() - start
        start = time.perf_counter()
        for batch in torch.utils.data.DataLoader(Captions(captions, tokenizer), **workers):
            half(mean(text_model(**batch).last_hidden_state, batch["attention_mask"]))
        text_seconds = time.perf_counter() - start
    return {"pictures/s": len(paths) / image_seconds, "captions/s": len(captions) / text_seconds}


def simple_clip(options) -> dict:
    """Rows of one caption and its picture: pictures a second are different ones, five rows each in Flickr8k."""
    import torch

    from extract.datasets import read_dataset

    dataset = read_dataset(options.data).first(options.captions // 5)
    _, _, image_model, transforms, text_model, tokenizer = plain_models(options)
    encoded = tokenizer(dataset.captions, padding=True, truncation=True, max_length=200)
    rows = [dataset.root / dataset.paths[picture] for picture in dataset.image_index]
    loader = torch.utils.data.DataLoader(Rows(rows, transforms, encoded), batch_size=8)
    spent = {"image": 0.0, "text": 0.0}
    with torch.no_grad():
        start = time.perf_counter()
        for batch in loader:
            image_model(batch.pop("image"))
            spent["image"] -= start - (start := time.perf_counter())
            text_model(**batch).last_hidden_state[:, 0]
            spent["text"] -= start - (start := time.perf_counter())
    return {
        "pictures/s": len(dataset.paths) / spent["image"],
        "captions/s": len(dataset.captions) / spent["text"],
    }


CONTESTANTS = {
    "extract": extract,
    "limit": limit,
    "loop": loop,
    "clip-retrieval": clip_retrieval,
    "OpenAI-CLIP": simple_clip,
}


class Pictures:
    """Picture files for a DataLoader."""

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
    """Captions with their pictures, a row each."""

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

    from extract.datasets import read_dataset
    from extract.encoders import _dataset_tokenizer

    dataset = read_dataset(options.data).first(options.pictures)
    tokenizer = _dataset_tokenizer(dataset.captions)
    image_model = models.resnet50(weights=None).eval()
    image_model.fc = torch.nn.Identity()
    text_model = DistilBertModel(DistilBertConfig(vocab_size=len(tokenizer))).eval()
    transforms = models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    return (
        [dataset.root / path for path in dataset.paths],
        dataset.captions,
        image_model,
        transforms,
        text_model,
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
    """The dataset with pictures of another size, as JPEG of quality 90."""
    import csv

    from PIL import Image

    from extract.datasets import read_dataset

    dataset = read_dataset(options.data).first(options.pictures)
    size = tuple(map(int, options.size.split("x")))
    for path in dataset.paths:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(dataset.root / path).convert("RGB").resize(size).save(target, "JPEG", quality=90)
    with open(folder / "captions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "split"])
        for caption, picture in zip(dataset.captions, dataset.image_index.tolist(), strict=True):
            writer.writerow([dataset.paths[picture], caption, dataset.splits[picture]])
    return folder


def machine() -> dict:
    """Where and with what this ran."""
    libraries = {name: version(name) for name in ("torch", "torchvision", "transformers", "pillow")}
    return {"processor": platform.machine(), "cores": os.cpu_count(), **libraries}


if __name__ == "__main__":
    main()
