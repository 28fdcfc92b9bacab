"""The wheel: it holds the package and nothing else, and works away from the checkout."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import onceover
from onceover.base.temporary import read_at

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("analysis", "base", "configs", "extract", "heads", "retrieval", "serve")
KINDS = (".py", ".yaml", ".typed", ".html", ".css", ".js")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built of a copy of the checkout's package."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE", "py.typed"))]:
        shutil.copy2(path, source)
    pip(folder, "wheel", "--no-build-isolation", "--wheel-dir", folder, source)
    return next(folder.glob("*.whl"))


def pip(folder, command, *arguments):
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
    call = [sys.executable, "-m", "pip", command, *options, *map(str, arguments)]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs the installed package's Python in a folder of its own, away from the checkout."""
    site = tmp_path_factory.mktemp("site")
    pip(site, "install", "--target", site, wheel)
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(*arguments):
        call = [sys.executable, *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run(call, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done

    run.site = site
    run.folder = elsewhere
    return run


def test_the_wheel_holds_the_package_and_nothing_at_top_level_but_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {name for name in names if name.endswith(KINDS)}
    expected = {"onceover/py.typed", *(f"onceover/{path.name}" for path in ROOT.glob("*.py"))}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix not in KINDS:
                continue
            expected.add(f"onceover/{path.relative_to(ROOT).as_posix()}")
    assert modules == expected
    top = {name.split("/")[0] for name in names}
    assert top == {"onceover", f"onceover_retrieval-{onceover.__version__}.dist-info"}


def test_the_installed_package_works_away_from_the_checkout(installed, extract_config):
    where = installed("-c", "import onceover; print(onceover.__file__)").stdout.strip()
    assert where == str(installed.site / "onceover/__init__.py")
    assert installed("-m", "onceover", "--version").stdout == f"onceover {onceover.__version__}\n"
    encoders = ("--image-encoder", extract_config.image_encoder, "--text-encoder", extract_config.text_encoder)
    extract = ("extract", "--data", "data", "--store", "s.h5", "--device", "cpu", *encoders)
    script = (
        "import onceover\n"
        "from onceover.cli import cli\n"
        "from onceover.extract.synthetic import draw_dataset\n"
        "draw_dataset('data', 36, 12, 12)\n"
        f"cli({extract}, standalone_mode=False)\n"
        "config = onceover.load_config(None, ['training.num_epochs=2', 'training.refit=false'])\n"
        "run = onceover.fit('s.h5', 'run', config, device='cpu')\n"
        "print(onceover.evaluate(run))\n"
        "for hit in onceover.search(run, 'a red circle', device='cpu'):\n"
        "    print(hit.path)\n"
    )
    done = installed("-c", script)
    assert "next: onceover fit --store s.h5 --run runs/first" in done.stderr
    output = done.stdout
    assert "multimodal" in output
    assert output.count("images/") == 5


def test_a_bare_checkout_answers_without_an_installation(tmp_path):
    call = [sys.executable, str(ROOT / "cli.py"), "--version"]
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"onceover {onceover.__version__}\n"


def test_the_api_reference_is_made_without_a_warning(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc, of the extra dev, is not installed")
    call = [sys.executable, "-W", "error", str(ROOT / "docs/make_api.py"), "--out", str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "onceover.html").read_text()
    for name in onceover.__all__:
        assert f'id="{name}"' in page
    assert 'id="Layout.find"' in (tmp_path / "onceover/extract/layouts.html").read_text()
    lines = (ROOT / "Makefile").read_text().splitlines()
    assert "\t$(BIN)/python -W error docs/make_api.py --out docs/api" in lines


def test_every_public_name_is_there_and_listed():
    for name in onceover.__all__:
        assert getattr(onceover, name) is not None
        assert name in dir(onceover)
    with pytest.raises(AttributeError, match="module 'onceover' has no attribute 'nothing'"):
        _ = onceover.nothing


def test_trap_every_module_is_imported_without_what_unix_alone_has():
    """Windows has neither resource nor fcntl, nor some functions of os."""
    script = """
import importlib, os, pkgutil, sys
import faiss, filelock, h5py, matplotlib.pyplot, torch, transformers
sys.modules["resource"] = None
sys.modules["fcntl"] = None
for name in ("sysconf", "preadv", "pread", "posix_fallocate", "sched_getaffinity", "register_at_fork", "fork"):
    delattr(os, name)
import onceover
from onceover.base.temporary import read_at
modules = [module.name for module in pkgutil.walk_packages(onceover.__path__, "onceover.")]
wanted = [name for name in modules if not name.startswith(("onceover.tests", "onceover.benchmarks", "onceover.docs"))]
for name in wanted:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(wanted))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 80


def test_rows_are_read_alike_where_a_file_has_one_place_for_all_threads(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(bytes(range(100)))
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)
    results = []
    for _ in range(2):
        view = memoryview(bytearray(9))
        results.append((read_at(descriptor, view, 90), bytes(view)))
        results.append((read_at(descriptor, view, 95), bytes(view)[:5]))
        monkeypatch.delattr(os, "preadv", raising=False)
    os.close(descriptor)
    assert results[:2] == results[2:] == [(9, bytes(range(90, 99))), (5, bytes(range(95, 100)))]


def test_the_oldest_releases_that_are_tested_are_those_that_are_allowed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [ranges for name, ranges in settings["optional-dependencies"].items() if name != "dev"]
    ranges = sum(extras, settings["dependencies"])
    lowest = {name: tuple(map(int, low.split("."))) for name, low in (re.split(">=|,", text)[:2] for text in ranges)}
    pinned = {}
    for line in (ROOT / "requirements-oldest.txt").read_text().split("# of the libraries above")[0].splitlines():
        if match := re.match(r"([\w-]+)==([\d.]+)", line):
            pinned[match[1]] = tuple(map(int, match[2].split(".")))
    assert pinned.keys() == lowest.keys()
    for name, low in lowest.items():
        assert pinned[name][: len(low)] == low, name
        assert not any(pinned[name][len(low) :]), name
