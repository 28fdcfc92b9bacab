"""How quickly does the search server answer one client and many, and does it stay up under bad requests?

    python benchmarks/bench_serve.py --run RUN [--images 8000] [--out FILE.json]
    python benchmarks/bench_serve.py --run RUN --soak MINUTES

The gallery is an index of the run's image embeddings, drawn with replacement and jittered to so many images, with their
thumbnails; ``--index`` names another one. The server is a process of its own on loopback, started as a user starts it.
Clients are threads of this process, each with a connection that it keeps, and send captions as text queries, the next
when the last is answered.

The forward pass is the text encoder's alone, on the tokens of one caption, in a process without a server. It and one
client are measured in turns, since other work on the machine slows both. ``--soak`` mixes good and bad requests, and
reports every answer by its status and the server's memory over time.
"""

import argparse
import base64
import contextlib
import http.client
import io
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
from bench_search import machine

CLIENTS = (1, 8, 32)
JITTER = 0.3  # length of the noise; the vectors have length 1
JSON = {"Content-Type": "application/json"}
ASKED = itertools.count()  # a number in each text: the server keeps vectors of texts, and none is to be asked twice
SAMPLES = 60  # seconds between two readings of the memory, at most


def main() -> None:
    """Parses the options, and measures or soaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--index", type=Path)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak", type=float, metavar="MINUTES")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--task", choices=["forward"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(forward_pass(options.run, options.seconds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        index = options.index or made_index(options.run, Path(folder) / "index", options.images)
        measure = soaked if options.soak else measured
        result = {"machine": machine(), "index": gallery_of(index), **measure(options, index)}
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def made_index(run: Path, folder: Path, images: int) -> Path:
    """An index of a run's images, drawn with replacement and jittered."""
    from onceover.retrieval.embeddings import read_embeddings
    from onceover.retrieval.gallery import Gallery
    from onceover.retrieval.index.galleries import write_gallery

    embeddings = read_embeddings(run / "embeddings.h5")
    generator = np.random.default_rng(0)
    rows = generator.integers(len(embeddings.ids), size=images)
    noise = generator.standard_normal((images, embeddings.images.shape[1]), dtype=np.float32)
    vectors = embeddings.images[rows] + JITTER * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"{number:05d}.jpg" for number in range(images)]
    captions: list[list[str]] = [[] for _ in embeddings.ids]
    for caption, image in zip(embeddings.captions, embeddings.image_index.tolist(), strict=True):
        captions[image].append(caption)
    thumbnails = None
    if embeddings.thumbnails is not None:
        thumbnails = [embeddings.thumbnails[row] for row in rows.tolist()]
    shown = [captions[row] for row in rows.tolist()]
    gallery = Gallery("image", vectors, False, names, names, shown, names, thumbnails, embeddings.space)
    write_gallery(
        folder,
        gallery,
        embeddings.probes("image", False),
        source=str(run),
        folders=[],
        run=str(run.resolve()),
        kind="flat",
        memory=None,
        min_recall=None,
        force=False,
        prune=False,
    )
    return folder


def gallery_of(index: Path) -> dict:
    """The size of the gallery of images."""
    from onceover.retrieval.index import Index

    opened = Index(index / "images")
    return {"images": len(opened), "dim": opened.manifest["dim"], "type": opened.manifest["type"]}


def queries(run: Path) -> list[str]:
    """The captions of a run, in a random order."""
    from onceover.retrieval.embeddings import read_embeddings

    texts = list(dict.fromkeys(read_embeddings(run / "embeddings.h5").captions))
    random.Random(0).shuffle(texts)
    return texts


