"""The parts of benchmarks/against_kvpress.py that need no other library."""

import against_kvpress
import numpy as np
import pytest
from against_kvpress import ROWS, Options, difference, overlap, table

import lookahead_jax as lk


def test_entries_in_common_are_counted_by_the_larger_set():
    ours = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    theirs = np.array([[1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(overlap(ours, theirs), [1 / 2, 1 / 3, 1.0])


def test_scores_differ_in_parts_of_their_head_s_largest():
    theirs = np.array([[9.0, 1.0, 4.0, 9.0], [9.0, 2.0, -1.0, 9.0]])
    ours = np.array([[0.0, 1.0, 3.0, 0.0], [0.0, 2.0, -1.0, 0.0]])
    assert difference(ours, theirs, 1, 1) == 1 / 4
    assert difference(ours, theirs, 2, 2) is None


def test_table_leaves_a_difference_out_that_there_is_none_of():
    row = dict(policy="tova", press="TOVAPress", equal_entries=1.0, worst_head=0.9, how="same")
    rows = [row | {"score_difference": value} for value in (2e-6, None)]
    assert table(rows).splitlines()[2:] == [
        "| `tova` | TOVAPress | 1.0000 | 0.900 | 2.0e-06 | same |",
        "| `tova` | TOVAPress | 1.0000 | 0.900 |  | same |",
    ]


def test_every_row_names_a_policy_with_its_settings():
    for row in ROWS:
        files = {"file", "shares"} & row.settings.keys()
        lk.make_policy(row.policy, **{k: v for k, v in row.settings.items() if k not in files})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(), "--peer is needed"),
        (Options(peer="python", tokens=(200, 202)), "--tokens 202: give multiples of 4"),
        (Options(peer="python", tokens=(64,)), "--tokens 64"),
    ],
)
def test_options_that_cannot_be_compared_are_refused(options, said):
    with pytest.raises(SystemExit, match=said):
        against_kvpress.check(options)
