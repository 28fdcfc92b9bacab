"""Fine-tunes layers of the encoders together with the heads, starting from a fitted run.

Linear probing, then fine-tuning (Kumar et al. 2022): the heads start from a fit on the frozen features, so that random
heads do not distort the encoders. The activations below the lowest unfrozen layer are computed once and cached
(``heads.towers``); a step then costs the unfrozen layers' forward and backward passes. BatchNorm keeps its statistics,
and the encoders' own dropout is off. The steps are in ``heads.finetune_loop``.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from onceover.base.files import digest, only_writer
from onceover.base.formats import FINETUNED, NEXT, PROVENANCE
from onceover.base.progress import muted, say
from onceover.configs.schema import FinetuneConfig
from onceover.extract.encoding.devices import log_device, native_bfloat16
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.stored import located_encoder
from onceover.extract.joined import is_joined
from onceover.extract.layouts import stored_images
from onceover.extract.store import KINDS, FeatureStore
from onceover.heads import checkpoint, replacement
from onceover.heads.checkpoint import Run, RunError
from onceover.heads.finetune_export import read_finetuned, save_finetuned, try_saving
from onceover.heads.finetune_loop import FinetuneError, Training
from onceover.heads.models import Ensemble
from onceover.heads.rows import captions_of
from onceover.heads.towers import CAPTIONS, ImageTower, TextTower, Tower, TunedTower
from onceover.heads.unfreeze import parse_unfreeze
from onceover.heads.workers import Workers


def finetune(
    store: FeatureStore,
    run: Run,
    data: str | Path,
    folder: str | Path,
    settings: FinetuneConfig,
    *,
    unfreeze: str = "image",
    cached: bool = True,
    activations: str | Path | None = None,
    encoders: Mapping[str, str | None] | None = None,
    device: str | torch.device = "cpu",
    force: bool = False,
) -> dict | None:
    """Fine-tunes a run's heads and encoders and writes them to ``folder``; continues an interrupted fine-tuning.

    Heads and encoders are those of the epoch with the best rsum on the validation images, the run as it was among
    them. A run that was fitted again on these images too is trained on all of them, and the last epoch counts.
    ``folder`` is no run yet: the new encoders' features are to be extracted (``dataset_of``), and ``finish``
    makes it one.

    Args:
        store: the features that ``run`` was fitted on.
        data: the dataset's folder, which has the images.
        unfreeze: which layers to unfreeze (``heads.unfreeze.parse_unfreeze``).
        cached: cache the activations below the lowest unfrozen layers in ``activations``, by default a folder of that
            name beside ``folder``. Without, every image is read and encoded whole in every epoch.
        encoders: by kind, where an encoder is now, if it has moved.
        device: ``cpu``, or a GPU.
        force: replace the run that is there.

    Returns:
        What ``finetune.json`` says: ``encoders`` (specs by kind), ``weights``, ``best_epoch``, ``rsum``, ``start``…
        Of several workers only the first one gets it.

    Raises:
        RunError: the run has several trained pairs, or is of other features or encoders; or the folder holds something
            else.
        FinetuneError: the loss is not finite. UnfreezeError: no such layers, or activations that cannot be cached.
    """
    folder = Path(folder)
    workers = Workers(torch.device(device))
    with contextlib.ExitStack() as stack:
        if not workers.leads:
            stack.enter_context(muted())
        if isinstance(run.heads, Ensemble):
            run = run.trained_pair()
            say("fine-tuning starts from the trained heads; the closed form beside them is left out")
        _check_run(store, run, folder)
        layers = parse_unfreeze(unfreeze)
        request = digest(
            {"settings": asdict(settings), "space": run.provenance["space"], "unfreeze": layers, "cached": cached}
        )
        if workers.leads:
            stack.enter_context(only_writer(folder, "the run"))
            _claim(folder, request, force)
        workers.wait()
        is_finished = (folder / PROVENANCE).exists() or (folder / FINETUNED).exists()
        if is_finished and not force:
            record = read_finetuned(folder)
            workers.leave()
            say(f"{folder} is fine-tuned with these settings already; --force trains again")
            return record if workers.leads else None
        if run.saw_validation:
            say(
                f"{run.folder} was fitted on the validation images as well, and is fine-tuned on them too: the last "
                "epoch counts (a run fitted with training.refit=false leaves them to choose the epoch by)"
            )
        work = folder / NEXT if is_finished else folder
        specs = _encoder_specs(run, encoders or {})
        towers = towers_of(store, run, data, settings, layers, specs, workers.device)
        if workers.leads:
            try_saving(work, towers, run)
        if cached:
            _cache_in_turn(towers, Path(activations or folder.parent / "activations"), workers)
        training = Training(store, run, towers, settings, workers)
        _train(training, work, request, workers)
        workers.leave()
        if not workers.leads:
            return None
        record = save_finetuned(work, folder, run, training, settings, specs, request, unfreeze)
        replacement.take_over(work, folder)
        return record


def _check_run(store: FeatureStore, run: Run, folder: Path) -> None:
    """Refuses a run that cannot be fine-tuned into a folder.

    Raises:
        RunError: it was fitted on other features, or on joined or imported ones; or it lies in that folder.
    """
    if run.provenance["fingerprints"] != store.fingerprints:
        raise RunError(
            f"{run.folder} was not fitted on the features of {store.path}; name the store that it was fitted on, "
            "or fit again"
        )
    if any(is_joined(recipe) for recipe in store.recipes.values()):
        raise RunError(
            f"{store.path} holds joined features of several encoders, and fine-tuning trains one image encoder and one "
            "text encoder; fit a run on one of the stores that were joined, and fine-tune that"
        )
    if any("encoder" in recipe for recipe in store.recipes.values()):  # imported, with the encoder named
        raise RunError(
            f"{store.path} holds imported features, and fine-tuning needs those that extract makes of the images "
            "themselves; extract the dataset with the same encoders, and fit a run on that store"
        )
    if folder.resolve() == run.folder.resolve():
        raise RunError(f"--out is {folder}, the run to start from; name a new folder")


def _claim(folder: Path, request: str, force: bool) -> None:
    """Checks that the folder is empty, or of this very request, and marks it as an unfinished run.

    Raises:
        RunError: it holds something else.
    """
    replacement.claim_folder(folder)
    if (folder / PROVENANCE).exists():
        if force or checkpoint.read_provenance(folder)["request"] != request:
            raise RunError(
                f"{folder} holds a finished run, which fine-tuning does not replace, since features of new encoders "
                "would still be missing; name another --out"
            )
        return
    work = replacement.working_folder(folder, force)
    if checkpoint.load_begun(work, request, force) is None:
        checkpoint.begin(work, {"request": request})


def _encoder_specs(run: Run, moved: Mapping[str, str | None]) -> dict[str, str]:
    """The specs of a run's encoders, by kind. ``moved``: where an encoder is now."""
    return {kind: located_encoder(kind, run.provenance["encoders"][kind], moved.get(kind)) for kind in KINDS}


