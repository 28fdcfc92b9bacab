"""What a file or folder of the project holds, as readable text."""

from collections import Counter
from pathlib import Path

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.base.files import check_regular, read_record
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
from onceover.configs.schema import ConfigError, load_config
from onceover.extract.plan import shards_of
from onceover.extract.store import FeatureStore, parts_folder
from onceover.retrieval.embeddings import model_name


class DescribeError(OnceoverError):
    """Nothing that this program makes, or something of it that is damaged."""


def describe(path: str | Path) -> str:
    """Readable lines about a store, a run, a sweep or an index, or about what is unfinished of one.

    Raises:
        DescribeError: none of these, or damaged; and what a store or an index raises itself.
    """
    path = Path(path)
    try:
        return _describe(path)
    except Exception as error:  # what a damaged file makes of any of the lines
        if isinstance(error, OnceoverError) and not isinstance(error, ConfigError):
            raise
        reason = next(iter(str(error).splitlines()), "")
        raise DescribeError(
            f"{path} is damaged, or of another format ({type(error).__name__}: {reason}); make it again"
        ) from error


def _describe(path: Path) -> str:
    if path.is_dir():
        return _describe_folder(path)
    parts = parts_folder(path)
    if parts.is_dir() and not path.exists():
        return _describe_parts(parts)
    check_regular(path)
    with FeatureStore(path) as store:
        return _describe_store(store)


def _describe_folder(path: Path) -> str:
    """A folder, by the first file in it that tells what it is."""
    kinds = {PROVENANCE: _describe_run, FINETUNED: _describe_finetuning, RESUME: _describe_fit, SWEEP: _describe_sweep}
    for name, describe_it in kinds.items():
        if (path / name).is_file():
            return describe_it(path)
    galleries = [folder for folder in (path, path / "images", path / "captions") if (folder / CURRENT).is_file()]
    if galleries:
        return "\n".join(map(_describe_index, galleries))
    if path.name.endswith(".parts"):
        return _describe_parts(path)
    parts = [folder for folder in (path / "images.h5.parts", path / "captions.h5.parts") if folder.is_dir()]
    if parts:
        return "\n".join([f"unfinished index {path}", *map(_describe_parts, parts)])
    raise DescribeError(f"{path} is a folder, but no run, sweep or index; name a store's .h5 file or a run folder")


def _describe_fit(folder: Path) -> str:
    return f"unfinished fit {folder}\n  run the same fit command again to go on"


def _describe_finetuning(folder: Path) -> str:
    made = read_record(folder / FINETUNED, "what fine-tuning made", strict=False)
    return "\n".join(
        [
            f"unfinished fine-tuning {folder}",
            f"  encoders    {_text(made['encoders'], 'image')}, {_text(made['encoders'], 'text')}: trained",
            "  features    none of these encoders yet",
            "  run the same finetune command again with --re-extract to go on",
        ]
    )


def _describe_sweep(folder: Path) -> str:
    made = read_record(folder / SWEEP, "the sweep", strict=False)
    trials = len(list((folder / TRIALS).glob("*.json")))
    is_finished = (folder / RESULTS).is_file()
    return "\n".join(
        [
            f"{'sweep' if is_finished else 'unfinished sweep'} {folder}",
            f"  store       {_text(made, 'store')}",
            f"  trials      {trials:,} ended",
            f"  results     {folder / RESULTS}" if is_finished else "  run the same sweep command again to go on",
        ]
    )


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
    made = store.provenance
    image, text = store.image_features, store.text_features
    splits = Counter(store.image_splits)
    per_picture = "0"
    if store.image_ids:
        counts = np.bincount(store.image_index, minlength=len(store.image_ids))
        per_picture = f"{counts.min()} to {counts.max()}"
    lines = [
        f"feature store {store.path} ({store.path.stat().st_size / 2**20:,.1f} MiB)",
        f"  made        {made['created']} from {made['data']} ({made['layout']} layout)",
        f"  images    {len(store.image_ids):,}: "
        + ", ".join(f"{n:,} {split or 'in no split'}" for split, n in splits.items()),
        f"  captions    {len(store.captions):,}, {per_picture} an image; "
        f"{int(store.truncated.sum()):,} cut at the encoder's maximum length",
    ]
    for kind, features, rows in (("image", image, "images"), ("text", text, "different captions")):
        if not store.recipes[kind]:
            lines.append(f"  {kind:<11} none")
            continue
        how = made[kind]
        shape = " x ".join(f"{side:,}" for side in features.shape)
        size, views = features.nbytes / 2**20, features.shape[1] if kind == "image" else 1
        each = f"; {views} views of {size / views:,.1f} MiB" if views > 1 else ""
        pace = f"{how['rows_per_second']:,} {rows} a second, " if "rows_per_second" in how else ""
        lines += [
            f"  {kind:<11} {how['encoder']}, {shape} {features.dtype} ({size:,.1f} MiB{each})",
            f"              fingerprint {store.fingerprints[kind][:16]}, "
            f"weights {store.recipes[kind]['weights'][:16]}, pooling: {store.recipes[kind]['pooling']}, "
            f"layers: {', '.join(map(str, store.recipes[kind].get('layers', ['unknown'])))}, "
            f"arithmetic {store.recipes[kind]['dtype']}",
            f"              imported from {how['source']}"
            if "source" in how
            else f"              on {how['device']}, {how['streams']} batches of {how['batch_size']} at a time, "
            f"{pace}torch {how['torch']}, transformers {how['transformers']}",
        ]
    thumbnails = store.thumbnails()
    size = f"{sum(map(len, thumbnails)) / 2**20:,.1f} MiB" if thumbnails is not None else "none"
    lines += [f"  thumbnails  {size}", f"  dataset     fingerprint {store.fingerprints['dataset'][:16]}"]
    lines += [f"  note        {note}" for note in made["notes"]]
    lines += [
        f"  warning     the same image lies in several splits: {', '.join(group)}"
        for group in store.duplicates_across_splits()
    ]
    failures = store.failures
    lines.append(f"  left out    {len(failures):,} records")
    lines += [f"    {failure.stage:<8} {failure.id}: {failure.reason}" for failure in failures]
    return "\n".join(lines)


