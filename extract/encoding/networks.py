"""Networks: loaded models as batches pass through them, to the outputs of the layers that make a feature."""

import difflib
import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from onceover.extract.encoders import EncoderError, ImageModel, Spec, TextModel
from onceover.extract.encoding.layers import LAST, PROJECTION, WORDS
from onceover.extract.encoding.library_errors import loading


class ImageNetwork:
    """An image model whose feature is the outputs of its layers, averaged over space or tokens, side by side.

    A pass may be under way in several threads.

    Attributes:
        module: the model.
        layers: ``last`` is the model's own feature, the others are modules within it.
    """

    def __init__(self, model: ImageModel, layers: list[str], spec: Spec):
        self.module = model.module
        self.layers = layers
        self._pool = model.pool
        self._spec = spec
        self._recorded = threading.local()
        self._hooks: list[RemovableHandle] = []

    def own_feature(self, batch: Tensor) -> Tensor:
        """The model's own feature, whatever the layers: (B, 3, H, W) -> (B, D)."""
        return self._pool(self.module, batch)

    def capture(self, sample: Tensor) -> None:
        """Records the layers from now on, and checks in one pass of ``sample`` that each of them plays a part.

        Modules that are to be replaced have to be replaced before, since a replaced module records nothing. A second
        call takes the place of the first.

        Raises:
            EncoderError: a layer that is no module of the model, or that has no part in a pass.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        modules = dict(self.module.named_modules())
        for name in self.layers:
            if name == LAST:
                continue
            if name not in modules:
                near = difflib.get_close_matches(name, filter(None, modules), n=3, cutoff=0.0)
                raise EncoderError(f"{self._spec.text} has no module {name!r}; near are {', '.join(near)}")
            self._hooks.append(modules[name].register_forward_hook(partial(self._record, name)))
        with torch.no_grad(), loading(self._spec):
            self.features(sample)

    def features(self, batch: Tensor) -> Tensor:
        """One pass of float (B, 3, H, W) on the device: (B, sum of the layers' dimensions)."""
        outputs = self.outputs(batch)
        missing = [name for name, output in zip(self.layers, outputs, strict=True) if output is None]
        if missing:
            raise EncoderError(
                f"{self._spec.text}: the module {missing[0]!r} plays no part in a pass; name another layer"
            )
        return torch.cat([output for output in outputs if output is not None], dim=1)

    def outputs(self, batch: Tensor) -> list[Tensor | None]:
        """One pass: (B, D) of each layer, None for one that played no part in it; gradients flow."""
        self._recorded.outputs = {}
        self._recorded.outputs[LAST] = self.own_feature(batch)
        return [self._recorded.outputs.get(name) for name in self.layers]

    def _record(self, name: str, _module: Any, _inputs: Any, output: Any) -> None:
        """Records a module's output, averaged; a hook of the module."""
        # a thread of autograd that repeats a checkpointed block has none
        outputs = getattr(self._recorded, "outputs", {})
        if not isinstance(output, Tensor):
            output = output[0]
        if output.ndim == 4:
            has_channels_last = output.shape[1] == output.shape[2] != output.shape[3]
            outputs[name] = output.mean((1, 2) if has_channels_last else (2, 3))
        elif output.ndim == 3:
            outputs[name] = output.mean(1)
        else:
            raise EncoderError(
                f"{self._spec.text}: the module {name!r} puts out no map and no tokens; name another layer"
            )


class TextNetwork:
    """A text model whose feature is its layers, each pooled over tokens, side by side.

    Attributes:
        module: the model.
        layers: ``last``, ``words``, and hidden states by number.
        pooling: ``mean`` over tokens, ``cls``, the first token, ``last``, the last one that is no padding, ``own``, as
            the model's library pools, or ``projection``, a dual encoder's own. The layer ``last`` of a model with a
            pooling has that one.
    """

    def __init__(self, model: TextModel, layers: list[str | int], pooling: str):
        self.module = model.module
        self.layers = layers
        self.pooling = pooling
        self._model = model

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """One pass of ``input_ids`` and ``attention_mask``, (B, L) on the device: (B, sum of the dimensions)."""
        return torch.cat(self.outputs(inputs), dim=1)

    def outputs(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """One pass: float32 (B, D) of each layer; gradients flow."""
        states = self._model.states(self.module, inputs)
        if self.pooling == PROJECTION:
            return [states[LAST].float()]
        return [self._pooled(layer, states, inputs) for layer in self.layers]

    def _pooled(self, layer: str | int, states: dict[str | int, Tensor], inputs: dict[str, Tensor]) -> Tensor:
        """A layer's tokens (B, L, D) -> float32 (B, D)."""
        if layer == LAST and self._model.pool is not None:
            return self._model.pool(self.module, states[LAST], inputs).float()
        if layer == WORDS:
            assert self._model.words is not None, "only a projection has none, and no other layers"
            ids = inputs["input_ids"]
            frame = torch.tensor(self._model.tokenizer.frame_ids, device=ids.device)
            is_word = inputs["attention_mask"] * ~torch.isin(ids, frame)
            return masked_mean(self._model.words(self.module, ids), is_word)
        if self.pooling == "cls":
            return states[layer][:, 0].float()
        mask = inputs["attention_mask"]
        if self.pooling == LAST:
            mask = last_of(mask)
        return masked_mean(states[layer], mask)


def last_of(mask: Tensor) -> Tensor:
    """A mask, (B, L), of the last token alone that ``mask`` leaves, whichever side is padded."""
    from_here = mask.flip(1).cumsum(1).flip(1)
    return mask * (from_here == 1)


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that ``mask``, (B, L), leaves: (B, L, D) -> float32 (B, D); 0 where it leaves none."""
    weights = mask.unsqueeze(-1).float()
    return (states.float() * weights).sum(1) / weights.sum(1).clamp_min(1)
