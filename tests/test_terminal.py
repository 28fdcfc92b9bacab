"""Tables on the terminal: at most 100 columns, folded where it is narrow, never a number cut, any encoding."""

import json
import os
import pty
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from onceover.base.terminal import PLAIN, Table, printable, shown, tables_text
from onceover.cli import cli
from onceover.extract.store import FeatureStore
from onceover.retrieval.embeddings import read_embeddings
from onceover.retrieval.evaluation import evaluate
from onceover.retrieval.leaderboard import leaderboard_tables
from onceover.retrieval.tables import comparison_tables, evaluation_tables

ROWS = [
    ["model", "R@1", "median rank"],
    ["multimodal_csls_transductive", "37.3 [34.4, 40.2]", "3.0"],
    ["chance", "0.10", "–"],
]


@pytest.fixture(scope="module")
def evaluation(run_dir, store_file):
    with FeatureStore(store_file) as opened:
        return evaluate(read_embeddings(run_dir / "embeddings.h5"), opened, rerank=["csls", "qbnorm"], folds=3)


def test_numbers_stand_below_each_other_and_text_is_the_same_wherever_it_goes():
    assert tables_text([Table("image→text", ROWS)]).splitlines() == [
        "image→text",
        "model                         R@1                median rank",
        "────────────────────────────────────────────────────────────",
        "multimodal_csls_transductive  37.3 [34.4, 40.2]  3.0",
        "chance                        0.10                 –",
    ]


def test_a_table_without_room_folds_headers_then_names_then_intervals():
    assert tables_text([Table("", ROWS)], width=56).splitlines()[:2] == [
        "                                                 median",
        "model                         R@1                rank",
    ]
    text = tables_text([Table("", ROWS)], width=45)
    assert "multimodal_csls_  37.3 [34.4, 40.2]" in text
    assert "\ntransductive\n" in text
    text = tables_text([Table("", [["R@1", "R@5"], ["37.3 [34.4, 40.2]", "60.3 [57.4, 63.2]"]])], width=28)
    assert [line.split("  ") for line in text.splitlines()[2:]] == [
        ["37.3", "", "", "", "", "60.3"], ["[34.4, 40.2]", "[57.4, 63.2]"],
    ]  # fmt: skip
    narrow = tables_text([Table("", ROWS)], width=10).splitlines()
    assert max(map(len, narrow)) == len("transductive") + len("[34.4,") + len("median") + 4
    assert "…" not in "".join(narrow)


@pytest.mark.parametrize("width", [100, 80, 40, 20, 1])
def test_no_number_of_an_evaluation_is_cut_however_narrow_the_terminal_is(evaluation, width):
    text = tables_text(evaluation_tables(evaluation), width=width)
    if width >= 80:
        assert max(map(len, text.splitlines())) <= width
    words = text.split()
    for model, summary in evaluation["models"].items():
        assert model.split("_")[0] in text
        assert f"{summary['rsum']:.1f}" in words
        for direction in ("image_to_text", "text_to_image"):
            assert f"{summary[direction]['median_rank']:.1f}" in words
            if "R@5_ci" in summary[direction] and "R@5_sd" not in summary[direction]:
                high = summary[direction]["R@5_ci"][1]
                assert f"{high:.1f}]" in words or f"{high:.2f}]" in words


def test_rows_with_other_galleries_have_a_table_of_their_own(evaluation):
    tables = evaluation_tables(evaluation)
    assert [table.title.partition(", ")[2] for table in tables] == [
        "gallery of 60", "gallery of 20", "gallery of 12", "gallery of 4",
    ]  # fmt: skip
    assert [row[0] for row in tables[1].rows] == ["model", "multimodal_3_folds"]
    assert tables[0].rows[1][0] == "multimodal"
    line = next(line for line in tables_text(tables).splitlines() if line.startswith("cca"))
    assert line.split()[-1] == f"{evaluation['models']['cca']['fitted_images']:,}"


