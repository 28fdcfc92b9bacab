"""onceover's command line: options in, one call or a short chain of calls, what was written and what to run next.

Stages are imported when a command runs, so that ``--help`` answers at once. An error the user can mend is one line on
stderr and exit code 2 (the call is wrong) or 1 (the rest).
"""

import errno
import json
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import fields
from importlib.util import module_from_spec, spec_from_file_location
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
from onceover.base.errors import OnceoverError
from onceover.base.progress import LOGGER, say
from onceover.configs.schema import DEFAULT_CONFIG, Config, ConfigError, load_config

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave their core to others,
os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # after a fraction of a millisecond: waking one costs a step a tenth
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch takes large arrays in huge pages

PROGRAM = ("onceover",) if __package__ else ("python", "cli.py")  # how the user calls it
_TRACEBACK = "onceover.traceback"
_FULL_DISK = re.compile(r"no space left|os error 28|file too large|disk quota exceeded", re.IGNORECASE)
_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|bad_alloc|failed to map segment", re.IGNORECASE
)


class PathName(click.Path):
    """A path that can be written down in a file of ours, and that leads somewhere."""

    def convert(self, value, param, ctx):
        """``value`` as a path."""
        text = os.fspath(value)
        if not text:
            self.fail("an empty path; name a file or a folder", param, ctx)
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
    """What is wrong with a name that is no Unicode, and how to mend it."""
    try:
        os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError:
        return "is not UTF-8, and names are written into files as UTF-8; rename it"
    return "is not understood here: Python does not read names as UTF-8; set the environment variable PYTHONUTF8=1"


FILE = PathName(path_type=Path)
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


def text_of(argument: str) -> str:
    """A text from the command line, which is taken for UTF-8 where Python does not read it so."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return argument


class Command(click.Command):
    """A command with --traceback."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        traceback = click.Option(
            ["--traceback"],
            is_flag=True,
            expose_value=False,
            callback=lambda context, _, value: context.find_root().meta.update({_TRACEBACK: value}),
            help="Show where in the program an unexpected error came from, for a report.",
        )
        self.params.append(traceback)


class Main(click.Group):
    """A group that turns every error into one line; what a user cannot mend asks for a report."""

    command_class = Command

    def invoke(self, ctx: click.Context):
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted; run the same command again: what was finished is kept", err=True)
            ctx.exit(130)
        except OnceoverError as error:
            self._fail(ctx, error, _one_line(str(error)), error.exit_code)
        except BrokenPipeError:
            raise
        except (click.exceptions.Exit, click.exceptions.ClickException, click.exceptions.Abort):
            raise
        except Exception as error:
            self._fail(ctx, error, _system_error(error), 1)

    @staticmethod
    def _fail(ctx: click.Context, error: Exception, line: str, code: int) -> None:
        if ctx.find_root().meta.get(_TRACEBACK):
            traceback.print_exception(error)
        click.echo(f"error: {line}", err=True)
        ctx.exit(code)


def _system_error(error: Exception) -> str:
    """What went wrong outside the program, or else a line that asks for a report."""
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or _FULL_DISK.search(text):
        place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "No space left on device"
        return f"{place}{reason}; make room and run the same command again: what was finished is kept"
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
    """Shows messages on stderr; stdout is for results."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a message."""
        click.echo(record.getMessage(), err=True)


def command(*parts) -> str:
    """A call of this program to be copied into a shell, with what needs quotes in quotes."""
    return shlex.join([*PROGRAM, *map(str, parts)])


def given(options: dict) -> list[str]:
    """What the options among these that were given are called on the command line."""
    names = {parameter.name: parameter.opts[0] for parameter in click.get_current_context().command.params}
    return [names[name] for name, value in options.items() if value is not None and value is not False]


def done(written: str, following: str | None = None) -> None:
    """The closing lines of a command: what it wrote, and what to run next."""
    say(written)
    if following:
        say(f"next: {following}")


def config_options(command):
    """--config and --set, shared by the commands that take settings."""
    command = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override one setting, for example training.num_epochs=5. May be repeated.",
    )(command)
    return click.option(
        "--config",
        "config_file",
        type=FILE,
        default=DEFAULT_CONFIG,
        show_default="configs/config.yaml",
        help="YAML file with settings.",
    )(command)


