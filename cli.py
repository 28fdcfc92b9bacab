"""onceover's command line: options in, one call or a short chain of calls, what was written and what to run next.

Stages are imported when a command runs, so that ``--help`` answers at once. An error the user can mend is one line on
stderr and exit code 2 (the call is wrong) or 1 (the rest).
"""

import errno
import json
import sys
from pathlib import Path

import click

from configs import OnceoverError
from configs.schema import DEFAULT_CONFIG, Config, ConfigError, load_config

FILE = click.Path(path_type=Path)
DIRECTORY = click.Path(file_okay=False, path_type=Path)


class Main(click.Group):
    """A group that turns errors the user can mend into one line."""

    def invoke(self, ctx: click.Context):
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except OnceoverError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            click.echo(f"error: {_system_error(error)}", err=True)
            ctx.exit(1)


def _system_error(error: OSError) -> str:
    text = f"{error.filename}: {error.strerror}" if error.filename else str(error).splitlines()[0]
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error):
        return f"{text}; make room and run the same command again: what was finished is kept"
    return text


def say(message: str) -> None:
    """Progress and advice go to stderr; stdout is for results."""
    click.echo(message, err=True)


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


device_option = click.option("--device", help="cpu, cuda, cuda:1, mps. [default: the best one at hand]")
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
def cli() -> None:
    """Image-text retrieval: encode a dataset once, fit projection heads over and over.

    \b
    extract   pictures and captions -> feature store (once)
    fit       feature store -> projection heads and embeddings (seconds)
    evaluate, search, plot   from the stored files

    Start with: python cli.py demo
    """


@cli.command()
@click.option("--data", required=True, type=FILE, help="The dataset's folder, or its CSV file (image,caption[,split]).")
@click.option("--store", "store_file", required=True, type=FILE, help="The .h5 file to write.")
@click.option("--image-encoder", metavar="SPEC", help="torchvision:NAME[@WEIGHTS] or hf:NAME_OR_FOLDER.")
@click.option("--text-encoder", metavar="SPEC", help="hf:NAME_OR_FOLDER; add @random for untrained weights.")
@click.option(
    "--text-pooling", type=click.Choice(["mean", "cls"]), help="Mean over a caption's tokens, or the first one."
)
@click.option("--views", type=int, help="Cached views a picture: 1 plain, 2 and its mirror image, up to 10 with crops.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the encoders' arithmetic.")
@click.option("--batch-size", type=int, help="Pictures a forward pass. [default: chosen for the device]")
@click.option("--thumbnails/--no-thumbnails", default=None, help="Keep small JPEGs in the store, for figures.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N pictures.")
@click.option("--force", is_flag=True, help="Replace features of other encoders or settings in this store.")
@click.option("--retry-failures", is_flag=True, help="Try again the pictures that the ledger records as failed.")
@device_option
@config_options
def extract(data, store_file, limit, force, retry_failures, device, config_file, overrides, **explicit):
    """Encode a dataset of captioned pictures once into a feature store.

    Killed at any moment, it goes on where it stopped when run again; run again on a finished store, it encodes only
    what is new.
    """
    from extract.datasets import read_dataset
    from extract.pipeline import extract as run

    settings = [f"extract.{key}={json.dumps(value)}" for key, value in explicit.items() if value is not None]
    config = load_config(config_file, [*overrides, *settings]).extract
    if store_file.is_dir():
        raise ConfigError(f"{store_file} is a folder; --store names the .h5 file to write")
    dataset = read_dataset(data, config.seed)
    for note in dataset.notes:
        say(note)
    summary = run(
        dataset.first(limit), store_file, config, device=device, force=force, retry_failures=retry_failures, say=say
    )
    _say_summary(summary)
    done(
        f"wrote {store_file}" if not summary.up_to_date else f"{store_file} is up to date; nothing to encode",
        f"python cli.py fit --store {store_file} --run runs/first",
    )


