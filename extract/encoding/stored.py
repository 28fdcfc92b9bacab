"""Encoders of a store's or run's features, loaded again by what its provenance says."""

import shlex
from collections.abc import Sequence
from typing import Any

from onceover.configs.schema import TEXT_POOLINGS
from onceover.extract.backends import EAGER
from onceover.extract.encoders import EncoderError, parse_spec, specs_of
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.joined import JoinedImageEncoder, JoinedTextEncoder
from onceover.extract.encoding.text import TextEncoder
from onceover.extract.joined import Part, is_joined, parts_of


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
    for own in specs_of(stored):
        missing = parse_spec(own).missing()
        if missing is not None:
            form = stored.replace(str(missing), "NEW_PATH")
            raise EncoderError(
                f"the {kind} encoder was at {missing}, and is not there any more; name its new place: "
                f"--{kind}-encoder {shlex.quote(form)}"
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
    backend: str = EAGER,
) -> Any:
    """The encoder that made a kind of features: an ``ImageEncoder`` or ``TextEncoder``, or several that are joined.

    Args:
        provenance, recipe: of that kind. settings: of the extraction. tokenizer_files: of the text encoder.
        device: as ``pick_device``. spec: where the encoder is now, if it has moved; of joined ones each, with
            `` + `` between them. plain: as it was saved, in float32. backend: the name of a backend.
    """
    parts = parts_of(recipe, provenance, settings, tokenizer_files)
    if not is_joined(recipe):
        return part_encoder(kind, parts[0], device, spec, plain, backend)
    specs = moved_parts(parts, spec, kind)
    backends = backend.split(", ")
    backends *= len(parts) // len(backends)
    encoders: list[Any] = []
    for part, own_spec, own_backend in zip(parts, specs, backends, strict=True):
        encoders.append(part_encoder(kind, part, device, own_spec, plain, own_backend))
    joined = JoinedImageEncoder if kind == "image" else JoinedTextEncoder
    return joined(encoders, [part.provenance for part in parts], recipe["store_dtype"])


def moved_parts(parts: Sequence[Part], spec: str | None, kind: str) -> list[str | None]:
    """Where the encoder of each part is now, or None where none has moved.

    Raises:
        EncoderError: there are more or fewer than parts.
    """
    if spec is None:
        return [None] * len(parts)
    specs = specs_of(spec) if len(parts) > 1 else [spec]
    if len(specs) != len(parts):
        raise EncoderError(
            f"the {kind} features come from {len(parts)} encoders; name the new location of each, in their order: "
            f'--{kind}-encoder "{" + ".join(part.provenance["encoder"] for part in parts)}"'
        )
    return list(specs)


def part_encoder(
    kind: str, part: Part, device: str | None, spec: str | None = None, plain: bool = False, backend: str = EAGER
) -> ImageEncoder | TextEncoder:
    """The one encoder of a part; arguments as ``stored_encoder``.

    That of imported features, which was named when they were imported, has their recipe.
    """
    own = part.recipe.get("encoder", part.recipe)
    settings = part.settings
    common: dict[str, Any] = {
        "dtype": own["dtype"],
        "store_dtype": own["store_dtype"],
        "seed": part.provenance["seed"],
        "device": device,
        "plain": plain,
        "backend": backend,
    }
    spec = located_encoder(kind, part.provenance, spec)
    encoder: ImageEncoder | TextEncoder
    if kind == "image":
        encoder = ImageEncoder(spec, layers=settings["image_layers"], views=settings["views"], **common)
    else:
        encoder = TextEncoder(
            spec,
            layers=settings["text_layers"],
            pooling=repeated_settings(settings, own)["text_pooling"],
            max_length=settings["max_length"],
            caption_prefix=own.get("caption_prefix", ""),
            query_prefix=own.get("query_prefix"),
            tokenizer_files=part.tokenizer_files,
            **common,
        )
    if own is not part.recipe and encoder.recipe == own:
        encoder.recipe = part.recipe
    return encoder
