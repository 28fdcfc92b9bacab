"""Which layers of an encoder thaw, and a pass that begins at the lowest of them.

A model is seen as a chain of *stages*: the modules that a pass goes through one after the other, lists and sequences
taken apart, blocks left whole. Everything from the lowest thawed stage up thaws with it, so that what lies below gives
the same activations in every epoch. torch only.
"""

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from onceover.base.errors import OnceoverError

PRESETS = {"image": "image.last4", "last": "image.last4,text.last2", "all": "image.all,text.all"}


class ThawError(OnceoverError):
    """A choice of layers that does not fit the encoders."""


def parse_unfreeze(text: str) -> dict[str, list[str]]:
    """``image.NAME,text.NAME`` or a preset (``PRESETS``) -> the names by kind, only kinds that have some.

    Raises:
        ThawError: a name that belongs to neither side.
    """
    chosen: dict[str, list[str]] = {}
    for entry in PRESETS.get(text.strip(), text).split(","):
        kind, dot, name = entry.strip().partition(".")
        if kind not in ("image", "text") or not dot or not name:
            raise ThawError(
                f"{entry.strip()!r} names no layer; write image.NAME or text.NAME, with NAME a module of the encoder, "
                f"lastN or all, separated by commas; or a preset: {', '.join(PRESETS)}"
            )
        chosen.setdefault(kind, []).append(name)
    return chosen


class Stages:
    """The stages of a model, as one pass goes through them, but for those whose parameters its outputs do not need.

    Args:
        outputs: makes the pass.

    Attributes:
        names: in the order of the pass. blocks: those of them that lists are made of, which ``lastN`` counts.
    """

    def __init__(self, model: nn.Module, outputs: Callable[[], list[Tensor]]):
        self._model, seen = model, []
        candidates = list(_apart(model, ""))
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: seen.append(name))
            for name in candidates
        ]
        named = dict(model.requires_grad_(True).named_parameters())
        total = sum(output.float().sum() for output in outputs())
        for hook in hooks:
            hook.remove()
        gradients = torch.autograd.grad(total, [*named.values()], allow_unused=True)
        model.requires_grad_(False)
        self._used = {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}
        idle = {name for name in seen if self._parameters(name) and not self._parameters(name) & self._used}
        self.names = [name for name in dict.fromkeys(seen) if name not in idle]
        numbered = (name for name in self.names if name.rpartition(".")[2].isdecimal())
        self.blocks = [name for name in numbered if [*model.get_submodule(name).children()]]

    def _parameters(self, stage: str) -> set[str]:
        return {f"{stage}.{name}" for name, _ in self._model.get_submodule(stage).named_parameters()}

    def lowest(self, chosen: list[str], kind: str) -> int:
        """Where in ``names`` the lowest of the chosen layers stands; ``kind`` is for the error.

        Raises:
            ThawError: no such layer.
        """
        return min(self._place(name, kind) for name in chosen)

    def _place(self, name: str, kind: str) -> int:
        if name == "all":
            return 0
        if last := re.fullmatch(r"last(\d+)", name):
            if not self.blocks or not int(last[1]):
                near = ", ".join(f"{kind}.{stage}" for stage in self.names[-4:])
                raise ThawError(
                    f"{kind}.{name}: the {kind} encoder has {len(self.blocks)} blocks that are numbered; name a layer: "
                    f"its last ones are {near}"
                )
            return self.names.index(self.blocks[-min(int(last[1]), len(self.blocks))])
        for place, stage in enumerate(self.names):
            if stage == name or stage.startswith(f"{name}."):
                return place
        known = dict.fromkeys(part for stage in self.names for part in _prefixes(stage))
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
        raise ThawError(
            f"the {kind} encoder has no layer {name!r} that could thaw; near are "
            f"{', '.join(f'{kind}.{each}' for each in near)}"
        )

    def thaw(self, lowest: int) -> dict[str, int]:
        """Lets gradients into the stages from ``lowest`` up, and nowhere else.

        Returns:
            The names of the thawed parameters with their depth: 0 in the topmost stage that has any.
        """
        self._model.requires_grad_(False)
        thawed = [name for name in self.names[lowest:] if self._parameters(name)]
        depth = {name: len(thawed) - 1 - place for place, name in enumerate(thawed)}
        depths: dict[str, int] = {}
        for name, parameter in self._model.named_parameters():
            stage = next((prefix for prefix in _prefixes(name) if prefix in depth), None)
            if name in self._used and (
                stage or lowest == 0
            ):  # of a whole model what belongs to no stage thaws too, as deep as the lowest one
                depths[name] = depth[stage] if stage else len(thawed) - 1
                parameter.requires_grad_(True)
        return depths

    def cut(self, lowest: int) -> "Cut":
        """The model cut below the stage ``lowest``."""
        modules = [self._model.get_submodule(name) for name in self.names[: lowest + 1]]
        return Cut(modules[:-1], modules[-1])

    def checkpoint(self, lowest: int) -> None:
        """Has the stages from ``lowest`` up keep their inputs alone for the way back (Chen et al. 2016)."""
        for name in self.names[lowest:]:
            module = self._model.get_submodule(name)
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def _apart(module: nn.Module, name: str) -> Iterator[str]:
    """Names of what ``module`` is taken apart into: itself, unless it is a list or holds lists."""
    for child, part in module.named_children():
        path = f"{name}.{child}" if name else child
        if type(part) is nn.Sequential or any(isinstance(each, nn.ModuleList) for each in part.modules()):
            yield from _apart(part, path)
        else:
            yield path


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


class _Reached(Exception):
    """No error, but the end of a pass that was wanted no further."""

    def __init__(self, activations: Tensor):
        self.activations = activations


class Cut:
    """A model in two parts: what lies below is passed once, and its activations stand for it from then on.

    Args:
        lower: the stages below the cut, in order. first: the stage above it.
    """

    def __init__(self, lower: list[nn.Module], first: nn.Module):
        self._lower, self._first = lower, first

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Within, passes end at the cut, for ``below``."""

        def stop(_module, inputs, named):
            raise _Reached(_first_tensor(inputs, named))

        hook = self._first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @staticmethod
    def below(forward: Callable[[], object]) -> Tensor:
        """What a pass brings to the cut, within ``stopping``; from several threads at will.

        Raises:
            ThawError: the pass does not come there.
        """
        try:
            forward()
        except _Reached as reached:
            return reached.activations
        raise ThawError("a pass does not come to the lowest thawed layer; thaw another one")

    @contextlib.contextmanager
    def entered(self, activations: Tensor) -> Iterator[None]:
        """Within, a pass begins at the cut: whatever enters the model, ``activations`` come out of the stages below."""
        for module in self._lower:
            module.forward = lambda *_, **__: activations
        try:
            yield
        finally:
            for module in self._lower:
                del module.forward


def _first_tensor(inputs: tuple, named: dict) -> Tensor:
    return next(value for value in (*inputs, *named.values()) if isinstance(value, Tensor))
