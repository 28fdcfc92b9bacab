"""Unfreezes the upper layers of an encoder, and starts its forward passes at the lowest of them. torch only.

A model is seen as a chain of *stages*: the modules that a forward pass goes through one after the other, with lists and
sequences taken apart and blocks left whole. Everything from the lowest unfrozen stage up is unfrozen with it, so that
the frozen stages below give the same activations in every epoch.
"""

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from onceover.base.errors import OnceoverError

PRESETS = {"image": "image.last4", "last": "image.last4,text.last2", "all": "image.all,text.all"}


class UnfreezeError(OnceoverError):
    """A choice of layers that does not fit the encoders."""


def parse_unfreeze(text: str) -> dict[str, list[str]]:
    """The layers of each encoder that ``image.NAME,text.NAME``, or a preset, names.

    >>> parse_unfreeze("image.layer4,image.layer3,text.last2")
    {'image': ['layer4', 'layer3'], 'text': ['last2']}

    Raises:
        UnfreezeError: a name that belongs to neither encoder.
    """
    layers: dict[str, list[str]] = {}
    for entry in PRESETS.get(text.strip(), text).split(","):
        kind, dot, name = entry.strip().partition(".")
        if kind not in ("image", "text") or not dot or not name:
            raise UnfreezeError(
                f"{entry.strip()!r} names no layer; write image.NAME or text.NAME, with NAME a module of the encoder, "
                f"lastN or all, separated by commas; or a preset: {', '.join(PRESETS)}"
            )
        layers.setdefault(kind, []).append(name)
    return layers


class Stages:
    """The stages of a model in the order of a forward pass, without those that its outputs do not depend on.

    A ResNet-18 has the stages ``conv1``, ``bn1``, ``layer1.0``, ``layer1.1``, ``layer2.0``, …, ``layer4.1``.

    Args:
        outputs: makes one forward pass.

    Attributes:
        names: of the stages.
        blocks: the names that end with a number, such as ``layer4.1``, which ``lastN`` counts.
    """

    def __init__(self, model: nn.Module, outputs: Callable[[], Sequence[Tensor | None]]):
        self._model = model
        passed: list[str] = []

        def note(name: str, *_: Any) -> None:
            passed.append(name)

        self._returns_tuple: set[str] = set()
        hooks = []
        for name in _stage_names(model, ""):
            stage = model.get_submodule(name)
            hooks.append(stage.register_forward_pre_hook(partial(note, name)))
            hooks.append(stage.register_forward_hook(partial(self._note_output, name)))
        parameters = dict(model.requires_grad_(True).named_parameters())
        total = sum(output.float().sum() for output in outputs() if output is not None)
        for hook in hooks:
            hook.remove()
        assert isinstance(total, Tensor)
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        model.requires_grad_(False)
        self._used = set()  # names of the parameters that the outputs depend on
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                self._used.add(name)
        self.names = [name for name in dict.fromkeys(passed) if not self._is_unused(name)]
        self.blocks = [name for name in self.names if self._is_block(name)]

    def _note_output(self, name: str, _module: nn.Module, _inputs: tuple, output: Any) -> None:
        if isinstance(output, tuple):
            self._returns_tuple.add(name)

    def _parameters(self, stage: str) -> set[str]:
        return {f"{stage}.{name}" for name, _ in self._model.get_submodule(stage).named_parameters()}

    def _is_unused(self, stage: str) -> bool:
        parameters = self._parameters(stage)
        return bool(parameters) and not parameters & self._used

    def _is_block(self, stage: str) -> bool:
        is_numbered = stage.rpartition(".")[2].isdecimal()
        return is_numbered and any(True for _ in self._model.get_submodule(stage).children())

    def lowest(self, layers: Sequence[str], kind: str) -> int:
        """The index in ``names`` of the lowest of some layers.

        Args:
            layers: names of modules, ``lastN`` or ``all``.
            kind: ``image`` or ``text``, for the error.

        Raises:
            UnfreezeError: no such layer.
        """
        return min(self._index(layer, kind) for layer in layers)

    def _index(self, layer: str, kind: str) -> int:
        if layer == "all":
            return 0
        last = re.fullmatch(r"last(\d+)", layer)
        if last:
            count = int(last[1])
            if not self.blocks or not count:
                near = ", ".join(f"{kind}.{stage}" for stage in self.names[-4:])
                raise UnfreezeError(
                    f"{kind}.{layer}: the {kind} encoder has {len(self.blocks)} blocks that are numbered; name a "
                    f"layer: its last ones are {near}"
                )
            return self.names.index(self.blocks[-min(count, len(self.blocks))])
        for index, stage in enumerate(self.names):
            if stage == layer or stage.startswith(f"{layer}."):
                return index
        known: dict[str, None] = {}
        for stage in self.names:
            known |= dict.fromkeys(_prefixes(stage))
        near = ", ".join(f"{kind}.{name}" for name in difflib.get_close_matches(layer, known, n=3, cutoff=0.0))
        raise UnfreezeError(f"the {kind} encoder has no layer {layer!r} to unfreeze; near are {near}")

    def unfreeze(self, lowest: int) -> dict[str, int]:
        """Lets gradients into the stages from ``lowest`` up, and nowhere else.

        Returns:
            The depth of each unfrozen parameter, by name: 0 in the topmost stage that has parameters.
        """
        self._model.requires_grad_(False)
        unfrozen = [name for name in self.names[lowest:] if self._parameters(name)]
        depth_of_stage = {name: depth for depth, name in enumerate(reversed(unfrozen))}
        depths: dict[str, int] = {}
        for name, parameter in self._model.named_parameters():
            if name not in self._used:
                continue
            stage = next((prefix for prefix in _prefixes(name) if prefix in depth_of_stage), None)
            if stage:
                depths[name] = depth_of_stage[stage]
            elif lowest == 0:  # of a whole model also what belongs to no stage, as deep as the lowest one
                depths[name] = len(unfrozen) - 1
            else:
                continue
            parameter.requires_grad_(True)
        return depths

    def cut(self, lowest: int) -> "Cut":
        """The model, cut below the stage ``lowest``."""
        lower = {}
        for name in self.names[:lowest]:
            lower[self._model.get_submodule(name)] = name in self._returns_tuple
        return Cut(lower, self._model.get_submodule(self.names[lowest]))

    def checkpoint(self, lowest: int) -> None:
        """Has the stages from ``lowest`` up recompute their activations in the backward pass (Chen et al. 2016)."""
        for name in self.names[lowest:]:
            module = self._model.get_submodule(name)
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def _stage_names(module: nn.Module, name: str) -> Iterator[str]:
    """Yields the names of a module's children, and in the place of a child that holds lists those of its children."""
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if type(child) is nn.Sequential or any(isinstance(part, nn.ModuleList) for part in child.modules()):
            yield from _stage_names(child, path)
        else:
            yield path


