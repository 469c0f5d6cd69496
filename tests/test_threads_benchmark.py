"""What `benchmarks.threads` says rests on its result file, and its work can be measured."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.threads.__main__ import RESULTS, SETTINGS, speeds, write_table


def test_the_table_and_the_page_hold_the_numbers_of_the_result_file(tmp_path):
    write_table(json.loads((RESULTS / "threads.json").read_text()), tmp_path / "threads.md")
    table = (tmp_path / "threads.md").read_text()
    assert table == (RESULTS / "threads.md").read_text()
    shown = {f"{float(number):.{places}f}" for number in re.findall(r"(\d\.\d+) \(", table) for places in (2, 3)}
    page = (RESULTS.parent / "README.md").read_text()
    stated = re.findall(r"\b\d\.\d+\b", page)
    assert len(stated) == 6
    assert set(stated) <= shown


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_both_kinds_of_work_run_in_every_setting(setting):
    found = speeds(SETTINGS[setting], 0.01)
    assert set(found) == {"columns", "products"}
    assert all(speed > 0 for speed in found.values())
