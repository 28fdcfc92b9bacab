"""Describes a file or folder of the project as readable text: a store, a run, a sweep, an index."""

from collections import Counter
from pathlib import Path

import numpy as np

from onceover.base.addresses import is_address
from onceover.base.errors import OnceoverError
from onceover.base.files import check_regular, digest, read_record
from onceover.base.formats import (
    CONFIG,
    CURRENT,
    EVALUATION,
    FINETUNED,
    PROVENANCE,
    RESULTS,
    RESUME,
    SWEEP,
    TRIALS,
)
from onceover.base.hdf5 import RowsOnDisk
from onceover.configs.schema import ConfigError, load_config
from onceover.extract.joined import is_joined
from onceover.extract.plan import batch_rows, shards_of
from onceover.extract.store import FeatureStore, named_store, parts_folder, store_exists
from onceover.extract.unknown import unknown_of
from onceover.retrieval.embeddings import model_name
from onceover.retrieval.hubness import correction_text
from onceover.retrieval.metrics import DIRECTIONS, RECALL_AT, rsum_text


class DescribeError(OnceoverError):
    """A file or folder that this program did not write, or that is damaged."""


def describe(path: str | Path) -> str:
    """Describes a store, a run, a sweep or an index, or an unfinished one of these, in readable lines.

    Raises:
        DescribeError: none of these, or damaged; and the errors of a store or an index.
    """
    path = named_store(path)
    try:
        return _describe(path)
    except Exception as error:  # a damaged file makes errors of many kinds
        if isinstance(error, OnceoverError) and not isinstance(error, ConfigError):
            raise
        reason = next(iter(str(error).splitlines()), "")
        raise DescribeError(
            f"{path} is damaged, or of another format ({type(error).__name__}: {reason}); make it again"
        ) from error


def _describe(path: Path) -> str:
    if is_address(path):
        with FeatureStore(path) as store:
            return _describe_store(store)
    if path.is_dir():
        return _describe_folder(path)
    parts = parts_folder(path)
    if parts.is_dir() and not path.exists():
        return _describe_parts(parts)
    check_regular(path)
    with FeatureStore(path) as store:
        return _describe_store(store)


def _describe_folder(path: Path) -> str:
    """Describes a folder, by the first file in it that tells its kind."""
    kinds = {PROVENANCE: _describe_run, FINETUNED: _describe_finetuning, RESUME: _describe_fit, SWEEP: _describe_sweep}
    if store_exists(path):
        with FeatureStore(path) as store:
            return _describe_store(store)
    for name, describe_it in kinds.items():
        if (path / name).is_file():
            return describe_it(path)
    galleries = [folder for folder in (path, path / "images", path / "captions") if (folder / CURRENT).is_file()]
    if galleries:
        return "\n".join(map(_describe_index, galleries))
    if path.name.endswith(".parts"):
        return _describe_parts(path)
    if parts_folder(path).is_dir():
        return _describe_parts(parts_folder(path))
    parts = [folder for folder in (path / "images.h5.parts", path / "captions.h5.parts") if folder.is_dir()]
    if parts:
        return "\n".join([f"unfinished index {path}", *map(_describe_parts, parts)])
    raise DescribeError(f"{path} is a folder, but no store, run, sweep or index; name one of these")


def _describe_fit(folder: Path) -> str:
    return f"unfinished fit {folder}\n  run the same fit command again to go on"


def _describe_finetuning(folder: Path) -> str:
    record = read_record(folder / FINETUNED, "what fine-tuning made", strict=False)
    encoders = record["encoders"]
    return "\n".join(
        [
            f"unfinished fine-tuning {folder}",
            f"  encoders    {_text(encoders, 'image')}, {_text(encoders, 'text')}: trained",
            "  features    none of these encoders yet",
            "  run the same finetune command again with --re-extract to go on",
        ]
    )


