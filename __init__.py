"""Image-text retrieval: encode a dataset once, fit projection heads over and over.

    import onceover

    store = onceover.extract_features("data/flickr8k", "stores/flickr8k.h5")
    run = onceover.fit(store, "runs/first")
    print(onceover.evaluate(run))
    for hit in onceover.search(run, "a dog playing in the park"):
        print(hit.score, hit.path)

The names are imported when they are first used, so that importing the package is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onceover.base.errors import OnceoverError
    from onceover.configs.schema import load_config
    from onceover.extract.dataset.reading import ReadOptions
    from onceover.extract.store import FeatureStore
    from onceover.heads.checkpoint import load_run
    from onceover.retrieval.embeddings import read_embeddings
    from onceover.serve.client import Client
    from onceover.workflows import (
        compare,
        distill,
        embed,
        ensemble,
        evaluate,
        export,
        extract_features,
        fit,
        index,
        join,
        plot,
        repack,
        report,
        search,
        search_many,
    )

__version__ = "0.2.0"

_HOMES = {
    "OnceoverError": "base.errors",
    "load_config": "configs.schema",
    "FeatureStore": "extract.store",
    "ReadOptions": "extract.dataset.reading",
    "load_run": "heads.checkpoint",
    "read_embeddings": "retrieval.embeddings",
    "Client": "serve.client",
}
__all__ = [
    "Client",
    "FeatureStore",
    "OnceoverError",
    "ReadOptions",
    "compare",
    "distill",
    "embed",
    "ensemble",
    "evaluate",
    "export",
    "extract_features",
    "fit",
    "index",
    "join",
    "load_config",
    "load_run",
    "plot",
    "read_embeddings",
    "repack",
    "report",
    "search",
    "search_many",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'onceover' has no attribute {name!r}")
    return getattr(import_module(f"onceover.{_HOMES.get(name, 'workflows')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