def check_overrides(overrides: tuple[str, ...], *sections: str) -> None:
    """Refuses a --set that would change nothing here.

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
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", str(value), re.IGNORECASE)
        if not match or not float(match[1]):
            self.fail(f"{value!r} is no size; write for example 500MiB or 2GiB", param, ctx)
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


memory_option = click.option(
    "--memory", type=Size(), help="What may be taken of it: 2GiB. [default: half of the machine's, or container's]"
)
device_option = click.option("--device", help="cpu, cuda, cuda:1, mps. [default: the best one at hand]")
encoder_options = (
    click.option("--image-encoder", metavar="SPEC", help="Where the image encoder is now, if it has moved."),
    click.option("--text-encoder", metavar="SPEC", help="Where the text encoder is now, if it has moved."),
)
json_option = click.option(
    "--json",
    "json_to",
    is_flag=False,
    flag_value="-",
    default=None,
    metavar="[FILE]",
    help="JSON to FILE, or to stdout and nothing else there if FILE is left out.",
)


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="onceover %(version)s")
def cli() -> None:
    """Image-text retrieval: encode a dataset once, fit projection heads over and over.

    \b
    extract   images and captions -> feature store (once)
    import    features computed elsewhere -> feature store
    fit       feature store -> projection heads and embeddings (seconds)
    sweep     feature store -> the best of a grid of settings, for the time of a few fits
    evaluate, compare, ensemble, index, search, plot   from the stored files

    Start with: onceover demo
    """
    _forgiving_streams()
    LOGGER.setLevel(logging.INFO)
    LOGGER.handlers = [StderrHandler()]


def _forgiving_streams() -> None:
    """Lets a terminal that is not UTF-8 show escapes in the place of characters that it lacks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@cli.command()
@click.option(
    "--data",
    required=True,
    type=FILE,
    help="The dataset's folder, or its CSV file (image,caption[,split]), or Karpathy's JSON.",
)
@click.option("--store", "store_file", required=True, type=FILE, help="The .h5 file to write.")
@click.option("--image-encoder", metavar="SPEC", help="torchvision:NAME[@WEIGHTS] or hf:NAME_OR_FOLDER.")
@click.option("--text-encoder", metavar="SPEC", help="hf:NAME_OR_FOLDER; add @random for untrained weights.")
@click.option("--image-layers", metavar="NAMES", help="Layers of the image encoder, side by side: auto, last, NAME,…")
@click.option("--text-layers", metavar="NAMES", help="The same of the text encoder: auto, last, middle, words, 0, 1, …")
@click.option(
    "--text-pooling", type=click.Choice(["mean", "cls"]), help="Mean over a caption's tokens, or the first one."
)
@click.option("--views", type=int, help="Cached views per image: 2 with its mirror image, 4 uncropped, 12 and corners.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Of the encoders' arithmetic; auto: float16 on CUDA, bfloat16 where a processor has it, if a sample bears it.",
)
@click.option("--store-dtype", type=click.Choice(["float32", "float16"]), help="Of the features on the disk.")
@click.option("--batch-size", type=int, help="Images a forward pass. [default: chosen for the device]")
@click.option("--thumbnails/--no-thumbnails", default=None, help="Keep small JPEGs in the store, for figures.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N images.")
@click.option("--force", is_flag=True, help="Replace features of other encoders or settings in this store.")
@click.option("--prune", is_flag=True, help="Drop rows of the store that the dataset has no more.")
@click.option("--retry-failures", is_flag=True, help="Try again the images that the ledger records as failed.")
@device_option
@config_options
def extract(data, store_file, limit, force, prune, retry_failures, device, config_file, overrides, **explicit):
    """Encode a dataset of captioned images once into a feature store.

    Killed at any moment, it goes on where it stopped when run again; run again on a finished store, it encodes only
    what is new.
    """
    from onceover import workflows

    check_overrides(overrides, "extract")
    settings = [f"extract.{key}={json.dumps(value)}" for key, value in explicit.items() if value is not None]
    config = load_config(config_file, [*overrides, *settings]).extract
    if store_file.is_dir():
        raise ConfigError(f"{store_file} is a folder; --store names the .h5 file to write")
    options = {"limit": limit, "device": device, "force": force, "prune": prune, "retry_failures": retry_failures}
    summary = workflows.extract(data, store_file, config, **options)
    _say_lines(summary)
    done(
        f"wrote {store_file}" if not summary.up_to_date else f"{store_file} is up to date; nothing to encode",
        command("fit", "--store", store_file, "--run", "runs/first"),
    )