def forward_pass(run: Path, seconds: float) -> dict:
    """Milliseconds of the text encoder's forward pass on one caption."""
    from onceover import cli
    from onceover.base.threads import bound_threads
    from onceover.heads.checkpoint import load_run

    assert cli  # sets what torch reads when it starts
    bound_threads()
    encoder = load_run(run).load_encoder("text", None, "cpu")
    texts = [f"{text} {number}" for number, text in enumerate(queries(run)[:500], 1000)]  # as the server is asked
    token_ids = encoder.tokenize(texts)[0]
    times = []
    end = time.perf_counter() + seconds
    number = 0
    while time.perf_counter() < end:
        start = time.perf_counter()
        encoder.encode_tokens([token_ids[number % len(token_ids)]])
        times.append(1000 * (time.perf_counter() - start))
        number += 1
    return latencies(times[20:])


def latencies(times: list[float]) -> dict:
    """Percentiles of milliseconds."""
    p50, p99 = np.percentile(times, [50, 99]).tolist()
    return {"p50_ms": round(p50, 2), "p99_ms": round(p99, 2)}


@contextlib.contextmanager
def server(options, index: Path, batch_size: int):
    """A server process; gives its process and its port."""
    command = [sys.executable, "-m", "onceover", "serve", "--run", options.run, "--index", index, "--port", 0]
    command += ["--batch-size", batch_size, "--device", "cpu"]
    with subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True) as process:
        try:
            told = []
            while not told or not told[-1].startswith("ready: "):
                told.append(process.stderr.readline())
                if not told[-1]:
                    raise SystemExit("".join(told))
            threading.Thread(target=copied, args=(process.stderr,), daemon=True).start()
            yield process, int(told[-1].split()[1].rpartition(":")[2])
        finally:
            process.terminate()


def copied(stream) -> None:
    """Passes on what the server says, which should be nothing."""
    for line in stream:
        sys.stderr.write(line)


def measured(options, index: Path) -> dict:
    """Rates and latencies by clients, the ratio to the forward pass, and what batching brings."""
    texts = queries(options.run)
    result: dict = {"forward": [], "one_client": [], "ratio": [], "clients": {}, "without_batching": {}}
    with server(options, index, 64) as (_, port):
        load(port, texts, 1, 3)
        for _ in range(options.rounds):
            command = [
                sys.executable,
                __file__,
                "--run",
                options.run,
                "--seconds",
                options.seconds,
                "--task",
                "forward",
            ]
            done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
            result["forward"].append(json.loads(done.stdout.splitlines()[-1]))
            result["one_client"].append(load(port, texts, 1, options.seconds))
            ratio = result["one_client"][-1]["p50_ms"] / result["forward"][-1]["p50_ms"]
            result["ratio"].append(round(ratio, 2))
            print("ratio", result["ratio"], file=sys.stderr, flush=True)
        for clients in CLIENTS:
            result["clients"][clients] = [load(port, texts, clients, options.seconds) for _ in range(options.rounds)]
            print(clients, result["clients"][clients], file=sys.stderr, flush=True)
    with server(options, index, 1) as (_, port):
        load(port, texts, 1, 3)
        for clients in CLIENTS[1:]:
            rounds = [load(port, texts, clients, options.seconds) for _ in range(options.rounds)]
            result["without_batching"][clients] = rounds
    most = CLIENTS[-1]
    rates = {
        name: statistics.median(entry["requests_per_second"] for entry in result[name][most])
        for name in ("clients", "without_batching")
    }
    result["gain_of_batching"] = round(rates["clients"] / rates["without_batching"], 2)
    return result


