"""Small real things: drawn images, a tiny encoder of each kind, a store and a run made from them once."""

import contextlib
import dataclasses
import importlib
import itertools
import logging
import multiprocessing
import os
import shutil
import socket
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from onceover.base.progress import LOGGER
from onceover.base.registry import installed
from onceover.cli import cli
from onceover.configs.schema import Config, ExtractConfig, ModelConfig, TrainingConfig

SHARED = Path(__file__).resolve().parents[2] / "shared"
MEMORY_FOLDER = Path("/dev/shm")
ROOM = 2 * 2**30  # bytes; the tests' files take less than a quarter of that
PRELOADED = [
    "onceover.cli",
    "onceover.workflows",
    "onceover.extract.pipeline",
    "onceover.extract.encoding.image",
    "onceover.extract.encoding.text",
    "onceover.heads.finetune",
    "onceover.serve.server",
    "transformers.models.bert.modeling_bert",
    "transformers.models.resnet.modeling_resnet",
    "transformers.models.bit.image_processing_bit",
    "transformers.models.mobilenet_v2.modeling_mobilenet_v2",
    "transformers.models.mobilenet_v2.image_processing_mobilenet_v2",
]
CAPTIONS = [
    "A brown dog runs through the grass .",
    "Two children play football on a beach .",
    "A woman in a red coat , smiling .",
    "Ein Hund springt über die Hürde 🐕",
]
SWEEP_TABLE = """model.temperature,model.weight_decay,outcome,split,seeds,rsum,i2t_R@1,t2i_R@1,pictures,captions,\
verdict,difference,difference_low,difference_high
0.03,3e-05,finished,dev,1,300.5,20.5,18.25,12,60,best,0.0,0.0,0.0
0.07,0.1,finished,dev,1,299.5,20.5,18.25,12,60,tie,-1.0,-2.5,0.5
0.07,3e-05,dropped,dev,1,250.5,10.5,8.25,12,60,dropped,-50.0,-60.5,-39.5
0.03,0.1,diverged,dev,1,,,,,,,,,
"""


def pytest_configure(config):
    """Has temporary folders lie in memory where there is room, since each result is flushed, which waits for a disk.

    ``--basetemp`` and the variable ``PYTEST_DEBUG_TEMPROOT`` choose another place.
    """
    if MEMORY_FOLDER.is_dir() and os.access(MEMORY_FOLDER, os.W_OK) and shutil.disk_usage(MEMORY_FOLDER).free > ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY_FOLDER))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "flickr8k").is_dir():
        pytest.skip("the photographs and encoders of ../shared are not here")
    return SHARED


