"""Encoders of a store's or run's features, loaded again by what its provenance says."""

from typing import Any

from onceover.configs.schema import TEXT_POOLINGS
from onceover.extract.encoders import EncoderError, parse_spec
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.text import TextEncoder


def located_encoder(kind: str, provenance: dict, spec: str | None) -> str:
    """The specification of the encoder that made a kind of features.

    Args:
        provenance: of that kind. spec: where the encoder is now, if it has moved.

    Raises:
        EncoderError: its files are no longer where they were, and ``spec`` does not name their new place.
    """
    if spec is not None:
        return spec
    stored = provenance["encoder"]
    missing = parse_spec(stored).missing()
    if missing is not None:
        form = stored.replace(str(missing), "NEW_PATH")
        raise EncoderError(
            f"the {kind} encoder was at {missing}, and is not there any more; name its new place: "
            f"--{kind}-encoder {form}"
        )
    return stored


def repeated_settings(settings: dict, text_recipe: dict) -> dict:
    """The settings of an extraction, so that they give the same features again.

    Earlier versions wrote down a pooling for text encoders that have their own.

    Args:
        text_recipe: of the text features; empty where there are none.
    """
    pooling = text_recipe.get("pooling")
    return settings | {"text_pooling": pooling if pooling in TEXT_POOLINGS else "auto"}


def stored_encoder(
    kind: str,
    provenance: dict,
    recipe: dict,
    settings: dict,
    tokenizer_files: dict[str, bytes],
    device: str | None = None,
    spec: str | None = None,
    plain: bool = False,
) -> Any:
    """The ``ImageEncoder`` or ``TextEncoder`` that made a kind of features.

    Args:
        provenance, recipe: of that kind. settings: of the extraction. tokenizer_files: of the text encoder.
        device: as ``pick_device``. spec: where the encoder is now, if it has moved. plain: as it was saved, in float32.
    """
    spec = located_encoder(kind, provenance, spec)
    common: dict[str, Any] = {
        "dtype": recipe["dtype"],
        "store_dtype": recipe["store_dtype"],
        "seed": provenance["seed"],
        "device": device,
        "plain": plain,
    }
    if kind == "image":
        return ImageEncoder(spec, layers=settings["image_layers"], views=settings["views"], **common)
    return TextEncoder(
        spec,
        layers=settings["text_layers"],
        pooling=repeated_settings(settings, recipe)["text_pooling"],
        max_length=settings["max_length"],
        tokenizer_files=tokenizer_files,
        **common,
    )
