"""onceover's command line: read the options, make one call, print what was written and the next command.

Stages are imported when a command runs, so that ``--help`` answers at once. An error is one line on stderr that says
how to fix it, with exit code 2 (a wrong call) or 1 (anything else).
"""

import contextlib
import errno
import functools
import json
import logging
import os
import platform
import re
import shlex
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from importlib.util import module_from_spec, spec_from_file_location
from itertools import chain
from pathlib import Path

import click

if not __package__:  # run as `python cli.py` in a checkout: this folder becomes the package, installed or not
    _root = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if entry != str(_root)]
    _spec = spec_from_file_location("onceover", _root / "__init__.py", submodule_search_locations=[str(_root)])
    assert _spec is not None, "the folder has an __init__.py"
    assert _spec.loader is not None, "it is a Python file"
    sys.modules["onceover"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["onceover"])

from onceover import __version__
from onceover.base.addresses import is_address, path_of
from onceover.base.cache import parse_size
from onceover.base.errors import OnceoverError
from onceover.base.files import noted_interrupts
from onceover.base.progress import LOGGER, say, timed, warn
from onceover.base.terminal import PLAIN, printable, stdout_text
from onceover.base.threads import bound_threads
from onceover.base.worker import WorkerError, parse_worker
from onceover.configs.schema import DEFAULT_CONFIG, Config, ConfigError, load_config

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads yield their core to others,
os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # but not at once: waking a thread costs a tenth of a training step
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch allocates large arrays in huge pages

PROGRAM = ("onceover",) if __package__ else ("python", "cli.py")  # how the user calls it
_TRACEBACK = "onceover.traceback"
_QUIET = "onceover.quiet"
_VERBOSE = "onceover.verbose"
_LIBRARIES = ("torch", "torchvision", "transformers", "faiss-cpu", "h5py", "numpy")
_FULL_DISK = re.compile(r"no space left|os error 28|file too large|disk quota exceeded", re.IGNORECASE)
_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|bad_alloc|failed to map segment", re.IGNORECASE
)


class PathName(click.Path):
    """A path that can be stored as UTF-8 and is not a broken link."""

    def convert(self, value, param, ctx):
        """``value`` as a path."""
        text = os.fspath(value)
        if not text:
            self.fail("an empty path; name a file or a folder", param, ctx)
        if is_address(text):
            self.fail(f"{text!r} is an address, and a path of this machine is needed; download it", param, ctx)
        try:
            text.encode()
        except UnicodeEncodeError:
            self.fail(f"{click.format_filename(text)!r} {_why_not_utf8(text)}", param, ctx)
        try:
            Path(text).stat()
        except OSError as error:
            if error.errno == errno.ELOOP:
                self.fail(f"{text!r} is a link that leads back to itself", param, ctx)
            if self.dir_okay and not self.file_okay and Path(text).is_symlink():
                self.fail(f"{text!r} is a link that leads nowhere", param, ctx)
        return super().convert(value, param, ctx)


def _why_not_utf8(text: str) -> str:
    """Says why a name cannot be read as Unicode, and how to fix that."""
    try:
        os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError:
        return "is not UTF-8, and names are written into files as UTF-8; rename it"
    return "is not understood here: Python does not read names as UTF-8; set the environment variable PYTHONUTF8=1"


class PathOrAddress(PathName):
    """A path, or an address such as ``s3://bucket/data``."""

    def convert(self, value, param, ctx):
        """``value`` as a path, or as an address, which has a path's methods."""
        if isinstance(value, str) and is_address(value):
            return path_of(value)
        return super().convert(value, param, ctx)


FILE = PathName(path_type=Path)
STORE = PathOrAddress(path_type=str)  # a store to write: a slash at the end says that it is to be a folder
LOCATION = PathOrAddress(path_type=Path)
DIRECTORY = PathName(file_okay=False, path_type=Path)


class Fraction(click.FloatRange):
    """A number from 0 to 1, which NaN is not."""

    def __init__(self):
        super().__init__(0, 1)

    def convert(self, value, param, ctx):
        """``value`` as a number."""
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value!r} is no number from 0 to 1", param, ctx)
        return number


