"""Runs of equal keys, random orders inside them and given spans, against loops and counts."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scorelm.noise.levels import Uniform, given_spans, random_rank, runs


def uniform(like, seed=0):
    return Uniform(torch.rand(6, *like.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def rows_of(length, count):
    """One document in each row."""
    return runs(torch.ones(count, length, dtype=torch.long))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 4), length=st.integers(1, 9), keys=st.integers(1, 3))
def test_runs_against_a_loop(data, rows, length, keys):
    cells = st.lists(st.lists(st.integers(0, 2), min_size=length, max_size=length), min_size=rows, max_size=rows)
    tables = [data.draw(cells) for _ in range(keys)]
    found = runs(*(torch.tensor(table) for table in tables))
    number, expected = -1, []
    for row in range(rows):
        for column in range(length):
            same = column > 0 and all(table[row][column] == table[row][column - 1] for table in tables)
            if not same:
                number += 1
                expected.append([])
            expected[number].append((row, column))
    assert int((found.offset_BL == 0).sum()) == len(expected)
    for cells_of_run in expected:
        for offset, (row, column) in enumerate(cells_of_run):
            assert found.first_BL[row, column] == column - offset
            assert found.offset_BL[row, column] == offset
            assert found.length_BL[row, column] == len(cells_of_run)


# --- random_rank and given_spans --------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_random_rank_is_a_permutation_of_every_run(sizes, seed):
    keys = torch.cat([torch.full((size,), k) for k, size in enumerate(sizes)])[None]
    rank = random_rank(runs(keys), uniform(keys, seed))[0]
    for part, size in zip(rank.split(sizes), sizes, strict=True):
        assert sorted(part.tolist()) == list(range(size))


def test_random_rank_is_uniform_over_permutations():
    # Two runs in each row, of 4 and 3 positions: 24 x 6 joint permutations, chi-square against equal counts.
    keys = torch.tensor([0, 0, 0, 0, 1, 1, 1]).expand(28_800, 7)
    rank = random_rank(runs(keys), uniform(keys, 3))
    counts = Counter(map(tuple, rank.tolist()))
    assert len(counts) == 144
    chi2 = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert 143 - 5 * math.sqrt(286) < chi2 < 143 + 5 * math.sqrt(286)


def test_given_spans_share():
    run = rows_of(6, 20_000)
    for share in (0.0, 0.3, 1.0):
        some = given_spans(run, share, uniform(run.first_BL)).any(1).double().mean()
        assert float(some) == pytest.approx(share * 6 / 7, abs=0.015)  # one span in seven is empty


def test_given_spans_have_uniform_length():
    run = rows_of(6, 35_000)
    given_BL = given_spans(run, 1.0, uniform(run.first_BL, 1))
    counts = torch.bincount(given_BL.sum(1), minlength=7).double()
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 30  # 6 degrees of freedom


def test_given_spans_are_half_contiguous_at_a_uniform_place_and_half_shuffled():
    run = rows_of(6, 70_000)
    given_BL = given_spans(run, 1.0, uniform(run.first_BL, 2))
    three = given_BL[given_BL.sum(1) == 3]
    counts = Counter(map(tuple, three.long().tolist()))
    assert len(counts) == 20  # every subset of three
    for subset, count in counts.items():
        first = subset.index(1)
        contiguous = subset[first : first + 3] == (1, 1, 1)
        expected = len(three) * (0.5 / 20 + (0.5 / 4 if contiguous else 0))
        assert abs(count - expected) < 5 * math.sqrt(expected)


def test_given_spans_are_independent_between_runs_of_a_row():
    keys = torch.tensor([1, 1, 1, 2, 2, 2]).expand(40_000, 6)
    given_BL = given_spans(runs(keys), 0.5, uniform(keys, 4))
    left, right = given_BL[:, :3].sum(1).double(), given_BL[:, 3:].sum(1).double()
    assert float(left.mean()) == pytest.approx(0.75, abs=0.02) and float(right.mean()) == pytest.approx(0.75, abs=0.02)
    assert abs(float(torch.corrcoef(torch.stack([left, right]))[0, 1])) < 0.02
