"""The model type `idp` of lm-evaluation-harness: from its command lines and by name, the numbers of the model in memory."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import idp_peft
from idp_peft import IDPConfig
from tests.tiny import tiny
from tests.tiny_folder import tiny_folder, tiny_tokenizer
from tests.tiny_gguf import tiny_gguf

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model, model_registry
from lm_eval.tasks import TaskManager

import idp_peft.evaluation.lm_eval
from idp_peft.evaluation import HarnessModel, score_tasks, task_data
from idp_peft.evaluation.harness_type import register_model_type
from idp_peft.evaluation.local_task import FOLDER
from idp_peft.evaluation.tasks import LOCAL_TASKS
from idp_peft.models.loading import load_model, load_tokenizer

_TEMPLATE = "{% for message in messages %}w2 {{ message['content'] }} w3 {% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
_LOCAL = ("arc_easy", "winogrande", "boolq", "lambada", "triviaqa")
_METRIC = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
_YAML = {
    "tiny_mc": "output_type: multiple_choice\ndoc_to_text: query\ndoc_to_choice: choices\ndoc_to_target: gold\n"
    + _METRIC
    + "fewshot_split: test\n",
    "tiny_roll": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
    "metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]\n",
}


def words(count: int, draw: random.Random) -> str:
    return " ".join(f"w{draw.randrange(5, 97)}" for _ in range(count))


def docs(count: int = 12) -> dict[str, list[dict]]:
    """Questions of every layout, with contexts of different lengths."""
    draw = random.Random(0)
    text = [words(draw.randint(2, 9), draw) for _ in range(count)]
    choices = [[words(draw.randint(1, 4), draw) for _ in range(3)] for _ in range(count)]
    mc = [{"query": query, "choices": of, "gold": 1} for query, of in zip(text, choices, strict=True)]
    return {
        "tiny_mc": mc,
        "arc_easy": mc,
        "winogrande": [{"contexts": [f"{t} w5", f"{t} w6"], "continuation": "w7 w8", "gold": 0} for t in text],
        "boolq": [{"passage": t, "question": "w9", "gold": 1} for t in text],
        "lambada": [{"context": t, "word": " w5 w6"} for t in text],
        "triviaqa": [{"question": t, "aliases": ["w5"]} for t in text],
        "tiny_roll": [{"text": words(count, draw)} for count in (30, 130, 61)],
    }


def save_adapter(folder: Path, base: str, config) -> str:
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), config)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A base, three adapters, questions in files and in the cache of the local tasks; no network."""
    folder, patch = tmp_path_factory.mktemp("harness"), pytest.MonkeyPatch()
    patch.setenv("IDP_CACHE", str(folder / "cache"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
    base = tiny_folder(folder / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(base)
    save_adapter(folder / "adapter", base, IDPConfig(task_type="CAUSAL_LM", num_prompts=4, num_virtual_tokens=4))
    save_adapter(folder / "one", base, IDPConfig(task_type="CAUSAL_LM", num_prompts=1, num_virtual_tokens=4))
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    save_adapter(folder / "lora", base, lora)
    (folder / "tasks").mkdir()
    for name, rows in docs().items():
        target = folder / "tasks" / f"{name}.jsonl"
        if name in _LOCAL:
            target = task_data.wheel_folder(task_data._wheel(name)) / task_data._FOLDER / f"{name}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if name in _YAML:
            data = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {target}}}}}\n"
            (folder / "tasks" / f"{name}.yaml").write_text(data + "test_split: test\n" + _YAML[name])
    yield folder
    patch.undo()


def manager(here: Path) -> TaskManager:
    return TaskManager(include_path=[str(FOLDER), str(here / "tasks")], include_defaults=False)


def by_name(here: Path, tasks: list[str], model_args, **options) -> dict:
    options = {"batch_size": 4, "bootstrap_iters": 0, "task_manager": manager(here), **options}
    return lm_eval.simple_evaluate(model="idp", model_args=model_args, tasks=tasks, **options)


def in_memory(here: Path, adapter: str | None = "adapter"):
    model = load_model(here / "base")
    return model if adapter is None else PeftModel.from_pretrained(model, here / adapter).eval()


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def files_of(folder: Path) -> tuple[dict, dict[str, list[dict]]]:
    """What `--output_path` and `--log_samples` wrote: the results, and the samples of each task."""
    (results,) = folder.rglob("results_*.json")
    samples = {}
    for path in folder.rglob("samples_*.jsonl"):
        name = re.fullmatch(r"samples_(.*)_\d{4}-.*", path.stem)[1]
        samples[name] = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: int(row["doc_id"]))
    return json.loads(results.read_text()), samples