class Numbers(click.ParamType):
    """Numbers between commas."""

    name = "numbers"

    def convert(self, value, param, ctx):
        """``value`` as a list of numbers."""
        if not isinstance(value, str):
            return value
        try:
            return [float(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is no list of numbers between commas, such as 3,2", param, ctx)


def text_of(argument: str) -> str:
    """A text from the command line, decoded as UTF-8 even where Python used another encoding."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return argument


def _common_flag(names: list[str], key: str, text: str) -> click.Option:
    """A flag that every command has, noted under a key in the context of the whole call."""
    return click.Option(
        names,
        is_flag=True,
        expose_value=False,
        callback=lambda context, _, value: context.find_root().meta.update({key: value}),
        help=text,
    )


class Command(click.Command):
    """A command with the options --quiet, --verbose and --traceback."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.params += [
            _common_flag(["-q", "--quiet"], _QUIET, "Print only results, warnings and errors."),
            _common_flag(["-v", "--verbose"], _VERBOSE, "Print details too: versions, devices, files, seconds."),
            _common_flag(["--traceback"], _TRACEBACK, "Print the traceback of an error, for a bug report."),
        ]

    def invoke(self, ctx: click.Context):
        """Runs the command with as many messages as were asked for."""
        flags = ctx.find_root().meta
        if flags[_QUIET] and flags[_VERBOSE]:
            raise click.UsageError("--quiet and --verbose contradict each other; name one of them", ctx)
        LOGGER.setLevel(logging.INFO)
        if flags[_QUIET]:
            LOGGER.setLevel(logging.WARNING)
        if flags[_VERBOSE]:
            LOGGER.setLevel(logging.DEBUG)
            LOGGER.debug("%s", _versions())
        with timed(str(self.name)):
            return super().invoke(ctx)


def _versions() -> str:
    """The versions of this program, of Python and of those libraries that are installed."""
    versions = [f"onceover {__version__}", f"Python {platform.python_version()}"]
    for library in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{library} {version(library)}")
    return ", ".join(versions)


class Main(click.Group):
    """A group that turns every error into one line; an unexpected one asks for a bug report."""

    command_class = Command

    def invoke(self, ctx: click.Context):
        """Runs the command."""
        with noted_interrupts() as interrupts:
            try:
                return super().invoke(ctx)
            except BrokenPipeError:
                raise
            except (click.exceptions.Exit, click.exceptions.ClickException, click.exceptions.Abort):
                raise
            except (KeyboardInterrupt, Exception) as error:
                if interrupts or isinstance(error, KeyboardInterrupt):
                    self._fail(ctx, error, "interrupted; run the same command again: what was finished is kept", 130)
                elif isinstance(error, OnceoverError):
                    self._fail(ctx, error, f"error: {_one_line(str(error))}", error.exit_code)
                else:
                    self._fail(ctx, error, f"error: {_system_error(error)}", 1)

    @staticmethod
    def _fail(ctx: click.Context, error: BaseException, line: str, code: int) -> None:
        if ctx.find_root().meta.get(_TRACEBACK):
            traceback.print_exception(error)
        click.echo(printable(line), err=True)
        ctx.exit(code)


def _system_error(error: Exception) -> str:
    """The reason of an error outside the program, or a line that asks for a bug report."""
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or _FULL_DISK.search(text):
        file = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "No space left on device"
        return f"{file}{reason}; make room and run the same command again: what was finished is kept"
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        return "there is not enough memory for this; close other programs, or give smaller settings or --memory"
    if isinstance(error, OSError) and error.strerror:
        return _one_line(f"{error.filename}: {error.strerror}" if error.filename else text)
    return _one_line(
        f"unexpected {type(error).__name__}: {text[:300]}; this is a fault of the program: please report it with what "
        "the same command prints with --traceback"
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


class StderrHandler(logging.Handler):
    """Prints messages on stderr; stdout is for results."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a message, a warning as such."""
        label = "warning: " if record.levelno >= logging.WARNING else ""
        click.echo(printable(f"{label}{record.getMessage()}"), err=True)


def command(*parts) -> str:
    """A call of this program, quoted so that it can be copied into a shell."""
    return shlex.join([*PROGRAM, *map(str, parts)])


def given(options: dict) -> list[str]:
    """The command-line names of those options that were given."""
    names = {parameter.name: parameter.opts[0] for parameter in click.get_current_context().command.params}
    return [names[name] for name, value in options.items() if value is not None and value is not False and value != ()]


def done(written: str, following: str | None = None) -> None:
    """Prints the closing lines of a command: what it wrote, and what to run next."""
    say(written)
    if following:
        say(f"next: {following}")


def _shipped_config(_context: click.Context, _parameter: click.Parameter, value: Path) -> Path:
    """The settings that come with the program, where their name is given: ``best``, or ``configs/best.yaml``."""
    shipped = DEFAULT_CONFIG.with_name(f"{value.stem}.yaml")
    if value.exists() or value.parent not in (Path(), Path("configs")) or not shipped.is_file():
        return value
    return shipped


def config_options(command):
    """--config and --set, shared by the commands that take settings."""
    command = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override one setting, e.g. training.num_epochs=5. Repeatable.",
    )(command)
    return click.option(
        "--config",
        "config_file",
        type=FILE,
        default=DEFAULT_CONFIG,
        show_default="config",
        callback=_shipped_config,
        help="YAML file with settings, or the name of some that come with the program: config, best.",
    )(command)


def check_overrides(overrides: tuple[str, ...], *sections: str) -> None:
    """Refuses a --set that this command does not use.

    Raises:
        ConfigError: a setting of another section.
    """
    for override in overrides:
        section = override.partition("=")[0].strip().partition(".")[0]
        if section in {field.name for field in fields(Config)} - {*sections}:
            raise ConfigError(
                f"{override!r} has no effect on this command, which takes settings of {' and '.join(sections)}"
            )


class Size(click.ParamType):
    """A number of bytes: 500MiB, 2GiB."""

    name = "size"

    def convert(self, value, param, ctx):
        """``value`` in bytes."""
        size = parse_size(str(value))
        if size is None:
            self.fail(f"{value!r} is no size; write for example 500MiB or 2GiB", param, ctx)
        return size


class WorkerNumber(click.ParamType):
    """A worker, as 2/4: the second of four."""

    name = "worker"

    def convert(self, value, param, ctx):
        """``value``, which names a worker."""
        try:
            return str(parse_worker(str(value)))
        except WorkerError as error:
            self.fail(str(error), param, ctx)


worker_option = click.option(
    "--worker",
    type=WorkerNumber(),
    metavar="I/N",
    help="Do the I-th of N shares, e.g. 2/4; N processes may run at once. A last call without --worker finishes.",
)
address_option = click.option(
    "--address", metavar="ADDRESS", help="Cluster for --engine ray. [default: RAY_ADDRESS, else one on this machine]"
)
memory_option = click.option(
    "--memory", type=Size(), help="Memory limit, e.g. 2GiB. [default: half of the machine's or container's]"
)
device_option = click.option("--device", help="cpu, cuda, cuda:1 or mps. [default: the best available]")
devices_option = click.option(
    "--device",
    help="cpu, cuda, cuda:1 or mps; several GPUs: cuda:0,cuda:1. [default: the best available]",
)
_READING = (
    click.option("--image-column", metavar="NAME", help="Column of the table that names the images."),
    click.option("--caption-column", metavar="NAME", multiple=True, help="Column that holds captions. Repeatable."),
    click.option("--split-column", metavar="NAME", help="Column that holds the split."),
    click.option("--images-root", type=LOCATION, metavar="DIR", help="Folder that the images' names start from."),
    click.option(
        "--caption-template",
        metavar="TEXT",
        help='Caption of an image in a class folder, as "a photo of a {}".',
    ),
    click.option("--exclude", metavar="GLOB", multiple=True, help="Leave these files alone. Repeatable."),
)


def reading_options(command, options=_READING):
    """Adds the options that say how to read a dataset; ``command`` gets them as one argument, ``reading``."""

    @functools.wraps(command)
    def with_reading(
        *, image_column, caption_column, split_column, images_root=None, caption_template=None, exclude=(), **given
    ):
        from onceover.extract.dataset.reading import ReadOptions

        reading = ReadOptions(image_column, caption_column, split_column, images_root, caption_template, exclude)
        return command(reading=reading, **given)

    decorated = with_reading
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


def reading_arguments(reading) -> list[str]:
    """The options of ``reading_options`` as they are written in a call."""
    values = {
        "--image-column": [reading.image_column],
        "--caption-column": reading.caption_columns,
        "--split-column": [reading.split_column],
        "--images-root": [reading.images_root],
        "--caption-template": [reading.caption_template],
        "--exclude": reading.exclude,
    }
    arguments: list[str] = []
    for name, given_values in values.items():
        for value in given_values:
            if value is not None:
                arguments += [name, str(value)]
    return arguments


def column_options(command):
    """The options that name a table's columns, for a table without images, as the argument ``reading``."""
    return reading_options(command, _READING[:3])


encoder_options = (
    click.option("--image-encoder", metavar="SPEC", help="New location of the image encoder, if it has moved."),
    click.option("--text-encoder", metavar="SPEC", help="New location of the text encoder, if it has moved."),
)
neighbours_option = click.option(
    "--neighbours",
    type=click.IntRange(0, 1000),
    default=10,
    show_default=True,
    metavar="K",
    help="Name the K nearest others in each row; 0 leaves these columns out.",
)
with_images_option = click.option(
    "--with-images", is_flag=True, help="Put the bytes of the images into the file, as they are."
)
json_option = click.option(
    "--json",
    "json_to",
    is_flag=False,
    flag_value="-",
    default=None,
    metavar="[FILE]",
    help="Write JSON to FILE; without FILE to stdout, and nothing else there.",
)


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="onceover %(version)s")
def cli() -> None:
    """Image-text retrieval: encode a dataset once, fit projection heads over and over.

    \b
    extract   images and captions -> feature store (once)
    import    features computed elsewhere -> feature store
    join      feature stores of one dataset -> one with the features of all their encoders
    repack    feature store -> its other form, one file or a folder of shards
    fit       feature store -> projection heads and embeddings (a minute or two)
    sweep     feature store -> the best of a grid of settings
    finetune  run -> fine-tuned encoders and heads
    evaluate, compare, ensemble, distill, index, search, plot, report, export   work from the stored files
    serve     a run or an index -> a search page in the browser
    embed     images or captions -> their embeddings, by a run

    \b
    Examples:
      onceover demo
      onceover extract --data data/flickr8k --store stores/flickr8k.h5
      onceover fit --store stores/flickr8k.h5 --run runs/first
    """
    bound_threads()
    _forgiving_streams()
    LOGGER.handlers = [StderrHandler()]


