"""Memory: what there is, what a piece of work takes, what a limit says."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from onceover.base.memory import peak_memory, total_memory

ROOT = Path(__file__).resolve().parent.parent


def test_the_peak_of_a_piece_of_work_is_seen_although_it_is_freed():
    seen = peak_memory(lambda: np.ones(200 * 2**20 // 8).sum())
    assert 190 * 2**20 < seen < 300 * 2**20
    assert peak_memory(lambda: None) < 50 * 2**20


def test_a_limit_of_the_system_counts_as_the_memory_there_is():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (2**31, 2**31));"
        "from onceover.base.memory import total_memory; print(total_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) <= 2**31
    assert total_memory() > 2**28
