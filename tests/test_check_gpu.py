"""The check for a GPU, on a processor: all its parts run without faiss, and what is wrong is told."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
WITHOUT_FAISS = f"""
import runpy, sys
sys.modules["faiss"] = None  # importing it fails
sys.path.insert(0, {str(BENCHMARKS)!r})
sys.argv = ["check_gpu.py", *sys.argv[1:]]
runpy.run_path({str(BENCHMARKS / "check_gpu.py")!r}, run_name="__main__")
"""


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("check_gpu")


def test_every_part_runs_without_faiss_and_agrees_with_itself(tmp_path):
    call = [sys.executable, "-c", WITHOUT_FAISS, "--tiny", "--json", str(tmp_path / "check.json")]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    head, _, *lines = done.stdout.splitlines()
    assert head.startswith("| what | on the device | beside | ratio | difference from the processor |")
    names = ["extract 224×224", "extract 500×375", "extract captions", "fit", "sweep of 4", "fine-tuning step"]
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in names]
    assert all(line.endswith("| agrees |") for line in lines)
    result = json.loads((tmp_path / "check.json").read_text())
    assert [row["name"] for row in result["rows"]] == names
    for row, line in zip(result["rows"], lines, strict=True):
        assert row["ratio"] > 0
        is_half = row["name"].startswith("extract") and "bfloat16" in line  # beside the processor's float32
        assert row["difference"] == pytest.approx(0, abs=0.05 if is_half else 1e-6)  # the device is the processor


def test_without_a_card_the_error_names_the_way_out(tmp_path):
    call = [sys.executable, str(BENCHMARKS / "check_gpu.py"), "--device", "cuda"]
    done = subprocess.run(
        call, capture_output=True, text=True, check=False, cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 1
    assert done.stderr == "error: torch sees no CUDA GPU here; --tiny runs the same code on the processor\n"


def test_a_part_that_fails_is_a_row(check, capsys):
    def fail():
        raise RuntimeError("no kernel image | is\navailable")

    row = check.checked(check.Part("fit", 5, fail))
    assert row.verdict == "FAILED: RuntimeError: no kernel image / is available"
    assert check.table([row]).splitlines()[-1] == f"| fit |  |  |  |  |  | {row.verdict} |"


def test_a_part_that_takes_too_long_is_ended(check, capsys):
    row = check.checked(check.Part("fit", 1, lambda: time.sleep(10)))
    assert row.verdict == "FAILED: TimeoutError: it took longer than 1 s"
    assert "fit: 1 s of at most 1 s" in capsys.readouterr().err


@pytest.mark.parametrize(("difference", "verdict"), [(0.1, "agrees"), (0.2, "DISAGREES"), (float("nan"), "DISAGREES")])
def test_a_difference_beyond_what_is_allowed_disagrees(check, difference, verdict):
    assert check.Row("fit", difference=difference, allowed=0.15).verdict == verdict


def test_a_wrong_row_makes_the_exit_code_1(check, monkeypatch, capsys):
    monkeypatch.setattr(check, "use_checkout", lambda: None)
    monkeypatch.setattr(check, "parts", lambda *_: [check.Part("fit", 5, lambda: check.Row("fit", difference=1.0))])
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--tiny"])
    with pytest.raises(SystemExit, match="^error: failed, or other than on the processor: fit$"):
        check.main()
    assert "| DISAGREES |" in capsys.readouterr().out
