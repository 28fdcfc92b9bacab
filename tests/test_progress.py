"""Progress and messages: a bar on a terminal, lines elsewhere, and what --quiet and --verbose leave or add."""

import logging
import os
import pty
import shutil
import subprocess
import sys
import termios

import pytest

from onceover.base import progress
from onceover.base.progress import LOGGER, ProgressBar, muted, say, tracked, warn

LONG_WORK = """
from onceover.base.progress import ProgressBar
with ProgressBar("image", "rows", total=200) as bar:
    for _ in range(200):
        bar.show(loss=0.5)
        bar.update()
"""


@pytest.fixture
def clock(monkeypatch):
    """The seconds that have passed; a test moves them on."""
    seconds = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.fixture(autouse=True)
def default_level(monkeypatch):
    """The logger as it is before anybody sets it up."""
    monkeypatch.setattr(LOGGER, "handlers", [])
    before = LOGGER.level
    LOGGER.setLevel(logging.NOTSET)
    yield
    LOGGER.setLevel(before)


def on_a_terminal(script: str) -> str:
    """What a script prints on stderr, which is a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    subprocess.run([sys.executable, "-W", "error", "-c", script], stderr=theirs, check=True)
    os.close(theirs)
    text = b""
    try:
        while block := os.read(ours, 65536):
            text += block
    except OSError:  # Linux: nobody has the other end open any more
        pass
    os.close(ours)
    return text.decode()


def test_a_terminal_shows_a_bar():
    text = on_a_terminal(LONG_WORK)
    assert "image: 100%|" in text
    assert "200/200" in text
    assert " rows/s, loss 0.5]" in text


def test_the_loggers_level_silences_the_bar():
    silence = "import logging\nlogging.getLogger('onceover').setLevel(logging.WARNING)\n"
    assert on_a_terminal(silence + LONG_WORK) == ""


def test_a_notebook_without_widgets_shows_a_bar_of_text_and_no_warning():
    kernel = "from ipykernel.kernelapp import IPKernelApp\nIPKernelApp.instance()\n"
    text = on_a_terminal(kernel + LONG_WORK)
    assert "image: 100%|" in text
    assert "IProgress" not in text


def test_elsewhere_a_line_comes_every_30_seconds(clock, told):
    with ProgressBar("image", "rows", total=5000, initial=1000) as bar:
        for _ in range(8):
            clock[0] += 10
            bar.show(decode="70 %")
            bar.update(100)
    assert told == [
        "image: 1,300 of 5,000 rows, 10.0 rows/s, 6:10 left (decode 70 %)",
        "image: 1,600 of 5,000 rows, 10.0 rows/s, 5:40 left (decode 70 %)",
    ]


def test_work_of_less_than_30_seconds_leaves_no_line(clock, told):
    for _ in tracked(range(29), "unpack", "files"):
        clock[0] += 1
    assert told == []


def test_a_total_that_is_unknown_or_grows(clock, told):
    with ProgressBar("cca", "candidates") as bar:
        clock[0] += 40
        bar.update(10)
        bar.add_total(400)
        clock[0] += 40
        bar.update(10)
    assert told == [
        "cca: 10 candidates, 0.2 candidates/s",
        "cca: 20 of 400 candidates, 0.2 candidates/s, 25:20 left",
    ]


def test_bytes_are_shown_as_megabytes_and_hours_as_such(clock, told):
    with ProgressBar("images", "B", total=100_000_000_000) as bar:
        clock[0] += 60
        bar.update(600_000_000)
    assert told == ["images: 600.0 MB of 100,000.0 MB, 10.0 MB/s, 2:45:40 left"]


def test_python_shows_warnings_alone_unless_logging_is_set_up(clock, capsys):
    with ProgressBar("image", "rows", total=2) as bar:
        clock[0] += 60
        bar.update()
        say("a note")
    assert capsys.readouterr().err == ""


def test_a_muted_process_shows_nothing(clock, told):
    with muted(), ProgressBar("finetune", "steps", total=2) as bar:
        clock[0] += 60
        bar.update()
        say("a note")
        warn("a warning")
    assert told == []
    say("another note")
    assert told == ["another note"]


SHORT = ("--device", "cpu", "--set", "training.num_epochs=2", "--set", "training.batch_size=16")


@pytest.fixture
def own_run(run_dir, tmp_path):
    """A fitted run that a test may write into."""
    return shutil.copytree(run_dir, tmp_path / "run")


def test_quiet_prints_results_alone(run, own_run, store_file, tmp_path):
    quiet = run("evaluate", "--run", own_run, "--quiet")
    assert quiet.stderr == ""
    assert quiet.stdout.splitlines()[0].startswith("image → caption: 12 queries")
    assert run("fit", "--store", store_file, "--run", tmp_path / "again", "-q", *SHORT).output == ""


def test_quiet_shows_warnings(run, own_run):
    result = run("evaluate", "--run", own_run, "--split", "train", "--quiet")
    assert result.stderr.startswith("warning: the heads were trained on these images")
    assert len(result.stderr.splitlines()) == 1


def test_verbose_adds_versions_devices_files_and_seconds(run, store_file, tmp_path):
    call = ("fit", "--store", store_file, *SHORT)
    plain = run(*call, "--run", tmp_path / "a").stderr
    verbose = run(*call, "--run", tmp_path / "b", "--verbose").stderr
    assert len(verbose.splitlines()) > len(plain.splitlines())
    for words in ("onceover 0.", ", torch ", f"opened the feature store {store_file}", "device cpu: ", "fit took "):
        assert words in verbose
        assert words not in plain


def test_quiet_and_verbose_contradict_each_other(run, run_dir):
    result = run("info", run_dir, "-q", "-v", code=2)
    assert "--quiet and --verbose contradict each other; name one of them" in result.stderr
    assert result.stdout == ""