def _forgiving_streams() -> None:
    """Prints ASCII that reads alike, or escapes, in place of characters that the terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=PLAIN)


@cli.command()
@click.option(
    "--data",
    required=True,
    type=LOCATION,
    metavar="DATA",
    help="Dataset: its folder or file, a pattern of shards, or an address (docs/data.md lists the forms).",
)
@click.option(
    "--store",
    "store_file",
    required=True,
    type=STORE,
    help="Feature store to write: one file (NAME.h5), a folder (NAME.store or NAME/), "
    "or the address of a folder (s3://bucket/NAME.store). [another NAME: a folder from 8 GiB of features]",
)
@click.option(
    "--image-encoder",
    metavar="SPEC",
    help="Image encoder: torchvision:, timm: or open_clip:NAME[@WEIGHTS], or hf:NAME_OR_FOLDER.",
)
@click.option(
    "--text-encoder",
    metavar="SPEC",
    help="Text encoder: hf: or st:NAME_OR_FOLDER, or open_clip:NAME[@WEIGHTS]; hf:NAME@random: untrained.",
)
@click.option(
    "--image-layers", metavar="NAMES", help="Concatenate these layers of the image encoder: auto, more, last, NAME,…"
)
@click.option(
    "--text-layers",
    metavar="NAMES",
    help="Concatenate these layers of the text encoder: auto, last, middle, words, 0,1,…",
)
@click.option(
    "--text-pooling",
    type=click.Choice(["auto", "mean", "cls", "last"]),
    help="Pool a caption's tokens: by their mean, the first (cls) or the last. [default: as the encoder was trained]",
)
@click.option(
    "--views",
    type=int,
    help="Views per image, 1 to 12: 2 adds its mirror image, 4 both uncropped, more add corner crops.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Compute dtype; auto: half precision where native, if it changes a sample's features by at most 1.4 %.",
)
@click.option("--store-dtype", type=click.Choice(["float32", "float16"]), help="Storage dtype of the features.")
@click.option("--batch-size", type=int, help="Images per forward pass. [default: chosen for the device]")
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="Engine: threads, processes (they feed a GPU), ray (a cluster) or auto.",
)
@address_option
@click.option(
    "--backend",
    default="auto",
    show_default=True,
    help="Backend: eager (torch), openvino, or auto: OpenVINO, if installed, for 200 images and more on x86.",
)
@click.option("--thumbnails/--no-thumbnails", default=None, help="Keep small JPEGs in the store, for figures.")
@click.option("--limit", type=click.IntRange(min=1), help="Encode only the first N images.")
@click.option("--force", is_flag=True, help="Replace features of other encoders or settings in this store.")
@click.option("--prune", is_flag=True, help="Drop stored rows that are no longer in the dataset.")
@click.option("--retry-failures", is_flag=True, help="Retry the images that the ledger records as failed.")
@worker_option
@reading_options
@devices_option
@config_options
def extract(
    data,
    store_file,
    limit,
    force,
    prune,
    retry_failures,
    worker,
    reading,
    engine,
    address,
    backend,
    device,
    config_file,
    overrides,
    **explicit,
):
    """Encode a dataset of captioned images into a feature store, once.

    Run the same command again to resume after an interruption, or to encode only what is new.

    \b
    Examples:
      onceover extract --data data/flickr8k --store stores/flickr8k.h5
      onceover extract --data "s3://bucket/{000..999}.tar" --store stores/web.store
      onceover extract --data photos.csv --store photos.h5 --image-encoder hf:encoders/clip --views 2
      onceover extract --data data/flickr8k --store stores/flickr8k.h5 --worker 1/4
    """
    from onceover import workflows

    check_overrides(overrides, "extract")
    settings = [f"extract.{key}={json.dumps(value)}" for key, value in explicit.items() if value is not None]
    config = load_config(config_file, [*overrides, *settings]).extract
    following = command("fit", "--store", store_file, "--run", "runs/first")
    options = {"limit": limit, "reading": reading, "device": device, "engine": engine, "backend": backend}
    options |= {"prune": prune, "retry_failures": retry_failures}
    if worker:
        if force:
            raise click.UsageError(
                "--force cannot be combined with --worker, since workers would discard each other's shards; "
                f"name another --store, or remove {store_file} first"
            )
        share = workflows.extract_share(data, store_file, worker, config, **options)
        share.tell()
        if share.sealed:
            done(f"{store_file} is finished; there is nothing to do for worker {worker}", following)
        else:
            done(_worker_done(worker, "extract", bool(share.left)), _command_without_worker())
        return
    summary = workflows.extract(data, store_file, config, force=force, address=address, **options)
    summary.tell()
    done(
        f"wrote {store_file}" if not summary.up_to_date else f"{store_file} is up to date; nothing to encode", following
    )


def _worker_done(worker: str, command_name: str, is_left: bool) -> str:
    """The closing line of a worker."""
    if is_left:
        return f"worker {worker} is done; when all are, run {command_name} without --worker"
    return f"worker {worker} is done, and so are all others; run {command_name} without --worker"


def _command_without_worker() -> str:
    """The call of this program, less its option --worker."""
    parts = list(sys.argv[1:])
    if "--worker" in parts:
        place = parts.index("--worker")
        del parts[place : place + 2]
    return command(*(part for part in parts if not part.startswith("--worker=")))


@cli.command("import")
@click.option(
    "--image-features",
    type=FILE,
    metavar="FILE_OR_DIR",
    help="Image features: .npy, .npz, .h5, .safetensors (one array of several: FILE.npz:NAME), .parquet, or a folder "
    "of such files.",
)
@click.option("--text-features", type=FILE, metavar="FILE_OR_DIR", help="Text features, one row per caption.")
@click.option(
    "--captions",
    type=LOCATION,
    metavar="TABLE",
    help="Caption table: .csv, .tsv, .jsonl, … as extract reads them, or a .parquet file or folder; "
    "with --captions-per-image a text file.",
)
@click.option(
    "--captions-per-image", type=click.IntRange(min=1), metavar="N", help="Read --captions as lines, N for each image."
)
@click.option(
    "--precomputed",
    type=DIRECTORY,
    help="Folder with train_ims.npy, train_caps.txt and the same for dev and test, as VSE++ has them.",
)
@click.option("--store", "store_file", required=True, type=STORE, help="Feature store to write, as of extract.")
@click.option("--image-ids", type=FILE, help="Image names of the rows of image features, one per line.")
@click.option(
    "--regions", type=click.Choice(["mean"]), help="Image features are (images, regions, numbers): take the mean."
)
@click.option("--name", metavar="TEXT", help="Name of unknown encoders. [default: that of the image features]")
@click.option(
    "--data", type=LOCATION, metavar="DIR", help="Folder of the images, if available. [default: the captions']"
)
@click.option(
    "--image-encoder", metavar="SPEC", help="Encoder that made the image features; checked on images in --data."
)
@click.option(
    "--text-encoder",
    metavar="SPEC",
    help="Encoder that made the text features; checked on captions. Without --text-features it encodes the captions.",
)
@column_options
@click.option("--force", is_flag=True, help="Replace a store of other features or captions.")
@device_option
@config_options
def import_(store_file, config_file, overrides, **given):
    """Make a feature store from features computed elsewhere.

    Row i of the text features belongs to row i of the caption table. Image features have one row per distinct image,
    in the order of the table, or one per row of the table, or one per line of --image-ids, or one array per image name.
    The images are not needed. New queries can be searched for where the encoders are named.

    \b
    Examples:
      onceover import --image-features img_emb --text-features text_emb --captions metadata --store mine.h5
      onceover import --image-features i.npy --text-features t.npy --captions captions.csv --store mine.h5
      onceover import --precomputed data/f30k_precomp --text-encoder hf:encoders/minilm --store f30k.h5
    """
    from onceover.extract.importing import import_features

    check_overrides(overrides, "extract")
    names = ("image_features", "text_features", "captions")
    config = load_config(config_file, overrides).extract
    summary = import_features(*(given.pop(name) for name in names), store_file, config=config, **given)
    summary.tell()
    done(
        f"wrote {store_file}" if not summary.up_to_date else f"{store_file} is up to date; nothing to import",
        command("fit", "--store", store_file, "--run", "runs/first"),
    )


@cli.command()
@click.argument("stores", nargs=-1, required=True, type=LOCATION, metavar="STORE_A STORE_B...")
@click.option("--out", "store_file", required=True, type=STORE, help="Feature store to write, as of extract.")
@click.option(
    "--common", is_flag=True, help="Join the images and captions that all stores have; the others go into the ledger."
)
@click.option("--force", is_flag=True, help="Replace another feature store at --out.")
def join(stores, store_file, common, force):
    """Join feature stores of one dataset into one that has the features of all their encoders side by side.

    Nothing is encoded again. Images are matched by content, captions by their image and text, in whatever order they
    lie. An encoder that several stores have in common is taken once. Queries and new images pass all encoders.

    \b
    Examples:
      onceover join stores/resnet.h5 stores/clip.h5 --out stores/both.h5
      onceover join stores/a.h5 stores/b.h5 stores/c.h5 --common --out stores/abc.h5
    """
    from onceover.extract.joining import join_stores

    summary = join_stores(stores, store_file, common=common, force=force)
    summary.tell()
    done(
        f"wrote {store_file}" if not summary.up_to_date else f"{store_file} is up to date; nothing to join",
        command("fit", "--store", store_file, "--run", "runs/first"),
    )


@cli.command()
@click.argument("store_file", type=LOCATION, metavar="STORE")
@click.option(
    "--to", required=True, type=STORE, help="Feature store to write: NAME.h5, NAME.store, NAME/, or an address."
)
@click.option("--force", is_flag=True, help="Replace another feature store at --to.")
def repack(store_file, to, force):
    """Convert a feature store from one file to a folder of shards, or back.

    Nothing is encoded again, and all commands take either form.

    \b
    Examples:
      onceover repack stores/flickr8k.h5 --to stores/flickr8k.store
      onceover repack stores/flickr8k.store --to stores/flickr8k.h5
    """
    from onceover.extract.repack import repack as write

    summary = write(store_file, to, force=force)
    done(
        f"wrote {to}" if not summary.up_to_date else f"{to} is up to date; nothing to convert",
        command("fit", "--store", to, "--run", "runs/first"),
    )


@cli.command()
@click.option("--store", "store_file", required=True, type=LOCATION, help="Finished feature store.")
@click.option("--run", "run_dir", required=True, type=DIRECTORY, help="Run folder to write.")
@click.option("--force", is_flag=True, help="Fit again and replace the existing run.")
@click.option(
    "--ensemble",
    type=click.IntRange(min=1),
    metavar="N",
    help="Train N members and average their scores (training.members).",
)
@memory_option
@device_option
@config_options
def fit(store_file, run_dir, force, ensemble, memory, device, config_file, overrides):
    """Fit projection heads on the train split of a feature store.

    Run the same command again to resume an interrupted fit; the result is the same. Features that exceed the memory
    limit are read in shuffled chunks.

    \b
    Examples:
      onceover fit --store stores/flickr8k.h5 --run runs/first
      onceover fit --store stores/flickr8k.h5 --run runs/five --ensemble 5 --set training.num_epochs=20
    """
    from onceover import workflows

    check_overrides(overrides, "model", "training")
    members = [f"training.members={ensemble}"] if ensemble else []
    config = load_config(config_file, [*overrides, *members])
    run = workflows.fit(store_file, run_dir, config, device=device, memory=memory, force=force)
    provenance = run.provenance
    selection = provenance["selection"]
    epochs = [f"{best} of {ran}" for best, ran in zip(provenance["best_epochs"], provenance["epochs"], strict=True)]
    say(
        f"best epoch {', '.join(epochs)}: rsum {selection['rsum']:.1f} on "
        f"{selection['pictures']:,} images ({selection['split']}), {provenance['seconds']:.0f} s"
    )
    done(f"wrote {run_dir}", command("evaluate", "--run", run_dir))


@cli.command()
@click.option("--store", "store_file", required=True, type=LOCATION, help="Finished feature store.")
@click.option("--out", required=True, type=DIRECTORY, help="Folder to write.")
@click.option(
    "--grid",
    multiple=True,
    metavar="KEY=V1,V2,…",
    help="Axis of the grid: a setting of model or training and its values. Repeatable.",
)
@click.option(
    "--seeds", type=click.IntRange(1, 1000), default=1, show_default=True, help="Number of seeds per setting."
)
@click.option(
    "--sample", type=click.IntRange(min=1), metavar="N", help="Try only N settings of the grid, drawn at random."
)
@click.option(
    "--halving",
    is_flag=True,
    help="Stop settings early that are clearly behind the best, and fit all seeds of only the best few.",
)
@click.option("--test-best", is_flag=True, help="Fit the best setting and evaluate it once on the reported split.")
@worker_option
@click.option(
    "--engine", type=click.Choice(["ray"]), help="ray: have a cluster fit the settings. [default: this machine]"
)
@address_option
@memory_option
@device_option
@config_options
def sweep(
    store_file,
    out,
    grid,
    seeds,
    sample,
    halving,
    test_best,
    worker,
    engine,
    address,
    memory,
    device,
    config_file,
    overrides,
):
    """Fit a grid of settings together and rank them on the validation split.

    Run the same command again to resume an interrupted sweep; finished trials are not fitted again.

    \b
    Examples:
      onceover sweep --store stores/flickr8k.h5 --out sweeps/first --grid model.temperature=0.03,0.05,0.07
      onceover sweep --store s.h5 --out sweeps/b --grid model.embedding_dim=256,512 --seeds 3 --halving
    """
    from onceover import workflows
    from onceover.heads.grid import expand

    check_overrides(overrides, "model", "training")
    settings = expand(config_file, overrides, grid, seeds, sample)
    if worker:
        if halving:
            raise click.UsageError("--halving compares all settings half-way, and cannot be combined with --worker")
        if test_best:
            raise click.UsageError("--test-best cannot be combined with --worker; give it to the last call")
        if engine:
            raise click.UsageError("--engine ray hands out trials itself; leave out --worker, or the engine")
        share = workflows.sweep_share(store_file, out, settings, worker, device=device, memory=memory)
        say(f"trials fitted by worker {worker}: {share.trained:,}")
        if share.left:
            shown = [f"{number}/{share.worker.count} ({count:,})" for number, count in share.left.items()]
            say(f"workers that have trials left: {', '.join(shown)}")
        done(_worker_done(worker, "sweep", bool(share.left)), _command_without_worker())
        return
    cluster = {"engine": engine, "address": address}
    rows = workflows.sweep(store_file, out, settings, halving=halving, device=device, memory=memory, **cluster)
    keys = list(settings[0].values)
    from onceover.retrieval.leaderboard import leaderboard_tables, notes

    click.echo(stdout_text(leaderboard_tables(rows, keys, most=10)))
    for note in notes(rows[:10]):
        say(note)
    if len(rows) > 10:
        say(f"{len(rows) - 10} more: {out / 'leaderboard.md'}")
    ties = sum(row.get("verdict") == "tie" for row in rows)
    say(f"{ties} more tie with the best setting" if ties else "no other setting ties with the best one")
    if "model.temperature" in keys and any(setting.configs[0].model.learn_temperature for setting in settings):
        say("model.temperature is where a learned temperature starts; --set model.learn_temperature=false fixes it")
    run_dir, best = out / "best", out / "best.yaml"
    following = command("fit", "--store", store_file, "--run", run_dir, "--config", best)
    if test_best:
        workflows.fit_best(store_file, out, device=device, memory=memory)
        _print_evaluation(workflows.evaluate(run_dir, store=store_file, memory=memory, device=device))
        following = command("plot", "--run", run_dir, "--out", out / "figures" / "best")
    done(f"wrote results.csv, leaderboard.md, best.yaml and figures to {out}", following)


@cli.command()
@click.option("--run", "run_dir", required=True, type=DIRECTORY, help="Fitted run to start from.")
@click.option("--data", required=True, type=LOCATION, metavar="DATA", help="Dataset that the store was made of.")
@click.option("--store", "store_file", required=True, type=LOCATION, help="Feature store that the run was fitted on.")
@click.option("--out", required=True, type=DIRECTORY, help="Folder to write.")
@click.option(
    "--unfreeze",
    default="image",
    show_default=True,
    metavar="LAYERS",
    help="Layers to fine-tune, with all above them: a preset (image, last, all), or image.NAME,text.NAME,… "
    "where NAME is a module, lastN (blocks) or all.",
)
@click.option(
    "--re-extract", is_flag=True, help="Then encode the dataset with the fine-tuned encoders, and complete the run."
)
@click.option("--no-cache", is_flag=True, help="Cache no activations: encode images in every epoch, with random crops.")
@click.option(
    "--activations", type=DIRECTORY, help="Folder for cached activations. [default: activations, beside --out]"
)
@click.option("--force", is_flag=True, help="Train again, in place of one whose features are not extracted yet.")
@encoder_options[0]
@encoder_options[1]
@device_option
@config_options
def finetune(
    run_dir,
    data,
    store_file,
    out,
    unfreeze,
    re_extract,
    no_cache,
    activations,
    force,
    image_encoder,
    text_encoder,
    device,
    config_file,
    overrides,
):
    """Fine-tune layers of the encoders together with a run's heads.

    Frozen layers below the lowest unfrozen one run once; their activations are cached on disk. Run the same command
    again to resume; the result is the same. Under torchrun, processes share each batch.

    A run that was fitted again on the validation split, as fit does by default, is fine-tuned on it too, and the last
    epoch counts. Otherwise the epoch that is best on the validation split is kept.

    \b
    Examples:
      onceover finetune --run runs/start --data data/flickr8k --store s.h5 --out runs/tuned --re-extract
      onceover finetune --run runs/start --data data/flickr8k --store s.h5 --out runs/t --unfreeze text.last2
    """
    from onceover import workflows

    check_overrides(overrides, "finetune")
    result = workflows.finetune(
        run_dir,
        data,
        store_file,
        out,
        load_config(config_file, overrides),
        unfreeze=unfreeze,
        cached=not no_cache,
        activations=activations,
        encoders={"image": image_encoder, "text": text_encoder},
        device=device,
        force=force,
        re_extract=re_extract,
    )
    if result is None:  # another process goes on
        return
    if result["rsum"] is None:
        say(f"{result['epochs']} epochs on train and validation images; {result['seconds']:.0f} s")
    else:
        say(
            f"best epoch {result['best_epoch']} of {result['epochs']}: rsum {result['rsum']:.1f} on the validation "
            f"images, {result['start']:.1f} before; {result['seconds']:.0f} s"
        )
    complete = (out / "run.json").exists()
    if re_extract and not complete:
        workflows.complete_finetuned(store_file, data, out, device=device).tell()
    if re_extract or complete:
        done(f"wrote {out}", command("evaluate", "--run", out))
    else:
        done(
            f"wrote encoders and heads to {out}; their features are not extracted yet",
            f"{_same_command()} --re-extract",
        )


def _same_command() -> str:
    return command(*(part for part in sys.argv[1:] if part != "--force"))


@cli.command()
@click.option("--run", "run_dir", type=DIRECTORY, help="Run folder, as fit writes it.")
@click.option(
    "--store",
    "store_file",
    type=LOCATION,
    help="Feature store: alone, for its baselines; with --run, its new location.",
)
@click.option("--split", help="Split to evaluate: train, select, dev or test. [default: the reported one]")
@click.option(
    "--rerank",
    multiple=True,
    type=click.Choice(["qbnorm", "csls"]),
    help="Add a row corrected for hubs: qbnorm uses training queries, csls the split's own. Repeatable.",
)
@click.option(
    "--equal-captions", is_flag=True, help="Add a row in which equal captions of other images are correct as well."
)
@click.option(
    "--folds",
    type=click.IntRange(min=2),
    metavar="N",
    help="Add a row in which each query searches its own of N folds, e.g. 5 for COCO's folds of 1,000 images.",
)
@click.option(
    "--shuffled", is_flag=True, help="Add a sanity check: heads trained on shuffled pairs must score at chance."
)
@click.option(
    "--errors", type=click.IntRange(min=1), metavar="N", help="Write a page with the N worst queries in each direction."
)
@click.option("--fresh", is_flag=True, help="Measure the baselines again instead of reading STORE.h5.baselines.")
@json_option
@memory_option
@device_option
def evaluate(run_dir, store_file, errors, json_to, **options):
    """Measure recall@K, ranks and MRR of a run beside baselines and chance.

    Print a table of both directions, and write it as evaluation-SPLIT.md, .csv and .json into the run folder, or
    beside the store. With --store alone, measure the baselines. Rows that an earlier evaluation of this run added
    (--rerank, --equal-captions, --folds, --shuffled) stay in the table.

    \b
    Examples:
      onceover evaluate --run runs/first
      onceover evaluate --run runs/first --shuffled --errors 20
      onceover evaluate --store stores/flickr8k.h5 --json baselines.json
    """
    of_a_run = ("rerank", "equal_captions", "folds", "shuffled")
    if run_dir is None and (store_file is None or errors or any(options[name] for name in of_a_run)):
        raise click.UsageError(
            "name a --run; --store alone gives the baselines, and goes with --split, --fresh, --memory and --json"
        )
    from onceover import workflows
    from onceover.base.outputs import check_result, write_result

    if json_to and json_to != "-":
        check_result(json_to)
    evaluation = workflows.evaluate(run_dir, store=store_file, **options)
    written = [*evaluation.files]
    if json_to == "-":
        click.echo(_json_result(evaluation.result))
    else:
        _print_evaluation(evaluation)
        if json_to:
            write_result(json_to, evaluation.result)
            written.append(json_to)
    if errors:
        written.append(workflows.error_page(run_dir, evaluation.result["split"], errors, options["rerank"]))
    done(f"wrote {', '.join(map(str, written))}", _after_evaluation(run_dir, store_file))


def _after_evaluation(run_dir: Path | None, store_file: Path | None) -> str:
    """The next command to suggest: a search, where the run has an encoder for queries."""
    if run_dir is None:
        return command("fit", "--store", store_file, "--run", "runs/first")
    return _search_command(run_dir, "--run", run_dir) or command("plot", "--run", run_dir, "--out", "figures")


def _search_command(run_dir: Path, *where, captions_alone: bool = False) -> str | None:
    """A search command to suggest: by text, or by image where the run can only embed images.

    None where all its features were imported, so that no query can be embedded.

    Args:
        captions_alone: only captions can be found, so that the query is an image.
    """
    from onceover.extract.encoders import is_imported
    from onceover.heads.provenance import read_provenance

    encoders = read_provenance(run_dir)["encoders"]
    if not captions_alone and not is_imported(encoders["text"]["encoder"]):
        return command("search", *where, "--query", "a dog playing in the park")
    if not is_imported(encoders["image"]["encoder"]):
        return command("search", *where, "--query", "IMAGE.jpg", "--mode", "image2text")
    return None


def _json_result(result: dict) -> str:
    """A result in the form in which it is written to a file."""
    from onceover.base.files import sealed
    from onceover.base.outputs import result_record

    return json.dumps(sealed(result_record(result)), indent=2)


def _print_evaluation(evaluation) -> None:
    from onceover.retrieval.tables import evaluation_tables, notes, warnings

    click.echo(stdout_text(evaluation_tables(evaluation.result)))
    _tell(notes(evaluation.result), warnings(evaluation.result))


def _tell(notes: Iterable[str], warnings: Iterable[str]) -> None:
    """Tells the notes and the warnings below a table."""
    for note in notes:
        say(note)
    for warning in warnings:
        warn(warning)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=DIRECTORY, metavar="RUN_A RUN_B...")
@click.option(
    "--split", help="Split to compare on: train, select, dev or test. [default: the one the first run reports]"
)
@click.option(
    "--rerank",
    type=click.Choice(["none", "qbnorm", "csls"]),
    help="Hubness correction for all runs. [default: each run's own]",
)
@json_option
def compare(runs, split, rerank, json_to):
    """Compare runs with the first one, query by query.

    Print the differences with paired 95 % intervals and a verdict: better, worse or not distinguishable.

    \b
    Examples:
      onceover compare runs/first runs/cold
      onceover compare runs/first runs/cold --split dev --json comparison.json
    """
    from onceover import workflows
    from onceover.base.outputs import check_result, write_result
    from onceover.retrieval import tables

    if json_to and json_to != "-":
        check_result(json_to)
    result = workflows.compare(runs, split, rerank)
    if json_to == "-":
        click.echo(_json_result(result))
        return
    click.echo(stdout_text(tables.comparison_tables(result)))
    _tell(tables.comparison_notes(result), tables.comparison_warnings(result))
    if json_to:
        write_result(json_to, result)
        done(f"wrote {json_to}")


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=DIRECTORY, metavar="RUN_A RUN_B...")
@click.option("--out", "run_dir", required=True, type=DIRECTORY, help="Run folder to write.")
@click.option("--weights", type=Numbers(), help="How much each run counts, as 3,2. [default: all the same]")
@click.option(
    "--store", "store_file", type=LOCATION, help="New location of the runs' feature store, or their joined one."
)
def ensemble(runs, run_dir, weights, store_file):
    """Join runs into one run that averages their scores.

    Runs of several stores of one dataset, such as one of fine-tuned encoders, are joined on the store that
    onceover join made of these.

    \b
    Examples:
      onceover ensemble runs/a runs/b runs/c --out runs/joined
      onceover ensemble runs/best runs/tuned --weights 3,2 --store joined.h5 --out runs/both
    """
    from onceover import workflows
    from onceover.retrieval.metrics import rsum_text

    provenance = workflows.ensemble(runs, run_dir, weights=weights, store=store_file).provenance
    selection = provenance["selection"]
    say(f"{len(provenance['members'])} pairs of heads: {rsum_text(selection['rsum'])} on {selection['split']}")
    done(f"wrote {run_dir}", command("evaluate", "--run", run_dir))


@cli.command()
@click.option("--run", "run_dir", required=True, type=DIRECTORY, help="Run of several linear pairs of heads.")
@click.option("--out", "out_dir", required=True, type=DIRECTORY, help="Run folder to write.")
@click.option("--dim", type=click.IntRange(1), help="Dimensions of the new pair. [default: those of the run's first]")
@click.option("--store", "store_file", type=LOCATION, help="New location of the run's feature store, if it has moved.")
def distill(run_dir, out_dir, dim, store_file):
    """Make one pair of heads of an ensemble: its recall at one pair's cost in search.

    Nothing is trained: the members are linear, and one linear map holds nearly all of what they do together.

    \b
    Examples:
      onceover distill --run runs/best --out runs/pair
    """
    from onceover import workflows

    provenance = workflows.distill(run_dir, out_dir, dim=dim, store=store_file).provenance
    say(f"one pair of heads, {provenance['members'][0]['embedding_dim']} dimensions")
    done(f"wrote {out_dir}", command("compare", run_dir, out_dir))


@cli.command()
@click.option("--run", "run_dir", type=DIRECTORY, help="Run whose encoders and heads to use. [required to build]")
@click.option("--index", "index_dir", type=DIRECTORY, help="Index folder to write. [default: index in the run folder]")
@click.option(
    "--images",
    type=LOCATION,
    multiple=True,
    metavar="DIR",
    help="Index the images in this folder or address and its subfolders. Repeatable, for folders of this machine.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="GLOB",
    help="Leave out images and folders of --images that match, such as '*.gif', raw, or '2019/**/small'; those indexed "
    "before are removed. Repeatable; give it each time.",
)
@click.option("--captions", type=LOCATION, metavar="FILE", help="Index the captions in this file, one per line.")
@click.option("--split", help="Index only this split of the run's own images and captions. [default: everything]")
@click.option(
    "--type",
    "kind",
    type=click.Choice(["auto", "flat", "hnsw", "ivf", "ivf16", "ivfpq"]),
    help="Type of index: flat is exact; hnsw, ivf and ivfpq are approximate and faster, from largest to smallest; "
    "ivf16 reads its lists from the disk. [default: auto, or as before]",
)
@click.option(
    "--memory", type=Size(), help="Memory limit of the index, for --type auto. [default: half of the machine's]"
)
@click.option(
    "--min-recall",
    type=Fraction(),
    help="Refuse an approximate index with a lower recall@10. [default: 0.95, or as before]",
)
@click.option(
    "--rerank", type=click.Choice(["none", "qbnorm"]), help="Hubness correction. [default: as before, or the run's own]"
)
@click.option("--remove", multiple=True, metavar="ID", help="Remove this item and do nothing else. Repeatable.")
@click.option("--compact", is_flag=True, help="Rewrite the index without removed items and do nothing else.")
@click.option("--prune", is_flag=True, help="Drop items that are no longer in the folder or file, with their features.")
@click.option("--retry-failures", is_flag=True, help="Retry the images that the ledger records as failed.")
@click.option(
    "--force",
    is_flag=True,
    help="Replace a damaged index or one of something else; continue although most items are gone.",
)
@encoder_options[0]
@encoder_options[1]
@device_option
@worker_option
def index(run_dir, index_dir, images, captions, split, remove, compact, worker, **options):
    """Index a run's images and captions, or a folder of your own, for fast search.

    Run the same command again to add what is new and remove what is gone; each image is encoded once. A removed item
    returns when its folder or file is indexed again and still holds it. Features of missing items are kept until
    --prune.

    \b
    Examples:
      onceover index --run runs/first
      onceover index --run runs/first --images ~/Pictures --index pictures.index
      onceover index --run runs/first --images ~/Pictures --index pictures.index --exclude '*.gif' --exclude raw
      onceover index --run runs/first --images ~/Pictures --images /media/disk/photos --index all.index
      onceover index --run runs/first --images s3://bucket/photos --index photos.index
      onceover index --run runs/first --type ivf16 --worker 1/4
      onceover index --index pictures.index --remove holiday/dog.jpg
    """
    if sum(map(bool, (images, captions, split))) > 1:
        raise click.UsageError("--images, --captions and --split exclude each other; name one of them at most")
    if (remove or compact) and (images or captions or split or (remove and compact)):
        raise click.UsageError("--remove and --compact stand alone: they change the index that is there")
    if worker and (images or captions or remove or compact):
        raise click.UsageError(
            "--worker shares the index of a run's own images and captions; for folders of images make an index of "
            "each, and name them all to search: --index A --index B"
        )
    if worker and (options["force"] or options["prune"]):
        raise click.UsageError("--force and --prune cannot be combined with --worker; give them to the last call")
    if (remove or compact) and (idle := given(options)):
        raise click.UsageError(f"{idle[0]} has no effect on --remove and --compact; leave it out, or index again")
    if (options["prune"] or options["retry_failures"]) and not (images or captions):
        raise click.UsageError("--prune and --retry-failures go with --images or --captions")
    if options["exclude"] and not images:
        raise click.UsageError("--exclude goes with --images; name the folder whose images to index")
    if run_dir is None and not (index_dir and (remove or compact)):
        raise click.UsageError("name the --run; only --remove and --compact of an --index need none")
    from onceover import workflows

    if remove or compact:
        workflows.change_index(index_dir or run_dir / "index", remove=remove, run=run_dir)
    else:
        encoders = {"image": options.pop("image_encoder"), "text": options.pop("text_encoder")}
        choices = workflows.IndexOptions(**options, encoders=encoders)
        workflows.index(
            run_dir, index_dir, images=images, captions=captions, split=split, options=choices, worker=worker
        )
    if worker:
        done(_worker_done(worker, "index", True), _command_without_worker())
        return
    index_dir = index_dir or run_dir / "index"
    following = command("info", index_dir)
    if not remove and not compact:
        following = _search_command(run_dir, "--index", index_dir, captions_alone=bool(captions)) or following
    done(f"wrote {index_dir}", following)


@cli.command()
@click.option("--run", "run_dir", type=DIRECTORY, help="Run folder, as fit writes it.")
@click.option(
    "--index",
    "index_dir",
    type=DIRECTORY,
    multiple=True,
    help="Search this index, as index writes it, instead of the run's own images. Repeatable, for indexes of one run.",
)
@click.option("--query", help="Query: a text, or with --mode image2… the path or address of an image.")
@click.option(
    "--queries", metavar="FILE", help="File of queries, one per line; - reads stdin, and answers each line as it comes."
)
@click.option(
    "--mode",
    type=click.Choice(["text2image", "image2text", "image2image", "text2text"]),
    default="text2image",
    show_default=True,
    help="What to search by, and what to find: images or texts (captions).",
)
@click.option(
    "--with",
    "with_",
    multiple=True,
    metavar="TEXT_OR_IMAGE",
    help="Mix in a text, or an image by its path or address. Repeatable.",
)
@click.option(
    "--weight", type=Fraction(), help="Weight of --query against all of --with together, 0 to 1. [default: 0.5]"
)
@click.option(
    "--minus",
    multiple=True,
    metavar="TEXT_OR_IMAGE",
    help="Subtract a text or an image; all of them together weigh 0.5, against 1 for --query and --with. Repeatable.",
)
@click.option(
    "--top-k",
    "--top_k",
    "top_k",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Number of hits per query.",
)
@click.option("--min-score", type=float, metavar="X", help="Leave out hits that score less.")
@click.option("--split", help="Search only this split. [default: everything]")
@click.option("--rerank", type=click.Choice(["none", "qbnorm"]), help="Hubness correction. [default: the run's own]")
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "json", "jsonl", "csv"]),
    show_default="text",
    help="Output format: jsonl has one query per line, csv one hit per line.",
)
@click.option("--json", "as_json", is_flag=True, help="Same as --format json.")
@click.option(
    "--root",
    type=DIRECTORY,
    multiple=True,
    metavar="NEW_FOLDER",
    help="Where the images are now, if their folder has moved. Repeatable; the first that has a file is taken.",
)
@click.option(
    "--out",
    type=FILE,
    help="Draw the hits of one --query to a .png, .svg or .pdf file, or those of all queries to one .html page.",
)
@encoder_options[0]
@encoder_options[1]
@device_option
def search(run_dir, index_dir, query, queries, mode, with_, minus, weight, style, as_json, out, **options):
    """Search for images or captions by text, by image, or by several of them added and subtracted.

    \b
    Examples:
      onceover search --run runs/first --query "a dog playing in the park" --out hits.png
      onceover search --run runs/first --query photo.jpg --mode image2text
      onceover search --run runs/first --query photo.jpg --mode image2image --min-score 0.5
      onceover search --run runs/first --query "in the snow" --with photo.jpg --weight 0.4 --minus "a car"
      onceover search --index pictures.index --queries queries.txt --format jsonl
      onceover search --index pictures.index --index phone.index --query "a dog"
    """
    from onceover import workflows

    if (query is None) == (queries is None):
        raise click.UsageError("name --query or --queries, one of the two")
    if run_dir is None and not index_dir:
        raise click.UsageError("name a --run, or an --index")
    if queries and out and out.suffix.lower() != ".html":
        raise click.UsageError("--out draws the hits of one --query; for --queries name a page: --out hits.html")
    if weight is not None and not with_:
        raise click.UsageError("--weight is the weight of --query against --with; add --with")
    if as_json and style not in (None, "json"):
        raise click.UsageError(f"--json and --format {style} contradict each other; name one of them")
    if index_dir and (options["split"] or options["rerank"]):
        raise click.UsageError("--split and --rerank go with --run; an index was built with its own")
    if query is not None and not mode.startswith("image2"):
        query = text_of(query)
    batches = [[query]] if queries is None else _read_queries(queries)
    encoders = {"image": options.pop("image_encoder"), "text": options.pop("text_encoder")}
    results = workflows.search_batches(
        run_dir,
        batches,
        mode=mode,
        index=index_dir or None,
        with_=[_text_or_path(value) for value in with_],
        minus=[_text_or_path(value) for value in minus],
        weight=weight,
        figure=out,
        encoders=encoders,
        **options,
    )
    count = _print_hits(results, mode, "json" if as_json else style or "text", queries is not None)
    done(f"wrote {out}" if out else f"{count} hits")


def _text_or_path(argument: str) -> str:
    """The path of a file as it is, and anything else as a text."""
    return argument if os.path.isfile(argument) else text_of(argument)  # noqa: PTH113 (a text may be too long)


def _read_queries(file: str) -> Iterator[list[str]]:
    """Queries in batches: those of a file, or the lines of stdin as they arrive."""
    from onceover.base.files import open_regular
    from onceover.retrieval.queries import batched, read_queries

    if file == "-":
        yield from read_queries(sys.stdin.buffer, "stdin")
    else:
        with open_regular(file) as opened:
            yield from batched(chain.from_iterable(read_queries(opened, file)))


def _print_hits(results: Iterable[tuple[str, list]], mode: str, style: str, many: bool) -> int:
    """Prints the hits of each query as they come; returns their number."""
    write = {"json": _json_hits, "jsonl": _json_line, "csv": _csv_hits, "text": _text_hits}[style]
    count = 0
    for number, (query, hits) in enumerate(results):
        click.echo(write(number, query, hits, mode, many), nl=False)
        count += len(hits)
    if style == "json":
        click.echo("\n]" if many else "")
    return count


def _json_hits(number: int, query: str, hits: list, mode: str, many: bool) -> str:
    """A query as a JSON object, which is an item of a list where there are several queries."""
    text = json.dumps(_result(query, hits, mode), indent=2, ensure_ascii=_lacks_characters())
    if not many:
        return text
    return (",\n  " if number else "[\n  ") + text.replace("\n", "\n  ")


def _json_line(number: int, query: str, hits: list, mode: str, many: bool) -> str:
    return json.dumps(_result(query, hits, mode), ensure_ascii=_lacks_characters()) + "\n"


def _lacks_characters() -> bool:
    """Whether stdout is not UTF-8, so that JSON has to be written with its own escapes."""
    return (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"


def _result(query: str, hits: list, mode: str) -> dict:
    return {"query": query, "mode": mode, "hits": [hit.to_dict() for hit in hits]}


def _csv_hits(number: int, query: str, hits: list, mode: str, many: bool) -> str:
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if number == 0:
        writer.writerow(["query", "mode", "rank", "score", "id", "path", "caption", "same"])
    for hit in hits:
        caption = (hit.captions or [""])[0]
        writer.writerow([query, mode, hit.rank, hit.score, hit.id, hit.path, caption, " ".join(hit.same)])
    return text.getvalue()


def _text_hits(number: int, query: str, hits: list, mode: str, many: bool) -> str:
    lines = [query] if many else []
    for hit in hits:
        first = hit.captions[0] if hit.captions else "(no caption)"
        shown = (hit.path, first) if mode.endswith("2image") else (first, hit.path or "(no image)")
        again = f"   (and {len(hit.same)} like it: {', '.join(hit.same[:3])})" if hit.same else ""
        lines.append(f"{hit.rank:3}  {hit.score:6.3f}  {shown[0]}{again}\n             {shown[1]}")
    return printable("".join(f"{line}\n" for line in lines))


@cli.command()
@click.option("--run", "run_dir", type=DIRECTORY, help="Serve a run's own images and captions.")
@click.option(
    "--index",
    "index_dir",
    type=DIRECTORY,
    multiple=True,
    help="Serve an index, as index writes it. Repeatable, for indexes of one run.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 is open to the network.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 takes a free one."
)
@click.option("--split", help="Serve only this split. [default: everything]")
@click.option("--rerank", type=click.Choice(["none", "qbnorm"]), help="Hubness correction. [default: the run's own]")
@click.option(
    "--root", "roots", type=DIRECTORY, multiple=True, help="New location of the images, if they have moved. Repeatable."
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Concurrent queries answered together at most.",
)
@encoder_options[0]
@encoder_options[1]
@device_option
def serve(run_dir, index_dir, image_encoder, text_encoder, **options):
    """Serve a search page and its JSON API until Ctrl-C.

    Search by text, by an image, and by both; with a map of the images and captions. Only this machine can reach the
    page unless --host says otherwise. The API's description is at /api/openapi.json.

    \b
    Examples:
      onceover serve --run runs/first
      onceover serve --index pictures.index --port 8080
    """
    from onceover.serve.server import serve as answer

    if run_dir is None and not index_dir:
        raise click.UsageError("name a --run, or an --index")
    if index_dir and (options["split"] or options["rerank"]):
        raise click.UsageError("--split and --rerank go with --run; an index was built with its own")
    answer(run_dir, index_dir or None, encoders={"image": image_encoder, "text": text_encoder}, **options)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads may still compute for queries that were given up; Python would wait for them


@cli.command()
@click.option(
    "--run", "run_dir", type=DIRECTORY, help="Draw a run: t-SNE, PCA, similarity matrices, training, ranks, evaluation."
)
@click.option("--store", "store_file", type=LOCATION, help="Draw a feature store: PCA by split, spectrum.")
@click.option("--sweep", "sweep_dir", type=DIRECTORY, help="Draw a sweep: heat maps, curves, parallel coordinates.")
@click.option("--out", required=True, type=DIRECTORY, help="Folder for the figures, each as PNG, SVG and PDF.")
@click.option("--split", help="Split to draw. [default: the reported one]")
@memory_option
def plot(run_dir, store_file, sweep_dir, out, split, memory):
    """Draw figures of a run, a feature store or a sweep from their stored files.

    \b
    Examples:
      onceover plot --run runs/first --out figures
      onceover plot --sweep sweeps/first --out figures/sweep
    """
    from onceover import workflows

    if sum(path is not None for path in (run_dir, store_file, sweep_dir)) != 1:
        raise click.UsageError("name one of --run, --store and --sweep")
    if split and not run_dir:
        raise click.UsageError("--split goes with --run")
    if memory and not store_file:
        raise click.UsageError("--memory goes with --store: a run's embeddings and a sweep's table take little")
    written = workflows.plot(out, run=run_dir, store=store_file, sweep=sweep_dir, split=split, memory=memory)
    if store_file:
        following = command("fit", "--store", store_file, "--run", "runs/first")
    else:
        following = command("report", "--run", run_dir, "--out", "report.html") if run_dir else None
    done(f"wrote {', '.join(path.name for path in written)} to {out}", following)


@cli.command()
@click.option("--run", "run_dir", required=True, type=DIRECTORY, help="Run folder, as fit writes it.")
@click.option(
    "--compare", multiple=True, type=DIRECTORY, metavar="DIR", help="Run to compare the first one with. Repeatable."
)
@click.option("--sweep", "sweep_dir", type=DIRECTORY, help="Sweep to show: its best settings, heat maps and curves.")
@click.option("--out", required=True, type=FILE, help="Page to write, such as report.html.")
@click.option("--split", help="Split to report. [default: the reported one]")
@click.option("--store", "store_file", type=LOCATION, help="New location of the run's feature store, if it has moved.")
def report(run_dir, compare, sweep_dir, out, split, store_file):
    """Write all that is known of a run as one HTML page, to be opened in a browser, printed or passed on.

    The page needs no network and nothing beside it: data and settings, the results beside their baselines,
    comparisons, an interactive map of images and captions, the best and worst queries with their images, hubs,
    training, a sweep, and the health of the feature store. Parts whose files are missing say how to make them.

    \b
    Examples:
      onceover report --run runs/first --out report.html
      onceover report --run runs/first --compare runs/cold --sweep sweeps/first --out report.html
    """
    from onceover import workflows

    page = workflows.report(run_dir, out, compare=compare, sweep=sweep_dir, split=split, store=store_file)
    done(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB)", _search_command(run_dir, "--run", run_dir))


@cli.command()
@click.option("--run", "run_dir", required=True, type=DIRECTORY, help="Run folder, as fit writes it.")
@click.option("--to", required=True, type=FILE, metavar="FILE.parquet", help="Parquet file to write.")
@click.option(
    "--kind",
    type=click.Choice(["image", "text"]),
    default="image",
    show_default=True,
    help="Write a row for each image, or for each caption.",
)
@click.option("--split", help="Write only this split. [default: everything]")
@neighbours_option
@with_images_option
@click.option(
    "--data", type=LOCATION, metavar="DATA", help="New location of the dataset, if it has moved, for --with-images."
)
@click.option(
    "--store",
    type=LOCATION,
    metavar="STORE",
    help="New location of the run's store, if it has moved, for --with-images.",
)
def export(run_dir, to, with_images, data, store, **options):
    """Write a run's images or captions with their embeddings to a Parquet file that other programs open.

    A row has id, path, split, captions, embedding (of length 1), x and y of a map, and its nearest neighbours. It
    ends by printing the calls that open the file in Hugging Face datasets, DuckDB, LanceDB and embedding-atlas.

    \b
    Examples:
      onceover export --run runs/first --to flickr8k.parquet
      onceover export --run runs/first --to test.parquet --split test --with-images
      onceover export --run runs/first --to captions.parquet --kind text --neighbours 0
    """
    from onceover import workflows

    if (data or store) and not with_images:
        raise click.UsageError("--data and --store go with --with-images")
    workflows.export(run_dir, to, with_images=with_images, data=data, store=store, **options)
    _done_table(to)


@cli.command()
@click.option("--run", "run_dir", required=True, type=DIRECTORY, help="Run whose encoders and heads to use.")
@click.option("--images", type=LOCATION, metavar="DIR", help="Embed every image in this folder and below it.")
@click.option("--captions", type=LOCATION, metavar="FILE", help="Embed the captions in this file, one per line.")
@click.option("--to", required=True, type=FILE, metavar="FILE.parquet", help="Parquet file to write.")
@neighbours_option
@with_images_option
@click.option("--exclude", metavar="GLOB", multiple=True, help="Leave these images and folders alone. Repeatable.")
@click.option("--force", is_flag=True, help="Replace kept features of other encoders or of another folder.")
@click.option("--prune", is_flag=True, help="Drop kept features of items that are no longer there.")
@click.option("--retry-failures", is_flag=True, help="Retry the images that the ledger records as failed.")
@encoder_options[0]
@encoder_options[1]
@device_option
def embed(run_dir, to, images, captions, image_encoder, text_encoder, **options):
    """Encode new images or captions with a run, and write their embeddings to a Parquet file, without an index.

    The columns are those of export. Run the same command again to resume after an interruption, or to encode only
    what is new: features are kept beside the file, in FILE.parquet.features.h5.

    \b
    Examples:
      onceover embed --run runs/first --images ~/Pictures --to pictures.parquet
      onceover embed --run runs/first --captions queries.txt --to queries.parquet
    """
    from onceover import workflows

    if (images is None) == (captions is None):
        raise click.UsageError("name either --images or --captions")
    if captions and (options["with_images"] or options["exclude"]):
        raise click.UsageError("--with-images and --exclude go with --images")
    encoders = {"image": image_encoder, "text": text_encoder}
    workflows.embed(run_dir, to, images=images, captions=captions, encoders=encoders, **options)
    _done_table(to)


def _done_table(path: Path) -> None:
    """Prints the closing lines of a command that wrote a table: the calls that open it elsewhere."""
    from onceover.retrieval.open_elsewhere import ways_to_open

    say(f"wrote {path}; open it:")
    for program, call in ways_to_open(path).items():
        say(f"{program}: {call}")


@cli.command()
@click.argument("path", type=LOCATION, metavar="[FILE_OR_DIR]", required=False)
@click.option(
    "--data", type=LOCATION, metavar="DATA", help="Dataset to preview: what would be taken, without encoding."
)
@reading_options
def info(path, data, reading):
    """Describe a feature store, run, sweep, index or unfinished extraction, or preview a dataset.

    \b
    Examples:
      onceover info stores/flickr8k.h5
      onceover info --data photos.tsv --image-column filepath --caption-column title
    """
    if (path is None) == (data is None):
        raise click.UsageError("name one of FILE_OR_DIR and --data DATA")
    if data is None:
        from onceover.analysis.describe import describe

        click.echo(printable(describe(path)))
        return
    from onceover.extract.preview import preview

    click.echo(printable(preview(data, reading)))
    following = command("extract", "--data", data, *reading_arguments(reading), "--store", "store.h5")
    done("read only; nothing was written", following)


@cli.command()
@click.argument("store_file", type=LOCATION, metavar="STORE_OR_INDEX")
@click.option("--sample", type=click.IntRange(min=1), help="Also encode N images and captions again and compare.")
@encoder_options[0]
@encoder_options[1]
@click.option(
    "--data", type=LOCATION, metavar="DATA", help="New location of the dataset, if it has moved. (With --sample.)"
)
@device_option
def verify(store_file, sample, device, **places):
    """Check a feature store or an index for damage.

    Check a store's structure, checksums and that all numbers are finite; with --sample, also the features themselves.
    Check every file of an index against its SHA-256.

    \b
    Examples:
      onceover verify stores/flickr8k.h5 --sample 100
      onceover verify pictures.index
    """
    from onceover.base.formats import CURRENT
    from onceover.extract.store import FeatureStore
    from onceover.retrieval.index.galleries import GALLERIES

    indexes = []
    if not is_address(store_file):
        indexes = [folder for name in GALLERIES.values() if ((folder := store_file / name) / CURRENT).exists()]
    for folder in indexes:
        from onceover.retrieval.index import Index

        click.echo(f"{folder} is sound: {len(Index(folder)):,} rows")
    if indexes:
        return
    with FeatureStore(store_file) as store:
        problems = store.verify()
        if sample and not problems:
            from onceover.extract.verify import verify_sample

            lines, problems = verify_sample(store, sample, device=device, **places)
            for line in lines:
                click.echo(printable(line))
    for problem in problems:
        click.echo(printable(f"wrong: {problem}"))
    if problems:
        mend = "remove it"
        if store.shards is not None:
            mend = "remove the shards that are named, or the folder where none is,"
        warn(f"{store_file} cannot be trusted; {mend} and extract again")
        sys.exit(1)
    click.echo(f"{store_file} is sound")


@cli.command()
@click.argument("name", type=click.Choice(["flickr8k"]))
@click.option("--to", "folder", required=True, type=DIRECTORY, help="Folder to create.")
def download(name, folder):
    """Download a dataset, check it and unpack it; run again to resume.

    \b
    Examples:
      onceover download flickr8k --to data/flickr8k
    """
    from onceover.extract.download import download_archives

    download_archives(name, folder)
    done(f"wrote {folder}", command("extract", "--data", folder, "--store", f"{folder}.h5"))


@cli.command()
@click.option("--out", type=DIRECTORY, default=Path("demo"), show_default=True, help="Folder to write.")
@device_option
def demo(out, device):
    """Run everything offline: draw a dataset, encode, fit, search, evaluate, plot.

    Nothing is downloaded, so the encoders have random weights: the heads learn from random features.

    \b
    Examples:
      onceover demo --out demo
    """
    from onceover import workflows
    from onceover.base.outputs import claim_folder
    from onceover.extract.synthetic import draw_dataset
    from onceover.retrieval.tables import summary_table

    config = load_config(DEFAULT_CONFIG.with_name("demo.yaml"))
    claim_folder(out, "name a new folder: --out DIR")
    run_dir = out / "run"
    figures = out / "figures"
    say(
        f"The demo, offline, in {out}: it draws 540 images of coloured shapes with five captions each, encodes them "
        "with ResNet50 and DistilBERT (UNTRAINED: nothing is downloaded, and for shapes that will do), fits heads, "
        "searches, draws figures and ends with a table of recalls. It takes some two minutes on two idle cores."
    )
    say("1/6 draw")
    sentence, picture = draw_dataset(out / "data")
    say("2/6 extract: images and captions -> features")
    workflows.extract(out / "data", out / "store.h5", config.extract, device=device, force=True).tell()
    say("3/6 fit: features -> heads and embeddings")
    run = workflows.fit(out / "store.h5", run_dir, config, device=device, force=True)
    say("4/6 search in both directions: the test images and captions nearest to a scene that none of them shows")
    for query, mode in ((sentence, "text2image"), (str(picture), "image2text")):
        click.echo(f"{mode}: {query}")
        options = {"mode": mode, "split": "test", "figure": figures / f"search-{mode}.png", "device": device}
        for hit in workflows.search(run, query, top_k=3, **options):
            click.echo(f"{hit.rank:3}  {hit.score:6.3f}  {hit.path if mode == 'text2image' else hit.captions[0]}")
    say("5/6 evaluate: the heads beside baselines on the same features")
    evaluation = workflows.evaluate(run)
    say("6/6 plot")
    workflows.plot(figures, run=run_dir)
    click.echo(stdout_text([summary_table(evaluation.result)]))
    done(
        f"wrote {out}: the dataset, the store, the run with all numbers (evaluation-test.md), and figures in {figures}",
        command("download", "flickr8k", "--to", "data/flickr8k") + "   (real photographs)",
    )


def main() -> None:
    """Runs the command line."""
    _open_closed_streams()
    try:
        cli(prog_name=" ".join(PROGRAM))
    except OSError as error:  # of printing a help text: within a command the error is caught there
        print(f"error: the output cannot be printed: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still held back has nowhere to go
        sys.exit(1)


def _open_closed_streams() -> None:
    """Opens those of stdin, stdout and stderr that the caller closed, so that no other file takes their place.

    Input is then empty, messages go nowhere, and results that cannot be printed end in an error.
    """
    ways = (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w"))
    for number, (name, flag, mode) in enumerate(ways):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flag)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


if __name__ == "__main__":
    main()