def answers(samples: list[dict]) -> list[list[str]]:
    """Every response of every question: log-likelihoods to their last digit, and texts."""
    rows = json.loads(json.dumps([(int(row["doc_id"]), row["filter"], row["filtered_resps"]) for row in samples]))
    return [[str(one) for one in _leaves(row)] for row in sorted(rows, key=lambda row: row[:2])]


def _leaves(value) -> list:
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, list) else [value]


# ---------------------------------------------------------------------- the two command lines


@pytest.mark.slow
def test_the_launcher_gives_exactly_what_the_evaluation_in_memory_gives(here):
    pytest.importorskip("evaluate", reason="evaluate is not installed")
    local = [f"local_{name}" for name in _LOCAL]
    run(
        *(
            sys.executable,
            "-m",
            "idp_peft.evaluation.lm_eval",
            "--model",
            "idp",
            "--model_args",
            "pretrained=base,peft=adapter",
        ),
        *("--tasks", ",".join(local), "tiny_mc", "tiny_roll", "--include_path", "tasks", "--batch_size", 4),
        *("--output_path", "out", "--log_samples"),
        folder=here,
    )
    results, samples = files_of(here / "out")
    tokenizer = load_tokenizer(here / "base")
    for name, expected in score_tasks(in_memory(here), tokenizer, local, batch_size=4).items():
        of_task = [row for row in samples[name] if row["filter"] == samples[name][0]["filter"]]
        assert len(of_task) == len(expected["items"]) == 12
        for row, item in zip(of_task, expected["items"], strict=True):
            assert str(row["doc_id"]) == item["id"]
            assert row["perplexity" if expected["metric"] == "log_likelihood" else expected["metric"]] is not None
            for metric in row["metrics"]:
                stored = item["scores"]["log_likelihood" if metric == "perplexity" else metric]
                assert float(row[metric]) == stored
        prompts = [item["prompt"] for item in expected["items"]]
        assert results["config"]["chosen_prompts"][name] == prompts
        assert results["results"][name][f"{expected['metric']},{of_task[0]['filter']}"] == expected["score"]
    assert len(set(results["config"]["chosen_prompts"]["local_arc_easy"])) > 1
    for name in (*local, "tiny_mc", "tiny_roll"):  # one after the other: batches of a task do not depend on the others
        lm = HarnessModel(in_memory(here), tokenizer, batch_size=4)
        expected = lm_eval.evaluate(lm, manager(here).load([name]), bootstrap_iters=0)
        assert answers(samples[name]) == answers(expected["samples"][name])
        assert results["config"]["chosen_prompts"][name] == [lm.prompts[name, doc] for doc in range(len(lm.prompts))]
    assert results["config"]["num_prompts"] == 4
    assert results["config"]["selection"] == "attention"


def test_the_harness_own_executable_knows_the_type_where_our_file_is_among_its_tasks(here):
    executable = Path(sys.executable).with_name("lm_eval")
    if not executable.exists():
        pytest.skip("lm-evaluation-harness has no executable beside this python")
    run(
        *(executable, "--model", "idp", "--model_args", "pretrained=base,peft=adapter", "--include_path", "tasks"),
        *(
            "--tasks",
            Path(idp_peft.__file__).with_name("lm_eval.yaml"),
            "tiny_mc",
            "--batch_size",
            4,
            "--num_fewshot",
            1,
        ),
        *("--apply_chat_template", "--fewshot_as_multiturn", "--limit", 8, "--output_path", "own", "--log_samples"),
        folder=here,
    )
    results, samples = files_of(here / "own")
    expected = lm_eval.simple_evaluate(
        HarnessModel(in_memory(here), load_tokenizer(here / "base"), batch_size=4),
        tasks=["tiny_mc"],
        task_manager=manager(here),
        num_fewshot=1,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        limit=8,
        bootstrap_iters=0,
    )
    assert answers(samples["tiny_mc"]) == answers(expected["samples"]["tiny_mc"])
    asked = samples["tiny_mc"][0]["arguments"]["gen_args_0"]["arg_0"]
    assert asked.startswith("w2 ")
    assert asked.endswith("w4 ")
    assert asked.count("w2 ") == 3, "one example, its answer, and the question are turns of their own"
    assert len(results["config"]["chosen_prompts"]["tiny_mc"]) == 8