def _say_lines(summary) -> None:
    for line in summary.lines():
        say(line)


@cli.command("import")
@click.option(
    "--image-features",
    required=True,
    type=FILE,
    metavar="FILE_OR_DIR",
    help=".npy, .safetensors (a tensor of several: FILE.safetensors:NAME) or .parquet; of a folder, all such files.",
)
@click.option("--text-features", required=True, type=FILE, metavar="FILE_OR_DIR", help="The same, a row a caption.")
@click.option(
    "--captions",
    required=True,
    type=FILE,
    metavar="TABLE",
    help="A .csv (image,caption[,split]), or a .parquet file or folder with these columns (or image_path).",
)
@click.option("--store", "store_file", required=True, type=FILE, help="The .h5 file to write.")
@click.option("--image-ids", type=FILE, help="The image of each row of image features, one name a line.")
@click.option("--name", metavar="TEXT", help="What to call the encoders. [default: as the image features]")
@click.option("--data", type=DIRECTORY, help="The images' folder, if they are at hand. [default: the table's]")
@click.option("--force", is_flag=True, help="Replace a store of other features or captions.")
def import_(store_file, **given):
    """Make a feature store of features that were computed elsewhere.

    Row i of the text features belongs to row i of the caption table. Image features have a row for each different
    image, in the order of the table, or for each row of the table, or for each line of --image-ids. Images are not
    needed; queries cannot be embedded, since the encoder is not there.
    """
    from onceover.extract.importing import import_features

    if store_file.is_dir():
        raise ConfigError(f"{store_file} is a folder; --store names the .h5 file to write")
    names = ("image_features", "text_features", "captions")
    summary = import_features(*(given.pop(name) for name in names), store_file, **given, say=say)
    _say_lines(summary)
    done(
        f"wrote {store_file}" if not summary.up_to_date else f"{store_file} is up to date; nothing to import",
        command("fit", "--store", store_file, "--run", "runs/first"),
    )


