"""A registry: the modules of a folder, and those that other packages add by entry points, imported when asked for."""

import difflib
import pkgutil
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from onceover.base.errors import OnceoverError


class RegistryError(OnceoverError):
    """A name that is not registered, or a registered module that cannot be imported."""

    exit_code = 2


class Registry:
    """Items registered under names: each module of a folder is one, and its file's name is the item's name.

    Modules whose names begin with an underscore are not items. Another package adds items by entry points.

    Args:
        folder: the package that holds the items, for example ``onceover.heads.losses``.
        group: the group of entry points, for example ``onceover.losses``.
        noun: what an item is, for messages.
    """

    def __init__(self, folder: str, group: str, noun: str):
        self._folder = folder
        self._group = group
        self._noun = noun

    def names(self) -> list[str]:
        """The names of all items, sorted; none is imported."""
        return sorted({*_modules(self._folder), *self._added()})

    def load(self, name: str) -> Any:
        """The item of that name: its module, or whatever an entry point of another package names.

        Raises:
            RegistryError: no such item, two packages that claim the name, or an item that cannot be imported.
        """
        if name in _modules(self._folder):
            return import_module(f"{self._folder}.{name}")
        claims = self._added().get(name)
        if claims is None:
            raise RegistryError(self._unknown(name))
        if len(claims) > 1:
            packages = ", ".join(sorted(_package(claim) for claim in claims))
            raise RegistryError(f"the {self._noun} {name!r} is claimed by several packages ({packages}); keep one")
        try:
            return claims[0].load()
        except Exception as error:  # another package's code
            raise RegistryError(
                f"the {self._noun} {name!r} of the package {_package(claims[0])} cannot be imported "
                f"({type(error).__name__}: {error}); mend or remove that package"
            ) from error

    def _added(self) -> dict[str, list[EntryPoint]]:
        """The entry points of other packages, by the names of their items."""
        added: dict[str, list[EntryPoint]] = {}
        for entry_point in installed(self._group):
            added.setdefault(entry_point.name, []).append(entry_point)
        return added

    def _unknown(self, name: str) -> str:
        names = self.names()
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(names)}"
        return f"there is no {self._noun} {name!r}; {hint}"


@cache
def _modules(folder: str) -> frozenset[str]:
    """The names of the modules in a package's folder."""
    package = import_module(folder)
    return frozenset(
        module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")
    )


@cache
def installed(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group in all installed packages, which takes reading all of them: done once."""
    return tuple(entry_points(group=group))


def _package(entry_point: EntryPoint) -> str:
    """The name of the package that an entry point belongs to."""
    return entry_point.dist.name if entry_point.dist else entry_point.value
