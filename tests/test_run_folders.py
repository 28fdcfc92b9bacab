"""A run's folder: only files in its record are removed or replaced, no link is followed, nobody's folder is a run."""

import contextlib
import shutil
from pathlib import Path

import pytest

from onceover import workflows
from onceover.base.files import file_sha256
from onceover.base.outputs import OutputError
from onceover.heads.checkpoint import RunError, load_run
from onceover.heads.training import fit


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its name."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.endswith(".lock"))
    return {str(file.relative_to(folder)): file_sha256(file) for file in files}


@pytest.fixture
def mine(run_dir, tmp_path) -> Path:
    """A copy of the run."""
    return shutil.copytree(run_dir, tmp_path / "mine")


@pytest.mark.parametrize("name", [".swap", ".next", "tokenizer", "encoders/text", "shuffled"])
def test_trap_no_link_in_a_run_leads_to_the_loss_of_another_ones_files(name, run, store, mine, run_dir, fit_config):
    """A command on a run whose inner folder is a link touches nothing of what the link leads to."""
    other = shutil.copytree(run_dir, mine.parent / "other")
    if name == "encoders/text":
        (mine / "encoders").mkdir()
        for file in ("config.json", "model.safetensors"):
            (other / file).write_text("weights")
    if (mine / name).exists():
        shutil.rmtree(mine / name)
    (mine / name).symlink_to(other)
    before = contents(other)
    for arguments in (("evaluate", "--run", mine), ("search", "--run", mine, "--query", "a dog", "--device", "cpu")):
        with contextlib.suppress(AssertionError):  # it may work, or end with an error
            run(*arguments)
    if name == "shuffled":
        run("evaluate", "--run", mine, "--shuffled", code=1)
    else:
        with pytest.raises((RunError, OutputError)):
            fit(store, mine, fit_config, force=True)
    assert contents(other) == before


@pytest.mark.parametrize(
    "name", ["shuffled/run.json", ".trial/notes.txt", "encoders/image/notes.txt", "tokenizer/a.txt"]
)
def test_trap_force_leaves_strangers_files_within_a_run(name, store, mine, fit_config):
    (mine / name).parent.mkdir(parents=True, exist_ok=True)
    (mine / name).write_text("mine")
    fit(store, mine, fit_config, force=True)
    assert (mine / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["tokenizer/spiece.model", "encoders/image/config.json", "finetune.json"])
def test_trap_force_refuses_where_somebody_elses_file_has_a_name_that_a_run_needs(name, store, mine, fit_config):
    (mine / name).parent.mkdir(parents=True, exist_ok=True)
    (mine / name).write_text("mine")
    before = contents(mine)
    with pytest.raises(OutputError, match="was not written by this program, and is left as it is; move it elsewhere"):
        fit(store, mine, fit_config, force=True)
    assert contents(mine) == before