def _say_summary(summary) -> None:
    from collections import Counter

    new, old = (", ".join(f"{n:,} {kind}" for kind, n in rows.items()) for rows in (summary.computed, summary.reused))
    took = f"; rows encoded: {new} in {summary.seconds:.0f} s; reused: {old}" if not summary.up_to_date else ""
    say(f"{summary.images:,} pictures, {summary.captions:,} captions{took}")
    if summary.truncated:
        say(f"{summary.truncated:,} captions are longer than the text encoder takes and were cut")
    for (stage, reason), count in Counter((f.stage, f.reason.partition(":")[0]) for f in summary.failures).items():
        example = next(f for f in summary.failures if (f.stage, f.reason.partition(":")[0]) == (stage, reason))
        say(f"left out: {count:,} at stage {stage}: {reason} (the first: {example.id}); python cli.py info lists them")
    for group in summary.duplicates[:3]:
        say(f"warning: the same picture lies in several splits: {', '.join(group)}")
    if len(summary.duplicates) > 3:
        say(f"warning: {len(summary.duplicates) - 3:,} more pictures lie in several splits")


@cli.command()
@click.option("--store", "store_file", required=True, type=FILE, help="A finished feature store.")
@click.option("--run", "run_dir", required=True, type=DIRECTORY, help="The folder to write.")
@click.option("--force", is_flag=True, help="Fit again, in the place of the run that is there.")
@device_option
@config_options
def fit(store_file, run_dir, force, device, config_file, overrides):
    """Fit projection heads on a feature store's train pictures.

    An interrupted fit goes on where it stopped when run again, to the same result.
    """
    config = load_config(config_file, overrides)
    provenance = _fit(store_file, run_dir, config, device, force)
    selection = provenance["selection"]
    say(
        f"best epoch {provenance['best_epoch']} of {provenance['epochs']}: rsum {selection['rsum']:.1f} on "
        f"{selection['pictures']:,} pictures ({selection['split']}), {provenance['seconds']:.0f} s"
    )
    done(f"wrote {run_dir}", f"python cli.py evaluate --run {run_dir}")


def _fit(store_file: Path, run_dir: Path, config: Config, device: str | None, force: bool = False) -> dict:
    from extract.store import FeatureStore

    with FeatureStore(store_file) as store:
        from extract.encoders import pick_device
        from heads.training import fit as run
        from retrieval.metrics import quality

        return run(store, run_dir, config, quality=quality, device=pick_device(device), force=force, say=say)


@cli.command()
@click.option("--run", "run_dir", required=True, type=DIRECTORY, help="A run folder, as fit writes it.")
@click.option("--split", help="train, select, dev or test. [default: the one to be reported on]")
@click.option("--store", "store_file", type=FILE, help="The run's feature store, if it has moved.")
@json_option
def evaluate(run_dir, split, store_file, json_to):
    """Recall@K, ranks and MRR of a run beside the unlearned baselines and chance, both ways.

    Prints a table and writes evaluation-SPLIT.md, .csv and .json into the run folder.
    """
    result = _evaluate(run_dir, split, store_file)
    if json_to == "-":
        click.echo(json.dumps(result, indent=2))
    else:
        _print_table(result)
        if json_to:
            from extract.files import write_json

            write_json(json_to, result)
    done(
        f"wrote {run_dir}/evaluation-{result['split']}.md, .csv and .json"
        + (f", {json_to}" if json_to not in (None, "-") else ""),
        f'python cli.py search --run {run_dir} --query "a dog playing in the park"',
    )


def _print_table(result: dict) -> None:
    from retrieval.evaluation import notes, terminal_table

    click.echo(terminal_table(result))
    for note in notes(result):
        say(note)


def _evaluate(run_dir: Path, split: str | None, store_file: Path | None = None) -> dict:
    from configs.formats import EMBEDDINGS, EVALUATION
    from extract.files import write_json, write_text
    from extract.store import FeatureStore
    from heads.checkpoint import read_provenance
    from retrieval import evaluation
    from retrieval.embeddings import read_embeddings

    provenance = read_provenance(run_dir)
    store_file = store_file or Path(provenance["store"])
    if not store_file.exists():
        raise ConfigError(f"{run_dir} was fitted on {store_file}, which is not there; name it: --store FILE.h5")
    with FeatureStore(store_file) as store:
        result = evaluation.evaluate(read_embeddings(run_dir / EMBEDDINGS), store, split)
    stem = EVALUATION.format(result["split"])
    write_text(run_dir / f"{stem}.md", evaluation.markdown_table(result))
    write_text(run_dir / f"{stem}.csv", evaluation.csv_table(result))
    write_json(run_dir / f"{stem}.json", result)
    return result


