"""Which module may import which (docs/contributing.md), what is never in the code, and how fast --help answers."""

import ast
import graphlib
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: from the ground up; a folder imports its own modules and floors below it
FLOORS = (
    ("base",),
    ("configs",),
    ("extract",),
    ("retrieval",),
    ("heads", "analysis"),
    ("workflows", "serve"),
    ("cli",),
)
PACKAGES = ("base", "configs", "extract", "retrieval", "heads", "analysis", "serve")
ONLY_IMPORTER = {
    "pyarrow": {"extract.dataset.parquet"},
    "ray": {"extract.engines.ray"},
    "tqdm": {"base.progress"},
    "jinja2": {"analysis.pages"},
    "fastapi": {"serve.api"},
    "uvicorn": {"serve.connections", "serve.server"},
    "faiss": {"retrieval.exact", "retrieval.index.faiss_files"},
    "torchvision": {"extract.encoders.torchvision"},
    "transformers": {
        "extract.encoders.huggingface",
        "extract.encoders.sentence_transformers",
        "extract.encoding.quiet",
        "extract.encoding.tokenizer_files",
        "extract.encoding.vocabulary",
    },
}
WITHOUT_TORCH = ("configs", "retrieval", "analysis", "extract.store", "extract.dataset", "extract.layouts")


@cache
def modules():
    """The name and syntax tree of every module."""
    return list(parsed())


def parsed():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), ast.parse(path.read_text())
    for path in sorted(ROOT.glob("*.py")):
        if path.stem not in ("__init__", "__main__"):
            yield path.stem, ast.parse(path.read_text())


def imports(tree):
    """The modules that a module imports, of this project without the leading ``onceover.``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("onceover.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                below = f"{node.module}.{alias.name}".removeprefix("onceover.")
                yield below if is_module(below) else node.module.removeprefix("onceover.")


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def floor(name):
    """The number of a module's floor; None where it is not of this project."""
    folder = name.partition(".")[0]
    return next((number for number, folders in enumerate(FLOORS) if folder in folders), None)


@pytest.mark.parametrize(("name", "tree"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_imports_its_own_folder_and_the_floors_below(name, tree):
    folder = name.partition(".")[0]
    for imported in imports(tree):
        top = imported.partition(".")[0]
        if floor(imported) is not None and top != folder:
            assert floor(imported) < floor(name), f"{name} imports {imported}"
        if top in ONLY_IMPORTER:
            assert name in ONLY_IMPORTER[top], f"{name} imports {top}"
        if any(name == module or name.startswith(f"{module}.") for module in WITHOUT_TORCH):
            assert top != "torch", f"{name} imports torch"


def test_no_two_files_need_each_other():
    graph = {}
    for name, tree in modules():
        graph[name] = {imported for imported in imports(tree) if floor(imported) is not None and imported != name}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"imports run in a circle: {' -> '.join(error.args[1])}")


def test_the_list_of_packages_is_that_of_the_folders():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = settings["tool"]["setuptools"]["packages"]
    found = ["onceover"]
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            found.append(".".join(("onceover", *path.parent.relative_to(ROOT).parts)))
    assert sorted(listed) == sorted(found)


@pytest.mark.parametrize("module", ["retrieval.ranks", "retrieval.metrics"])
def test_the_metrics_are_pure_numpy(module):
    names = {name if name == "retrieval.ranks" else name.partition(".")[0] for name in imports(dict(modules())[module])}
    assert names <= {"base", "collections", "dataclasses", "functools", "numpy", "retrieval.ranks", "typing"}


def test_trap_nothing_is_unpickled():
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if call == "torch.load":
                    assert keywords.get("weights_only") == "True", name
                assert call not in ("pickle.load", "pickle.loads", "joblib.load", "torch.hub.load"), name
                assert keywords.get("allow_pickle") != "True", name


def test_trap_embeddings_are_normalised_in_one_module():
    users: dict[str, set] = {"F.normalize": set(), "unit": set()}
    for name, tree in modules():
        for node in ast.walk(tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else None
            if called in users and not name.startswith("heads.losses."):  # cosines within a loss
                users[called].add(name)
    assert users == {"F.normalize": {"heads.models"}, "unit": {"heads.models", "heads.training_data"}}


def test_help_imports_neither_torch_nor_transformers_nor_faiss():
    script = (
        "import sys; sys.argv = ['onceover', '--help']\n"
        "from onceover.cli import cli\n"
        "try:\n    cli()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'torchvision', 'transformers', 'faiss', 'h5py', 'numpy', 'sklearn', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "extract" in done.stdout


def test_every_class_of_error_is_the_users_kind():
    """Domain errors derive from OnceoverError, so that the command line can tell a mistake from a bug."""
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and name != "base.errors":
                assert [ast.unparse(base) for base in node.bases] == ["OnceoverError"], f"{name}.{node.name}"
