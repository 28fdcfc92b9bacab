"""Galleries of images or captions that a run was not fitted on: encoded into a store of their own, and embedded."""

import os
from dataclasses import replace
from pathlib import Path

from onceover.base.errors import OnceoverError
from onceover.base.progress import say
from onceover.configs.schema import ExtractConfig
from onceover.extract.dataset import Dataset
from onceover.extract.encoding.stored import located_encoder, repeated_settings
from onceover.extract.joined import is_joined
from onceover.extract.pipeline import extract
from onceover.extract.store import FeatureStore
from onceover.heads.checkpoint import Run
from onceover.heads.embed import image_embeddings, text_embeddings
from onceover.retrieval.embeddings import Embeddings
from onceover.retrieval.gallery import Gallery, gallery_of_store
from onceover.retrieval.hubness import bias_by_bank


class ForeignError(OnceoverError):
    """A store in the place of the features of new items that is not of these items."""


def foreign_gallery(
    run: Run,
    embeddings: Embeddings,
    dataset: Dataset,
    store_file: Path,
    *,
    rerank: str | None,
    device: str | None,
    encoders: dict[str, str | None],
    force: bool,
    retry_failures: bool,
    prune: bool,
    has_grown: bool = False,
) -> Gallery:
    """Encodes images alone, or captions alone, into the feature store ``store_file``, and embeds them by a run's heads.

    Args:
        embeddings: the run's. rerank: ``none`` or ``qbnorm``; None stands for the run's own.
        encoders: by kind, where an encoder is now, if it has moved.
        force, retry_failures, prune: as ``extract.pipeline.extract``.
        has_grown: the store holds only a part of these items, and may name another place of them.

    Raises:
        ForeignError: ``store_file`` is a link, holds features of the other kind, or of other items.
    """
    kind = "image" if dataset.ids else "text"
    _check_store(store_file, kind, dataset.root, force or has_grown)
    for note in dataset.notes:
        say(note)
    summary = extract(
        dataset,
        store_file,
        _extraction_of(run, kind, encoders),
        device=device,
        encoders={kind: run.encoder_loader(kind, encoders.get(kind))},
        check_encoder=run.check_encoder,
        force=force,
        retry_failures=retry_failures,
        keep_vanished=True,
        prune=prune,
    )
    summary.tell()
    with FeatureStore(summary.path) as store:
        run.check_encoder(kind, store.recipes[kind])
        if kind == "image":
            vectors = image_embeddings(run.heads, store.image_features)
        else:
            vectors = text_embeddings(run.heads, store.text_features)
        is_corrected = (rerank or embeddings.rerank) == "qbnorm"
        bias = bias_by_bank(embeddings, kind, vectors) if is_corrected else None
        gallery = gallery_of_store(store, kind, vectors, bias, embeddings.space)
    if kind == "text":
        return gallery
    root = dataset.root.resolve()
    return replace(gallery, paths=[str(root / path) for path in gallery.paths])


def _check_store(path: Path, kind: str, root: Path, force: bool) -> None:
    """Refuses to overwrite a store that is not of the items whose features are to be kept there.

    Args:
        kind: kind of the items: ``image`` or ``text``. root: their location. force: replace one of items elsewhere.

    Raises:
        ForeignError: it is a link, holds features of the other kind, or of other items.
    """
    if not os.path.lexists(path):
        return
    if path.is_symlink():
        raise ForeignError(f"{path} is a link, and features are to be kept there; move it elsewhere")
    with FeatureStore(path) as store:
        is_paired = len(store.image_ids) > 0 and len(store.captions) > 0
        holds_kind = len(store.image_ids if kind == "image" else store.captions) > 0
        is_of_others = store.provenance["data"] != str(root.resolve())
    if is_paired or not holds_kind:
        raise ForeignError(f"{path} is another feature store, and features are to be kept there; move it elsewhere")
    if is_of_others and not force:
        raise ForeignError(f"{path} holds features of other items than those in {root}; move it elsewhere, or --force")


def _extraction_of(run: Run, kind: str, encoders: dict[str, str | None]) -> ExtractConfig:
    """The settings that give other images or captions features like those the run was fitted on."""
    provenance = run.provenance
    specs = {name: encoders.get(name) or encoder["encoder"] for name, encoder in provenance["encoders"].items()}
    specs[kind] = located_encoder(kind, provenance["encoders"][kind], encoders.get(kind))
    recipe = provenance["recipes"][kind]
    return replace(
        ExtractConfig(**repeated_settings(provenance["extract"], provenance["recipes"]["text"])),
        image_encoder=specs["image"],
        text_encoder=specs["text"],
        seed=provenance["encoders"][kind]["seed"],
        dtype="float32" if is_joined(recipe) else recipe["dtype"],  # whose parts each have their own
        batch_size=None,
    )