def test_the_launchers_help_is_the_harness_own(monkeypatch, capsys):
    from lm_eval.__main__ import cli_evaluate

    from idp_peft.evaluation.lm_eval import main

    for words in (["--help"], ["run", "--help"], ["ls", "--help"], ["validate", "--help"]):
        shown = []
        for command in (main, cli_evaluate):
            monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
            with pytest.raises(SystemExit) as stopped:
                command()
            assert stopped.value.code == 0
            shown.append(capsys.readouterr().out)
        assert shown[0] == shown[1]
        assert "lm-eval" in shown[0]


# ---------------------------------------------------------------------- by name, in Python


def test_dense_and_other_adapters_are_rows_of_the_same_table(here):
    tokenizer = load_tokenizer(here / "base")
    seen = []
    for adapter in (None, "lora", "adapter"):
        model_args = f"pretrained={here / 'base'}" + (f",peft={here / adapter}" if adapter else "")
        found = by_name(here, ["tiny_mc"], model_args)
        expected = lm_eval.evaluate(
            HarnessModel(in_memory(here, adapter), tokenizer, batch_size=4),
            manager(here).load(["tiny_mc"]),
            bootstrap_iters=0,
        )
        assert answers(found["samples"]["tiny_mc"]) == answers(expected["samples"]["tiny_mc"])
        assert ("chosen_prompts" in found["config"]) == (adapter == "adapter")
        seen.append(answers(found["samples"]["tiny_mc"]))
    assert seen[0] != seen[1] != seen[2]


def test_an_adapter_alone_brings_its_base(here):
    both = by_name(here, ["tiny_mc"], {"pretrained": str(here / "base"), "peft": str(here / "adapter")})
    alone = by_name(here, ["tiny_mc"], {"peft": str(here / "adapter")})
    assert answers(alone["samples"]["tiny_mc"]) == answers(both["samples"]["tiny_mc"])
    with pytest.raises(ValueError, match=r"needs `pretrained` .* got neither"):
        get_model("idp").create_from_arg_string("batch_size=2")


def test_a_forced_prompt_is_forced_and_one_that_there_is_not_is_refused(here):
    tokenizer, names = load_tokenizer(here / "base"), {"pretrained": str(here / "base"), "peft": str(here / "adapter")}
    for prompt in (2, -1.0):  # the harness's own parser makes a float of a negative number
        found = by_name(here, ["tiny_mc"], {**names, "prompt_id": prompt})
        expected = lm_eval.evaluate(
            HarnessModel(in_memory(here), tokenizer, 4, int(prompt)), manager(here).load(["tiny_mc"]), bootstrap_iters=0
        )
        assert answers(found["samples"]["tiny_mc"]) == answers(expected["samples"]["tiny_mc"])
        assert set(found["config"]["chosen_prompts"]["tiny_mc"]) == {int(prompt)}
        assert found["config"]["selection"] == f"forced: {int(prompt)}"
    with pytest.raises(ValueError, match=r"must be between -1 .* and 3, got"):
        get_model("idp")(**names, prompt_id=4)
    with pytest.raises(ValueError, match="needs a model with an active IDP adapter"):
        get_model("idp")(pretrained=names["pretrained"], prompt_id=0)


def rolling(texts: list[str]) -> list[Instance]:
    return [Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("t", n, 1)) for n, text in enumerate(texts)]


def test_each_window_of_a_rolling_text_chooses_by_what_it_reads_and_does_not_score(here):
    lm = get_model("idp")(pretrained=str(here / "base"), peft=str(here / "adapter"), batch_size=3, device="cpu")
    model, draw = in_memory(here), random.Random(1)
    texts = [words(count, draw) for count in (1, 40, 60, 61, 150)]
    scores = lm.loglikelihood_rolling(rolling(texts), disable_tqdm=True)
    several = set()
    for number, (text, score) in enumerate(zip(texts, scores, strict=True)):
        tokens = [1] + [int(word[1:]) for word in text.split()]  # the prefix token predicts the first
        expected, chosen = 0.0, []
        for start in range(1, len(tokens), 60):  # 64 positions less 4 of the prompt
            stop = min(start + 60, len(tokens))
            read, scored = tokens[max(0, stop - 61) : stop], stop - start
            with torch.no_grad():
                model(input_ids=torch.tensor([read[: len(read) - scored]]))
                prompt = model.last_selection.prompt_ids
                logits = model(input_ids=torch.tensor([read[:-1]]), prompt_ids=prompt).logits[0].log_softmax(-1)
            expected += float(logits[-scored:].gather(1, torch.tensor(read[-scored:])[:, None]).sum())
            chosen.append(int(prompt))
        assert abs(score - expected) < 1e-3
        assert lm.prompts["t", number] == chosen
        several |= set(chosen)
    assert len(several) > 1


