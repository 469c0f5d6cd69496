"""The report says what the result files hold, refuses what does not fit together, and claims no more than its tests show."""

from __future__ import annotations

import ast
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import idp_peft.report as report_package
from idp_peft.report import analyse, read_results, write_report
from idp_peft.report.bootstrap import Estimate
from idp_peft.report.comparisons import Comparison, correct
from idp_peft.report.markdown import markdown
from idp_peft.report.tables import confirmed_winner, tables
from tests.report_files import MODELS, five, result, write

pytest.importorskip("matplotlib")
TEXT = "wiki:held_out"


def statistics(*results, folder):
    return analyse(read_results(write(folder, *results)), draws=500).statistics


class Page(HTMLParser):
    """What stands in a page: tags, and attributes that load something."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.loads, self.alts, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action"):
                self.loads.append(value)
            if name == "alt":
                self.alts.append(value)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "in").mkdir()
    five(folder / "in")
    return write_report([folder / "in"], folder / "out")


def test_a_report_is_a_page_a_table_and_the_numbers(report):
    assert report.name == "report.html"
    assert sorted(path.name for path in report.parent.iterdir()) == ["report.html", "report.md", "statistics.json"]
    assert report.stat().st_size < 1_500_000
    numbers = json.loads((report.parent / "statistics.json").read_text())
    assert [row["label"] for row in numbers["rows"]] == list(MODELS)
    assert numbers["texts"][TEXT]["items"] == 60
    assert {c["kind"] for c in numbers["texts"][TEXT]["comparisons"]} == {"repair", "method", "choice"}


def test_the_page_loads_nothing_and_runs_nothing(report):
    page = Page(report.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert len(page.loads) == 5
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.loads)
    assert all(len(alt) > 20 for alt in page.alts)
    assert page.tags.count("table") == page.tags.count("caption") == 5
    assert page.tags.count("h1") == 1
    assert not re.search(r"@import|url\(", report.read_text(encoding="utf-8"))


def test_the_numbers_are_those_of_the_items(report, tmp_path):
    numbers = json.loads((report.parent / "statistics.json").read_text())
    items = {label: result(label)["perplexity"][TEXT]["items"] for label in MODELS}
    nats = {label: sum(i["nats"] for i in rows) / sum(i["tokens"] for i in rows) for label, rows in items.items()}
    rows = numbers["texts"][TEXT]["rows"]
    for label, mean in nats.items():
        assert rows[label]["perplexity"]["value"] == pytest.approx(np.exp(mean))
        assert rows[label]["to_dense"]["value"] == pytest.approx(mean - nats["dense"], abs=1e-9)
    expected = (nats["IDP"] - nats["compressed"]) / (nats["dense"] - nats["compressed"])
    assert rows["IDP"]["recovery"]["value"] == pytest.approx(expected)
    text = (report.parent / "report.md").read_text(encoding="utf-8")
    assert f"| {np.exp(nats['LoRA']):.2f} |" in text
    assert f"{100 * expected:.1f} %" in text
    assert "Commit: abc123." in text
    assert "processor Some CPU" in text


def test_the_same_files_and_seed_give_the_same_bytes(report, tmp_path):
    again = write_report(five(tmp_path), tmp_path / "out")
    for name in ("report.html", "report.md", "statistics.json"):
        assert (again.parent / name).read_bytes() == (report.parent / name).read_bytes()
    other = write_report(five(tmp_path), tmp_path / "other", seed=1)
    assert (other.parent / "statistics.json").read_bytes() != (again.parent / "statistics.json").read_bytes()


def test_words_of_a_user_stay_words(tmp_path):
    wicked = '<script>alert(1)</script> | **x** $a$ & "q" \' [l](http://x)'
    files = [result("compressed"), result("IDP", label=wicked), result("LoRA", label="_hidden", model="<img src=x>")]
    path = write_report(write(tmp_path, *files), tmp_path / "out")
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert "x" not in page.loads
    assert wicked in page.text
    for line in path.with_suffix(".md").read_text(encoding="utf-8").splitlines():
        assert "<script>" not in line
        assert "](" not in line
        if "alert" in line and line.startswith("|"):
            assert "\\| \\*\\*x\\*\\* $a$ &amp;" in line


def test_items_are_paired_by_name_and_only_shared_ones_count(tmp_path):
    dense, compressed, idp = (result(label) for label in ("dense", "compressed", "IDP"))
    compressed["perplexity"][TEXT]["items"] = compressed["perplexity"][TEXT]["items"][10:][::-1]
    idp["perplexity"][TEXT]["items"] = idp["perplexity"][TEXT]["items"][:50]
    made = statistics(dense, compressed, idp, folder=tmp_path)
    text = made["texts"][TEXT]
    assert (text["items"], text["measured"]) == (40, {"dense": 60, "compressed": 50, "IDP": 50})
    kept = [i for i in result("IDP")["perplexity"][TEXT]["items"] if 10 <= int(i["id"]) < 50]
    assert text["rows"]["IDP"]["mean"]["value"] == pytest.approx(
        sum(i["nats"] for i in kept) / sum(i["tokens"] for i in kept)
    )
    assert "different samples (dense: 60, compressed: 50, IDP: 50); the 40 shared items count" in markdown(made)


def test_files_that_share_no_item_are_refused(tmp_path):
    compressed, idp = result("compressed"), result("IDP")
    for item in idp["perplexity"][TEXT]["items"]:
        item["id"] += "x"
    with pytest.raises(
        ValueError, match=r"no item of text 'wiki:held_out' is in every file \(60 in .*0.json, 60 in .*1.json"
    ):
        statistics(compressed, idp, folder=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["perplexity"][TEXT].update(stride=128), r"`stride` of text .* got 192 in .*0.json and 128 in .*1.json"),
        (lambda f: f["perplexity"][TEXT].update(window=512), r"`window` of text .* got 256 in .*0.json and 512 in .*1.json"),
        (lambda f: f["tasks"]["local_piqa"].update(metric="acc"), r"`metric` of task 'local_piqa' .* 'acc_norm' .* 'acc'"),
        (lambda f: f["perplexity"][TEXT]["items"][3].update(tokens=7), r"`tokens` of item '3' of text .* and 7 in .*1.json"),
        (lambda f: f.update(label="compressed"), r"`label` must differ between files, got 'compressed' in .*0.json and .*1.json"),
        (lambda f: f.update(role="compressed"), r"one file of `role` 'compressed' is wanted, got .*0.json and .*1.json"),
        (lambda f: f.update(role="best"), r"1.json: `role` must be one of dense, compressed, recovered, got 'best'"),
        (lambda f: f.update(format=2), r"1.json: `format` must be 1, the format this version reads, got 2"),
        (lambda f: f.pop("extra_parameters"), r"1.json: `extra_parameters` is missing"),
        (lambda f: f.update(label="a\nb"), r"`label` must be a printable, non-empty string, got 'a\\nb'"),
        (lambda f: f.update(tasks=[]), r"`tasks` must be an object, got \[\]"),
        (lambda f: f["tasks"]["local_piqa"].update(items=[]), r"tasks\['local_piqa'\]: `items` must be a list with at least one"),
        (lambda f: f["perplexity"][TEXT]["items"][0].update(nats=float("nan")), r"items\[0\]: `nats` must be a finite number, got nan"),
        (lambda f: f["perplexity"][TEXT]["items"][0].update(tokens=0), r"`tokens` must be an integer of at least 1, got 0"),
        (lambda f: f["perplexity"][TEXT]["items"][0].update(prompt=4), r"`prompt` must be below num_prompts=4, got 4"),
        (lambda f: f["perplexity"][TEXT]["items"][0].update(nats_by_prompt=[1.0]), r"must hold num_prompts=4 numbers, got 1"),
        (lambda f: f["perplexity"][TEXT]["items"][0].update(id="1"), r"`id` must differ between items, got '1' twice"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named_with_what_is_wrong_in_one_line(tmp_path, change, message):
    files = [result("compressed"), result("IDP")]
    change(files[1])
    with pytest.raises(ValueError, match=message) as error:
        write_report(write(tmp_path, *files), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_wrong_sources_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such result file or folder"):
        write_report([tmp_path / "none"], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no result file .* in the folder"):
        write_report([tmp_path], tmp_path / "out")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken.json: must be a JSON result file"):
        write_report([tmp_path / "broken.json"], tmp_path / "out")
    with pytest.raises(ValueError, match="`role` 'compressed' is needed to compare with, got 'IDP'"):
        write_report(write(tmp_path, result("IDP")), tmp_path / "out")
    with pytest.raises(ValueError, match="`seed` must be an integer of at least 0, got -1"):
        write_report(write(tmp_path, result("compressed")), tmp_path / "out", seed=-1)


def test_a_folder_stands_for_its_result_files_and_a_file_given_twice_counts_once(tmp_path):
    paths = five(tmp_path)
    (tmp_path / "statistics.json").write_text('{"format": 1, "rows": []}')
    (tmp_path / "notes.json").write_text("not json")
    labels = [r.label for r in read_results([tmp_path, paths[2]])]
    assert labels == list(MODELS)


def test_without_a_dense_row_there_is_no_recovery_and_a_note_says_so(tmp_path):
    made = statistics(result("compressed"), result("IDP"), folder=tmp_path)
    text = markdown(made)
    assert "There is no dense row, so no recovery" in text
    assert not any("recovery" in column for table in tables(made) for column in table.columns)
    assert "nats above compressed" in text


def test_a_model_without_a_task_has_no_mean_over_tasks(tmp_path):
    idp = result("IDP")
    del idp["tasks"]["local_piqa"]
    made = statistics(result("compressed"), idp, result("LoRA"), folder=tmp_path)
    assert set(made["mean_over_tasks"]["rows"]) == {"compressed", "LoRA"}
    assert "local_piqa was not measured for IDP." in markdown(made)


def test_a_report_needs_neither_texts_nor_tasks_nor_recovered_models(tmp_path):
    for number, changes in enumerate(({"tasks": {}}, {"perplexity": {}})):
        folder = tmp_path / str(number)
        folder.mkdir()
        files = [result(label, **changes) for label in ("dense", "compressed")]
        page = write_report(write(folder, *files), folder / "out").read_text(encoding="utf-8")
        assert "There is no recovered model" in page
    with pytest.raises(
        ValueError, match="must hold at least one text in `perplexity` or one task in `tasks`, got none"
    ):
        write_report(write(tmp_path, result("compressed", perplexity={}, tasks={})), tmp_path / "out")


def test_single_items_give_means_and_no_claims(tmp_path):
    path = write_report(write(tmp_path, *(result(m, documents=1, questions=1) for m in MODELS)), tmp_path / "out")
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "too few items" in text
    assert " is better than " not in text.split("**Before believing it**")[0]


def test_nothing_is_called_better_or_made_bold_where_models_are_alike(tmp_path):
    files = [result("compressed"), result("IDP"), result("LoRA")]
    for content in files[1:]:  # the same numbers, but for noise that favours nobody
        for item, same in zip(content["perplexity"][TEXT]["items"], files[0]["perplexity"][TEXT]["items"], strict=True):
            item["nats"] = same["nats"] + float(
                np.random.default_rng([int(item["id"]), len(content["label"])]).normal()
            )
            item.pop("nats_by_prompt", None)
        content["tasks"] = {}
    made = statistics(files[0] | {"tasks": {}}, *files[1:], folder=tmp_path)
    assert {c.verdict for c in made["texts"][TEXT]["comparisons"]} == {"no difference seen"}
    assert not any(table.strong for table in tables(made))
    assert "No difference seen between IDP and LoRA" in markdown(made)


def test_with_many_models_the_summary_groups_what_was_seen(tmp_path):
    files = [result(m, documents=20, task_count=0) for m in MODELS]
    files += [result("LoRA", documents=20, task_count=0, label=f"LoRA {i}") for i in range(3)]
    page = Page(write_report(write(tmp_path, *files), tmp_path / "out").read_text(encoding="utf-8"))
    summary = page.text.split("Models")[0]
    assert "IDP is better than compressed" in summary
    assert "LoRA 2 is better than compressed." in summary
    assert "nats per token" not in summary


def test_a_winner_has_beaten_every_other_row(tmp_path):
    made = statistics(*(result(label) for label in MODELS), folder=tmp_path)
    comparisons = made["texts"][TEXT]["comparisons"]
    labels, recovered = ["compressed", "IDP", "LoRA", "Prompt tuning"], ["IDP", "LoRA", "Prompt tuning"]
    for comparison in comparisons:
        comparison.verdict = "better"
    assert confirmed_winner(labels, recovered, comparisons) == "IDP"
    against_lora = next(c for c in comparisons if (c.left, c.right) == ("IDP", "LoRA"))
    against_lora.verdict = "no difference seen"
    assert confirmed_winner(labels, recovered, comparisons) is None
    against_lora.verdict = "worse"  # LoRA beats IDP, but nothing compared it with prompt tuning
    assert confirmed_winner(labels, recovered, comparisons) is None
    assert confirmed_winner(labels[:3], recovered[:2], comparisons) == "LoRA"


def test_accuracies_are_tested_by_mcnemar_and_corrected_over_the_table(tmp_path):
    made = statistics(*(result(label) for label in MODELS), folder=tmp_path)
    all_tasks = [c for task in made["tasks"].values() for c in task["comparisons"]]
    tests = {c.right: c.test for c in all_tasks}
    assert tests["compressed"] == tests["LoRA"] == "McNemar, exact"
    assert tests["random choice (expected)"] == "paired bootstrap"
    assert all((c.verdict == "no difference seen") == (c.p_holm >= 0.05) for c in all_tasks)
    smallest = min(all_tasks, key=lambda c: c.p)
    assert smallest.p_holm == pytest.approx(min(1, len(all_tasks) * smallest.p))


def test_choices_are_counted_and_compared_only_where_they_were_measured(tmp_path):
    idp = result("IDP")
    for item in idp["tasks"]["local_sciq"]["items"]:
        item["score_by_prompt"] = None
    made = statistics(result("compressed"), idp, folder=tmp_path)
    chosen = [item["prompt"] for item in idp["perplexity"][TEXT]["items"]]
    choice = made["texts"][TEXT]["choices"]["IDP"]
    assert choice["shares"] == pytest.approx([chosen.count(i) / 60 for i in range(4)])
    assert choice["uses"]["oracle choice (bound)"]["value"] <= choice["uses"]["as measured"]["value"]
    assert made["tasks"]["local_sciq"]["choices"]["IDP"]["uses"] == {}
    assert "Not measured under each prompt (`evaluate --each_prompt`): local_sciq".replace("`", "\\`") in markdown(made)
    assert not any(c.kind == "choice" for c in made["mean_over_tasks"]["comparisons"])


def test_a_choice_that_has_read_more_than_the_context_is_told(tmp_path):
    idp = result("IDP")
    idp["perplexity"][TEXT]["selection_reads"] = "window"
    text = markdown(statistics(result("compressed"), idp, folder=tmp_path))
    assert "the choice of IDP read “window”, not only the context" in text
    assert "except where said above" in text


def test_the_honesty_notes_are_on_every_report(report):
    text = (report.parent / "report.md").read_text(encoding="utf-8")
    page = Page(report.read_text(encoding="utf-8")).text
    for note in ("another training seed", "Not all recovery is repair", "Selection reads the context only", "Holm"):
        assert note in text
        assert note in page


def test_a_failed_write_leaves_the_old_report_and_no_scraps(report, monkeypatch, tmp_path):
    paths, before = five(tmp_path), report.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(paths, report.parent, seed=1)
    assert report.read_bytes() == before
    assert len(list(report.parent.iterdir())) == 3


def test_matplotlib_is_imported_only_where_it_draws():
    for path in Path(report_package.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            assert "matplotlib" not in ast.unparse(node) or not isinstance(node, ast.Import | ast.ImportFrom), path


def test_a_verdict_follows_the_corrected_p():
    made = [Comparison("t", "repair", "a", "b", Estimate(0.1), "test", p) for p in (0.001, 0.03, 0.04)]
    correct(made, higher_is_better=True)
    assert [c.verdict for c in made] == ["better", "no difference seen", "no difference seen"]
    assert correct(made[:1], higher_is_better=False)[0].verdict == "worse"
