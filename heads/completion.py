"""Completes a fine-tuned run: extracts the features of its encoders, and writes the rest of a run."""

import os
from functools import partial
from pathlib import Path

from onceover.base.addresses import path_of
from onceover.base.files import only_writer
from onceover.base.formats import CONFIG, EMBEDDINGS, ENCODERS
from onceover.configs.schema import load_config
from onceover.extract.dataset import Dataset
from onceover.extract.dataset.reading import read_options
from onceover.extract.layouts import stored_images
from onceover.extract.pipeline import extract
from onceover.extract.store import KINDS, FeatureStore
from onceover.extract.summary import Summary
from onceover.heads import checkpoint, replacement
from onceover.heads.checkpoint import RunError
from onceover.heads.embed import embed, write_embeddings
from onceover.heads.finetune_export import check_encoder, read_finetuned
from onceover.retrieval.hubness import inherited_betas
from onceover.retrieval.metrics import quality


def complete(store: FeatureStore, data: str | Path, out: Path, device: str | None = None) -> Summary:
    """Extracts the features of the encoders that were fine-tuned in ``out``, and makes it a run like any other.

    Args:
        store: of the features before. data: the dataset.

    Raises:
        RunError: another store lies in ``out``.
    """
    force = _has_own_store(out)
    summary = extract(
        dataset_of(store, data),
        out / "store.h5",
        load_config(out / CONFIG).extract,
        device=device,
        reuse=store,
        tokenizer_files=store.tokenizer_files,
        check_encoder=partial(check_encoder, out),
        force=force,
    )
    with FeatureStore(out / "store.h5") as new:
        finish(new, out)
    return summary


def check_completion(store: FeatureStore, data: str | Path, out: Path) -> None:
    """Refuses, before anything is trained, what would keep the new encoders' features from being extracted.

    Raises:
        RunError: another store lies in ``out``, or images of ``store`` are not in ``data``.
    """
    if (out / CONFIG).is_file():
        _has_own_store(out)
    images = stored_images(store, data)
    missing = [path for path in store.image_paths if images.stat(path)[0] < 0]
    if missing:
        raise RunError(
            f"{len(missing):,} of the {len(store.image_paths):,} images of {store.path} are not in {data} (the first: "
            f"{missing[0]}); restore them, or name the dataset that the store was made of"
        )


def _has_own_store(out: Path) -> bool:
    """Whether ``store.h5`` in a fine-tuned run's folder is of its encoders, so that it may be replaced.

    Raises:
        RunError: it is a link, or another store that was copied there.
    """
    path = out / "store.h5"
    if not os.path.lexists(path):
        return False
    if not path.is_symlink():
        with FeatureStore(path) as store:
            specs = {store.provenance[kind]["encoder"] for kind in KINDS}
        config = load_config(out / CONFIG).extract
        own = f"{(out / ENCODERS).resolve()}{os.sep}"
        if any(own in spec for spec in specs):
            return True
        if specs == {config.image_encoder, config.text_encoder}:  # no epoch was better, and they are the run's before
            return False
    raise RunError(
        f"{path} is not a store of the encoders in {out}, and would be replaced by theirs; move it elsewhere"
    )


def finish(store: FeatureStore, folder: str | Path) -> dict:
    """Makes fine-tuned encoders and heads a run like any other, with a store of the new encoders' features.

    Args:
        folder: that ``finetune`` wrote.

    Returns:
        The run's provenance.

    Raises:
        RunError: the store's features are of other encoders.
    """
    folder = Path(folder)
    with only_writer(folder, "the run"):
        tuned = read_finetuned(folder)
        for kind in KINDS:
            check_encoder(folder, kind, store.recipes[kind])
        base = tuned["base"]
        heads = checkpoint.load_heads(folder, base | {"files": tuned["files"]})
        config = load_config(folder / CONFIG)
        space = checkpoint.save_heads(folder, heads, store.fingerprints)
        roles = store.roles()
        rsum = None
        inherited = None
        if config.training.refit:  # the validation images were trained on
            roles = roles.together()
            inherited = inherited_betas(base["betas"])
        else:
            rsum = quality(*embed(heads, store, roles.selection))["rsum"]
        with replacement.run_files(folder).file(EMBEDDINGS) as aside:
            betas = write_embeddings(store, heads, aside, roles, space, config.model.rerank, inherited)
        names = ("unfreeze", "encoders", "weights", "start", "device", "threads")
        provenance = base | {
            "request": tuned["request"],
            "space": space,
            "store": str(store.path.resolve()),
            "fingerprints": store.fingerprints,
            "recipes": store.recipes,
            "encoders": {kind: store.provenance[kind] for kind in KINDS},
            "extract": store.provenance["settings"],
            "betas": betas,
            "selection": base["selection"] | {"rsum": rsum},
            "epochs": [tuned["epochs"]],
            "best_epochs": [tuned["best_epoch"]],
            "seconds": tuned["seconds"],
            "versions": tuned["versions"],
            "finetune": {name: tuned[name] for name in names} | {"from": base["run"], "space": base["space"]},
        }
        provenance.pop("distilled", None)  # it is trained now
        checkpoint.save_provenance(folder, provenance)
    return checkpoint.read_provenance(folder)


def dataset_of(store: FeatureStore, data: str | Path) -> Dataset:
    """The dataset of exactly the images and captions of a store, in its order, to encode them again.

    Args:
        data: the dataset's folder.
    """
    at = path_of(data)
    return Dataset(
        root=at if at.is_dir() else at.parent,
        layout=store.provenance["layout"],
        ids=store.image_ids,
        paths=store.image_paths,
        splits=store.image_splits,
        captions=store.captions,
        image_index=store.image_index,
        failures=store.failures,
        notes=store.provenance["notes"],
        source=stored_images(store, at),
        named=at,
        reading=read_options(store.provenance.get("reading", {})),
    )