@cli.command()
@click.option("--run", "run_dir", required=True, type=DIRECTORY, help="A run folder, as fit writes it.")
@click.option("--query", required=True, help="A sentence (text2image), or the path of any picture (image2text).")
@click.option("--mode", type=click.Choice(["text2image", "image2text"]), default="text2image", show_default=True)
@click.option(
    "--top-k", "--top_k", "top_k", type=click.IntRange(min=1), default=5, show_default=True, help="Hits to show."
)
@click.option("--split", help="Search this split alone. [default: everything]")
@click.option("--json", "as_json", is_flag=True, help="JSON to stdout, and nothing else there.")
@click.option("--encoder", metavar="SPEC", help="Where the run's encoder of such queries is now, if it has moved.")
@click.option("--out", type=FILE, help="Draw the hits: a .png, .svg or .pdf file.")
@device_option
def search(run_dir, query, mode, top_k, split, as_json, out, encoder, device):
    """Find pictures by a sentence, or captions by a picture."""
    hits = _search(run_dir, query, mode, top_k, split, out, device, encoder)
    if as_json:
        click.echo(
            json.dumps(
                {"query": query, "mode": mode, "hits": [hit.to_dict() for hit in hits]}, indent=2, ensure_ascii=False
            )
        )
    else:
        for hit in hits:
            first = hit.captions[0] if hit.captions else "(no caption)"
            lines = (hit.path, first) if mode == "text2image" else (first, hit.path)
            click.echo(f"{hit.rank:3}  {hit.score:6.3f}  {lines[0]}\n             {lines[1]}")
    done(f"wrote {out}" if out else f"{len(hits)} hits", f"python cli.py plot --run {run_dir} --out figures")


def _search(
    run_dir: Path,
    query: str,
    mode: str,
    top_k: int,
    split: str | None = None,
    out: Path | None = None,
    device: str | None = None,
    encoder: str | None = None,
) -> list:
    from configs.formats import EMBEDDINGS
    from extract.pictures import read_picture
    from heads.checkpoint import load_run
    from retrieval.embeddings import read_embeddings
    from retrieval.search import Searcher, check_query

    check_query(query, mode)
    if mode == "image2text":
        read_picture(query)  # what is no picture is refused before an encoder is loaded
    run = load_run(run_dir)
    embeddings = read_embeddings(run_dir / EMBEDDINGS)
    embed_query = (_embed_text if mode == "text2image" else _embed_picture)(run, device, encoder)
    hits = Searcher(embeddings, embed_query, split).search(query, mode, top_k)
    if out:
        from analysis.plots import plot_hits

        plot_hits(hits, query, mode, embeddings.thumbnails, out)
    return hits


def _embed_text(run, device: str | None, spec: str | None):
    """A function from a sentence to its embedding: the run's text encoder, then its heads."""
    import torch

    from extract.encoders import text_encoder_of
    from heads.embed import text_embeddings

    made = run.provenance
    encoder = text_encoder_of(made["encoders"]["text"], made["extract"], run.tokenizer_files, device, spec)
    run.check_encoder("text", encoder.recipe)
    say(f"encoding the query with {spec or made['encoders']['text']['encoder']} on {encoder.device}")

    def embed_query(sentence: str):
        features, truncated = encoder.encode([sentence])
        if truncated[0]:
            say("the query is longer than the text encoder takes and was cut")
        return text_embeddings(run.heads, torch.from_numpy(features))[0]

    return embed_query


def _embed_picture(run, device: str | None, spec: str | None):
    """A function from a picture's path to its embedding: the run's image encoder, then its heads."""
    import torch

    from extract.encoders import image_encoder_of
    from extract.pictures import read_picture
    from heads.embed import image_embeddings

    made = run.provenance
    encoder = image_encoder_of(made["encoders"]["image"], made["extract"], device, spec)
    run.check_encoder("image", encoder.recipe)
    say(f"encoding the query with {spec or made['encoders']['image']['encoder']} on {encoder.device}")

    def embed_query(path: str):
        pixels = encoder.pixels(read_picture(path))
        return image_embeddings(run.heads, torch.from_numpy(encoder.encode(pixels[None])))[0]

    return embed_query


@cli.command()
@click.option("--run", "run_dir", type=DIRECTORY, help="Draw a run: t-SNE, PCA, similarity matrix, training, ranks.")
@click.option("--store", "store_file", type=FILE, help="Draw a feature store: PCA by split, spectrum.")
@click.option("--out", required=True, type=DIRECTORY, help="The folder for the figures, each as PNG and SVG.")
@click.option("--split", help="Whose pictures to draw. [default: the one to be reported on]")
def plot(run_dir, store_file, out, split):
    """Draw figures from stored files; no model is loaded."""
    if (run_dir is None) == (store_file is None):
        raise click.UsageError("name either --run or --store")
    if store_file and split:
        raise click.UsageError("--split goes with --run; a store is drawn whole, by split")
    written = _plot(run_dir, store_file, out, split)
    following = (
        f"python cli.py info {run_dir}" if run_dir else f"python cli.py fit --store {store_file} --run runs/first"
    )
    done(f"wrote {', '.join(path.name for path in written)} to {out}", following)