def _describe_sweep(folder: Path) -> str:
    record = read_record(folder / SWEEP, "the sweep", strict=False)
    trials = len(list((folder / TRIALS).glob("*.json")))
    title = f"unfinished sweep {folder}"
    last = "  run the same sweep command again to go on"
    if (folder / RESULTS).is_file():
        title = f"sweep {folder}"
        last = f"  results     {folder / RESULTS}"
    return "\n".join([title, f"  store       {_text(record, 'store')}", f"  trials      {trials:,} ended", last])


def _text(record: dict, name: str) -> str:
    """A value that has to be text."""
    if not isinstance(record[name], str):
        raise TypeError(f"{name} is no text")
    return record[name]


def _count(record: dict, name: str) -> int:
    """A value that has to be a whole number."""
    if type(record[name]) is not int:
        raise TypeError(f"{name} is no whole number")
    return record[name]


def _describe_store(store: FeatureStore) -> str:
    provenance = store.provenance
    lines = [
        f"feature store {store.path} ({_files(store)}{store.nbytes / 2**20:,.1f} MiB)",
        f"  made        {provenance['created']} from {provenance['data']} ({provenance['layout']} layout)",
        *(f"  joined from {path}" for path in provenance.get("joined", {}).get("stores", ())),
        *_dataset_lines(store),
        *_feature_lines(store, "image"),
        *_feature_lines(store, "text"),
    ]
    thumbnails = store.thumbnails()
    size = "none"
    if thumbnails is not None and store.shards is not None:
        size = "in the shards"
    elif thumbnails is not None:
        size = f"{sum(map(len, thumbnails)) / 2**20:,.1f} MiB"
    lines.append(f"  thumbnails  {size}")
    lines.append(f"  dataset     fingerprint {store.fingerprints['dataset'][:16]}")
    lines += [f"  note        {note}" for note in provenance["notes"]]
    for group in store.duplicates_across_splits():
        lines.append(f"  warning     the same image lies in several splits: {', '.join(group)}")
    failures = store.failures
    lines.append(f"  left out    {len(failures):,} records")
    lines += [f"    {failure.stage:<8} {failure.id}: {failure.reason}" for failure in failures]
    return "\n".join(lines)


def _files(store: FeatureStore) -> str:
    """How many shards a store has that is a folder."""
    return "" if store.shards is None else f"a folder of {len(store.shards):,} shards, "


def _dataset_lines(store: FeatureStore) -> list[str]:
    """The numbers of images by split, and of captions by image."""
    splits = [f"{count:,} {split or 'in no split'}" for split, count in Counter(store.image_splits).items()]
    per_image = "0"
    images = len(store.image_features)
    if images:
        counts = np.bincount(store.image_index, minlength=images)
        per_image = f"{counts.min()} to {counts.max()}" if counts.min() < counts.max() else f"{counts.max()}"
    unknown = unknown_of(store)
    lines = [
        f"  images      {images:,}: {', '.join(splits)}",
        f"  captions    {len(store.text_features):,}, {per_image} an image; "
        f"{int(store.truncated.sum()):,} cut at the encoder's maximum length",
        f"              {unknown or 'unknown tokens were not counted'}",
    ]
    warning = unknown and unknown.warning()
    if warning:
        lines.append(f"  warning     {warning}")
    return lines


def _feature_lines(store: FeatureStore, kind: str) -> list[str]:
    """The encoder of a kind of features, their shape, their recipe and the machine that computed them."""
    recipe = store.recipes[kind]
    if not recipe:
        return [f"  {kind:<11} none"]
    record = store.provenance[kind]
    features = store.features(kind)
    shape = " x ".join(f"{length:,}" for length in features.shape)
    lines = [f"  {kind:<11} {record['encoder']}, {shape} {features.dtype} ({_size(features, kind)})"]
    if not is_joined(recipe):
        return [*lines, *_encoder_lines(recipe, record, store.fingerprints[kind], kind)]
    lines.append(f"              fingerprint {store.fingerprints[kind][:16]}, joined from:")
    for part, own in zip(recipe["parts"], record["parts"], strict=True):
        lines.append(f"            - {own['encoder']}, {own['dim']:,} numbers")
        lines += _encoder_lines(part, own, digest(part), kind)
    return lines