@cli.command()
@click.option("--store", "store_file", required=True, type=FILE, help="A finished feature store.")
@click.option("--run", "run_dir", required=True, type=DIRECTORY, help="The folder to write.")
@click.option("--force", is_flag=True, help="Fit again, in the place of the run that is there.")
@click.option("--ensemble", type=click.IntRange(min=1), metavar="N", help="N pairs of heads as one: training.members.")
@memory_option
@device_option
@config_options
def fit(store_file, run_dir, force, ensemble, memory, device, config_file, overrides):
    """Fit projection heads on a feature store's train images.

    An interrupted fit goes on where it stopped when run again, to the same result. Features that do not fit the memory
    are read in shuffled chunks.
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
@click.option("--store", "store_file", required=True, type=FILE, help="A finished feature store.")
@click.option("--out", required=True, type=DIRECTORY, help="The folder to write.")
@click.option(
    "--grid",
    multiple=True,
    metavar="KEY=V1,V2,…",
    help="An axis of the grid: any setting of model or training. Repeat.",
)
@click.option("--seeds", type=click.IntRange(1, 1000), default=1, show_default=True, help="Fits of each setting.")
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Only N settings of the grid, drawn at random.")
@click.option(
    "--halving",
    is_flag=True,
    help="Drop settings early that are clearly behind the best one, and fit all seeds of the best few alone.",
)
@click.option("--test-best", is_flag=True, help="Fit the best setting and evaluate it, once, on the reported split.")
@memory_option
@device_option
@config_options
def sweep(store_file, out, grid, seeds, sample, halving, test_best, memory, device, config_file, overrides):
    """Fit a grid of settings together and rank them on the validation images.

    An interrupted sweep goes on where it stopped when run again; settings that are fitted already are not fitted again.
    """
    from onceover import workflows
    from onceover.heads.grid import expand

    check_overrides(overrides, "model", "training")
    settings = expand(config_file, overrides, grid, seeds, sample)
    rows = workflows.sweep(store_file, out, settings, halving=halving, device=device, memory=memory)
    keys = list(settings[0].values)
    from onceover.retrieval.evaluation import terminal_table
    from onceover.retrieval.leaderboard import leaderboard_table, notes

    click.echo(terminal_table(leaderboard_table(rows, keys, most=10)))
    for note in notes(rows):
        say(note)
    if len(rows) > 10:
        say(f"{len(rows) - 10} more: {out / 'leaderboard.md'}")
    ties = sum(row.get("verdict") == "tie" for row in rows)
    say(f"{ties} more cannot be told from the best one" if ties else "the best one stands alone")
    if "model.temperature" in keys and any(setting.configs[0].model.learn_temperature for setting in settings):
        say("model.temperature was where a learned temperature started; --set model.learn_temperature=false fixes it")
    run_dir, best = out / "best", out / "best.yaml"
    following = command("fit", "--store", store_file, "--run", run_dir, "--config", best)
    if test_best:
        workflows.fit_best(store_file, out, device=device, memory=memory)
        _print_evaluation(workflows.evaluate(run_dir, store=store_file, memory=memory, device=device))
        following = command("plot", "--run", run_dir, "--out", out / "figures" / "best")
    done(f"wrote results.csv, leaderboard.md, best.yaml and figures to {out}", following)


@cli.command()
@click.option("--run", "run_dir", required=True, type=DIRECTORY, help="The fitted run to start from.")
@click.option("--data", required=True, type=FILE, help="The dataset's folder, or its CSV or JSON file.")
@click.option("--store", "store_file", required=True, type=FILE, help="The feature store that the run was fitted on.")
@click.option("--out", required=True, type=DIRECTORY, help="The folder to write.")
@click.option(
    "--unfreeze",
    default="image",
    show_default=True,
    metavar="LAYERS",
    help="image.NAME,text.NAME,…: a module, lastN (blocks) or all; and what lies above. Or a preset: image, last, all.",
)
@click.option("--re-extract", is_flag=True, help="Encode with the new encoders what changed, and complete the run.")
@click.option("--no-cache", is_flag=True, help="Pass images whole in every epoch, with random crops.")
@click.option(
    "--activations", type=DIRECTORY, help="Where activations are cached. [default: activations, beside --out]"
)
@click.option("--force", is_flag=True, help="Train again, in the place of what is there.")
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
    """Train layers of the encoders on, together with a run's heads.

    The activations below the lowest unfrozen layer are computed once and cached on disk, so that a step costs little
    more than the unfrozen layers' own. An interrupted training resumes when the same command is run again, to the same
    result, which is never worse on the validation images than the run it started from. Started by torchrun, workers
    share batches.
    """
    from onceover import workflows

    check_overrides(overrides, "finetune")
    made = workflows.finetune(
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
    )
    if made is None:  # another process goes on
        return
    say(
        f"best epoch {made['best_epoch']} of {made['epochs']}: rsum {made['rsum']:.1f} on the validation images, "
        f"{made['start']:.1f} before; {made['seconds']:.0f} s"
    )
    complete = (out / "run.json").exists()
    if re_extract and not complete:
        _say_lines(workflows.complete_finetuned(store_file, data, out, device=device))
    if re_extract or complete:
        done(f"wrote {out}", command("evaluate", "--run", out))
    else:
        done(f"wrote encoders and heads to {out}; no features of theirs yet", f"{_same_command()} --re-extract")


def _same_command() -> str:
    return command(*(part for part in sys.argv[1:] if part != "--force"))


@cli.command()
@click.option("--run", "run_dir", type=DIRECTORY, help="A run folder, as fit writes it.")
@click.option(
    "--store", "store_file", type=FILE, help="A feature store: alone, for its baselines; or the run's, moved."
)
@click.option("--split", help="train, select, dev or test. [default: the one to be reported on]")
@click.option(
    "--rerank",
    multiple=True,
    type=click.Choice(["qbnorm", "csls"]),
    help="A further row, corrected for hubs: qbnorm, by training queries; csls, by the split's own. May be repeated.",
)
@click.option("--shuffled", is_flag=True, help="The control: heads fitted to train pairs that were shuffled.")
@click.option("--errors", type=click.IntRange(min=1), metavar="N", help="Write the N worst queries each way as a page.")
@json_option
@memory_option
@device_option
def evaluate(run_dir, store_file, split, rerank, shuffled, errors, json_to, memory, device):
    """Recall@K, ranks and MRR of a run beside baselines and chance, both ways; or of the baselines alone.

    Prints a table and writes evaluation-SPLIT.md, .csv and .json into the run folder, or beside the store.
    """
    if run_dir is None and (store_file is None or shuffled or errors or rerank):
        raise click.UsageError("name a --run; --store alone gives the baselines, and goes with --split and --json")
    from onceover import workflows
    from onceover.base.outputs import check_result, write_result

    if json_to and json_to != "-":
        check_result(json_to)
    options = {"split": split, "rerank": rerank, "shuffled": shuffled, "memory": memory, "device": device}
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
        written.append(workflows.error_page(run_dir, evaluation.result["split"], errors, rerank))
    done(
        f"wrote {', '.join(map(str, written))}",
        command("search", "--run", run_dir, "--query", "a dog playing in the park")
        if run_dir
        else command("fit", "--store", store_file, "--run", "runs/first"),
    )


def _json_result(result: dict) -> str:
    """A result as it is written to a file, too."""
    from onceover.base.files import sealed
    from onceover.base.outputs import result_record

    return json.dumps(sealed(result_record(result)), indent=2)


def _print_evaluation(evaluation) -> None:
    from onceover.retrieval.evaluation import notes

    click.echo(evaluation)
    for note in notes(evaluation.result):
        say(note)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=DIRECTORY, metavar="RUN_A RUN_B...")
@click.option("--split", help="train, select, dev or test. [default: the one the first run reports on]")
@click.option("--rerank", type=click.Choice(["none", "qbnorm", "csls"]), help="For all runs. [default: each run's own]")
@json_option
def compare(runs, split, rerank, json_to):
    """Compare runs with the first one, query by query: differences with 95 % intervals, and what they allow to say."""
    from onceover import workflows
    from onceover.base.outputs import check_result, write_result
    from onceover.retrieval import evaluation

    if json_to and json_to != "-":
        check_result(json_to)
    result = workflows.compare(runs, split, rerank)
    if json_to == "-":
        click.echo(_json_result(result))
        return
    click.echo(evaluation.terminal_table(evaluation.comparison_rows(result)))
    for note in evaluation.comparison_notes(result):
        say(note)
    if json_to:
        write_result(json_to, result)
        done(f"wrote {json_to}")


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=DIRECTORY, metavar="RUN_A RUN_B...")
@click.option("--out", "run_dir", required=True, type=DIRECTORY, help="The folder to write, a run like any other.")
@click.option("--store", "store_file", type=FILE, help="The runs' feature store, if it has moved.")
def ensemble(runs, run_dir, store_file):
    """Join runs of one store: their scores are averaged, by laying their vectors side by side."""
    from onceover import workflows

    made = workflows.ensemble(runs, run_dir, store=store_file).provenance
    selection = made["selection"]
    say(f"{len(made['members'])} pairs of heads: rsum {selection['rsum']:.1f} on {selection['split']}")
    done(f"wrote {run_dir}", command("evaluate", "--run", run_dir))


@cli.command()
@click.option("--run", "run_dir", type=DIRECTORY, help="The run whose encoders and heads are used. [required to build]")
@click.option("--index", "index_dir", type=DIRECTORY, help="The folder to write. [default: index in the run folder]")
@click.option("--images", type=DIRECTORY, help="Index this folder's images, with those below it.")
@click.option("--captions", type=FILE, help="Index this file's sentences, one a line.")
@click.option("--split", help="Index this split of the run's own images and captions. [default: everything]")
@click.option(
    "--type",
    "kind",
    type=click.Choice(["auto", "flat", "hnsw", "ivf", "ivfpq"]),
    help="flat is exact; hnsw, ivf and ivfpq are faster, and smaller in this order. [default: auto, or as before]",
)
@click.option("--memory", type=Size(), help="What the index may take, for auto. [default: half of the machine's]")
@click.option(
    "--min-recall",
    type=Fraction(),
    help="Refuse an approximate index whose recall@10 is lower. [default: 0.95, or as before]",
)
@click.option(
    "--rerank", type=click.Choice(["none", "qbnorm"]), help="Correct for hubs. [default: as before, or as the run does]"
)
@click.option("--remove", multiple=True, metavar="ID", help="Only remove this item. May be repeated.")
@click.option("--compact", is_flag=True, help="Only write the index anew, without what was removed.")
@click.option("--prune", is_flag=True, help="Drop items, and their features, that are no longer in the folder or file.")
@click.option("--retry-failures", is_flag=True, help="Try again the images that the ledger records as failed.")
@click.option(
    "--force",
    is_flag=True,
    help="Replace an index of something else, or a damaged one; go on although most of the items are gone.",
)
@encoder_options[0]
@encoder_options[1]
@device_option
def index(run_dir, index_dir, images, captions, split, remove, compact, **options):
    """Index a run's images and captions, or anyone's, for fast search.

    Run again, it takes up what is new, changed or gone; images of a folder are encoded once. An item that was
    removed comes back when its folder or file is indexed again and still holds it. Features of what is gone are kept
    for its return, until --prune.
    """
    if sum(map(bool, (images, captions, split))) > 1:
        raise click.UsageError("--images, --captions and --split exclude each other; name one of them at most")
    if (remove or compact) and (images or captions or split or (remove and compact)):
        raise click.UsageError("--remove and --compact stand alone: they change the index that is there")
    if (remove or compact) and (idle := given(options)):
        raise click.UsageError(f"{idle[0]} has no effect on --remove and --compact; leave it out, or index again")
    if (options["prune"] or options["retry_failures"]) and not (images or captions):
        raise click.UsageError("--prune and --retry-failures go with --images or --captions")
    if run_dir is None and not (index_dir and (remove or compact)):
        raise click.UsageError("name the --run; only --remove and --compact of an --index go without")
    from onceover import workflows

    if remove or compact:
        workflows.change_index(index_dir or run_dir / "index", remove=remove, run=run_dir)
    else:
        encoders = {"image": options.pop("image_encoder"), "text": options.pop("text_encoder")}
        choices = workflows.IndexOptions(**options, encoders=encoders)
        workflows.index(run_dir, index_dir, images=images, captions=captions, split=split, options=choices)
    index_dir = index_dir or run_dir / "index"
    done(
        f"wrote {index_dir}",
        command(
            *("search", "--index", index_dir, "--query"),
            *(("PICTURE", "--mode", "image2text") if captions else ("a dog playing in the park",)),
        ),
    )


@cli.command()
@click.option("--run", "run_dir", type=DIRECTORY, help="A run folder, as fit writes it.")
@click.option(
    "--index", "index_dir", type=DIRECTORY, help="An index, as index writes it, in the place of the run's own images."
)
@click.option("--query", help="A sentence (text2image), or the path of any image (image2text).")
@click.option("--queries", metavar="FILE", help="Many queries, one a line; - reads stdin.")
@click.option("--mode", type=click.Choice(["text2image", "image2text"]), default="text2image", show_default=True)
@click.option(
    "--with", "other", metavar="OTHER", help="Mix in an image's path (text2image), or a sentence (image2text)."
)
@click.option("--weight", type=Fraction(), help="The share of --query, beside --with. [default: 0.5]")
@click.option(
    "--top-k", "--top_k", "top_k", type=click.IntRange(min=1), default=5, show_default=True, help="Hits to show."
)
@click.option("--split", help="Search this split alone. [default: everything]")
@click.option("--rerank", type=click.Choice(["none", "qbnorm"]), help="Correct for hubs. [default: as the run does]")
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "json", "jsonl", "csv"]),
    show_default="text",
    help="How the hits are printed: jsonl is one query a line, csv one hit a line.",
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option("--out", type=FILE, help="Draw the hits of one query: a .png, .svg or .pdf file.")
@encoder_options[0]
@encoder_options[1]
@device_option
def search(run_dir, index_dir, query, queries, mode, other, weight, top_k, style, as_json, out, **options):
    """Find images by a sentence, or captions by an image, or either by both together."""
    from onceover import workflows

    if (query is None) == (queries is None):
        raise click.UsageError("name --query or --queries, one of the two")
    if run_dir is None and index_dir is None:
        raise click.UsageError("name a --run, or an --index")
    if queries and out:
        raise click.UsageError("--out draws the hits of one --query")
    if weight is not None and other is None:
        raise click.UsageError("--weight is the share of --query beside what --with mixes in")
    if as_json and style not in (None, "json"):
        raise click.UsageError(f"--json and --format {style} contradict each other; name one of them")
    weight = 0.5 if weight is None else weight
    if index_dir and (options["split"] or options["rerank"]):
        raise click.UsageError("--split and --rerank go with --run; an index was built with its own")
    if mode == "text2image" and query is not None:
        query = text_of(query)
    elif mode == "image2text" and other is not None:
        other = text_of(other)
    asked = [query] if queries is None else _read_queries(queries)
    encoders = {"image": options.pop("image_encoder"), "text": options.pop("text_encoder")}
    results = workflows.search_many(
        run_dir,
        asked,
        mode=mode,
        top_k=top_k,
        index=index_dir,
        other=other,
        weight=weight,
        figure=out,
        encoders=encoders,
        **options,
    )
    count = _print_hits(results, mode, "json" if as_json else style or "text", queries is not None)
    done(
        f"wrote {out}" if out else f"{count} hits",
        command("plot", "--run", run_dir, "--out", "figures") if run_dir else None,
    )


def _read_queries(file: str) -> Iterator[str]:
    from onceover.base.files import open_regular
    from onceover.retrieval.search import read_queries

    if file == "-":
        yield from read_queries(sys.stdin.buffer, "stdin", say)
    else:
        with open_regular(file) as opened:
            yield from read_queries(opened, file, say)


def _print_hits(results: Iterable[tuple[str, list]], mode: str, style: str, many: bool) -> int:
    """Prints the hits of each query as they come; returns how many there were."""
    write = {"json": _json_hits, "jsonl": _json_line, "csv": _csv_hits, "text": _text_hits}[style]
    count = 0
    for number, (query, hits) in enumerate(results):
        click.echo(write(number, query, hits, mode, many), nl=False)
        count += len(hits)
    if style == "json":
        click.echo("\n]" if many else "")
    return count


def _json_hits(number: int, query: str, hits: list, mode: str, many: bool) -> str:
    """The object of a query, which is an item of a list where there are many."""
    text = json.dumps(_result(query, hits, mode), indent=2, ensure_ascii=_lacks_characters())
    if not many:
        return text
    return (",\n  " if number else "[\n  ") + text.replace("\n", "\n  ")


def _json_line(number: int, query: str, hits: list, mode: str, many: bool) -> str:
    return json.dumps(_result(query, hits, mode), ensure_ascii=_lacks_characters()) + "\n"


def _lacks_characters() -> bool:
    """Whether stdout is not UTF-8: then JSON needs its own escapes, since the terminal's are none to it."""
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
        shown = (hit.path, first) if mode == "text2image" else (first, hit.path or "(no image)")
        again = f"   (and {len(hit.same)} like it: {', '.join(hit.same[:3])})" if hit.same else ""
        lines.append(f"{hit.rank:3}  {hit.score:6.3f}  {shown[0]}{again}\n             {shown[1]}")
    return "".join(f"{line}\n" for line in lines)


