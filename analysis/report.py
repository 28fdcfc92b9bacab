"""The page of errors: the queries that a run answers worst, with the hits it returned instead, as one HTML file."""

import base64
from html import escape

import numpy as np

from onceover.retrieval.embeddings import Embeddings
from onceover.retrieval.ranks import Ranks, rank

HITS = 5  # shown of each query
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
article { border-top: 1px solid #ccc; padding: 1rem 0 }
.query { font-size: 1.05rem; font-weight: 600 } .rank { color: #b03a00 }
.row { display: flex; flex-wrap: wrap; gap: .9rem; margin-top: .6rem } .row > div { flex: 1 1 20rem }
figure { margin: 0; width: 165px } figure.truth img { outline: 3px solid #0072b2 }
img { width: 100%; display: block } figcaption { font-size: .8rem; color: #444; overflow-wrap: anywhere }
ol { margin: .2rem 0; padding-left: 1.4rem }
.note { color: #555 }
"""


def error_page(embeddings: Embeddings, split: str, count: int, rerank: str | None = None) -> str:
    """Writes the ``count`` worst queries of each direction on a split: rank and score of the truth, and the first hits.

    Ranks are those of ``evaluate`` with the same ``rerank`` (the run's own by default). Without thumbnails in the
    store, images are named, not shown.

    Raises:
        EmbeddingsError: no such split.
    """
    page = _Page(embeddings, split, rerank)
    title = f"Errors on {escape(split)}"
    parts = [_heading(embeddings, split, rerank), *page.worst_captions(count), *page.worst_images(count)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )


def _heading(embeddings: Embeddings, split: str, rerank: str | None) -> str:
    """A note on the numbers of the page."""
    images, captions, _ = embeddings.split(split)
    correction = rerank or embeddings.rerank
    chosen = ""
    if split == embeddings.validation_split:
        chosen = " The heads were chosen on this split."
    return (
        f'<p class="note">{len(images):,} images, {len(captions):,} captions; correction for hubs: '
        f"{escape(correction)}. The rank of a query is that of its best correct item. A framed image is the truth."
        f"{chosen}</p>"
    )


class _Page:
    """The articles of a page, for one split of a run."""

    def __init__(self, embeddings: Embeddings, split: str, rerank: str | None):
        self._embeddings = embeddings
        self._image_rows, self._caption_rows, _ = embeddings.split(split)
        self._images, self._texts, self._image_index = embeddings.vectors_of(split)
        self._biases = embeddings.biases(rerank, split)
        self._to_text, self._to_image = rank(self._images, self._texts, self._image_index, **self._biases)

    def worst_captions(self, count: int) -> list[str]:
        """A title, and an article for each of the captions that find their image last."""
        total = len(self._caption_rows)
        parts = [f"<h2>Caption → image: the worst {min(count, total)} of {total:,} captions</h2>"]
        for query, query_rank in _worst(self._to_image, count):
            scores = self._images @ self._texts[query] + self._biases.get("image_bias", 0)
            truth = self._image_index[query]
            figures = [self._figure(truth, f"the truth, {scores[truth]:.3f}", "truth")]
            for number, row in enumerate(_first_hits(scores), 1):
                figures.append(self._figure(row, f"{number}. {scores[row]:.3f}"))
            title = f"“{escape(self._caption(query))}”"
            body = f'<div class="row">{"".join(figures)}</div>'
            parts.append(_article(title, query_rank, len(self._image_rows), body))
        return parts

    def worst_images(self, count: int) -> list[str]:
        """A title, and an article for each of the images that find their captions last."""
        total = len(self._to_text.group)
        parts = [f"<h2>Image → caption: the worst {min(count, total)} of {total:,} images</h2>"]
        for query, query_rank in _worst(self._to_text, count):
            image = self._to_text.group[query]
            scores = self._texts @ self._images[image] + self._biases.get("text_bias", 0)
            own = np.flatnonzero(self._image_index == image)
            own = own[np.argsort(-scores[own])]
            lists = self._caption_list("Found first", _first_hits(scores), scores)
            lists += self._caption_list("Its own captions", own, scores)
            body = f'<div class="row">{self._figure(image, "")}{lists}</div>'
            title = escape(self._embeddings.ids[self._image_rows[image]])
            parts.append(_article(title, query_rank, len(self._caption_rows), body))
        return parts

    def _caption(self, row: int) -> str:
        return self._embeddings.captions[self._caption_rows[row]]

    def _caption_list(self, title: str, rows: np.ndarray, scores: np.ndarray) -> str:
        """Captions with their scores under a title."""
        lines = ""
        for row in rows:
            lines += f"<li>{escape(self._caption(row))} <span class='note'>{scores[row]:.3f}</span></li>"
        return f"<div><b>{title}</b><ol>{lines}</ol></div>"

    def _figure(self, image: int, label: str, kind: str = "hit") -> str:
        """An image with a label and its id."""
        row = self._image_rows[image]
        name = escape(self._embeddings.ids[row])
        tag = ""
        if self._embeddings.thumbnails is not None:
            data = base64.b64encode(self._embeddings.thumbnails[row]).decode()
            tag = f'<img alt="{name}" src="data:image/jpeg;base64,{data}">'
        return f'<figure class="{kind}">{tag}<figcaption>{label} {name}</figcaption></figure>'


def _worst(ranks: Ranks, count: int) -> list[tuple[int, float]]:
    """The queries with the highest ranks, the worst first, with these ranks."""
    expected = ranks.expected_rank()
    return [(query, expected[query]) for query in np.argsort(-expected, kind="stable")[:count]]


def _first_hits(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:HITS]


def _article(title: str, query_rank: float, gallery: int, body: str) -> str:
    head = f'<span class="query">{title}</span> <span class="rank">rank {query_rank:,.0f} of {gallery:,}</span>'
    return f"<article>{head}{body}</article>"
