"""What was run: the data, the encoders, the settings, and what made them."""

from collections import Counter
from typing import Any

from onceover import __version__
from onceover.analysis.describe import describe
from onceover.analysis.report.files import ReportFiles
from onceover.base.formats import CONFIG
from onceover.configs.schema import load_config


def overview(files: ReportFiles) -> dict[str, Any]:
    """Facts by name, the settings by section, and what ``onceover info`` prints of the run and its store."""
    run = files.run
    provenance = files.provenance
    embeddings = run.embeddings
    counts = Counter(embeddings.splits)
    splits = ", ".join(f"{count:,} {split or 'in no split'}" for split, count in sorted(counts.items()))
    facts = {
        "images": f"{len(embeddings.ids):,}: {splits}",
        "captions": f"{len(embeddings.captions):,}",
        "image encoder": str(provenance["encoders"]["image"]["encoder"]),
        "text encoder": str(provenance["encoders"]["text"]["encoder"]),
        "heads": _heads(provenance),
        "fitted on": f"{provenance['train_pictures']:,} images",
        "chosen on": f"{provenance['selection']['split']}, {provenance['selection']['pictures']:,} images",
        "to be reported on": embeddings.report_split,
        "correction for hubs": embeddings.rerank,
        "feature store": str(provenance["store"]),
        "versions": ", ".join(f"{name} {value}" for name, value in provenance["versions"].items()),
        "report by": f"onceover {__version__}",
    }
    settings = load_config(run.folder / CONFIG).to_dict()
    described = {"the run": describe(run.folder)}
    if not isinstance(files.store, str):
        described["its feature store"] = describe(files.store.path)
        made = files.store.provenance
        facts = {"data": f"{made['data']} ({made['layout']} layout), encoded {made['created']}"} | facts
    fingerprints = {"space of the embeddings": embeddings.space}
    for kind, value in embeddings.fingerprints.items():
        fingerprints[f"{kind} fingerprint"] = value
    return {
        "facts": facts,
        "folded": {
            **{f"Settings: {name}": settings[name] for name in ("extract", "model", "training")},
            "Fingerprints": fingerprints,
        },
        "described": described,
        "note": files.store if isinstance(files.store, str) else None,
    }


def _heads(provenance: dict) -> str:
    """The kind of heads, how many, their dimension and their size."""
    members = provenance["members"]
    first = members[0]
    count = f"an ensemble of {len(members)} pairs" if len(members) > 1 else "one pair"
    epochs = ", ".join(str(epoch) for epoch in provenance["best_epochs"])
    return f"{count}, {first['head']}, {first['embedding_dim']:,} dimensions; best epoch {epochs}"