def _plot(run_dir: Path | None, store_file: Path | None, out: Path, split: str | None = None) -> list[Path]:
    from analysis.plots import plot_run, plot_store

    if run_dir:
        from heads.checkpoint import read_provenance

        read_provenance(run_dir)
        return plot_run(run_dir, out, split, step=lambda name: say(f"drawing {name}"))
    from extract.store import FeatureStore

    with FeatureStore(store_file) as store:
        return plot_store(store, out, step=lambda name: say(f"drawing {name}"))


@cli.command()
@click.argument("path", type=FILE, metavar="FILE_OR_DIR")
def info(path):
    """Describe a feature store, a run folder, or an unfinished extraction."""
    from analysis.describe import describe

    click.echo(describe(path))


@cli.command()
@click.argument("store_file", type=FILE, metavar="FILE.h5")
@click.option("--sample", type=click.IntRange(min=1), help="Encode N pictures and captions again and compare.")
@click.option("--image-encoder", metavar="SPEC", help="Where the image encoder is now, if it has moved.")
@click.option("--text-encoder", metavar="SPEC", help="Where the text encoder is now, if it has moved.")
@click.option("--data", type=DIRECTORY, help="The dataset's folder, if it has moved. (With --sample.)")
@device_option
def verify(store_file, sample, device, **places):
    """Check a feature store: structure, checksums, finite numbers; with --sample, the features themselves."""
    from extract.store import FeatureStore
    from extract.verify import verify_sample

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
    from extract.download import download_archives

    download_archives(name, folder, say)
    done(f"wrote {folder}", f"python cli.py extract --data {folder} --store {folder}.h5")


@cli.command()
@click.option("--out", type=DIRECTORY, default=Path("demo"), show_default=True, help="The folder to write.")
@device_option
def demo(out, device):
    """Everything end to end, offline: draw a dataset, encode, fit, evaluate, search, plot.

    The encoders are untrained (random weights), since none may be downloaded: the heads learn from random features.
    """
    from extract.datasets import read_dataset
    from extract.pipeline import extract as encode
    from extract.synthetic import draw_dataset

    config = load_config(DEFAULT_CONFIG.with_name("demo.yaml"))
    data, store_file, run_dir, figures = out / "data", out / "store.h5", out / "run", out / "figures"
    say("1/6 draw: a small captioned dataset of coloured shapes")
    sentence, picture = draw_dataset(data)
    say("2/6 extract: ResNet50 and DistilBERT with random weights: UNTRAINED encoders, as nothing is downloaded")
    summary = encode(read_dataset(data), store_file, config.extract, device=device, force=True, say=say)
    _say_summary(summary)
    say("3/6 fit: projection heads on the cached features")
    _fit(store_file, run_dir, config, device, force=True)
    say("4/6 evaluate")
    result = _evaluate(run_dir, None)
    _print_table(result)
    say("5/6 search, both ways")
    for query, mode in ((sentence, "text2image"), (str(picture), "image2text")):
        click.echo(f"{mode}: {query}")
        for hit in _search(run_dir, query, mode, 3, result["split"], figures / f"search-{mode}.png", device):
            click.echo(f"{hit.rank:3}  {hit.score:6.3f}  {hit.path if mode == 'text2image' else hit.captions[0]}")
    say("6/6 plot")
    _plot(run_dir, None, figures)
    multimodal, guess = result["models"]["multimodal"], result["models"]["chance"]
    for direction, label in (("image_to_text", "picture -> caption"), ("text_to_image", "caption -> picture")):
        ratio = multimodal[direction]["R@1"] / guess[direction]["R@1"]
        click.echo(
            f"{label}: R@1 {multimodal[direction]['R@1']:.1f} %, {ratio:.0f} times chance, with untrained encoders"
        )
    done(
        f"wrote {out}: the store, the run, and the pictures in {figures}",
        "python cli.py download flickr8k --to data/flickr8k   (real photographs)",
    )


if __name__ == "__main__":
    cli(prog_name="python cli.py")
