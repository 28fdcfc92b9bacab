"""The examples in the docstrings of the public names, run in a folder with a small dataset, store and two runs."""

import doctest
import shutil

import pytest
import yaml

import onceover
from onceover import workflows

NAMES = sorted({*onceover.__all__} - {"OnceoverError"})


@pytest.fixture(scope="module")
def examples_folder(tmp_path_factory, drawn, store_file, run_dir, fit_config, changed_config):
    """``data``, ``store.h5``, ``runs/first`` and ``runs/second``, and the default settings of the examples."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(drawn, folder / "data")
    shutil.copy(store_file, folder / "store.h5")
    shutil.copytree(run_dir, folder / "runs/first")
    workflows.fit(folder / "store.h5", folder / "runs/second", changed_config, device="cpu")
    (folder / "defaults.yaml").write_text(yaml.safe_dump(fit_config.to_dict()))
    return folder


@pytest.fixture(scope="module")
def changed_config(fit_config):
    from dataclasses import replace

    return replace(fit_config, training=replace(fit_config.training, seed=1, num_epochs=2))


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_runs(name, examples_folder, monkeypatch):
    monkeypatch.chdir(examples_folder)
    monkeypatch.setattr(workflows, "DEFAULT_CONFIG", examples_folder / "defaults.yaml")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    runner = doctest.DocTestRunner(optionflags=options)
    documented = doctest.DocTestFinder(recurse=False).find(getattr(onceover, name), name, globs={"onceover": onceover})
    examples = [test for test in documented if test.examples]
    assert examples, f"{name} has no example"
    report = []
    for test in examples:
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
