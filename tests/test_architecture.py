"""Who imports whom (docs/contributing.md), what is never in the code, and how fast --help answers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("configs", "extract", "heads", "retrieval", "analysis")
#: errors, Failure, whole and safe files: no stage's internals
FOUNDATION = ("configs", "extract", "extract.files", "extract.hdf5", "extract.outputs")

#: what each module may import of the project; a prefix stands for what lies below it
ALLOWED = {
    "configs": ("configs",),
    "extract.files": ("configs",),
    "extract.hdf5": ("configs", "extract.files"),
    "extract.specs": ("configs",),
    "extract.memory": (),
    "extract.inference": (),
    "extract.streams": ("configs", "extract.memory"),
    "extract.pictures": FOUNDATION,
    "extract.datasets": FOUNDATION,
    "extract.store": (*FOUNDATION, "extract.specs"),
    "extract.synthetic": FOUNDATION,
    "extract.download": (*FOUNDATION, "extract.outputs"),
    "extract.outputs": FOUNDATION,
    "extract.encoders": (*FOUNDATION, "extract.inference", "extract.pictures", "extract.specs"),
    "extract.arrays": (*FOUNDATION, "extract.store"),
    "extract.importing": (
        *FOUNDATION,
        "extract.arrays",
        "extract.datasets",
        "extract.pipeline",
        "extract.store",
    ),
    "extract.pipeline": ("configs", "extract"),
    "extract.verify": ("configs", "extract"),
    "extract": (),
    "heads.models": ("configs",),
    "heads.losses": ("configs",),
    "heads.query": (*FOUNDATION, "extract.encoders", "extract.pictures", "extract.store", "heads"),
    "heads.finetune": (
        *FOUNDATION,
        "extract.datasets",
        "extract.encoders",
        "extract.inference",
        "extract.store",
        "heads",
    ),
    "heads.sides": (
        *FOUNDATION,
        "extract.encoders",
        "extract.pictures",
        "extract.store",
        "extract.streams",
        "heads",
    ),
    "heads.thaw": ("configs",),
    "heads.workers": (),
    "heads": (*FOUNDATION, "extract.memory", "extract.specs", "extract.store", "heads"),
    "retrieval": (*FOUNDATION, "extract.memory", "extract.store", "retrieval"),
    "analysis": (*FOUNDATION, "extract.memory", "extract.pictures", "extract.store", "retrieval", "analysis"),
}
ONLY_IMPORTER = {
    "pyarrow": {"extract.arrays"},
    "faiss": {"retrieval.index"},
    "torchvision": {"extract.encoders"},
    "transformers": {"extract.encoders"},
}


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if is_module(name) else node.module for name in below)


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def rule(name):
    while name not in ALLOWED:
        name = name.rpartition(".")[0]
    return ALLOWED[name]


def within(name, allowed):
    return any(name == one or (one not in ("extract",) and name.startswith(f"{one}.")) for one in allowed)


@pytest.mark.parametrize(("name", "tree"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_imports_only_what_the_architecture_lets_it(name, tree):
    allowed = rule(name)
    for imported in imports(tree):
        top = imported.partition(".")[0]
        if top in PACKAGES:
            whole_stage = name in ("extract.pipeline", "extract.verify") and top == "extract"
            assert whole_stage or within(imported, allowed), f"{name} imports {imported}"
        assert imported != "cli", f"{name} imports the command line"
        if top in ONLY_IMPORTER:
            assert name in ONLY_IMPORTER[top], f"{name} imports {top}"
        if name.partition(".")[0] in ("retrieval", "analysis", "configs") or name in (
            "extract.store",
            "extract.datasets",
        ):
            assert top != "torch", f"{name} imports torch"


def test_the_metrics_are_pure_numpy():
    tree = dict(modules())["retrieval.metrics"]
    assert {name.partition(".")[0] for name in imports(tree)} <= {
        "collections",
        "dataclasses",
        "functools",
        "numpy",
        "configs",
    }


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
            if isinstance(node, ast.Call) and (called := ast.unparse(node.func)) in users:
                users[called].add(name)
    assert users == {"F.normalize": {"heads.models"}, "unit": {"heads.models", "heads.training"}}


def test_help_imports_neither_torch_nor_transformers_nor_faiss():
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['cli.py', '--help']\n"
        "import cli\n"
        "try:\n    cli.cli()\nexcept SystemExit:\n    pass\n"
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
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and name != "configs":
                assert [ast.unparse(base) for base in node.bases] == ["OnceoverError"], f"{name}.{node.name}"
