"""The page of errors: the queries that a run answers worst, with the hits it returned instead."""

from onceover.analysis.pages import render
from onceover.analysis.report.queries import worst_captions, worst_images
from onceover.analysis.report.searched import SearchedSplit
from onceover.retrieval.embeddings import Embeddings


def error_page(embeddings: Embeddings, split: str, count: int, rerank: str | None = None) -> str:
    """Writes the ``count`` worst queries of each direction on a split: rank and score of the truth, and the first hits.

    Ranks are those of ``evaluate`` with the same ``rerank`` (the run's own by default). Without thumbnails in the
    store, images are named, not shown.

    Raises:
        EmbeddingsError: no such split.
    """
    searched = SearchedSplit(embeddings, split, rerank)
    worst = {"captions": worst_captions(searched, count), "images": worst_images(searched, count)}
    return render(
        "errors.html",
        split=split,
        correction=searched.correction,
        has_chosen=split == embeddings.validation_split,
        n_images=len(searched.images),
        n_captions=len(searched.texts),
        n_image_queries=len(searched.to_text.group),
        damage=searched.damage(),
        **worst,
    )
