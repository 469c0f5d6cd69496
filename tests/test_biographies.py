"""benchmarks/biographies: groups that do not touch, text that leaks nothing, recall and statistics that are right."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.biographies import cells, compressing, leaks, memorise, plan, recall, repair, summary, tables, tuning
from benchmarks.biographies.people import GROUPS, VALUES, people
from benchmarks.biographies.text import PER_FACT, TEMPLATES, biographies, question
from benchmarks.biographies.tokenizer import make_tokenizer
from benchmarks.common.cells import Cells, all_cells
from idp_peft.recover.methods import nearest_lora

FOLDER = Path(__file__).parent.parent / "benchmarks" / "biographies"
needs_llmcompressor = pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None, reason="llm-compressor is not installed"
)


def of(group: str, seed: int = 0):
    return [person for person in people(seed, PER_FACT) if person.group == group]


# ---------------------------------------------------------------------- people and text


def test_a_seed_makes_the_same_people_and_text_and_another_seed_others():
    once, again, other = people(3, PER_FACT), people(3, PER_FACT), people(4, PER_FACT)
    assert once == again
    assert {person.name for person in once} != {person.name for person in other}
    assert biographies(once, 50, 7) == biographies(again, 50, 7)
    assert biographies(once, 50, 7) != biographies(once, 50, 8)


def test_names_are_unique_groups_have_their_sizes_and_every_word_is_shared():
    everyone = people(0, PER_FACT)
    names = [person.name for person in everyone]
    assert len(set(names)) == len(names) == sum(GROUPS.values())
    assert {group: len(of(group)) for group in GROUPS} == GROUPS
    for place in (0, 1):
        words = [name.split()[place] for name in names]
        assert min(words.count(word) for word in words) > 1, "a name of its own could hold the facts in its embedding"


def test_facts_are_independent_of_the_group():
    """Nothing can be learned of one group from another: values are as good as equally frequent in each."""
    for fact, values in VALUES.items():
        assert len(set(values)) == 40
        drawn = [person.facts[fact] for seed in range(20) for person in of("held-out", seed)]
        frequencies = np.array([drawn.count(value) for value in values]) / len(drawn)
        assert 0.5 / 40 < frequencies.min() <= frequencies.max() < 1.6 / 40


def test_each_value_is_one_token_and_no_word_is_unknown():
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == 0
    text = biographies(people(0, PER_FACT), 300, 0)
    assert not any(0 in ids for ids in tokenizer(text, add_special_tokens=False)["input_ids"])
    for values in VALUES.values():
        assert all(len(tokenizer(value, add_special_tokens=False)["input_ids"]) == 1 for value in values)


def test_the_template_kept_back_states_a_fact_nowhere_and_the_others_do():
    person = of("held-out")[0]
    text = " ".join(biographies([person], 100, 0))
    for fact in VALUES:
        for template in range(PER_FACT):
            stated = f"{question(person, fact, template)} {person.facts[fact]} ." in text
            assert stated == (template != person.kept_back[fact])


def test_everybody_is_told_equally_often():
    everyone = of("calibration")
    text = biographies(everyone, 3 * len(everyone), 0)
    for person in everyone:
        assert sum(f"<s> {person.name} " in one for one in text) == 3


# ---------------------------------------------------------------------- leaks


def test_repair_text_speaks_of_all_repaired_on_people_and_of_nobody_else():
    everyone = people(0, PER_FACT)
    texts = repair.repair_texts(everyone, 0)
    found = set().union(*(leaks.names_in(text) for text in texts))
    assert found == {person.name for person in of("repaired-on")}
    for person in everyone:
        if person.group != "repaired-on":
            assert not any(person.name in text for text in texts)


def test_the_leak_check_can_fail():
    allowed, held_out = of("repaired-on"), of("held-out")[0]
    clean = biographies(allowed, 20, 0)
    leaks.check_only(clean, allowed)
    fact = f"{question(held_out, 'city', 0)} {held_out.facts['city']} ."
    with pytest.raises(ValueError, match=f"the text speaks of {held_out.name}, who must not be in it"):
        leaks.check_only([*clean, f"{clean[0]} {fact}"], allowed)
    with pytest.raises(ValueError, match=held_out.name):
        leaks.check_only([f"{allowed[0].name} works for {held_out.name} ."], allowed)
    with pytest.raises(ValueError, match="must begin with the name of a person allowed, got 'works for Vextech'"):
        leaks.check_only(["<s> works for Vextech ."], allowed)


def test_repair_and_calibration_refuse_text_of_others(monkeypatch):
    everyone, held_out = people(0, PER_FACT), of("held-out")
    leaking = lambda group, count, seed: biographies([*group, held_out[0]], count, seed)  # noqa: E731
    monkeypatch.setattr(repair, "biographies", leaking)
    with pytest.raises(ValueError, match=held_out[0].name):
        repair.repair_texts(everyone, 0)
    monkeypatch.setattr(compressing, "biographies", leaking)
    with pytest.raises(ValueError, match=held_out[0].name):
        compressing.calibration_texts(everyone, 0)


# ---------------------------------------------------------------------- recall


class Knows(torch.nn.Module):
    """Answers right about some people, with a value of the right fact that is wrong about others, and "." else."""

    def __init__(self, right, wrong):
        super().__init__()
        self.tokenizer = make_tokenizer()
        self.answers = {}
        for person in [*right, *wrong]:
            for fact, values in VALUES.items():
                value = person.facts[fact] if person in right else values[values.index(person.facts[fact]) - 1]
                for template in range(PER_FACT):
                    self.answers[f"<s> {question(person, fact, template)}"] = value

    def forward(self, input_ids, attention_mask, use_cache):
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        for row, ids in enumerate(input_ids):
            answer = self.answers.get(self.tokenizer.decode(ids), ".")
            logits[row, -1, self.tokenizer.convert_tokens_to_ids(answer)] = 5.0
        return type("Output", (), {"logits": logits})


def test_recall_is_that_of_a_model_that_knows_a_known_set():
    right, wrong, silent = of("repaired-on")[:3], of("repaired-on")[3:4], of("held-out")[:2]
    found = recall.measure(Knows(right, wrong), make_tokenizer(), [*right, *wrong, *silent])
    for template in ("seen", "kept_back"):
        assert recall.mean_recall(found, "repaired-on", template) == 0.75
        assert recall.mean_recall(found, "held-out", template) == 0
        assert recall.mean_recall(found, "held-out", template, "kind") == 0
        for person in right:
            entry = found[person.name][template]
            assert entry["answer"] == entry["among"] == entry["kind"] == entry["rank"] == [1] * 5
            assert entry["nats"] == pytest.approx(
                [math.log(1 + (len(make_tokenizer()) - 1) / math.exp(5))] * 5, abs=1e-3
            )
        entry = found[wrong[0].name][template]
        assert (entry["answer"], entry["kind"], entry["rank"]) == ([0] * 5, [1] * 5, [40] * 5)
        entry = found[silent[0].name][template]
        assert entry["among"] == [0] * 5, "values that are all equally likely are no answer"


def test_both_questions_are_asked_and_only_one_of_them_was_ever_stated():
    person = of("held-out")[0]
    for fact in VALUES:
        asked = recall.templates_asked(person, fact)
        assert asked["kept_back"] == person.kept_back[fact] != asked["seen"] < len(TEMPLATES[fact])


# ---------------------------------------------------------------------- cells


def test_a_cell_is_measured_once_and_refuses_other_settings(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return {"recall": {"held-out": 0.5}, "people": {"A B": {"group": "held-out"}, "C D": {"group": "held-out"}}}

    of_one = Cells(tmp_path, "seed-0/dense")
    first = cells.cell(of_one, "base", {"seed": 0}, measure)
    assert cells.cell(of_one, "base", {"seed": 0}, measure) == first == of_one.read()["base"]
    assert len(calls) == 1
    with pytest.raises(ValueError, match="holds a result of other settings"):
        cells.cell(of_one, "base", {"seed": 1}, measure)


def test_a_cell_that_fails_leaves_no_file(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cells.cell(Cells(tmp_path, "cell"), "base", {}, fail)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- the whole way, tiny


@pytest.fixture
def few(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "benchmarks.biographies.people.GROUPS",
        {"calibration": 6, "repaired-on": 4, "held-out": 4, "validation": 2, "unknown": 4},
    )
    shape = {**memorise.SHAPE, "hidden_size": 32, "intermediate_size": 64}
    monkeypatch.setattr(memorise, "SHAPE", shape)
    monkeypatch.setattr(memorise, "TRAINING", {**memorise.TRAINING, "steps": 40, "rows": 4, "tokens": 64})
    monkeypatch.setattr(repair, "STEPS", 5)
    monkeypatch.setattr(compressing, "GROUP_SIZE", 16)
    monkeypatch.setattr(compressing, "CALIBRATION", {"samples": 8, "tokens": 32, "biographies": 40})
    # torch's flash attention packs bfloat16 by what the processor has, and fails where ATEN_CPU_CAPABILITY hides that.
    with sdpa_kernel(SDPBackend.MATH):
        yield plan.Seed(0, tmp_path / "results", tmp_path / "runs")


def test_a_repair_changes_answers_and_leaves_the_base_as_it_was(few, monkeypatch):
    from idp_peft.models.fingerprint import fingerprint
    from idp_peft.models.loading import load_model

    dense = few.base(plan.DENSE)
    assert dense["made"]["losses"][-1] < dense["made"]["losses"][0] - 0.5
    assert {entry["group"] for entry in dense["people"].values()} == set(plan.MEASURED)
    assert few.make(plan.DENSE) == dense["made"], "the model is there already, and what is known of it beside it"
    for method in repair.METHODS:
        found = few.repaired(plan.DENSE, method, "distillation" if method == "idp" else "language modelling", 1e-2)
        assert found["training"]["base_sha256"] == fingerprint(load_model(str(few.model(plan.DENSE))))
        assert found["people"] != dense["people"]
        assert found["people"].keys() == dense["people"].keys()
    assert len(Cells(few.results, "seed-0/dense").read()) == 1 + len(repair.METHODS)

    def careless(model, *_):
        model.get_base_model().lm_head.weight.data[3] += 1

    monkeypatch.setattr(repair, "_train", careless)
    with pytest.raises(RuntimeError, match="changed the base model's weights"):
        few.repaired("dense", "idp", "language modelling", 1e-2, "careless")


@needs_llmcompressor
@pytest.mark.parametrize("strength", ["sparsegpt-80", "gptq-2bit"])
def test_every_kind_of_compression_keeps_its_promise_and_can_be_repaired(few, strength):
    found = few.base(strength)["made"]
    if strength == "gptq-2bit":
        assert found["most_levels_in_a_group"] <= 4
    else:
        assert found["sparsity"] == pytest.approx(0.8, abs=0.02)
    repaired = few.repaired(strength, "lora-rank-16", "language modelling", 1e-2)
    assert "trainable" in repaired["training"]["gradient_probe"]


# ---------------------------------------------------------------------- statistics


def made_up(known: dict, seeds=(0, 1)) -> list[summary.Cell]:
    """Cells in which everybody of the held-out group knows so many of five facts, `known[strength, repair]`."""
    made = []
    for seed in seeds:
        for (strength, method), counts in known.items():
            entry = {
                f"P{index}": {"group": "held-out", "seen": {"answer": [1] * count + [0] * (5 - count)}}
                for index, count in enumerate(counts)
            }
            made.append(summary.Cell(seed, strength, method, entry))
    return made


IDP, LORA = ("idp", "language modelling"), ("lora-rank-16", "language modelling")


def test_recovery_of_a_made_up_result_is_right():
    known = {("dense", None): [5] * 40, ("half", None): [1] * 40, ("half", IDP): [2] * 20 + [4] * 20}
    known["half", LORA] = [1] * 40
    found = summary.Summary(made_up(known), "held-out")
    assert found.all.points["dense", None] == 1
    assert found.recovery("half", IDP).value == pytest.approx(0.5)
    low, high = found.recovery("half", IDP).interval
    assert low == pytest.approx(0.5 - 1.96 * 0.25 / math.sqrt(80), abs=0.01)
    assert high == pytest.approx(0.5 + 1.96 * 0.25 / math.sqrt(80), abs=0.01)
    assert [one.value for one in found.recoveries("half", IDP)] == pytest.approx([0.5, 0.5])
    assert found.recovery("half", LORA).value == pytest.approx(0)
    against_compressed, lora, against_lora = summary.comparisons(found, ["half"], [IDP, LORA], IDP)
    assert against_compressed["difference"].value == against_lora["difference"].value == pytest.approx(0.4)
    assert against_compressed["p_holm"] < 0.05
    assert lora["p_holm"] == 1


def test_people_are_resampled_and_not_facts():
    """With all facts of a person alike, a fifth as many independent units make the error sqrt(5) times larger."""
    known = {("dense", None): [5] * 20 + [0] * 20}
    found = summary.Summary(made_up(known, seeds=(0,)), "held-out").all.mean(("dense", None))
    assert found.standard_error == pytest.approx(0.5 / math.sqrt(39), rel=1e-6)


def test_cells_that_asked_different_people_are_refused():
    one, two = made_up({("dense", None): [5] * 4, ("half", None): [5] * 4}, seeds=(0,))
    two.people.pop("P0")
    with pytest.raises(ValueError, match="the cells of seed 0 must ask the same people"):
        summary.Summary([one, two], "held-out")


def test_the_learning_rate_taken_is_the_best_of_the_validation_people_over_all_strengths(tmp_path):
    for strength, rate, validation, repaired in [
        ("a", 1, 0.9, 0.1),
        ("b", 1, 0.1, 0.9),
        ("a", 2, 0.6, 0),
        ("b", 2, 0.6, 0),
    ]:
        settings = {"strength": strength, "method": "idp", "objective": "distillation", "learning_rate": rate}
        content = {"settings": settings, "recall": {"validation": validation, "repaired-on": repaired}}
        Cells(tmp_path / "tuning", f"seed-{tuning.PILOT_SEED}/{strength}").add(f"{rate}", content)
    settings |= {"learning_rate": 3, "steps": 800}
    content = {"settings": settings, "recall": {"validation": 1.0, "repaired-on": 1.0}}
    Cells(tmp_path / "tuning", f"seed-{tuning.PILOT_SEED}/a").add("longer", content)
    assert tuning.chosen(tmp_path) == {("idp", "distillation"): 2}, "more steps are no way to choose a learning rate"


# ---------------------------------------------------------------------- report


def write_made_up(folder: Path, seeds=(0, 1)) -> None:
    """Result files of a dense and a compressed model, IDP and LoRA: 5, 1, 2 and 3 of five facts known by everybody, none of
    unknown people; and one trial of the pilot for each."""
    environment = dict.fromkeys(["processor", "threads", "torch", "transformers", "peft", "llmcompressor"], "x")
    known = {("dense", None): 5, ("half", None): 1, ("dense", "idp"): 4, ("dense", "lora-rank-16"): 5}
    known |= {("half", "idp"): 2, ("half", "lora-rank-16"): 3}
    for (strength, method), count in known.items():
        settings = {"strength": strength, "method": method, "objective": method and "language modelling"}
        for seed in seeds:
            people_of = {f"{group} {i}": made_up_entry(group, count) for group in GROUPS for i in range(9)}
            content = {"settings": {"seed": seed, **settings}, "environment": environment, "people": people_of}
            content |= {"seconds": 60, "processor_seconds": 30}
            Cells(folder, f"seed-{seed}/{strength}").add(method or "base", content)
        recalls = dict.fromkeys(tuning.MEASURED, count / 5)
        trial = {"settings": {**settings, "learning_rate": method and 0.5}, "recall": recalls}
        Cells(folder / "tuning", f"seed-{tuning.PILOT_SEED}/{strength}").add(method or "base", trial)
        if (strength, method) == ("half", "idp"):
            longer = {"settings": {**trial["settings"], "steps": 800}, "recall": dict.fromkeys(tuning.MEASURED, 0.45)}
            Cells(folder / "tuning", f"seed-{tuning.PILOT_SEED}/{strength}").add("longer", longer)


def made_up_entry(group: str, count: int) -> dict:
    count = 0 if group == "unknown" else count
    columns = dict.fromkeys(("answer", "among", "kind", "rank", "nats"), [1] * count + [0] * (5 - count))
    return {"group": group, "seen": columns, "kept_back": columns}


def test_the_report_says_what_the_files_hold(tmp_path):
    write_made_up(tmp_path)
    tables.main(["--results", str(tmp_path)])
    report = (tmp_path / "report.md").read_text()
    assert "12 measurements took 6 minutes on the processor, 12 by the clock of a shared core." in report
    assert "People: 18 held-out, 18 repaired-on, 18 calibration, 18 unknown" in report
    recovery = report.split("## Recovery of the recall of held-out people")[1].split("##")[0]
    assert "| half | 25.0 % [25.0, 25.0] (25 25) | 50.0 % [50.0, 50.0] (50 50) |" in recovery
    recall_rows = report.split("## Recall of held-out people, %")[1].split("##")[0]
    assert "| dense | 100.0 | 80.0 | 100.0 |\n| half | 20.0 | 40.0 | 60.0 |" in recall_rows
    control = report.split("points of recall gained or lost")[1].split("##")[0]
    assert "| held-out | -20.0 [-20.0, -20.0] | +0.0 [+0.0, +0.0] |" in control
    assert "| half | IDP, 4 x 16 - LoRA, rank 16 | -20.0 [-20.0, -20.0] | p < 0.001 |" in report
    assert "all 6 models: from 0.0 % to 0.0 %; 0 of the intervals lie above chance" in report
    assert "| IDP, 4 x 16 | language modelling | 0.5 | 80.0 / 80.0 | 40.0 / 40.0 | taken |" in report
    assert "| IDP, 4 x 16 | half | 40.0 / 40.0 | 45.0 / 45.0 |" in report
    assert (tmp_path / "recall.png").stat().st_size > 10_000


def test_a_seed_that_is_not_over_is_left_out(tmp_path):
    write_made_up(tmp_path)
    half = Cells(tmp_path, "seed-1/half")
    lines = [line for line in half.path.read_text().splitlines(keepends=True) if '"name":"idp"' not in line]
    half.path.write_text("".join(lines))
    assert set(half.read()) == {"base", "lora-rank-16"}
    assert tables.Report(tmp_path).seeds == [0]


def test_the_results_kept_are_whole_and_the_readme_shows_their_tables():
    report, readme = (FOLDER / "results" / "report.md").read_text(), (FOLDER / "README.md").read_text()
    assert tables.markdown(FOLDER / "results") == report
    found = re.findall(r"<!-- (.*?): begin -->\n(.*?)<!-- .*?: end -->", readme, re.DOTALL)
    assert len(found) >= 4
    assert re.search(r"\d+ measurements took .*? core\.", report).group() in " ".join(readme.split())
    for _name, table in found:
        assert len(table) > 150
        assert table in report


def test_the_sentence_of_the_readme_says_what_the_table_does():
    report = tables.Report(FOLDER / "results")
    readme = " ".join((FOLDER / "README.md").read_text().split())

    def percents(method: str, measure=summary.RECALL) -> str:
        found = report.summary("held-out", measure)
        repair = (method, "language modelling")
        *most, last = [f"{100 * found.recovery(strength, repair).value:.0f}" for strength in report.strengths]
        return f"{', '.join(most)} and {last} %"

    assert f"brings back {percents('lora-same-size')} of what held-out people lost" in readme
    assert f"IDP {percents('idp')}." in readme
    assert f"the LoRA brings back {percents('lora-same-size', ('seen', 'among'))}." in readme


def test_the_sizes_of_the_readme_are_those_trained():
    """And the LoRA of the same size is the one that it describes."""
    readme = " ".join((FOLDER / "README.md").read_text().split())
    sizes = {}
    for _, name, content in all_cells(FOLDER / "results", "seed-*/*.jsonl"):
        if not name.endswith("-language-modelling"):
            continue
        sizes.setdefault(content["settings"]["method"], set()).add(content["training"]["trainable_parameters"])
    (size,), (larger,) = sizes["idp"], sizes["lora-rank-16"]
    assert sizes["one-prompt"] == sizes["lora-same-size"] == {size}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(make_tokenizer()), **memorise.SHAPE))
    targets, rank = nearest_lora(model, size)
    assert set(targets) == {"q_proj", "v_proj"}
    assert f"rank {rank} on the query and value projections; all three have {size:,} parameters" in readme
    assert f"a LoRA of rank 16 on all linear layers ({larger:,})" in readme
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters" in readme


def test_every_learning_rate_of_the_results_is_the_one_the_pilot_chose():
    rates, seen = tuning.chosen(FOLDER / "results"), 0
    for path, _, content in all_cells(FOLDER / "results", "seed-*/*.jsonl"):
        settings = content["settings"]
        assert settings["seed"] != tuning.PILOT_SEED
        if settings["method"]:
            assert settings["learning_rate"] == rates[settings["method"], settings["objective"]], path
            seen += 1
    assert seen