@pytest.fixture(scope="session")
def forkserver():
    """A context of multiprocessing: its processes share nothing with this one, and find the libraries imported."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system does not fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    first = context.Process(target=int)  # starts the server, which imports the libraries
    first.start()
    first.join()
    return context


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """The demo's dataset, 60 pictures: 36 train, 12 dev, 12 test."""
    from onceover.extract.synthetic import draw_dataset

    folder = tmp_path_factory.mktemp("drawn") / "data"
    draw_dataset(folder, 36, 12, 12)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory, drawn) -> Path:
    """A two-layer BERT with random weights in a local Hugging Face folder, safetensors and tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    from onceover.extract.encoding.vocabulary import dataset_tokenizer
    from onceover.extract.layouts import read_dataset

    folder = tmp_path_factory.mktemp("tiny") / "bert"
    tokenizer = dataset_tokenizer([*read_dataset(drawn).captions, *CAPTIONS])
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory, drawn) -> Path:
    """A CLIP of one layer a tower with random weights in a local Hugging Face folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from onceover.extract.encoding.vocabulary import dataset_tokenizer
    from onceover.extract.layouts import read_dataset

    folder = tmp_path_factory.mktemp("tiny") / "clip"
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = dataset_tokenizer(read_dataset(drawn).captions)
    special = {"bos": tokenizer.cls_token_id, "eos": tokenizer.sep_token_id, "pad": tokenizer.pad_token_id}
    ids = {f"{name}_token_id": number for name, number in special.items()}
    config = CLIPConfig(
        text_config={**small, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 40},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_resnet(tmp_path_factory) -> Path:
    """A ResNet of two narrow stages for images of 32 pixels in a local Hugging Face folder."""
    import torch
    from transformers import BitImageProcessor, ResNetConfig, ResNetModel

    folder = tmp_path_factory.mktemp("tiny") / "resnet"
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetModel(ResNetConfig(**sizes)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def extract_config(tiny_resnet, tiny_bert) -> ExtractConfig:
    return ExtractConfig(
        image_encoder=f"hf:{tiny_resnet}",
        text_encoder=f"hf:{tiny_bert}",
        text_layers="last",
        views=2,
        batch_size=8,
        dtype="float32",
    )


@pytest.fixture(scope="session", autouse=True)
def _small_fits_are_corrected():
    """Fits on few drawn images are corrected for hubs too, though they have learned little."""
    from onceover.retrieval import hubness

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hubness, "MIN_BANK", 1)
        patch.setattr(hubness, "is_mostly_noise", lambda _: False)
        yield


@pytest.fixture(scope="session")
def fit_config(extract_config) -> Config:
    training = TrainingConfig(num_epochs=12, batch_size=16, refit=False, cca=False)
    return Config(extract_config, ModelConfig(embedding_dim=16, variation=1.0, rerank="none"), training)


@pytest.fixture(scope="session")
def store_file(tmp_path_factory, drawn, extract_config) -> Path:
    from onceover.extract.layouts import read_dataset
    from onceover.extract.pipeline import extract

    path = tmp_path_factory.mktemp("store") / "drawn.h5"
    extract(read_dataset(drawn), path, extract_config, device="cpu")
    return path


@pytest.fixture
def store(store_file):
    from onceover.extract.store import FeatureStore

    with FeatureStore(store_file) as opened:
        yield opened


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, store_file, fit_config) -> Path:
    from onceover.extract.store import FeatureStore
    from onceover.heads.training import fit

    folder = tmp_path_factory.mktemp("runs") / "run"
    with FeatureStore(store_file) as opened:
        fit(opened, folder, fit_config)
    return folder


@pytest.fixture(scope="session")
def evaluated_run(run_dir, store_file, tmp_path_factory) -> Path:
    """A copy of the run with its evaluation."""
    from onceover import workflows

    folder = shutil.copytree(run_dir, tmp_path_factory.mktemp("reported") / "run")
    workflows.evaluate(folder, store=store_file)
    return folder


@pytest.fixture(scope="session")
def compared_run(evaluated_run, tmp_path_factory) -> Path:
    """A run to compare with, the same one again."""
    return shutil.copytree(evaluated_run, tmp_path_factory.mktemp("compared") / "run")


@pytest.fixture(scope="session")
def sweep_folder(tmp_path_factory) -> Path:
    """A sweep's folder, with its table alone."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "results.csv").write_text(SWEEP_TABLE)
    return folder


@pytest.fixture(scope="session")
def report_file(evaluated_run, compared_run, sweep_folder, tmp_path_factory) -> Path:
    """A report with all its parts."""
    from onceover import workflows

    out = tmp_path_factory.mktemp("report") / "report.html"
    return workflows.report(evaluated_run, out, compare=[compared_run], sweep=sweep_folder)


@pytest.fixture(scope="session")
def served(run_dir):
    """The address of a search server over the run, in a thread of this process."""
    from onceover.serve.server import open_site

    with serving(open_site(run_dir, device="cpu")) as address:
        yield address


def start_drivers_anew():
    """Has the drivers of addresses made anew, as a new process makes them."""
    import fsspec

    from onceover.base import drivers

    drivers._shared.clear()
    drivers._answered.clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@contextlib.contextmanager
def object_store(bucket):
    """An object store (moto's) with a bucket, its address and credentials in the environment; gives its address."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import requests

    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    endpoint = "http://{}:{}".format(*running.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        start_drivers_anew()
        requests.put(f"{endpoint}/{bucket}", timeout=10).raise_for_status()
        yield endpoint
    start_drivers_anew()
    running.stop()


@contextlib.contextmanager
def serving(site, host="127.0.0.1"):
    """Serves a site within, in a thread, on a free port of this machine; gives its address."""
    from onceover.serve.server import listening, server_of

    with listening("127.0.0.1", 0) as listener:
        server = server_of(site, host)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            site.close()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, the machine's own; its driver keeps an event loop running, which other modules do without."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium here to open pages with")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def unplugged(monkeypatch, tmp_path) -> Path:
    """No network, and nothing in Hugging Face's cache; the path of the cache."""
    from huggingface_hub import constants
    from transformers.utils import hub

    def refuse(*_args, **_options):
        raise OSError("Network is unreachable")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "TRANSFORMERS_CACHE", str(tmp_path / "hub"), raising=False)  # of transformers before 5
    return tmp_path / "hub"


@pytest.fixture
def cached_file(unplugged):
    """Puts a file into Hugging Face's cache as if it had been downloaded; returns its path."""

    def put(repository: str, name: str, data: bytes = b"") -> Path:
        folder = unplugged / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text("0" * 40)
        path = folder / "snapshots" / ("0" * 40) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return put


@pytest.fixture
def changed():
    """A settings object with some values of its groups replaced."""

    def change(config: Config, **groups: dict) -> Config:
        return dataclasses.replace(
            config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in groups.items()}
        )

    return change