def test_trap_a_strangers_file_in_next_does_not_replace_the_runs_own(store, mine, fit_config, monkeypatch):
    (mine / "notes.txt").write_text("of the run")
    monkeypatch.setattr("onceover.heads.replacement.take_over", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fit(store, mine, fit_config, force=True)
    monkeypatch.undo()
    (mine / ".next/notes.txt").write_text("of a stranger")
    fit(store, mine, fit_config, force=True)
    assert (mine / "notes.txt").read_text() == "of the run"
    assert (mine / ".swap/notes.txt").read_text() == "of a stranger"
    assert load_run(mine)


def test_trap_what_was_changed_in_a_run_is_kept_when_force_replaces_it(store, mine, fit_config):
    (mine / "config.yaml").write_text("# my notes")
    fit(store, mine, fit_config, force=True)
    assert (mine / "config.yaml.1.old").read_text() == "# my notes"
    (mine / "config.yaml").write_text("# more of them")
    fit(store, mine, fit_config, force=True)
    assert (mine / "config.yaml.2.old").read_text() == "# more of them"
    assert load_run(mine)


@pytest.mark.parametrize("name", ["resume.pt", "finetune.json"])
@pytest.mark.parametrize("force", [False, True])
def test_trap_a_folder_with_a_file_of_our_names_is_no_run(name, force, store, fit_config, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for file in (name, "config.yaml", "history.csv"):
        (folder / file).write_text("{}")
    before = contents(folder)
    with pytest.raises(RunError, match="theirs is not empty and no run; name a new folder"):
        fit(store, folder, fit_config, force=force)
    assert contents(folder) == before


def test_trap_a_forced_fit_that_was_killed_at_its_first_file_goes_on(store, mine, fit_config):
    (mine / ".next").mkdir()
    (mine / ".next/.resume.4194305.aside.pt").write_bytes(b"half")
    (mine / ".next/..onceover.4194305.aside.json").write_bytes(b"half")
    fit(store, mine, fit_config, force=True)
    assert load_run(mine)
    assert not (mine / ".next").exists()


def test_trap_a_run_without_its_record_adopts_only_what_is_as_it_was_written(store, mine, fit_config):
    """Dotfiles are lost when a folder's content is copied."""
    (mine / ".onceover.json").unlink()
    (mine / "encoders/image").mkdir(parents=True)
    (mine / "encoders/image/model.safetensors").write_text("my only copy")
    with pytest.raises(OutputError, match="model.safetensors was not written by this program"):
        fit(store, mine, fit_config, force=True)
    assert (mine / "encoders/image/model.safetensors").read_text() == "my only copy"
    shutil.rmtree(mine / "encoders")
    (mine / ".onceover.json").unlink()
    (mine / "history.csv").write_text("edited")
    with pytest.raises(OutputError, match="history.csv was not written by this program"):
        fit(store, mine, fit_config, force=True)


def test_trap_a_run_that_somebody_copied_to_swap_replaces_nothing(run, store, mine, run_dir, fit_config, changed):
    other = mine.parent / "other"
    fit(store, other, changed(fit_config, training={"seed": 7}))
    shutil.copytree(other, mine / ".swap")
    before = contents(mine)
    run("info", mine)
    assert load_run(mine).config.training.seed == load_run(run_dir).config.training.seed
    assert contents(mine) == before
    with pytest.raises(RunError, match="is where a run is replaced, and holds something else; move it elsewhere"):
        fit(store, mine, fit_config, force=True)


def test_trap_hidden_files_in_next_are_in_nobodys_way(store, mine, fit_config, changed):
    for seed in (3, 4):
        (mine / ".next").mkdir(exist_ok=True)
        (mine / ".next/.DS_Store").write_text("of the system")
        fit(store, mine, changed(fit_config, training={"seed": seed}), force=True)
        assert load_run(mine).config.training.seed == seed
        assert (mine / ".next/.DS_Store").read_text() == "of the system"


def test_trap_an_evaluation_of_another_run_is_not_believed(run, store, mine, fit_config, changed, one_format):
    other = mine.parent / "other"
    fit(store, other, changed(fit_config, training={"seed": 7}))
    run("evaluate", "--run", other)
    shutil.copy(other / "evaluation-test.json", mine / "evaluation-test.json")
    assert "evaluation-test.json is of another run, and is not shown" in run("info", mine).stdout
    refused = run("plot", "--run", mine, "--out", mine.parent / "figures", code=1).stderr
    assert "evaluation-test.json is of another run; move it elsewhere and evaluate again" in refused


def test_a_run_of_an_earlier_version_has_no_record_and_is_replaced_all_the_same(store, mine, fit_config, changed):
    (mine / ".onceover.json").unlink()
    (mine / "notes.txt").write_text("mine")
    config = changed(fit_config, training={"seed": 3})
    fit(store, mine, config, force=True)
    assert load_run(mine).config.training.seed == 3
    assert (mine / "notes.txt").read_text() == "mine"
    assert not list(mine.glob("*.old"))


def test_trap_a_hostile_record_names_nothing_outside_its_folder(store, mine, fit_config):
    from onceover.base.files import read_record, write_record

    victim = mine.parent / "victim.txt"
    victim.write_text("theirs")
    record = read_record(mine / ".onceover.json", "a record")
    for name in ("../victim.txt", str(victim), "tokenizer/../../victim.txt"):
        write_record(mine / ".onceover.json", record | {"files": {name: [file_sha256(victim)]}})
        with pytest.raises(Exception, match="is no record of this program's; move it elsewhere"):
            fit(store, mine, fit_config, force=True)
        assert victim.read_text() == "theirs"


def test_trap_embeddings_of_another_run_are_refused_everywhere(run, store, mine, fit_config, changed):
    """Whether its heads are others, or the same ones with another correction."""
    other_way = {"none": "qbnorm", "qbnorm": "none"}[fit_config.model.rerank]
    others = {
        "heads": changed(fit_config, training={"seed": 7}),
        "correction": changed(fit_config, model={"rerank": other_way}),
    }
    for name, config in others.items():
        other = mine.parent / name
        fit(store, other, config)
        shutil.copy(other / "embeddings.h5", mine / "embeddings.h5")
        for arguments in (
            ("evaluate", "--run", mine),
            ("compare", mine, other),
            ("ensemble", mine, other, "--out", mine.parent / "joined"),
            ("plot", "--run", mine, "--out", mine.parent / "figures"),
            ("index", "--run", mine),
            ("search", "--run", mine, "--query", "a dog", "--device", "cpu"),
        ):
            stderr = run(*arguments, code=1).stderr
            assert f"{mine / 'embeddings.h5'} is not the file that the fit wrote, or is damaged" in stderr, arguments


def test_trap_a_users_run_in_the_place_of_the_sanity_check_is_left_alone(mine, run_dir, store_file):
    shutil.copytree(run_dir, mine / "shuffled")
    before = contents(mine / "shuffled")
    with pytest.raises(RunError, match="holds another run, and the sanity check"):
        workflows.evaluate(mine, store=store_file, shuffled=True)
    assert contents(mine / "shuffled") == before


def test_trap_a_users_run_of_shuffled_pairs_is_not_replaced(mine, store_file, store, fit_config, changed):
    own = changed(fit_config, training={"shuffle_pairs": True, "num_epochs": 2}, model={"embedding_dim": 9})
    fit(store, mine / "shuffled", own)
    with pytest.raises(RunError, match="holds another run, and the sanity check"):
        workflows.evaluate(mine, store=store_file, shuffled=True)
    assert load_run(mine / "shuffled").config.model.embedding_dim == 9
    shutil.rmtree(mine / "shuffled")
    workflows.evaluate(mine, store=store_file, shuffled=True)
    fit(store, mine, changed(fit_config, model={"embedding_dim": 12}), force=True)
    workflows.evaluate(mine, store=store_file, shuffled=True)  # replaces its own
    assert load_run(mine / "shuffled").config.model.embedding_dim == 12


@pytest.mark.parametrize("options", [(), ("--force",), ("--force", "--re-extract")])
def test_trap_fine_tuning_never_replaces_a_finished_run(run, mine, drawn, store_file, options):
    """Features of the new encoders would still be missing when the old run is gone."""
    other = shutil.copytree(mine, mine.parent / "tuned")
    before = contents(other)
    refused = run("finetune", "--run", mine, "--data", drawn, "--store", store_file, "--out", other, *options, code=1)
    assert "holds a finished run, which fine-tuning does not replace" in refused.stderr
    assert contents(other) == before


def test_images_that_a_re_extraction_would_miss_are_told_of_before_anything_is_trained(
    run, mine, drawn, store_file, tmp_path
):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(drawn, elsewhere)
    (elsewhere / "images/0003.jpg").unlink()
    command = ("finetune", "--run", mine, "--data", elsewhere, "--store", store_file, "--out", tmp_path / "tuned")
    assert "1 of the 60 images of" in run(*command, "--re-extract", code=1).stderr
    assert not (tmp_path / "tuned").exists()


def test_trap_a_users_run_in_best_is_left_alone(run, run_dir, store_file, tmp_path, one_format):
    grid = ("--store", store_file, "--out", tmp_path / "s", "--grid", "model.temperature=0.04,0.06")
    short = ("--set", "training.num_epochs=2", "--set", "model.embedding_dim=8", "--set", "training.refit=false")
    run("sweep", *grid, *short)
    shutil.copytree(run_dir, tmp_path / "s/best")
    before = contents(tmp_path / "s/best")
    refused = run("sweep", *grid, *short, "--test-best", code=1).stderr
    assert "best holds a run that this sweep has not made; move it elsewhere" in refused
    assert contents(tmp_path / "s/best") == before
    shutil.rmtree(tmp_path / "s/best")
    run("sweep", *grid, *short, "--test-best")


@pytest.mark.parametrize("way", ["copied", "linked"])
def test_trap_another_store_in_an_index_is_left_alone(way, fails, run_dir, store_file, drawn, tmp_path):
    (tmp_path / "index").mkdir()
    store = shutil.copy(store_file, tmp_path / "store.h5")
    if way == "copied":
        shutil.copy(store, tmp_path / "index/images.h5")
    else:
        (tmp_path / "index/images.h5").symlink_to(store)
    (tmp_path / "index/.onceover.json").write_text(_claimed())
    before = contents(tmp_path)
    message = fails("index", "--run", run_dir, "--images", drawn / "images", "--index", tmp_path / "index")
    assert "images.h5 is " in message
    assert "and features are to be kept there; move it elsewhere" in message
    assert contents(tmp_path) == before


@pytest.mark.parametrize("way", ["copied", "linked"])
def test_trap_another_store_in_a_fine_tuned_run_is_left_alone(way, mine, store_file, drawn, monkeypatch):
    if way == "copied":
        shutil.copy(store_file, mine / "store.h5")
    else:
        (mine / "store.h5").symlink_to(store_file)
    (mine / "config.yaml").write_text(f"extract:\n  image_encoder: hf:{mine / 'encoders/image'}\n")
    with pytest.raises(RunError, match="is not a store of the encoders in .*; move it elsewhere"):
        workflows.complete_finetuned(store_file, drawn, mine, device="cpu")


def _claimed() -> str:
    from onceover.base.files import json_text, sealed

    return json_text(sealed({"format": "onceover folder", "claimed": True, "files": {}}))