def _prefixes(name: str) -> list[str]:
    """``a.b.c`` -> ``a``, ``a.b``, ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


class _CutReached(Exception):
    """Ends a forward pass at the cut; no error."""

    def __init__(self, activations: Tensor):
        self.activations = activations


class Cut:
    """A model in two parts: the lower one is passed once, and its cached activations replace it from then on.

    Args:
        lower: the stages below the cut, and whether each returns a tuple, of which activations are the first.
        first: the stage above it.
    """

    def __init__(self, lower: dict[nn.Module, bool], first: nn.Module):
        self._lower = lower
        self._first = first

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Within, forward passes end at the cut, for ``below``."""

        def stop(_module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
            raise _CutReached(_first_tensor(inputs, named))

        hook = self._first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @staticmethod
    def below(forward: Callable[[], object]) -> Tensor:
        """The activations that a forward pass has at the cut. Used within ``stopping``, from any thread.

        Raises:
            UnfreezeError: the pass does not reach the cut.
        """
        try:
            forward()
        except _CutReached as reached:
            return reached.activations
        raise UnfreezeError("a pass does not come to the lowest unfrozen layer; unfreeze another one")

    @contextlib.contextmanager
    def entered(self, activations: Tensor) -> Iterator[None]:
        """Within, a forward pass starts at the cut: the stages below return ``activations`` whatever they are given."""
        for module, returns_tuple in self._lower.items():
            output = (activations,) if returns_tuple else activations
            module.forward = partial(_constant, output)
        try:
            yield
        finally:
            for module in self._lower:
                del module.forward  # the class's own method is back


def _constant(output: Any, *_: Any, **__: Any) -> Any:
    return output


def _first_tensor(inputs: tuple, named: dict[str, Any]) -> Tensor:
    return next(value for value in (*inputs, *named.values()) if isinstance(value, Tensor))