@cli.command()
@click.option(
    "--run", "run_dir", type=DIRECTORY, help="Draw a run: t-SNE, PCA, similarity matrix, training, ranks, evaluation."
)
@click.option("--store", "store_file", type=FILE, help="Draw a feature store: PCA by split, spectrum.")
@click.option("--sweep", "sweep_dir", type=DIRECTORY, help="Draw a sweep: heat maps, curves, parallel coordinates.")
@click.option("--out", required=True, type=DIRECTORY, help="The folder for the figures, each as PNG and SVG.")
@click.option("--split", help="Whose images to draw. [default: the one to be reported on]")
@memory_option
def plot(run_dir, store_file, sweep_dir, out, split, memory):
    """Draw figures from stored files; no model is loaded."""
    from onceover import workflows

    if sum(place is not None for place in (run_dir, store_file, sweep_dir)) != 1:
        raise click.UsageError("name one of --run, --store and --sweep")
    if split and not run_dir:
        raise click.UsageError("--split goes with --run")
    if memory and not store_file:
        raise click.UsageError("--memory goes with --store: a run's embeddings and a sweep's table take little")
    written = workflows.plot(out, run=run_dir, store=store_file, sweep=sweep_dir, split=split, memory=memory)
    if store_file:
        following = command("fit", "--store", store_file, "--run", "runs/first")
    else:
        following = command("info", run_dir) if run_dir else None
    done(f"wrote {', '.join(path.name for path in written)} to {out}", following)


