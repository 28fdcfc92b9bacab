"""The layers of a model whose outputs lie side by side in a feature, and their pooling, as the settings name them."""

from onceover.extract.encoders import EncoderError, TextModel

AUTO = "auto"  # the setting that leaves a choice to the model
LAST = "last"  # the model's own feature, or the last hidden state
WORDS = "words"  # the word embeddings, before positions and without the ids that frame a caption
PROJECTION = "projection"  # the pooling of a dual encoder's own feature, which has no other layers
OWN = "own"  # the pooling of a feature that is the last layer alone, pooled as the model's library does
MORE = "more"  # the setting for more of an image model's layers than ``auto`` takes
_RESNET = "torchvision:resnet"  # not measured: pretrained weights could not be had
_IMAGE_LAYERS = {  # by setting, the start of an architecture's name -> layers that pay together
    AUTO: {
        "MobileNetV2Model": [LAST, "layer.15.conv_3x3", "layer.12.expand_1x1"],
        _RESNET: [LAST, "layer3"],
    },
    MORE: {
        "MobileNetV2Model": [
            LAST,
            "layer.15.conv_3x3",
            "layer.12.expand_1x1",
            "layer.15.expand_1x1",
            "layer.14.conv_3x3",
            "layer.13.conv_3x3",
            "layer.10.expand_1x1",
        ],
        _RESNET: [LAST, "layer4.0", "layer3", "layer2"],
    },
}


def image_layers(setting: str, recipe: dict) -> list[str]:
    """The names of an image model's layers: ``last`` is its own feature, others are modules within it.

    ``auto``: the layers that are known to pay for an architecture (``_IMAGE_LAYERS``); else ``last``. ``more``: further
    ones as well, for about twice the numbers and a little more recall.

    Raises:
        EncoderError: layers of a dual encoder, or ``auto`` or ``more`` beside others.
    """
    is_dual = recipe["pooling"] == PROJECTION
    names = _names(setting)
    if len(names) == 1 and names[0] in _IMAGE_LAYERS:
        if is_dual:
            return [LAST]
        return _known_layers(names[0], recipe["architecture"])
    for name in names:
        if name in _IMAGE_LAYERS:
            raise EncoderError(f"{name} stands alone in extract.image_layers; it takes layers of its own choice")
    if is_dual and names != [LAST]:
        raise EncoderError("a dual encoder's own projection is its feature; leave extract.image_layers at last")
    return names


def text_layers(setting: str, model: TextModel) -> list[str | int]:
    """A text model's layers: ``last``, hidden states by number (0: what enters the first layer), and ``words``.

    ``words`` is the mean of the word embeddings, before positions and without the first and last special token;
    ``middle`` the hidden state half-way; ``auto`` is ``last,middle,words``, but for dual encoders.

    Raises:
        EncoderError: no such layer, or layers of a dual encoder.
    """
    names = _names(setting)
    if names == [AUTO]:
        names = [LAST]
        if not model.is_projection:
            names = [LAST, "middle", WORDS]
    if model.is_projection and names != [LAST]:
        raise EncoderError("a dual encoder's own projection is its feature; leave extract.text_layers at last")
    depth = 0
    if names != [LAST]:
        depth = model.depth
    layers: list[str | int] = []
    for name in names:
        layer = _text_layer(name, depth)
        if layer not in (LAST, WORDS, *range(depth + 1)):
            raise EncoderError(f"{name!r} is no layer of the text encoder; use last, middle, words, or 0 to {depth}")
        if layer not in layers:
            layers.append(layer)
    return layers


def text_pooling(setting: str, model: TextModel, layers: list[str | int]) -> str:
    """The pooling over a caption's tokens: what the setting says, or with ``auto`` the one that suits the model.

    Raises:
        EncoderError: a pooling for an encoder that has its own, or a causal model's first token.
    """
    own = None
    if model.is_projection:
        own = PROJECTION
    elif model.pool is not None and layers == [LAST]:
        own = OWN
    if own is not None:
        if setting != AUTO:
            raise EncoderError(
                f"the text encoder's own {'projection' if own == PROJECTION else 'pooling'} is its feature, whatever "
                "the setting; leave extract.text_pooling at auto"
            )
        return own
    if setting == AUTO:
        return model.pooling
    if setting == "cls" and model.is_causal:
        raise EncoderError(
            "the first token of a causal text encoder has seen none of the others; set extract.text_pooling to last"
        )
    return setting


def _names(setting: str) -> list[str]:
    """The names in a setting."""
    return [name.strip() for name in setting.split(",")]


def _known_layers(setting: str, architecture: str) -> list[str]:
    """The layers that are known to pay for an architecture, by one of the settings in ``_IMAGE_LAYERS``."""
    for start, layers in _IMAGE_LAYERS[setting].items():
        if architecture.startswith(start):
            return layers
    return [LAST]


def _text_layer(name: str, depth: int) -> str | int:
    """A layer by its name, numbers as such."""
    if name == "middle":
        return depth // 2
    if name.isdecimal():
        return int(name)
    return name
