"""Packages that only some uses need, which the project's optional extras install."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

from onceover.base.errors import OnceoverError, first_line


class MissingPackageError(OnceoverError):
    """A package that is needed and not installed, or that cannot be imported."""


class Extra(NamedTuple):
    """A package that one of the project's extras installs.

    Attributes:
        name: of the extra.
        package: its name on PyPI.
        module: its name in Python.
    """

    name: str
    package: str
    module: str

    def imported(self, user: str, otherwise: str = "") -> ModuleType:
        """The module.

        Args:
            user: what needs it, which begins the message. otherwise: what can be done instead.

        Raises:
            MissingPackageError: it is not installed, or cannot be imported.
        """
        try:
            return import_module(self.module)
        except ImportError as error:
            raise self._missing(user, first_line(error), otherwise) from error

    def is_installed(self) -> bool:
        """Whether the module is there, had without importing it."""
        return find_spec(self.module) is not None

    def version(self, user: str) -> str:
        """The package's version, had without importing it.

        Raises:
            MissingPackageError: it is not installed.
        """
        try:
            return version(self.package)
        except PackageNotFoundError as error:
            raise self._missing(user, "it is not installed", "") from error

    def _missing(self, user: str, reason: str, otherwise: str) -> MissingPackageError:
        line = f"{user} needs the package {self.package} ({reason}); pip install 'onceover-retrieval[{self.name}]'"
        return MissingPackageError(f"{line}, or {otherwise}" if otherwise else line)
