"""The local tasks: what is asked, how it is scored, which questions a limit draws; real data where it is cached."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
import torch

from idp_peft.evaluation import task_data
from idp_peft.evaluation.task_data import COUNTS, is_cached, task_file
from idp_peft.evaluation.tasks import LOCAL_TASKS, SCORES, expand_tasks
from tests.test_harness import tokenizer
from tests.test_perplexity import word_ids
from tests.tiny import tiny

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

# Two questions of every published layout, in words of the tiny tokenizer; each function below turns one into a task's.
_ARC = {"query": "Question: w5 w6\nAnswer:", "choices": ["w7", "w8 w9", "w10"], "gold": 1}
_PUBLISHED = {
    "arc_easy": (task_data._choices, _ARC),
    "arc_challenge": (task_data._choices, _ARC),
    "hellaswag": (task_data._choices, {"query": "w5 w6", "choices": ["w7", "w8"], "gold": 0}),
    "sciq": (
        task_data._sciq,
        {
            "support": " w4 w5",
            "question": "w6",
            "distractor1": "w7",
            "distractor2": "w8",
            "distractor3": "w9",
            "correct_answer": "w10",
        },
    ),
    "piqa": (task_data._piqa, {"goal": "w5", "sol1": "w6 w7", "sol2": "w8", "label": 1}),
    "winogrande": (
        task_data._winogrande,
        {"sentence": "w5 w6 so _ w7 w8.", "option1": "w9", "option2": "w10", "answer": "2"},
    ),
    "boolq": (task_data._boolq, {"passage": "w5 w6", "question": "w7", "answer": True}),
    "triviaqa": (task_data._triviaqa, {"question": "w5 w6?", "answer": {"aliases": ["w7", "w8"]}}),
    "lambada": (task_data._lambada, {"query": "w5 w6", "choices": ["w7"]}),
    "webqs": (task_data._web_question, {"question": "w5?", "answer": ["w8", "w7 w9", "w7"]}),
}
# Context and continuation of every request, as lm-evaluation-harness 0.4.13 builds them from its own definition.
_ASKED = {
    "arc_easy": [("Question: w5 w6\nAnswer:", f" {choice}") for choice in ("w7", "w8 w9", "w10")],
    "hellaswag": [("w5 w6", " w7"), ("w5 w6", " w8")],
    "piqa": [("Question: w5\nAnswer:", " w6 w7"), ("Question: w5\nAnswer:", " w8")],
    "winogrande": [("w5 w6 so w9", " w7 w8."), ("w5 w6 so w10", " w7 w8.")],
    "boolq": [("w5 w6\nQuestion: w7?\nAnswer:", " no"), ("w5 w6\nQuestion: w7?\nAnswer:", " yes")],
    "lambada": [("w5 w6", " w7")],
    "webqs": [("Question: w5?\nAnswer:", " w7"), ("Question: w5?\nAnswer:", " w8")],
}


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Every local task, with 30 questions that differ in their first words."""
    from idp_peft.evaluation import tasks

    for name, (convert, published) in _PUBLISHED.items():
        doc = json.dumps(convert(published))
        lines = [doc] + [doc.replace("w5", f"w{5 + i} w{6 + i}") for i in range(1, 30)]
        (tmp_path / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    monkeypatch.setattr(tasks, "task_file", lambda name: tmp_path / f"{name}.jsonl")
    monkeypatch.setenv("IDP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def asked(name: str) -> list[tuple]:
    from idp_peft.evaluation.task_loading import load_tasks

    task = load_tasks([f"local_{name}"])[f"local_{name}"]
    task.build_all_requests(samples=[0])
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize("name", list(_ASKED))
def test_a_question_is_asked_as_the_harness_asks_it(name, local):
    assert asked(name) == _ASKED[name]


def test_sciq_shuffles_its_choices_the_same_way_every_time(local):
    convert, published = _PUBLISHED["sciq"]
    doc = convert(published)
    assert doc == convert(published)
    assert doc["choices"][doc["gold"]] == "w10"
    golds = {convert({**published, "question": f"w{i}"})["gold"] for i in range(40)}
    assert golds == {0, 1, 2, 3}
    assert {context for context, _ in asked("sciq")} == {"w4 w5\nQuestion: w6\nAnswer:"}
    assert sorted(choice for _, choice in asked("sciq")) == [" w10", " w7", " w8", " w9"]


def test_an_open_answer_is_generated_and_compared_with_every_alias(local):
    from idp_peft.evaluation.task_loading import load_tasks

    ((context, options),) = asked("triviaqa")
    assert context == "Question: w5 w6??\nAnswer:"  # the harness adds a question mark too
    assert options["until"] == ["\n", ".", ","]
    task = load_tasks(["local_triviaqa"])["local_triviaqa"]
    doc = task.eval_docs[0]
    assert task.process_results(doc, ["W8"])["exact_match"] == 1.0
    assert task.process_results(doc, ["w9"])["exact_match"] == 0.0


def test_every_task_is_scored_question_by_question(local, make):
    from idp_peft.evaluation import score_tasks

    model = make("llama")
    results = score_tasks(model, tokenizer(), "all_local", limit=5, each_prompt=True)
    assert list(results) == list(LOCAL_TASKS)
    for name, result in results.items():
        expected = SCORES[name.removeprefix("local_")]
        assert (result["metric"], result["chance"]) == (expected.metric, expected.chance)
        assert len(result["items"]) == 5
        assert abs(result["score"] - sum(item["score"] for item in result["items"]) / 5) < 1e-12
        for item in result["items"]:
            assert item["scores"][expected.metric] == item["score"]
            assert item["prompt"] in range(4)
            # Under a forced prompt a question scores what it does when it chooses that prompt.
            assert item["score_by_prompt"][item["prompt"]] == item["score"]
        json.dumps(result)
    assert results["local_lambada"]["items"][0]["scores"].keys() == {"acc", "log_likelihood"}
    with_probability = {name for name, result in results.items() if "probability" in result["items"][0]["scores"]}
    assert with_probability == set(LOCAL_TASKS) - {"local_triviaqa", "local_lambada", "local_webqs"}
    plain = score_tasks(tiny("llama"), tokenizer(), "local_piqa", limit=5, each_prompt=True)["local_piqa"]
    assert all(item["prompt"] is None and "score_by_prompt" not in item for item in plain["items"])


@pytest.mark.parametrize("name", ["piqa", "winogrande", "arc_easy"])
def test_the_probability_of_the_right_choice_is_the_softmax_over_the_choices(local, make, name):
    from idp_peft.evaluation import score_tasks
    from tests.test_harness import alone

    model, task, words = tiny("llama"), f"local_{name}", tokenizer()
    item = score_tasks(model, tokenizer(), task, limit=30)[task]["items"][0]
    gold = json.loads((local / f"{name}.jsonl").read_text().splitlines()[0])["gold"]
    log_likelihoods = torch.tensor(
        [alone(model, *(words(text)["input_ids"] for text in pair)) for pair in _ASKED[name]]
    )
    assert item["scores"]["probability"] == pytest.approx(float(log_likelihoods.softmax(0)[gold]), rel=1e-4)


def test_a_forced_prompt_answers_every_question(local, make):
    from idp_peft.evaluation import score_tasks

    model = make("llama")
    by_prompt = score_tasks(model, tokenizer(), "local_piqa", limit=5, each_prompt=True)["local_piqa"]["items"]
    forced = score_tasks(model, tokenizer(), "local_piqa", limit=5, prompt_id=2)["local_piqa"]["items"]
    assert [item["prompt"] for item in forced] == [2] * 5
    assert [item["score"] for item in forced] == [item["score_by_prompt"][2] for item in by_prompt]


def test_a_limit_draws_the_same_questions_for_every_model_and_names_them_by_their_number(local, make):
    from idp_peft.evaluation import score_tasks
    from tests.test_harness import chosen_alone

    def ids(model, **options):
        items = score_tasks(model, tokenizer(), "local_hellaswag", **options)["local_hellaswag"]["items"]
        return [item["id"] for item in items]

    drawn = ids(tiny("llama"), limit=6)
    assert drawn == ids(make("llama"), limit=6)
    assert drawn != ids(tiny("llama"), limit=6, seed=1)
    assert drawn != [str(number) for number in range(6)]
    assert ids(tiny("llama")) == [str(number) for number in range(30)]
    model = make("llama")
    items = score_tasks(model, tokenizer(), "local_hellaswag", limit=6)["local_hellaswag"]["items"]
    lines = (local / "hellaswag.jsonl").read_text().splitlines()
    for item in items:  # the prompt is that of the question with this number
        assert item["prompt"] == chosen_alone(model, word_ids(json.loads(lines[int(item["id"])])["query"]))
    with pytest.raises(ValueError, match="`limit` must be at least 1 item, or left out for all, got 0"):
        ids(tiny("llama"), limit=0)


def test_names_of_tasks():
    from idp_peft.evaluation.task_loading import check_tasks

    assert expand_tasks("all_local") == list(LOCAL_TASKS)
    assert expand_tasks(" local_piqa, local_sciq,local_piqa") == ["local_piqa", "local_sciq"]
    assert expand_tasks(["local_piqa,local_sciq", "all_local"])[:2] == ["local_piqa", "local_sciq"]
    assert expand_tasks(None) == expand_tasks("") == []
    with pytest.raises(ValueError, match=r"knows no 'local_arc': choose from local_arc_easy, .*, or a task of"):
        check_tasks("local_piqa,local_arc")
    assert check_tasks("arc_easy") == ["arc_easy"]


def test_a_missing_harness_names_the_extra(monkeypatch):
    import sys

    from idp_peft.evaluation.task_loading import check_tasks

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"need lm-evaluation-harness: pip install 'idp-peft\[eval\]'"):
        check_tasks("local_piqa")
    assert check_tasks(None) == []


def test_a_task_of_the_hub_that_cannot_be_reached_is_one_line_with_the_local_one(monkeypatch):
    from lm_eval.tasks import TaskManager

    from idp_peft.evaluation.task_loading import load_tasks

    def unreachable(*_):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub\nmore lines")

    monkeypatch.setattr(TaskManager, "load", unreachable)
    with pytest.raises(
        ValueError, match=r"'arc_easy' could not be loaded from the Hub \(Couldn't reach .* on the Hub more lines\)"
    ):
        load_tasks("arc_easy")
    with pytest.raises(ValueError, match="; local_lambada needs no hub"):
        load_tasks("lambada_openai")


def test_a_jar_inside_a_wheel_is_read_and_a_wrong_count_is_refused(tmp_path, monkeypatch):
    jar = io.BytesIO()
    with zipfile.ZipFile(jar, "w") as archive:
        archive.writestr(task_data._WEB_FILE, '{"question": "q?", "answer": ["b", "ab", "a"]}\n')
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        archive.writestr(task_data._WEB_JAR, jar.getvalue())
    monkeypatch.setitem(COUNTS, "webqs", 1)
    with zipfile.ZipFile(tmp_path / "wheel") as wheel:
        task_data._convert_web_questions(wheel, tmp_path)
        doc = json.loads((tmp_path / "webqs.jsonl").read_text())
        assert doc == {"question": "q?", "choices": ["a", "b"], "gold": [0, 1]}
        monkeypatch.setitem(COUNTS, "webqs", 2)
        with pytest.raises(RuntimeError, match="webqs must have 2 questions, the published file has 1"):
            task_data._convert_web_questions(wheel, tmp_path)


def test_requests_that_are_published_twice_become_one_question():
    import gzip

    docs = [{"id": n, "query": f"q{n}", "choices": ["a"], "gold": 0} for n in (0, 0, 1, 1, 0)]
    content = gzip.compress("\n".join(json.dumps({"doc": doc, "idx": i}) for i, doc in enumerate(docs)).encode())
    assert [doc["id"] for doc in task_data._request_docs(content)] == [0, 1]


@pytest.mark.parametrize("name", list(COUNTS))
def test_the_published_questions_are_all_there(name):
    if not is_cached(name):
        pytest.skip("the question sets are not in the cache")
    docs = [json.loads(line) for line in task_file(name).read_text(encoding="utf-8").split("\n")[:-1]]
    assert len(docs) == COUNTS[name]
    for doc in docs:
        texts = [*doc.get("choices", []), *doc.get("contexts", []), *doc.get("aliases", [])]
        texts += [doc[key] for key in ("query", "question", "goal", "continuation", "context", "word") if key in doc]
        assert all(text.strip() for text in texts)
        golds = doc["gold"] if isinstance(doc.get("gold"), list) else [doc.get("gold", 0)]
        assert all(0 <= gold < len(doc.get("choices", doc.get("contexts", ["no", "yes"]))) for gold in golds)
