"""What was run: the data, the encoders, the settings, and what made them."""

from collections import Counter
from pathlib import Path
from typing import Any

from onceover import __version__
from onceover.analysis.describe import describe, run_settings
from onceover.analysis.report.files import ReportFiles
from onceover.base.errors import OnceoverError
from onceover.base.formats import CONFIG
from onceover.configs.schema import load_config
from onceover.extract.store import SELECTION
from onceover.retrieval.hubness import correction_text


def overview(files: ReportFiles) -> dict[str, Any]:
    """Facts about the run by name."""
    provenance = files.provenance
    embeddings = files.run.embeddings
    counts = Counter(embeddings.splits)
    splits = ", ".join(f"{count:,} {split or 'in no split'}" for split, count in sorted(counts.items()))
    facts = {
        "images": f"{len(embeddings.ids):,}: {splits}",
        "captions": f"{len(embeddings.captions):,}",
        "image encoder": str(provenance["encoders"]["image"]["encoder"]),
        "text encoder": str(provenance["encoders"]["text"]["encoder"]),
        "heads": _heads(provenance, embeddings.images.shape[1]),
        "fitted on": f"{provenance['train_pictures']:,} images",
        "chosen on": _chosen_on(provenance, load_config(files.run.folder / CONFIG).training.refit),
        "to be reported on": embeddings.report_split,
        "correction for hubs": correction_text(embeddings.rerank, embeddings.betas),
        "feature store": str(provenance["store"]),
        "versions": ", ".join(f"{name} {value}" for name, value in provenance["versions"].items()),
        "report by": f"onceover {__version__}",
    }
    if not isinstance(files.store, str):
        made = files.store.provenance
        facts = {"data": f"{made['data']} ({made['layout']} layout), encoded {made['created']}"} | facts
    return {"facts": facts, "note": files.store if isinstance(files.store, str) else None}


def details(files: ReportFiles) -> dict[str, Any]:
    """The settings by section, fingerprints, and what ``onceover info`` prints of the run and its store."""
    run = files.run
    settings = run_settings(run.folder, files.provenance)
    folded = {f"Settings: {name}": settings[name] for name in ("model", "training")}
    described = {"the run": _described(run.folder)}
    if not isinstance(files.store, str):
        folded = {"Settings: extract": files.store.provenance.get("settings", {})} | folded
        described["its feature store"] = _described(files.store.path)
    fingerprints = {"space of the embeddings": run.embeddings.space}
    for kind, value in run.embeddings.fingerprints.items():
        fingerprints[f"{kind} fingerprint"] = value
    return {"folded": folded | {"Fingerprints": fingerprints}, "described": described}


def _described(path: Path) -> str:
    """What ``onceover info`` prints of a run or store; or why it cannot."""
    try:
        return describe(path)
    except OnceoverError as error:
        return str(error)


def _chosen_on(provenance: dict, is_refitted: bool) -> str:
    """The images that chose the settings, and whether the heads were fitted with them afterwards."""
    selection = provenance["selection"]
    images = f"{selection['split']}, {selection['pictures']:,} images"
    if selection["split"] == SELECTION:
        images = f"{selection['pictures']:,} of the train images, set aside for it"
    again = "fitted again and fine-tuned" if "finetune" in provenance else "fitted again"
    return f"{images}; then {again}, these images included" if is_refitted else images


def _heads(provenance: dict, dimensions: int) -> str:
    """The kind of heads, how many, the dimensions of what is searched, and where they come from."""
    members = provenance["members"]
    count = f"an ensemble of {len(members)} pairs" if len(members) > 1 else "one pair"
    epochs = ", ".join(str(epoch) for epoch in provenance["best_epochs"])
    origin = f"fine-tuned up to epoch {epochs}" if "finetune" in provenance else f"best epoch {epochs}"
    if "distilled" in provenance:
        origin = "distilled in closed form"
    return f"{count}, {members[0]['head']}, {dimensions:,} dimensions; {origin}"