def _encoder_lines(recipe: dict, record: dict, fingerprint: str, kind: str) -> list[str]:
    """The recipe of one encoder's features, and the machine that computed them."""
    own = recipe.get("encoder", recipe)
    layers = ", ".join(map(str, own.get("layers", ["unknown"])))
    return [
        f"              fingerprint {fingerprint[:16]}, weights {own['weights'][:16]}, "
        f"pooling: {own['pooling']}, layers: {layers}, arithmetic {recipe['dtype']}",
        f"              {_computed_by(record, kind)}",
        f"              {_findings(record.get('check'), kind)}",
    ]


def _size(features: RowsOnDisk, kind: str) -> str:
    """The size of features in MiB, and that of each view where there are several."""
    size = features.nbytes / 2**20
    text = f"{size:,.1f} MiB"
    if kind == "image" and features.shape[1] > 1:
        views = features.shape[1]
        text += f"; {views} views of {size / views:,.1f} MiB"
    return text


def _computed_by(record: dict, kind: str) -> str:
    """The source of imported features, or the device, batches, speed and libraries of an extraction."""
    if "source" in record:
        return f"imported from {record['source']}"
    pace = ""
    if "rows_per_second" in record:
        rows = {"image": "images", "text": "different captions"}[kind]
        pace = f"{record['rows_per_second']:,} {rows} a second, "
    means = "".join(f"{name} {record[name]}, " for name in ("engine", "backend") if name in record)
    batches = "1 batch" if record["streams"] == 1 else f"{record['streams']} batches"
    return (
        f"on {record['device']}, {means}{batches} of {batch_rows(kind, record['batch_size'])} at a time, "
        f"{pace}torch {record['torch']}, transformers {record['transformers']}"
    )


def _findings(check: dict | None, kind: str) -> str:
    """The findings of an encoder's check (``extract.encoder_checks``)."""
    if check is None:
        return "not checked, as stores of earlier versions and imported ones are not"
    inputs = {"image": "images of two other shapes", "text": f"the longest caption, {check.get('longest')} tokens,"}
    batched = f"alone and in a batch to {check['difference']:.0e} of the spread"
    if not check["difference"]:
        batched = "as do alone and in a batch"
    return (
        f"checked: two passes agree to the bit, {batched} ({check['dtype']}), {inputs[kind]} went through; "
        f"{check['passes']} passes in {check['seconds']:.1f} s"
    )


def run_settings(folder: Path, run: dict) -> dict[str, dict]:
    """The settings of a run by section, with the batch size and the number of epochs that were chosen.

    ``run``: its provenance, which has none of them where an earlier version fitted it.
    """
    settings = load_config(folder / CONFIG).to_dict()
    settings["training"] |= run.get("schedule", {})
    return settings