def load(port: int, texts: list[str], clients: int, seconds: float) -> dict:
    """Requests per second and latencies of so many clients at once."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        place = number * 997
        own = []
        while time.perf_counter() < end:
            text = f"{texts[place % len(texts)]} {next(ASKED)}"
            message = json.dumps({"terms": [{"text": text}], "top_k": 24})
            place += 1
            start = time.perf_counter()
            connection.request("POST", "/api/search", message, JSON)
            answer = connection.getresponse()
            answer.read()
            own.append(1000 * (time.perf_counter() - start))
            assert answer.status == 200, answer.status
        times.extend(own)

    start = time.perf_counter()
    together(work, clients)
    return {"requests_per_second": round(len(times) / (time.perf_counter() - start), 1), **latencies(times)}


def together(work, count: int) -> None:
    """Calls ``work`` with each number from 0 in a thread of its own, and waits for all."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def soaked(options, index: Path) -> dict:
    """Good and bad requests from eight clients for so many minutes: answers by status, and memory in MiB."""
    texts = queries(options.run)
    answers: Counter = Counter()
    memory = []
    with server(options, index, 64) as (process, port):
        end = time.monotonic() + 60 * options.soak

        def work(number: int) -> None:
            generator = random.Random(number)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            own: Counter = Counter()
            while time.monotonic() < end:
                name, (method, path, body, headers) = request(generator, texts)
                try:
                    connection.request(method, path, body, headers)
                    answer = connection.getresponse()
                    answer.read()
                    own[f"{name}: {answer.status}"] += 1
                except (http.client.HTTPException, OSError) as error:
                    own[f"{name}: {type(error).__name__}"] += 1
                    connection.close()
            answers.update(own)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            memory.append(round(resident(process.pid) / 2**20))
            time.sleep(min(SAMPLES, 60 * options.soak / 20))
        for thread in threads:
            thread.join()
        memory.append(round(resident(process.pid) / 2**20))
        assert process.poll() is None, "the server is gone"
    faults = sum(count for name, count in answers.items() if name.rpartition(": ")[2].startswith("5"))
    return {"minutes": options.soak, "errors_of_ours": faults, "answers": dict(sorted(answers.items())), "MiB": memory}


def request(generator: random.Random, texts: list[str]) -> tuple[str, tuple]:
    """A good or bad request, and the name of its kind."""
    item = f"{generator.randrange(9000):05d}.jpg"
    kinds = {
        "text": lambda: search({"text": generator.choice(texts)}),
        "item": lambda: search({"item": item}),
        "image": lambda: search({"image": base64.b64encode(image(generator)).decode()}),
        "mixed": lambda: search({"text": generator.choice(texts)}, {"text": generator.choice(texts), "weight": -0.5}),
        "thumbnail": lambda: ("GET", f"/api/items/image/thumbnail?id={item}", None, {}),
        "view": lambda: ("GET", f"/api/items/image/view?id={item}", None, {}),
        "map": lambda: ("GET", "/api/map", None, {}),
        "long text": lambda: search({"text": "ab " * generator.randrange(3333)}),
        "damaged image": lambda: search({"image": base64.b64encode(image(generator)[:-400]).decode()}),
        "noise as image": lambda: search({"image": base64.b64encode(generator.randbytes(5000)).decode()}),
        "noise as JSON": lambda: ("POST", "/api/search", generator.randbytes(200), JSON),
        "wrong settings": lambda: search({"text": "a"}, top_k=generator.choice([0, -1, 10**9, "x", None])),
        "nothing": lambda: ("GET", f"/{generator.randbytes(4).hex()}", None, {}),
        "foreign name": lambda: ("GET", "/api/info", None, {"Host": "example.com"}),
        "too large": lambda: ("POST", "/api/search", b" " * (25 * 2**20), JSON),
    }
    weights = [8, 4, 4, 4, 8, 4, 0.2, 1, 1, 1, 1, 1, 1, 1, 0.1]
    name = generator.choices(list(kinds), weights)[0]
    return name, kinds[name]()


def search(*terms: dict, **settings) -> tuple:
    """A search request."""
    return "POST", "/api/search", json.dumps({"terms": terms, **settings}), JSON


def image(generator: random.Random) -> bytes:
    """A JPEG of noise, up to 640 pixels wide."""
    from PIL import Image

    buffer = io.BytesIO()
    size = (generator.randrange(32, 640), generator.randrange(32, 480))
    Image.effect_noise(size, 60).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
