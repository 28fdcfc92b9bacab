"""Joined features: those of several encoders, side by side in each row; their recipe and the encoders behind it.

A recipe of the architecture ``joined`` holds the recipes of its parts, and the provenance beside it what else is needed
to load each part's encoder again. numpy and torch are not needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from onceover.base.files import digest
from onceover.extract.encoder_files import files_of_part

JOINED = "joined"
_UNKNOWN = "unknown"  # what a view of imported features shows


@dataclass(frozen=True)
class Part:
    """One encoder of a kind of features: all that tells of it, and that is needed to load it again.

    Attributes:
        recipe: all that changes its features.
        provenance: ``encoder`` (its specification), ``seed``, and how its features were computed.
        settings: of the extraction. tokenizer_files: of a text encoder.
    """

    recipe: dict
    provenance: dict
    settings: dict
    tokenizer_files: dict[str, bytes]


def is_joined(recipe: dict) -> bool:
    """Whether the features of a recipe come from several encoders; a kind without features has an empty recipe."""
    return recipe.get("architecture") == JOINED


def joined_recipe(kind: str, recipes: Sequence[dict], store_dtype: str) -> dict:
    """The recipe of features that lie side by side, in the order of their own recipes.

    Args:
        kind: ``image`` or ``text``. store_dtype: of the features together.
    """
    recipe = {
        "architecture": JOINED,
        "parts": list(recipes),
        "weights": digest([part["weights"] for part in recipes]),
        "pooling": JOINED,
        "dtype": ", ".join(dict.fromkeys(part["dtype"] for part in recipes)),
        "store_dtype": store_dtype,
    }
    if kind == "image":
        recipe["views"] = shared_views(recipes)
    return recipe


def shared_views(recipes: Sequence[dict]) -> list:
    """The views, from the first on, that show the same in the features of all recipes.

    Of imported views only the number is known; they are taken to be in the usual order.
    """
    known = [recipe.get("encoder", recipe) for recipe in recipes]
    views = [recipe["views"] for recipe in known if "views" in recipe]
    count = min(len(own["views"]) if "views" in own else own["shape"][0] for own in known)
    if not views:
        return [_UNKNOWN] * count
    same = takewhile(lambda shown: all(view == shown[0] for view in shown), zip(*views, strict=False))
    return [shown[0] for shown in same][:count]


def parts_of(recipe: dict, provenance: dict, settings: dict, tokenizer_files: dict[str, bytes]) -> list[Part]:
    """The encoders of a kind of features, in the order of their columns: one, or those of joined features.

    Args:
        recipe, provenance: of the kind. settings: of the extraction. tokenizer_files: of a text encoder or several.
    """
    if not is_joined(recipe):
        return [Part(recipe, provenance, settings, tokenizer_files)]
    parts = []
    for number, (own, record) in enumerate(zip(recipe["parts"], provenance["parts"], strict=True)):
        parts.append(Part(own, record, record["settings"], files_of_part(tokenizer_files, number)))
    return parts