@cli.command()
@click.argument("path", type=FILE, metavar="FILE_OR_DIR")
def info(path):
    """Describe a feature store, a run folder, an index, or an unfinished extraction."""
    from onceover.analysis.describe import describe

    click.echo(describe(path))


@cli.command()
@click.argument("store_file", type=FILE, metavar="FILE.h5_OR_INDEX")
@click.option("--sample", type=click.IntRange(min=1), help="Encode N images and captions again and compare.")
@encoder_options[0]
@encoder_options[1]
@click.option("--data", type=DIRECTORY, help="The dataset's folder, if it has moved. (With --sample.)")
@device_option
def verify(store_file, sample, device, **places):
    """Check a feature store: structure, checksums, finite numbers; with --sample, the features themselves.

    Of an index every file is checked against its SHA-256.
    """
    from onceover.base.formats import CURRENT
    from onceover.extract.store import FeatureStore
    from onceover.extract.verify import verify_sample
    from onceover.workflows import GALLERIES

    indexes = [folder for name in GALLERIES.values() if ((folder := store_file / name) / CURRENT).exists()]
    for folder in indexes:
        from onceover.retrieval.index import Index

        click.echo(f"{folder} is sound: {len(Index(folder)):,} rows")
    if indexes:
        return
    with FeatureStore(store_file) as store:
        problems = store.verify()
        if sample and not problems:
            lines, problems = verify_sample(store, sample, device=device, say=say, **places)
            for line in lines:
                click.echo(line)
    for problem in problems:
        click.echo(f"wrong: {problem}")
    if problems:
        say(f"{store_file} cannot be trusted; remove it and extract again")
        sys.exit(1)
    click.echo(f"{store_file} is sound")


