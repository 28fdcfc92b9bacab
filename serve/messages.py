"""The bodies of the API's requests and answers, from which its OpenAPI description is made."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Strict, Tag

from onceover.retrieval.queries import MAX_QUERY
from onceover.serve.limits import MAX_BODY, MAX_HITS, MAX_TERMS, MAX_WEIGHT

Kind = Literal["image", "text"]
Weight = Annotated[
    float,
    Strict(),
    Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False, description="Factor in the sum; below 0: subtracted."),
]


class _Term(BaseModel):
    model_config = ConfigDict(extra="forbid")
    weight: Weight = 1.0


class TextTerm(_Term):
    """A text."""

    text: str = Field(min_length=1, max_length=MAX_QUERY, pattern=r"\S")


class ItemTerm(_Term):
    """An item of the galleries, whose stored vector is taken."""

    item: str = Field(min_length=1, max_length=4096, description="The item's id.")
    kind: Kind = "image"


class ImageTerm(_Term):
    """An image file, of any format that the project reads."""

    image: str = Field(min_length=1, max_length=MAX_BODY, description="The file's bytes in base64.")
    sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of the file that the image was made smaller of; the gallery's own copy of it is no hit.",
    )


def _kind_of_term(value: Any) -> str | None:
    """The one of ``text``, ``item`` and ``image`` that a term has; None where it has none or several."""
    if not isinstance(value, dict):
        return None
    given = [name for name in ("text", "item", "image") if name in value]
    return given[0] if len(given) == 1 else None


TermMessage = Annotated[
    Annotated[TextTerm, Tag("text")] | Annotated[ItemTerm, Tag("item")] | Annotated[ImageTerm, Tag("image")],
    Discriminator(
        _kind_of_term, custom_error_type="term", custom_error_message="a term has one of text, item and image"
    ),
]


class SearchMessage(BaseModel):
    """A query: the normalised sum of its terms' unit vectors, each times its weight."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"terms": [{"text": "a dog in the snow"}], "gallery": "image", "top_k": 5}]},
    )
    terms: list[TermMessage] = Field(min_length=1, max_length=MAX_TERMS)
    gallery: Kind = Field("image", description="What is searched: images, or captions (text).")
    top_k: int = Field(20, ge=1, le=MAX_HITS, strict=True, description="Number of hits.")
    min_score: float | None = Field(
        None, strict=True, allow_inf_nan=False, description="Leave out hits with a lower score."
    )


class HitMessage(BaseModel):
    """An image with its captions, or a caption with its image."""

    rank: int
    score: float = Field(description="Cosine similarity, less the gallery's correction for hubs.")
    id: str
    path: str
    captions: list[str]
    same: list[str] = Field(description="Ids of further items that look the same.")
    image: str | None = Field(description="Id of the image to show.")


class HitsMessage(BaseModel):
    """The hits of a query, best first."""

    hits: list[HitMessage]
    best_score: float | None = Field(description="Score of the best item, which may be below min_score.")
    note: str | None = Field(description="What the text encoder left out of the query; null where it took all of it.")


class ItemMessage(BaseModel):
    """An image with its captions, or a caption with its image."""

    kind: Kind
    id: str
    path: str
    captions: list[str]
    image: str | None = Field(description="Id of the image to show.")
    split: str | None


class GalleryMessage(BaseModel):
    """What can be searched, and how much of it there is."""

    kind: Kind
    size: int


class TakesMessage(BaseModel):
    """Why a kind of query cannot be embedded here; null where it can be."""

    text: str | None
    image: str | None


class InfoMessage(BaseModel):
    """What is served."""

    version: str
    name: str = Field(description="Name of the run's or index's folder.")
    stamp: str = Field(description="Changes when other items are served.")
    encoders: dict[str, str]
    dimension: int
    galleries: list[GalleryMessage]
    splits: dict[str, int] = Field(description="Number of images by split, where that is known.")
    takes: TakesMessage
    sample: list[str] = Field(description="Ids of some images, the same ones each time.")
    examples: list[str] = Field(description="Some captions, to try a search with.")


class ErrorMessage(BaseModel):
    """What is wrong, and how to mend it."""

    error: str


class PointMessage(BaseModel):
    """An image or a caption on the map, by the projections that are there: ``pca``, and later ``tsne``."""

    id: str
    kind: Literal["image", "caption"]
    x: dict[str, float]
    y: dict[str, float]
    split: str | None
    caption: str
    image: str | None = Field(description="Address of a thumbnail.")
    pair: str | None = Field(description="Id of the point that belongs to it: of an image's caption, or its image.")


class MapMessage(BaseModel):
    """Points of the map."""

    points: list[PointMessage]
    images: int = Field(description="Number of images on the map; a sample where the gallery has more.")
    of: int = Field(description="Number of images in the gallery.")
    is_complete: bool = Field(description="Whether t-SNE is there, too; if not, it is being computed.")