def _describe_run(folder: Path) -> str:
    run = read_record(folder / PROVENANCE, "the run's provenance", strict=False)
    settings = run_settings(folder, run)
    encoders = run["encoders"]
    chosen = run["selection"]
    also = ", those that chose among them," if settings["training"]["refit"] else ""
    lines = [f"run folder {folder}"]
    epoch = ""
    trained = len(run["epochs"])
    if "distilled" in run:
        lines.append(f"  distilled   in closed form of {_text(run, 'distilled')}; the training is that one's")
        epoch = " (of that one)" if settings["training"]["refit"] else ""
    elif trained > 1:
        lines.append(f"  ensemble    {len(run['members'])} pairs of heads; the settings are the first one's")
    else:
        epoch = f" at epoch {run['best_epochs'][0]:d} of {run['epochs'][0]:d}"
        for member in run["members"][trained:]:
            lines.append(
                f"  heads       one trained pair, and one in closed form with a weight of {member['weight']:g}"
            )
    threads = "1 thread" if _count(run, "threads") == 1 else f"{run['threads']} threads"
    lines += [
        f"  store       {_text(run, 'store')}",
        f"  encoders    {_text(encoders['image'], 'encoder')}, {_text(encoders['text'], 'encoder')}",
        f"  searched    {sum(member['embedding_dim'] for member in run['members']):,} dimensions; correction for hubs: "
        f"{correction_text(settings['model']['rerank'], run.get('betas', {}))}",
        "  model       " + ", ".join(f"{key} {value}" for key, value in settings["model"].items()),
        "  training    " + ", ".join(f"{key} {value}" for key, value in settings["training"].items()),
        f"  fitted on   {_count(run, 'train_pictures'):,} images{also} in {run['seconds']:.0f} s "
        f"({_text(run, 'device')}, {threads}, torch {_text(run['versions'], 'torch')})",
        f"  chosen on   {_text(chosen, 'split')}, {_count(chosen, 'pictures'):,} images: "
        f"{rsum_text(chosen['rsum'])}{epoch}",
        f"  report on   {_text(run['report'], 'split')}, {_count(run['report'], 'pictures'):,} images",
    ]
    for file in sorted(folder.glob(EVALUATION.format("*.json"))):
        lines += _evaluation_lines(file, model_name(settings["model"]["rerank"]), _text(run, "space"))
    return "\n".join(lines)


def _evaluation_lines(file: Path, model: str, space: str) -> list[str]:
    """The recalls of a run's own model in an evaluation, which is of the run with this space."""
    result = read_record(file, "the evaluation", strict=False)
    if result.get("space", space) != space:
        return [f"  {file.name} is of another run, and is not shown"]
    split = _text(result, "split")
    sizes = f"{result['n_images']:,} images, {result['n_captions']:,} captions"
    lines = []
    for direction in DIRECTIONS:
        numbers = result["models"][model][direction]
        recalls = " / ".join(f"{numbers[f'R@{k}']:.1f}" for k in RECALL_AT)
        lines.append(
            f"  {split:<11} {model}, {direction.replace('_', ' ')}: R@1/5/10 {recalls}, "
            f"median rank {numbers['median_rank']:g} ({sizes})"
        )
    return lines


def _describe_index(folder: Path) -> str:
    from onceover.retrieval.index import Index  # with faiss

    manifest = Index(folder).manifest  # its files are checked
    segments = [f"{entry['name']} {entry['type']} {entry['rows']:,} rows" for entry in manifest["segments"]]
    buried = sum(entry["rows"] for entry in manifest["segments"]) - manifest["rows"]
    noun = "images" if manifest["kind"] == "image" else "captions"
    corrected = ", corrected for hubs" if manifest["biased"] else ""
    lines = [
        f"index {folder}",
        f"  holds       {manifest['rows']:,} {noun} of {manifest['source']}, "
        f"{manifest['dim']:,} numbers each{corrected}",
        f"  run         {manifest['run']}",
        f"  type        {manifest['type']} ({manifest['reason']})",
        f"  segments    {len(segments):,}: {', '.join(segments)}",
        f"  removed     {buried:,} rows wait for --compact",
        f"  recall@10   {manifest['recall@10']:.3f} against exact search with {manifest['probes']:,} queries of the "
        f"other kind, {manifest['queries_per_second']:,.0f} queries a second one by one",
    ]
    return "\n".join(lines)


def _describe_parts(parts: Path) -> str:
    lines = [f"unfinished extraction {parts}"]
    for kind in ("image", "text"):
        plan = parts / f"{kind}.plan.json"
        if plan.exists():
            shards = shards_of(read_record(plan, "the plan"), kind, parts)
            done = sum(shard.file.exists() for shard in shards)
            rows = sum(shard.size for shard in shards)
            lines.append(f"  {kind:<11} {done:,} of {len(shards):,} shards done ({rows:,} rows in all)")
    return "\n".join([*lines, "  run the same extract command again to go on"])