def test_the_harness_finds_a_batch_size_by_itself(here):
    names = {"pretrained": str(here / "base"), "peft": str(here / "adapter")}
    fixed = by_name(here, ["tiny_mc", "local_triviaqa"], names)
    for setting, detections in (("auto", 1), ("auto:3", 3)):
        lm = get_model("idp")(**names, batch_size=setting, max_batch_size=8)
        found = lm_eval.evaluate(lm, manager(here).load(["tiny_mc", "local_triviaqa"]), bootstrap_iters=0)
        assert list(lm.batch_sizes.values()) == [8] * detections
        for mine, theirs in zip(found["samples"]["tiny_mc"], fixed["samples"]["tiny_mc"], strict=True):
            for (score, _), (expected, _) in zip(mine["filtered_resps"], theirs["filtered_resps"], strict=True):
                assert abs(score - expected) < 1e-4
        assert answers(found["samples"]["local_triviaqa"]) == answers(fixed["samples"]["local_triviaqa"])


def test_stored_answers_are_refused_where_they_depend_on_more_than_their_key(here):
    pytest.importorskip("sqlitedict", reason="sqlitedict is not installed")
    names = {"pretrained": str(here / "base"), "peft": str(here / "adapter")}
    with pytest.raises(ValueError, match="`use_cache` stores an answer by its context and continuation alone"):
        by_name(here, ["tiny_mc"], names, use_cache=str(here / "answers"))
    free = by_name(here, ["tiny_mc"], {**names, "prompt_id": 1})
    for _ in range(2):
        stored = by_name(here, ["tiny_mc"], {**names, "prompt_id": 1}, use_cache=str(here / "answers-1"))
        assert answers(stored["samples"]["tiny_mc"]) == answers(free["samples"]["tiny_mc"])
    by_name(here, ["tiny_mc"], {**names, "peft": str(here / "one")}, use_cache=str(here / "answers-one"))


def test_settings_of_the_harness_reach_the_model(here):
    lm = get_model("idp")(
        pretrained=str(here / "base"),
        peft=str(here / "adapter"),
        tokenizer=str(here / "base"),
        dtype="bfloat16",
        max_length=20,
        prefix_token_id=7,
        add_bos_token=True,
        device="cpu",
        revision="main",
        attn_implementation="eager",
        trust_remote_code=False,
        think_end_token="w9",
    )
    assert lm.model.dtype == torch.bfloat16
    assert lm.max_length == 20 - 4
    assert lm.prefix_token_id == 7
    assert lm.model.config._attn_implementation == "eager"
    assert lm.think_end_token == "w9"
    context = [request("w5 w6 w7", " w8")]
    assert lm.loglikelihood(context, disable_tqdm=True)[0][0] < 0


