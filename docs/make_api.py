"""Writes the API reference, HTML pages made by pdoc from the docstrings, to docs/api. ``make docs`` runs it.

It covers the public names of ``onceover``, and the seams: what an extension imports or implements.
"""

import argparse
import ast
import inspect
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import pdoc

MODULES = (
    "onceover",
    "onceover.extract.layouts",
    "onceover.extract.dataset.rows",
    "onceover.extract.image_source",
    "onceover.extract.encoders",
    "onceover.extract.engines",
    "onceover.extract.backends",
    "onceover.heads.losses",
    "onceover.analysis.figures",
    "onceover.base.registry",
    "onceover.configs.schema",
    "onceover.retrieval.search",
    "onceover.retrieval.index",
)


def import_annotations(module: ModuleType) -> None:
    """Runs the imports under ``if TYPE_CHECKING``, so that pdoc can resolve lazily imported names and annotations."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            exec(compile(ast.Module(node.body, []), module.__name__, "exec"), vars(module))
    for value in [*vars(module).values()]:
        if isinstance(value, type) and issubclass(value, tuple) and value.__module__ == module.__name__:
            value.__new__.__annotations__ = get_type_hints(value)  # of a NamedTuple pdoc does not know the module


def main() -> None:
    """Writes the pages to the folder that ``--out`` names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "api", help="Folder to write.")
    out = parser.parse_args().out
    for name in MODULES:
        import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "onceover"]:
        import_annotations(sys.modules[name])
    pdoc.render.configure(docformat="google", footer_text=f"onceover {sys.modules['onceover'].__version__}")
    pdoc.pdoc(*MODULES, output_directory=out)


if __name__ == "__main__":
    main()