def towers_of(
    store: FeatureStore,
    run: Run,
    data: str | Path,
    settings: FinetuneConfig,
    layers: Mapping[str, list[str]],
    specs: Mapping[str, str],
    device: torch.device,
) -> dict[str, Tower]:
    """Builds the two towers; an encoder is loaded only where some of its layers are unfrozen.

    Args:
        data: the dataset's folder.
        layers: to unfreeze, by kind. specs: of the encoders, by kind.

    Raises:
        RunError: an encoder is not the run's. FinetuneError: a dtype that the device does not have.
        UnfreezeError: no such layers.
    """
    if settings.dtype == "bfloat16" and not native_bfloat16(device):
        raise FinetuneError(f"{device} does not multiply in bfloat16 itself; set finetune.dtype to float32")
    bfloat16 = settings.dtype != "float32" and native_bfloat16(device)
    roles = store.roles()
    images = np.sort(np.concatenate([roles.train, roles.selection]))
    caption_size = max(1, min(CAPTIONS, settings.micro_batch * settings.captions_per_image))
    towers: dict[str, Tower] = {
        "image": Tower(store.image_features, settings.micro_batch, device),
        "text": Tower(store.text_features, caption_size, device),
    }
    for kind, names in layers.items():
        encoder = run.load_encoder(kind, specs[kind], str(device), plain=True)
        run.check_encoder(kind, encoder.recipe)
        tower: ImageTower | TextTower
        if isinstance(encoder, ImageEncoder):
            tower = ImageTower(
                store,
                stored_images(store, data),
                images,
                encoder,
                settings.micro_batch,
                bfloat16=bfloat16,
                layers=names,
                augment=settings.augment,
            )
        else:
            tower = TextTower(
                store,
                captions_of(store.image_index, images),
                encoder,
                caption_size,
                bfloat16=bfloat16,
                layers=names,
                word_dropout=settings.word_dropout,
            )
        if settings.checkpoint:
            tower.stages.checkpoint(tower.lowest)
        towers[kind] = tower
    return towers


def cache(towers: Mapping[str, Tower], folder: Path) -> None:
    """Caches the activations below the unfrozen layers of the towers in a folder."""
    for tower in towers.values():
        if isinstance(tower, TunedTower):
            tower.cache(folder)


def _cache_in_turn(towers: Mapping[str, Tower], folder: Path, workers: Workers) -> None:
    """Caches the activations in the first worker; then the others take its files."""
    if workers.leads:
        cache(towers, folder)
    workers.wait()
    if not workers.leads:
        cache(towers, folder)


def _train(training: Training, work: Path, request: str, workers: Workers) -> None:
    """Trains to the end, from the state in ``work`` if there is one, and saves it there now and then."""
    state = checkpoint.load_resume(work, request) or {}
    steps = training.loader.steps
    log_device(workers.device)
    if "epoch" in state:
        training.restore(state)
        say(f"going on in epoch {training.epoch + 1}, after {training.step} of its {steps} steps")
    counts = {}
    for kind, tower in training.towers.items():
        counts[kind] = sum(parameter.numel() for parameter in tower.unfrozen_parameters().values())
    say(
        f"fine-tuning on {workers.device}: {counts['image']:,} parameters of the image encoder and "
        f"{counts['text']:,} of the text encoder, with the heads; {steps} steps per epoch"
    )
    training.run(lambda state: checkpoint.save_resume(work, {"request": request} | state))
