"""The study: its matrix runs cell by cell, its cells say what the models do, and its tables what the cells say."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from benchmarks.common.cells import Cells, all_cells
from benchmarks.study import __main__ as study
from benchmarks.study import claims, measure, tables
from benchmarks.study.cells import ATTENTION, LEAST_LOSS, Entry, read_entries, values
from benchmarks.study.choices import context_nats, least_loss
from benchmarks.study.estimates import Compared, Table, correct
from benchmarks.study.matrix import Contender, Matrix
from idp_peft.evaluation import score_chunks, score_tasks
from idp_peft.evaluation.tasks import LOCAL_TASKS
from idp_peft.report.bootstrap import Estimate
from idp_peft.report.choices import ORACLE, RANDOM
from tests.test_harness import tokenizer
from tests.test_tasks import local  # noqa: F401  (a fixture)
from tests.tiny import tiny
from tests.tiny_folder import tiny_folder, tiny_texts

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((Path(study.__file__).parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_configuration_holds_what_the_study_is_about(file):
    matrix = Matrix(file)
    found = {(one.compression, one.method, one.objective) for one in matrix.contenders}
    assert {"gptq-3bit", "gptq-4bit", "sparsegpt-50"} == set(matrix.compressions)
    for method in ("compressed", "bos_prefix"):
        assert all((name, method, None) in found for name in matrix.compressions)
    for method in (
        "idp",
        "one_prompt_26",
        "one_prompt_100",
        "one_prompt_128",
        "composed_26_100",
        "prefix",
        "lora_budget",
        "lora_16",
    ):
        assert ("gptq-3bit", method, "lm") in found
    assert ("gptq-3bit", "idp", "distillation") in found
    assert {
        one.seed
        for one in matrix.contenders
        if (one.method, one.objective) == ("idp", "lm") and one.compression == "gptq-3bit"
    } == {0, 1, 2}
    assert matrix.tasks == list(LOCAL_TASKS) or set(matrix.tasks) == set(LOCAL_TASKS)
    names = [one.path for one in matrix.contenders]
    for one in matrix.contenders:  # a bank that is composed comes after its parts
        for part in matrix.methods.get(one.method, {}).get("of", []):
            path = Contender(one.compression, part, one.objective, one.seed).path
            assert names.index(path) < names.index(one.path)


def test_make_study_names_adapters_that_the_matrix_trains():
    rules = subprocess.run(
        ["make", "-n", "study", "PY=python"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    named = set(re.findall(r"=runs/study/smollm2-135m/(\S+?)/adapter", rules))
    matrix = Matrix(CONFIGS[-1])
    assert len(named) == 8
    assert named <= {str(one.path) for one in matrix.contenders}
    assert set(re.findall(r"--(?:results|output) (\S+)/", rules)) == {"runs/measured", "runs/measured/patterns"}


def test_a_configuration_with_an_undefined_method_is_refused(tmp_path):
    values = yaml.safe_load(CONFIGS[-1].read_text())
    values["rows"] = [{"compression": "gptq-3bit", "methods": ["magic"], "objectives": ["lm"], "seeds": [0]}]
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=r"`methods` defines \['composed_26_100', .*\], got 'magic' in `rows`"):
        Matrix(tmp_path / "wrong.yaml")


SETTINGS = {"block_tokens": 24, "context_tokens": 8, "batch_size": 4, "limit": 5, "sample_seed": 0}


@pytest.mark.parametrize("task", LOCAL_TASKS)
def test_a_looked_up_score_is_that_of_a_free_choice(local, make, task):  # noqa: F811
    model = make("llama")
    looked_up = measure.score_task(model, tokenizer(), task, SETTINGS, each_prompt=True)["items"]
    free = score_tasks(model, tokenizer(), task, limit=5, each_prompt=True, batch_size=4)[task]["items"]
    assert len({item["prompt"] for item in free}) > 1 or task in (
        "local_boolq",
        "local_webqs",
        "local_triviaqa",
        "local_piqa",
        "local_arc_easy",
        "local_arc_challenge",
    )
    for one, other in zip(looked_up, free, strict=True):
        assert (one["id"], one["score"], one["prompt"]) == (other["id"], other["score"], other["prompt"])
        assert one["by_prompt"]["score"] == other["score_by_prompt"]


def test_a_text_is_scored_under_every_prompt_and_the_chosen_one_is_what_a_free_pass_gives(make, monkeypatch):
    from idp_peft.texts import data as text_data

    monkeypatch.setattr(
        text_data, "load_texts", lambda name, split: [*tiny_texts(3, words=4), *tiny_texts(9, words=30)]
    )
    model, words = make("llama"), tokenizer()
    found = measure.score_text(model, words, "wiki", 6, SETTINGS)["items"]
    assert [item["id"] for item in found] == ["3", "4", "5", "6", "7", "8"]  # the short ones are passed over
    blocks = [[int(word[1:]) for word in text.split()][:24] for text in tiny_texts(9, words=30)[:6]]
    free = score_chunks(model, blocks, 8)
    assert [item["prompt"] for item in found] == free.prompt_ids.tolist()
    assert len(set(free.prompt_ids.tolist())) > 1
    assert np.allclose([item["nats"] for item in found], free.nats, rtol=1e-5)
    for prompt in range(4):
        forced = score_chunks(model, blocks, 8, prompt)
        assert np.allclose([item["by_prompt"]["nats"][prompt] for item in found], forced.nats, rtol=1e-5)


def test_the_least_loss_choice_is_the_prompt_under_which_the_context_is_likeliest(make):
    model = make("llama")
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]
    expected = []
    for row in rows:
        losses = []
        for prompt in range(4):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row]), prompt_ids=prompt).logits[0].log_softmax(-1)
            losses.append(-sum(float(logits[i, token]) for i, token in enumerate(row[1:])) / (len(row) - 1))
        expected.append(int(np.argmin(losses)))
        assert np.allclose(losses, [context_nats(model, [row], prompt, 4)[0] for prompt in range(4)], atol=1e-5)
    assert least_loss(model, rows, 4, batch_size=2) == expected
    assert context_nats(model, [[5]], 0, 4) == [0.0]  # nothing to go by


@pytest.fixture
def tiny_matrix(tmp_path, monkeypatch, local):  # noqa: F811
    """A matrix of tiny models: one text, one task, one bank, one LoRA, the two prompts of a composed bank."""
    from idp_peft.texts import data as text_data

    original = text_data.load_texts
    held_out = tiny_texts(8, words=30, seed=7)
    monkeypatch.setattr(
        text_data, "load_texts", lambda name, *rest: held_out if name == "wiki" else original(name, *rest)
    )
    (tmp_path / "text.txt").write_text("\n".join(tiny_texts(20, words=30)))
    idp = {"method": "idp", "learning_rate": 0.1}
    values = {
        "base": tiny_folder(tmp_path / "dense", seed=0),
        "compressions": {"small": tiny_folder(tmp_path / "small", seed=1)},
        "methods": {
            "idp": {**idp, "num_prompts": 2, "num_virtual_tokens": 3},
            "one_a": {**idp, "num_prompts": 1, "num_virtual_tokens": 2},
            "one_b": {**idp, "num_prompts": 1, "num_virtual_tokens": 4},
            "composed": {"method": "composed", "of": ["one_a", "one_b"]},
            "lora_budget": {
                "method": "lora",
                "num_prompts": 2,
                "num_virtual_tokens": 3,
                "match_budget": True,
                "learning_rate": 0.01,
            },
        },
        "training": {
            "dataset": str(tmp_path / "text.txt"),
            "block_tokens": 24,
            "context_tokens": 8,
            "min_tokens": 24,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
        },
        "evaluation": SETTINGS,
        "texts": {"wiki": 6},
        "tasks": ["local_piqa"],
        "task_seeds": [0],
        "each_prompt": ["small/idp.lm.seed0"],
        "rows": [
            {"compression": "none", "methods": ["dense"]},
            {"compression": "small", "methods": ["compressed", "bos_prefix"]},
            {
                "compression": "small",
                "methods": ["idp", "lora_budget", "one_a", "one_b", "composed"],
                "objectives": ["lm"],
                "seeds": [0],
            },
            {"compression": "small", "methods": ["idp"], "objectives": ["distillation"], "seeds": [0, 1]},
            {"compression": "none", "methods": ["lora_budget"], "objectives": ["lm"], "seeds": [0]},
        ],
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_the_matrix_runs_cell_by_cell_goes_on_where_it_was_and_makes_a_report(tiny_matrix, tmp_path):
    options = [str(tiny_matrix), "--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    study.main([*options, "--only", "small/one_a"])
    results = tmp_path / "results" / "tiny"
    one_a = Cells(results, "small/one_a.lm.seed0")
    assert [path.relative_to(results) for path in results.rglob("*.jsonl")] == [Path("small/one_a.lm.seed0.jsonl")]
    assert list(one_a.read()) == ["text_wiki", "local_piqa"]
    trained = tmp_path / "runs/tiny/small/one_a.lm.seed0/adapter/adapter_model.safetensors"
    before, kept = trained.stat().st_mtime_ns, one_a.path.read_text().splitlines(keepends=True)[0]
    one_a.path.write_text(kept + kept[: len(kept) // 2])  # as a process leaves it that is killed while it writes
    study.main(options)
    assert trained.stat().st_mtime_ns == before  # neither trained nor measured again
    assert one_a.path.read_text().startswith(kept)
    assert list(one_a.read()) == ["text_wiki", "local_piqa"]
    matrix = Matrix(tiny_matrix)
    expected = {(one.path, name) for one in matrix.contenders for name in matrix.measures(one)}
    assert {(contender, name) for contender, name, _ in all_cells(results)} == expected
    assert (Path("small/idp.distillation.seed1"), "local_piqa") not in expected  # tasks are for seed 0
    shared = json.loads((results / "run.json").read_text())["shared"]
    assert len(shared) < len(expected)  # an environment stands there once
    cell = Cells(results, "small/idp.distillation.seed1").read()["text_wiki"]
    assert cell["environment"]["torch"] == torch.__version__
    assert cell["cell"] == {
        "base": matrix.base,
        "compression": "small",
        "method": "idp",
        "objective": "distillation",
        "seed": 1,
        "task": "text_wiki",
    }
    assert cell["training"]["objective"] == "distillation"
    assert cell["training"]["steps"] == 2
    assert cell["extra_parameters"] == 2 * 3 * tiny("llama").config.hidden_size

    # A composed bank is its parts: forced to prompt i, what prompt i gave alone.
    def of(name):
        return Cells(results, f"small/{name}.lm.seed0").read()["text_wiki"]["items"]

    for composed, a, b in zip(of("composed"), of("one_a"), of("one_b"), strict=True):
        assert composed["by_prompt"]["nats"] == pytest.approx([a["nats"], b["nats"]], rel=1e-5)

    tables.main([str(tiny_matrix), "--results", str(tmp_path / "results")])
    report = (tmp_path / "results/tiny/report.md").read_text()
    assert "| IDP, 2 x 3, distillation (2 seeds) |" in report
    assert "| IDP composed, 2 + 4 |" in report
    assert "## Control: the same training on the dense model" in report
    assert "| - its oracle choice (bound) |" in report
    statistics = json.loads((tmp_path / "results/tiny/statistics.json").read_text())
    means = statistics["small"]["text wiki"]["means"]
    nats = [
        sum(i["nats"] for i in Cells(results, f"small/idp.distillation.seed{s}").read()["text_wiki"]["items"])
        for s in (0, 1)
    ]
    assert means["IDP, 2 x 3, distillation"]["value"] == pytest.approx(sum(nats) / 2 / (6 * 16))


def test_a_report_of_a_matrix_that_is_not_done_leaves_out_what_is_missing(tiny_matrix, tmp_path):
    options = [str(tiny_matrix), "--results", str(tmp_path / "results")]
    for name in ("none/dense", "small/compressed", "small/bos_prefix"):
        study.main([*options, "--runs", str(tmp_path / "runs"), "--only", name, "--measure", "text_"])
    tables.main(options)
    report = (tmp_path / "results/tiny/report.md").read_text()
    assert "| BOS prefix of the dense model |" in report
    assert "McNemar" not in report
    study.main([*options, "--runs", str(tmp_path / "runs"), "--only", "small/bos_prefix"])
    tables.main(options)  # one repair has its tasks, the compressed model not yet
    assert "McNemar" not in (tmp_path / "results/tiny/report.md").read_text()


def test_a_bank_whose_parts_are_not_trained_yet_waits(tiny_matrix, tmp_path, caplog):
    options = [str(tiny_matrix), "--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    study.main([*options, "--only", "small/composed"])
    assert "one_a.lm.seed0/adapter" in caplog.text
    assert "not trained yet: run again later" in caplog.text
    assert not (tmp_path / "results").exists()


def test_two_processes_do_not_train_the_same_contender(tmp_path):
    with study._alone(tmp_path / "small" / "idp") as first, study._alone(tmp_path / "small" / "idp") as second:
        assert (first, second) == (True, False)
        with study._alone(tmp_path / "small" / "lora") as other:
            assert other


# ---------------------------------------------------------------- estimates


def made_up(
    label: str, by_seed: dict, num_prompts: int | None = None, tokens: int = 10, measure: str = "text_wiki"
) -> Entry:
    """An entry whose items have these nats; rows of several numbers are one per prompt, the first one chosen."""
    entry = Entry(Contender("small", label, "lm", 0), label)
    for seed, rows in by_seed.items():
        items = []
        for number, row in enumerate(rows):
            many = row if isinstance(row, list) else [row]
            item = {"id": str(number), "nats": many[0], "tokens": tokens, "prompt": 0}
            if len(many) > 1:
                item |= {"by_prompt": {"nats": many}, "least_loss_prompt": 1}
            items.append(item)
        entry.cells[seed] = {measure: {"items": items, "num_prompts": num_prompts, "extra_parameters": 1}}
    return entry


def test_recovery_and_differences_average_seeds_item_by_item():
    dense = made_up("dense", {None: [10.0, 12.0, 11.0, 13.0]})
    compressed = made_up("compressed", {None: [20.0, 22.0, 21.0, 23.0]})
    one = made_up("one", {0: [18.0, 20.0, 19.0, 21.0], 1: [16.0, 18.0, 17.0, 19.0]})
    other = made_up("other", {0: [19.0, 21.0, 20.0, 22.0]})
    table = Table([dense, compressed, one, other], ["text_wiki"], "nats")
    assert table.recovery(one, compressed, dense).value == pytest.approx(0.3)  # 0.2 and 0.4
    assert table.recovery_by_seed(one, compressed, dense) == pytest.approx([0.2, 0.4])
    gap = table.difference(one, compressed)
    assert gap.estimate.value == pytest.approx(-0.3)
    assert gap.by_seed == pytest.approx([-0.2, -0.4])
    common = table.difference(one, other)  # seed 0 alone: the other has no seed 1
    assert common.by_seed == pytest.approx([-0.1])


def test_every_use_of_a_banks_prompts_is_its_definition():
    bank = made_up("bank", {0: [[10.0, 8.0], [10.0, 14.0], [10.0, 6.0]]}, num_prompts=2)
    cell = bank.cells[0]["text_wiki"]
    assert values(cell, "nats", ATTENTION).tolist() == [10, 10, 10]
    assert values(cell, "nats", LEAST_LOSS).tolist() == [8, 14, 6]
    assert values(cell, "nats", RANDOM).tolist() == [9, 12, 8]
    assert values(cell, "nats", ORACLE).tolist() == [8, 10, 6]
    plain = made_up("plain", {0: [1.0, 2.0]}).cells[0]["text_wiki"]
    assert values(plain, "nats", ORACLE) is None


def test_a_difference_is_seen_only_where_every_seed_has_its_sign():
    sure = Estimate(-1.0, 0.1, (-1.2, -0.8), p=0.001)
    agree, disagree = Compared("a", "b", sure, [-1.5, -0.5]), Compared("a", "c", sure, [-2.5, 0.5])
    doubtful = Compared("a", "d", Estimate(-1.0, 0.9, (-2.0, 0.1), p=0.04), [-1.0])
    correct([agree, disagree, doubtful, None])
    assert (agree.p_holm, disagree.p_holm, doubtful.p_holm) == pytest.approx((0.003, 0.003, 0.04))
    assert (agree.seen, disagree.seen, doubtful.seen) == (True, False, True)
    rounding = correct([Compared("a", "b", sure, [-1.0, -1e-16])])[0]
    assert not rounding.seen
    many = [Compared("a", "d", Estimate(-1.0, 0.9, None, p=0.04), [-1.0]) for _ in range(2)]
    assert not any(one.seen for one in correct(many))  # 0.04 twice is 0.08 by Holm


def test_models_measured_on_other_items_are_not_compared():
    shifted = made_up("shifted", {0: [1.0, 2.0]})
    for number, item in enumerate(shifted.cells[0]["text_wiki"]["items"]):
        item["id"] = str(number + 1)
    with pytest.raises(ValueError, match="shifted, text_wiki: must be measured on the same items as the others"):
        Table([made_up("one", {0: [1.0, 2.0]}), shifted], ["text_wiki"], "nats")


def test_cells_of_other_settings_are_refused(tiny_matrix, tmp_path):
    matrix = Matrix(tiny_matrix)
    cell = {"evaluation": {**SETTINGS, "limit": 7}, "items": []}
    Cells(tmp_path / "results" / "tiny", "none/dense").add("text_wiki", cell)
    with pytest.raises(ValueError, match=r"text_wiki of .* was measured with .*'limit': 7.*, not .*'limit': 5"):
        read_entries(matrix, tmp_path / "results", "small")


def test_verdicts_follow_their_rules():
    assert claims.lora_verdict(worse_on_a_text=True, lowest_points=3.0) == claims.NOT_REPRODUCED
    assert claims.lora_verdict(worse_on_a_text=False, lowest_points=-0.9) == claims.REPRODUCED
    assert claims.lora_verdict(worse_on_a_text=False, lowest_points=-1.1) == claims.NOT_TESTABLE
    assert claims.points_verdict((-3.0, 1.2)) == claims.NOT_REPRODUCED
    assert claims.points_verdict((-3.0, 3.0)) == claims.NOT_TESTABLE
    assert claims.points_verdict((0.1, 3.0)) == claims.REPRODUCED