def test_a_comparison_fits_whatever_the_runs_are_called():
    side = {"gallery": 5000, "R@1": 27.6, "R@5": 50.0, "R@10": 61.25, "mrr": 0.396}
    difference = {"R@1": -0.4, "R@5": 0.0, "R@10": 10.0, "mrr": 0.01}
    difference |= {f"{key}_ci": (-1.0, 1.0) for key in difference}
    both = {"image_to_text": side, "text_to_image": side, "rsum": 271.0}
    first, second = "runs/a_run_with_a_long_name_that_says_all_of_its_settings/first", "runs/second"
    result = {
        "reference": first,
        "runs": {first: both, second: both},
        "differences": {
            second: {"image_to_text": difference, "text_to_image": difference, "rsum": 1.5, "rsum_ci": (0.5, 2.5)}
        },
    }
    tables = comparison_tables(result)
    text = tables_text(tables)
    assert text.splitlines()[0] == f"{second} against {first}"
    assert max(map(len, text.splitlines())) <= 100
    assert "+1.5 [+0.5, +2.5]" in text
    assert tables[0].rows[0][:4] == ["direction (gallery)", "metric", first, second]


def test_a_leaderboard_fits_however_many_settings_its_grid_has():
    keys = [f"model.setting_number_{number}" for number in range(8)]
    row = {
        **dict.fromkeys(keys, 0.0003),
        "outcome": "finished", "i2t_R@1": 30.0, "t2i_R@1": 20.5, "rsum": 300.25, "seeds": 3, "verdict": "best",
        "difference": 0.0, "difference_low": -0.5, "difference_high": 0.5,
    }  # fmt: skip
    diverged = dict.fromkeys(keys, 1) | {"outcome": "diverged", "seeds": 1}
    text = tables_text(leaderboard_tables([row, diverged, row], keys, most=2))
    assert max(map(len, text.splitlines())) <= 100
    assert "setting_number_7=0.0003" in text
    assert "+0.0 [-0.5, +0.5]" in text
    assert text.count("diverged") == 1
    assert text.count("best") == 2  # the header's and the first row's


def test_what_a_terminal_lacks_is_ascii_that_reads_alike_or_an_escape():
    assert shown("image→text ± 1 – “狗” …", "ascii") == 'image->text +- 1 - "\\u72d7" ...'
    assert shown("image→text ± 1 – “狗” …", "cp1252") == "image->text ± 1 – “\\u72d7” …"
    assert "狗→".encode("latin-1", PLAIN) == b"\\u72d7->"
    lines = tables_text([Table("a→b", [["→", "x"], ["±1", "2"]])], encoding="ascii").splitlines()
    assert lines == ["a->b", "->   x", "------", "+-1  2"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_trap_a_terminal_that_is_not_utf8_kills_no_command(run_dir, tmp_path, monkeypatch, encoding):
    for name in ("run", "other"):
        shutil.copytree(run_dir, tmp_path / name)
    monkeypatch.chdir(tmp_path)

    def said(*arguments):
        done = CliRunner(charset=encoding).invoke(cli, arguments)
        assert done.exit_code == 0, (done.stderr, done.exception)
        return done.stdout_bytes.decode(encoding)

    evaluated = said("evaluate", "--run", "run")
    assert "image -> caption: 12 queries, gallery of 60" in evaluated
    assert (" +- " if encoding == "ascii" else " ± ") in evaluated
    assert "\\u" not in evaluated
    assert "other against run" in said("compare", "run", "other")
    assert "images" in said("info", "run")
    searched = said("search", "--run", "run", "--query", "Hürde 狗", "--json", "--device", "cpu")
    assert json.loads(searched)["query"] == "Hürde 狗"


def test_a_terminal_has_bold_headers_and_a_pipe_has_none():
    script = (
        "from onceover.base.terminal import *\nprint(stdout_text([Table('title', [['name', 'number'], ['a', '1']])]))"
    )
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    subprocess.run([sys.executable, "-c", script], stdout=follower, env=environment, check=True)
    os.close(follower)
    assert b"\x1b[1mtitle" in os.read(leader, 10_000)
    os.close(leader)
    piped = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert piped.stdout == "title\nname  number\n────────────\na     1\n"


def test_control_characters_are_escaped_and_line_breaks_stay():
    assert printable("a\x1b[2Jb\x07\r\x9bc\n\td é 狗") == "a\\x1b[2Jb\\x07\\r\\x9bc\n\td é 狗"
