"""Comparisons of features: errors in units of their spread, and shared neighbours."""

import numpy as np
import pytest

from onceover.extract.comparison import neighbour_overlap, relative_error


def test_an_error_is_told_in_units_of_the_spread_over_records():
    reference = np.array([[1000.0, 0.0], [1002.0, 0.0]])  # cosine 1, and yet two records
    assert relative_error(reference + 0.5, reference) == pytest.approx(0.5 / np.mean([1, 0]))
    assert relative_error(reference[:1], reference[:1]) == float("inf")
    assert relative_error(reference[:1] + 1, reference[:1], spread=reference) == pytest.approx(2)


def test_trap_a_cosine_says_nothing_of_features_that_all_agree():
    generator = np.random.default_rng(0)
    features = 1 + 0.01 * generator.standard_normal((50, 64))
    wrong = features[generator.permutation(50)]
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (features, wrong)]
    assert (unit[0] * unit[1]).sum(1).min() > 0.999
    assert relative_error(wrong, features) > 1.2
    assert neighbour_overlap(wrong, features, 10) < 0.4


def test_the_overlap_of_neighbours_counts_the_ones_in_common():
    line = np.column_stack([np.cos(np.arange(5) / 10), np.sin(np.arange(5) / 10)])
    assert neighbour_overlap(line, line, 2) == 1
    moved = line[[0, 4, 2, 3, 1]]  # each record keeps one of its two neighbours
    assert neighbour_overlap(moved, line, 2) == 0.5