@cli.command()
@click.argument("name", type=click.Choice(["flickr8k"]))
@click.option("--to", "folder", required=True, type=DIRECTORY, help="The folder to make.")
def download(name, folder):
    """Download a dataset: resumable, checked, unpacked safely."""
    from onceover.extract.download import download_archives

    download_archives(name, folder, say)
    done(f"wrote {folder}", command("extract", "--data", folder, "--store", f"{folder}.h5"))


@cli.command()
@click.option("--out", type=DIRECTORY, default=Path("demo"), show_default=True, help="The folder to write.")
@device_option
def demo(out, device):
    """Everything end to end, offline: draw a dataset, encode, fit, evaluate, search, plot.

    The encoders are untrained (random weights), since none may be downloaded: the heads learn from random features.
    """
    from onceover import workflows
    from onceover.base.outputs import claim_folder
    from onceover.extract.synthetic import draw_dataset

    config = load_config(DEFAULT_CONFIG.with_name("demo.yaml"))
    claim_folder(out, "name a new folder: --out DIR")
    run_dir = out / "run"
    figures = out / "figures"
    say("1/6 draw: a small captioned dataset of coloured shapes")
    sentence, picture = draw_dataset(out / "data")
    say("2/6 extract: ResNet50 and DistilBERT with random weights: UNTRAINED encoders, as nothing is downloaded")
    _say_lines(workflows.extract(out / "data", out / "store.h5", config.extract, device=device, force=True))
    say("3/6 fit: projection heads on the cached features")
    run = workflows.fit(out / "store.h5", run_dir, config, device=device, force=True)
    say("4/6 evaluate")
    evaluation = workflows.evaluate(run)
    result = evaluation.result
    _print_evaluation(evaluation)
    say("5/6 search, both ways")
    for query, mode in ((sentence, "text2image"), (str(picture), "image2text")):
        click.echo(f"{mode}: {query}")
        options = {"mode": mode, "split": result["split"], "figure": figures / f"search-{mode}.png", "device": device}
        for hit in workflows.search(run, query, top_k=3, **options):
            click.echo(f"{hit.rank:3}  {hit.score:6.3f}  {hit.path if mode == 'text2image' else hit.captions[0]}")
    say("6/6 plot")
    workflows.plot(figures, run=run_dir)
    multimodal, guess = result["models"]["multimodal"], result["models"]["chance"]
    for direction, label in (("image_to_text", "image -> caption"), ("text_to_image", "caption -> image")):
        ratio = multimodal[direction]["R@1"] / guess[direction]["R@1"]
        click.echo(
            f"{label}: R@1 {multimodal[direction]['R@1']:.1f} %, {ratio:.0f} times chance, with untrained encoders"
        )
    done(
        f"wrote {out}: the store, the run, and the images in {figures}",
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
    """Opens what the caller closed of stdin, stdout and stderr, so that no other file takes its place.

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
