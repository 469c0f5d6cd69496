"""Every model class of the installed transformers, each right or refused, and as docs/models.md says (`make test-models`)."""

from __future__ import annotations

import pytest

from tests.every_model.sweep import outcome, read_results, rows

RESULTS = read_results()


@pytest.mark.parametrize("row", rows())
def test_a_model_is_right_or_refused_as_the_table_says(row):
    found = outcome(row)
    assert found.status != "wrong", found.reason
    if RESULTS:
        assert row in RESULTS, "the table does not know it: run `python -m tests.every_model.sweep`, then `.table`"
        if "not built" not in (found.status, RESULTS[row].status):  # which depends on what else is installed
            assert found == RESULTS[row]
