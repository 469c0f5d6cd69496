"""`benchmarks.repair`: its tables are those of its cells, and the README shows them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks.repair.contenders import LIKE, MIXTURE, ONE_KIND, RATES
from benchmarks.repair.tables import RESULTS, best_rates, repaired, short_table, write

ROOT = Path(__file__).parent.parent


@pytest.fixture
def copied(tmp_path):
    for name in ("run.json", "wiki", "kinds", "tuning"):
        source = RESULTS / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path)
    return tmp_path


def test_tables_and_learning_rates_are_those_of_the_cells(copied):
    write(copied)
    best_rates(copied)
    for name in ("tables.md", "tuning.md", "rates.json"):
        assert (copied / name).read_text() == (RESULTS / name).read_text(), name
    assert (copied / "wiki.png").stat().st_size > 10_000


def test_the_table_of_the_readme_is_that_of_the_cells():
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"<!-- repair: begin -->\n(.*?)\n<!-- repair: end -->", readme, re.DOTALL).group(1)
    assert shown == short_table(RESULTS)


def test_damage_repaired_is_0_for_the_compressed_and_1_for_the_dense_model():
    unrepaired = {"dense": {"wiki": [2.0, 3.0]}, "compressed": {"wiki": [4.0, 4.0]}}
    for nats, share in (([4.0, 4.0], 0.0), ([2.0, 3.0], 1.0), ([3.0, 3.5], 0.5)):
        assert repaired({"unrepaired": unrepaired, "nats": {"wiki": nats}}, "wiki") == pytest.approx(share)


def test_every_contender_has_learning_rates_that_were_tried():
    for name in (*ONE_KIND, *MIXTURE):
        assert LIKE.get(name, name) in RATES