@pytest.fixture
def messages(monkeypatch):
    """The messages that the user is shown, in their order."""
    shown = []

    class Collecting(logging.Handler):
        def emit(self, record):
            shown.append(record.getMessage())

    monkeypatch.setattr(LOGGER, "level", logging.INFO)
    monkeypatch.setattr(LOGGER, "handlers", [Collecting()])
    LOGGER.manager._clear_cache()
    return shown


@pytest.fixture
def low_resolution(monkeypatch):
    """Figures of few pixels, which are drawn sooner."""
    from onceover.analysis.drawing import STYLE

    monkeypatch.setitem(STYLE, "savefig.dpi", 50)


@pytest.fixture
def without_pdf(low_resolution, monkeypatch):
    """Figures of few pixels, as PNG and SVG: fonts are embedded in a PDF, which takes longest."""
    from onceover.analysis import drawing

    monkeypatch.setattr(drawing, "SUFFIXES", (".png", ".svg"))


@pytest.fixture
def one_format(low_resolution, monkeypatch):
    """Figures of few pixels, as PNG alone: each further format takes as long again."""
    from onceover.analysis import drawing

    monkeypatch.setattr(drawing, "SUFFIXES", (".png",))


@pytest.fixture
def run():
    def call(*arguments, code=0):
        result = CliRunner().invoke(cli, [str(part) for part in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return call


@pytest.fixture
def fails(run):
    """The one line that a failing call prints; nothing else may be there."""

    def call(*arguments, code=1):
        result = run(*arguments, code=code)
        assert result.stdout == ""
        lines = [line for line in result.stderr.splitlines() if not line.endswith(" rows")]  # what was taken
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return call


@pytest.fixture
def told():
    """The messages about the work under way, as they come."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    listener = Listener()
    LOGGER.addHandler(listener)
    LOGGER.setLevel(logging.INFO)
    yield messages
    LOGGER.removeHandler(listener)


@pytest.fixture
def interrupt_after():
    """Given a monkeypatch and a number: Ctrl-C after so many finished shards, whichever thread writes them."""
    from onceover.extract import encode

    def interrupt(patch, shards):
        write, left = encode.write_shard, iter(range(shards))

        def interrupted(*args):
            if next(left, None) is None:
                raise KeyboardInterrupt
            write(*args)

        patch.setattr(encode, "write_shard", interrupted)

    return interrupt


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Makes a package like an installed one, whose module of the given text is an entry point of a group."""
    folder = tmp_path / "outside"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    packages = itertools.count()

    def add(group: str, name: str, text: str) -> None:
        number = next(packages)
        module = f"outside_{number}_{folder.parent.name}".replace("-", "_")
        (folder / f"{module}.py").write_text(text)
        metadata = folder / f"outside_{number}-1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: outside-{number}\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")
        importlib.invalidate_caches()
        installed.cache_clear()

    yield add
    installed.cache_clear()


@pytest.fixture
def laid(tmp_path):
    """Writes text files (name -> text or bytes) and images (names; never opened) into a folder; returns the folder."""

    def write(files, images=(), folder=tmp_path):
        for name in images:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder

    return write
