"""What a file or folder of the project holds, as readable text."""

from collections import Counter
from pathlib import Path

import numpy as np
import yaml

from configs import OnceoverError
from configs.formats import CONFIG, CURRENT, EVALUATION, PROVENANCE
from extract.files import digest, read_json
from extract.store import FeatureStore, parts_folder
from retrieval.embeddings import model_name


class DescribeError(OnceoverError):
    """Neither a store nor a run nor an unfinished extraction."""


def describe(path: str | Path) -> str:
    """Readable lines about a feature store, a run, an index, or an unfinished extraction (``FILE.h5`` or its parts).

    Raises:
        DescribeError: none of these. StoreError: a damaged store.
    """
    path = Path(path)
    if (path / PROVENANCE).is_file():
        try:
            return _describe_run(path)
        except (KeyError, TypeError, OSError) as error:
            raise DescribeError(f"{path} is damaged, or of another format ({error}); fit again") from error
    galleries = [folder for folder in (path, path / "images", path / "captions") if (folder / CURRENT).is_file()]
    if galleries:
        return "\n".join(map(_describe_index, galleries))
    parts = path if path.name.endswith(".parts") else parts_folder(path)
    if parts.is_dir() and not path.is_file():
        return _describe_parts(parts)
    if path.is_dir():
        raise DescribeError(f"{path} is a folder, but no run; name a store's .h5 file or a run folder")
    with FeatureStore(path) as store:
        return _describe_store(store)


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
        f"  pictures    {len(store.image_ids):,}: "
        + ", ".join(f"{n:,} {split or 'in no split'}" for split, n in splits.items()),
        f"  captions    {len(store.captions):,}, {per_picture} a picture; "
        f"{int(store.truncated.sum()):,} cut at the encoder's maximum length",
    ]
    for kind, features, rows in (("image", image, "pictures"), ("text", text, "different captions")):
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
        f"  warning     the same picture lies in several splits: {', '.join(group)}"
        for group in store.duplicates_across_splits()
    ]
    failures = store.failures
    lines.append(f"  left out    {len(failures):,} records")
    lines += [f"    {failure.stage:<8} {failure.id}: {failure.reason}" for failure in failures]
    return "\n".join(lines)


def _describe_run(folder: Path) -> str:
    made = read_json(folder / PROVENANCE, "the run's provenance")
    settings = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    again = ", those that chose among them," if settings["training"]["refit"] else ""
    lines = [
        f"run {folder}",
        f"  store       {made['store']}",
        f"  encoders    {made['encoders']['image']['encoder']}, {made['encoders']['text']['encoder']}",
        "  model       " + ", ".join(f"{key} {value}" for key, value in settings["model"].items()),
        "  training    " + ", ".join(f"{key} {value}" for key, value in settings["training"].items()),
        f"  fitted on   {made['train_pictures']:,} pictures{again} in {made['seconds']:.0f} s "
        f"({made['device']}, {made['threads']} threads, torch {made['versions']['torch']})",
        f"  chosen on   {made['selection']['split']}, {made['selection']['pictures']:,} pictures: "
        f"rsum {made['selection']['rsum']:.1f}"
        + ("" if len(made["members"]) > 1 else f" at epoch {made['best_epochs'][0]} of {made['epochs'][0]}"),
        f"  report on   {made['report']['split']}, {made['report']['pictures']:,} pictures",
    ]
    if len(made["members"]) > 1:
        lines.insert(1, f"  ensemble    {len(made['members'])} pairs of heads; the settings are the first one's")
    for file in sorted(folder.glob(EVALUATION.format("*.json"))):
        result = read_json(file, "the evaluation")
        own = model_name(settings["model"]["rerank"])
        for direction in ("image_to_text", "text_to_image"):
            side = result["models"][own][direction]
            recalls = " / ".join(f"{side[f'R@{k}']:.1f}" for k in (1, 5, 10))
            lines.append(
                f"  {result['split']:<11} {own}, {direction.replace('_', ' ')}: R@1/5/10 {recalls}, "
                f"median rank {side['median_rank']:g} "
                f"({result['n_images']:,} pictures, {result['n_captions']:,} captions)"
            )
    return "\n".join(lines)


def _describe_index(folder: Path) -> str:
    from retrieval.index import Index  # with faiss

    made = Index(folder).manifest  # its files are checked
    segments = [f"{entry['name']} {entry['type']} {entry['rows']:,} rows" for entry in made["segments"]]
    buried = sum(entry["rows"] for entry in made["segments"]) - made["rows"]
    lines = [
        f"index {folder}",
        f"  holds       {made['rows']:,} {'pictures' if made['kind'] == 'image' else 'captions'} of {made['source']}, "
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
            todo = read_json(plan, "the plan")
            shards = len(list(parts.glob(f"{kind}-{digest(todo)[:12]}-*.h5")))
            total = -(-len(todo["todo"]) // todo["rows"])
            lines.append(f"  {kind:<11} {shards:,} of {total:,} shards done ({len(todo['todo']):,} rows in all)")
    return "\n".join([*lines, "  run the same extract command again to go on"])