def test_a_gguf_file_and_a_subfolder_are_bases_too(here, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    tiny_gguf(tmp_path / "tiny.gguf")
    question, tokenizer = [request("w5 w6 w7", " w8")], load_tokenizer(here / "base")
    for names, base in (
        ({"pretrained": str(here), "subfolder": "base"}, here / "base"),
        ({"pretrained": str(tmp_path / "tiny.gguf")}, tmp_path / "tiny.gguf"),
        ({"pretrained": str(tmp_path), "gguf_file": "tiny.gguf"}, tmp_path / "tiny.gguf"),
    ):
        lm = get_model("idp")(**names, peft=str(here / "adapter"), tokenizer=str(here / "base"))
        assert torch.equal(lm.model.get_input_embeddings().weight, tiny("llama").get_input_embeddings().weight)
        expected = HarnessModel(PeftModel.from_pretrained(load_model(base), here / "adapter").eval(), tokenizer)
        assert lm.loglikelihood(question, disable_tqdm=True) == expected.loglikelihood(question, disable_tqdm=True)


def request(context: str, continuation: str) -> Instance:
    return Instance("loglikelihood", {}, (context, continuation), 0, metadata=("t", 0, 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_spreading_a_model_over_gpus_needs_one(here):
    with pytest.raises(ValueError, match="`parallelize=True` spreads a model over GPUs, and there is none"):
        get_model("idp")(pretrained=str(here / "base"), parallelize=True)


@pytest.mark.parametrize(
    ("model_args", "text"),
    [
        ({"pretraned": "x"}, r"knows no 'pretraned': did you mean 'pretrained'\?"),
        ({"nonsense": 1}, "knows no 'nonsense': It takes pretrained, peft, prompt_id"),
        ({"softmax_dtype": "float32"}, "does not take 'softmax_dtype': log-softmax is always taken in float32"),
        ({"backend": "seq2seq"}, "does not take 'backend'"),
        ({"prompt_id": 1.5}, "'prompt_id' must be an integer, got 1.5"),
        ({"max_length": "long"}, "'max_length' must be an integer, got 'long'"),
        ({"device": "cdua"}, "`device` must be a device of torch, like cpu or cuda:0, got 'cdua'"),
        ({"peft": "/no/where"}, "`peft` /no/where is no adapter"),
        ({"pretrained": "./nowhere"}, "there is no model at ./nowhere"),
        ({"batch_size": 2}, "`model_args` has 'batch_size', which the command line gives too"),
    ],
)
def test_a_wrong_argument_is_named_in_one_line(here, model_args, text):
    with pytest.raises((ValueError, FileNotFoundError), match=text) as error:
        by_name(here, ["tiny_mc"], {"pretrained": str(here / "base"), **model_args})
    assert "\n" not in str(error.value)


def launcher_error(monkeypatch, *words: str) -> str:
    from idp_peft.evaluation.lm_eval import main

    monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return str(stopped.value.code)


def test_the_launcher_names_a_wrong_argument_before_anything_is_loaded(here, monkeypatch):
    monkeypatch.chdir(here)
    error = launcher_error(
        monkeypatch, "--model", "idp", "--model_args", "pretrained=base,pfet=adapter", "--tasks", "x"
    )
    assert error.startswith("error: `model_args`: the model type 'idp' knows no 'pfet': did you mean 'peft'?")
    (here / "run.yaml").write_text("model: idp\nmodel_args: {pretrained: base, pfet: adapter}\ntasks: [x]\n")
    assert launcher_error(monkeypatch, "run", "--config", "run.yaml") == error


@pytest.mark.parametrize("model", [["--model", "hf"], ["--model", "huggingface"], []])
def test_an_adapter_of_ours_under_another_model_type_is_refused_by_the_launcher(here, monkeypatch, model):
    monkeypatch.chdir(here)
    error = launcher_error(monkeypatch, *model, "--model_args", "pretrained=base,peft=adapter", "--tasks", "tiny_mc")
    assert error.startswith("error: `peft` adapter is an IDP adapter, and --model h")
    assert "use --model idp" in error


@pytest.mark.parametrize("adapter", ["lora", "one"])
def test_adapters_that_choose_nothing_are_left_to_the_harness_under_other_model_types(here, monkeypatch, adapter):
    monkeypatch.chdir(here)
    handed = []
    monkeypatch.setattr("lm_eval._cli.harness.HarnessCLI.execute", lambda _, arguments: handed.append(arguments))
    monkeypatch.setattr(
        sys,
        "argv",
        ["lm_eval", "--model", "hf", "--model_args", f"pretrained=base,peft={adapter}", "--tasks", "tiny_mc"],
    )
    from idp_peft.evaluation.lm_eval import main

    main()
    (arguments,) = handed
    assert arguments.include_path == [str(FOLDER)]
    assert arguments.model_args == {"pretrained": "base", "peft": adapter}
    assert arguments.tasks == ["tiny_mc"]


def test_every_local_task_has_its_file(here):
    index = manager(here).task_index
    assert sorted(name for name in index if name.startswith("local_")) == sorted(LOCAL_TASKS)
    assert sorted(index["all_local"].tags) == sorted(LOCAL_TASKS)


def test_registering_twice_changes_nothing_and_a_name_that_is_taken_is_refused(monkeypatch):
    register_model_type()
    get_model("idp")
    register_model_type()
    monkeypatch.setitem(model_registry._objs, "idp", "somebody.elses:Model")
    with pytest.raises(RuntimeError, match="already has a model type named 'idp'"):
        register_model_type()