def _describe_run(folder: Path) -> str:
    made = read_record(folder / PROVENANCE, "the run's provenance", strict=False)
    settings = load_config(folder / CONFIG).to_dict()
    again = ", those that chose among them," if settings["training"]["refit"] else ""
    lines = [
        f"run {folder}",
        f"  store       {_text(made, 'store')}",
        f"  encoders    {_text(made['encoders']['image'], 'encoder')}, {_text(made['encoders']['text'], 'encoder')}",
        "  model       " + ", ".join(f"{key} {value}" for key, value in settings["model"].items()),
        "  training    " + ", ".join(f"{key} {value}" for key, value in settings["training"].items()),
        f"  fitted on   {_count(made, 'train_pictures'):,} images{again} in {made['seconds']:.0f} s "
        f"({_text(made, 'device')}, {_count(made, 'threads')} threads, torch {_text(made['versions'], 'torch')})",
        f"  chosen on   {_text(made['selection'], 'split')}, {_count(made['selection'], 'pictures'):,} images: "
        f"rsum {made['selection']['rsum']:.1f}"
        + ("" if len(made["members"]) > 1 else f" at epoch {made['best_epochs'][0]:d} of {made['epochs'][0]:d}"),
        f"  report on   {_text(made['report'], 'split')}, {_count(made['report'], 'pictures'):,} images",
    ]
    if len(made["members"]) > 1:
        lines.insert(1, f"  ensemble    {len(made['members'])} pairs of heads; the settings are the first one's")
    for file in sorted(folder.glob(EVALUATION.format("*.json"))):
        result = read_record(file, "the evaluation", strict=False)
        own = model_name(settings["model"]["rerank"])
        for direction in ("image_to_text", "text_to_image"):
            side = result["models"][own][direction]
            recalls = " / ".join(f"{side[f'R@{k}']:.1f}" for k in (1, 5, 10))
            lines.append(
                f"  {_text(result, 'split'):<11} {own}, {direction.replace('_', ' ')}: R@1/5/10 {recalls}, "
                f"median rank {side['median_rank']:g} "
                f"({result['n_images']:,} images, {result['n_captions']:,} captions)"
            )
    return "\n".join(lines)


def _describe_index(folder: Path) -> str:
    from onceover.retrieval.index import Index  # with faiss

    made = Index(folder).manifest  # its files are checked
    segments = [f"{entry['name']} {entry['type']} {entry['rows']:,} rows" for entry in made["segments"]]
    buried = sum(entry["rows"] for entry in made["segments"]) - made["rows"]
    lines = [
        f"index {folder}",
        f"  holds       {made['rows']:,} {'images' if made['kind'] == 'image' else 'captions'} of {made['source']}, "
        f"{made['dim']:,} numbers each" + (", corrected for hubs" if made["biased"] else ""),
        f"  run         {made['run']}",
        f"  type        {made['type']} ({made['reason']})",
        f"  segments    {len(segments):,}: {', '.join(segments)}",
        f"  removed     {buried:,} rows wait for --compact",
        f"  recall@10   {made['recall@10']:.3f} against exact search with {made['probes']:,} queries of the other kind,"
        f" {made['queries_per_second']:,.0f} queries a second one by one",
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
