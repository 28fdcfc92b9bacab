"""Encoders of a store's or run's features, loaded again by what its provenance says."""

from typing import Any

from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.text import TextEncoder


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
    spec = spec or provenance["encoder"]
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
        pooling=settings["text_pooling"],
        max_length=settings["max_length"],
        tokenizer_files=tokenizer_files,
        **common,
    )
