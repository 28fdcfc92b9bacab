"""The page of errors: the queries that a run answers worst, with what it found instead, as one HTML file."""

import base64
from html import escape

import numpy as np

from onceover.retrieval.embeddings import Embeddings
from onceover.retrieval.metrics import rank

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
    """The ``count`` worst queries of each direction on a split: rank and score of the truth, and the first hits.

    Ranks are those of ``evaluate`` with the same ``rerank`` (the run's own by default). Without thumbnails in the
    store, images are named, not shown.

    Raises:
        EmbeddingsError: no such split.
    """
    pictures, captions, image_index = embeddings.split(split)
    biases = embeddings.biases(rerank, split)
    images, texts = embeddings.images[pictures], embeddings.texts[captions]
    to_text, to_image = rank(images, texts, image_index, **biases)
    parts = [_heading(embeddings, split, count, rerank, len(pictures), len(captions))]
    parts.append(f"<h2>Caption → image: the worst {min(count, len(captions))} of {len(captions):,} captions</h2>")
    places = to_image.expected_rank()
    for query in _worst(places, count):
        scores = images @ texts[query] + biases.get("image_bias", 0)
        truth = image_index[query]
        shown = [_picture(embeddings, pictures[truth], f"the truth, {scores[truth]:.3f}", "truth")]
        shown += [
            _picture(embeddings, pictures[row], f"{place}. {scores[row]:.3f}")
            for place, row in enumerate(np.argsort(-scores, kind="stable")[:HITS], 1)
        ]
        said = f"“{escape(embeddings.captions[captions[query]])}”"
        parts.append(_article(said, places[query], len(pictures), f'<div class="row">{"".join(shown)}</div>'))
    places = to_text.expected_rank()
    parts.append(f"<h2>Image → caption: the worst {min(count, len(places))} of {len(places):,} images</h2>")
    for query in _worst(places, count):
        picture = to_text.group[query]
        scores = texts @ images[picture] + biases.get("text_bias", 0)
        own = np.flatnonzero(image_index == picture)
        found = np.argsort(-scores, kind="stable")[:HITS]
        lists = ""
        for title, rows in (("Found first", found), ("Its own captions", own[np.argsort(-scores[own])])):
            lines = [_sentence(embeddings.captions[captions[row]], scores[row]) for row in rows]
            lists += f"<div><b>{title}</b><ol>{''.join(lines)}</ol></div>"
        body = f'<div class="row">{_picture(embeddings, pictures[picture], "")}{lists}</div>'
        parts.append(_article(escape(embeddings.ids[pictures[picture]]), places[query], len(captions), body))
    title = f"Errors on {escape(split)}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )


def _heading(embeddings: Embeddings, split: str, count: int, rerank: str | None, n_images: int, n_captions: int) -> str:
    correction = rerank or embeddings.rerank
    chosen = " The heads were chosen on this split." if split == embeddings.selection_split else ""
    return (
        f'<p class="note">{n_images:,} images, {n_captions:,} captions; correction for hubs: {escape(correction)}. '
        f"The rank of a query is that of its best correct item. A framed image is the truth.{chosen}</p>"
    )


def _worst(places: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-places, kind="stable")[:count]


def _article(query: str, place: float, gallery: int, body: str) -> str:
    head = f'<span class="query">{query}</span> <span class="rank">rank {place:,.0f} of {gallery:,}</span>'
    return f"<article>{head}{body}</article>"


def _sentence(caption: str, score: float) -> str:
    return f"<li>{escape(caption)} <span class='note'>{score:.3f}</span></li>"


def _picture(embeddings: Embeddings, row: int, label: str, kind: str = "hit") -> str:
    name = escape(embeddings.ids[row])
    image = ""
    if embeddings.thumbnails is not None:
        data = base64.b64encode(embeddings.thumbnails[row]).decode()
        image = f'<img alt="{name}" src="data:image/jpeg;base64,{data}">'
    return f'<figure class="{kind}">{image}<figcaption>{label} {name}</figcaption></figure>'
