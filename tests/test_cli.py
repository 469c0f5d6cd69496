"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import inspect
import json
import os
import resource
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from idp_peft_cli import main, options
from idp_peft_cli.parsing import WrongUseError, parse
from tests.hub_server import TOKEN, HubServer, only_hub
from tests.tiny_folder import tiny_folder, tiny_texts

pytest.importorskip("datasets")
ROOT = Path(__file__).parent.parent


def run(*arguments: str, folder: Path | None = None, server: HubServer | None = None) -> subprocess.CompletedProcess:
    """The command in a process of its own, which knows no hub but the server, if any."""
    hub = {**os.environ, "HF_HUB_OFFLINE": "1"} if server is None else server.environment(folder / "home")
    environment = {**hub, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "idp_peft_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.parametrize(
    "command", [[], ["compress"], ["recover"], ["evaluate"], ["report"], ["push"], ["export"], ["route"], ["proxy"]]
)
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys; from idp_peft_cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'idp_peft', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage: idp-peft" in done.stdout
    assert not command or "--config FILE" in done.stdout


@pytest.mark.parametrize(("given", "expected"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_sleep_while_they_wait_unless_told_otherwise(given, expected, tmp_path):
    """OpenMP reads the setting when torch is imported."""
    code = (
        "import os, sys; from idp_peft_cli import main\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print('torch sees', os.environ.get('OMP_WAIT_POLICY'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "main(sys.argv[1:])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"PYTHONPATH": str(ROOT), **given}
    for command in (["evaluate", "--model", "x", "--output", "y"], ["recover", "--model", "x", "--output_dir", "y"]):
        call = [sys.executable, "-c", code, *command]
        done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert f"torch sees {expected}" in done.stdout.splitlines()[0], done.stderr


def test_help_answers_within_two_seconds():
    """Of the processor's time: what other processes take is not counted."""
    fastest = min(_seconds("recover", "--help") for _ in range(3))
    assert fastest < 2, fastest


def _seconds(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run(*arguments).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["repair"],
            "the sub-command must be one of compress, recover, teach, evaluate, report, push, export, route, proxy; got 'repair'",
        ),
        (["compress", "--model", "x"], "required: --output_dir"),
        (["compress", "--model", "x", "--output_dir", "y", "--colour", "red"], "--colour"),
        (["evaluate", "--model", "x", "--output", "y", "--limit", "many"], "--limit: invalid int value: 'many'"),
        (["push", "--adapter", "x"], "required: --repo"),
        (["report", "--config", "missing.yaml"], "`--config` 'missing.yaml' cannot be read"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_two(arguments, text, tmp_path):
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert text in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"--model": "./nowhere"}, "nowhere"),
        ({"--dataset": "missing.jsonl"}, "`dataset` 'missing.jsonl' does not exist"),
        ({"--text_column": "content"}, "`text_column` must be one of the columns of 'text.jsonl', text; got 'content'"),
        ({"--teacher": "other"}, "`teacher` must have the model's vocabulary"),
        ({"--context_tokens": "16"}, "`context_tokens` must be from 1 to block_tokens - 1 = 15, got 16"),
        ({"--min_tokens": "999"}, "`dataset` 'text.jsonl' has no document of `min_tokens`=999 tokens"),
        ({"--learning_rat": "1"}, "--learning_rat"),
        ({"--dataset": "self"}, "`dataset` 'self' needs `teacher`"),
    ],
)
def test_recover_refuses_before_anything_is_written(changes, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_folder(tmp_path / "model")
    other = tiny_folder(tmp_path / "other")
    tokenizer = Path(other, "tokenizer.json")
    tokenizer.write_text(tokenizer.read_text().replace('"w7"', '"other"'))
    (tmp_path / "text.jsonl").write_text('{"text": "' + " ".join(f"w{i}" for i in range(2, 90)) + '"}\n')
    flags = {"--model": "model", "--dataset": "text.jsonl", "--output_dir": "run", "--max_steps": "1"}
    flags |= {"--block_tokens": "16", "--context_tokens": "4", "--min_tokens": "8", **changes}
    with pytest.raises(SystemExit) as stop:
        main(["recover", *(word for pair in flags.items() for word in pair)])
    assert stop.value.code == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("idp-peft recover: error: ")
    assert text in last
    assert not (tmp_path / "run").exists()


def test_a_yaml_file_replaces_flags_and_flags_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: some/model\noutput_dir: {tmp_path}\nlearning_rate: 2e-2\nmatch_budget: true\nteacher: null\n"
        "lr_scheduler_kwargs: {num_cycles: 1}\nmax_steps: 7\n"
    )
    options, arguments = parse("recover", ["--config", str(file), "--max_steps", "9"])
    assert (options.model, options.match_budget, options.teacher) == ("some/model", True, None)
    assert (arguments.learning_rate, arguments.max_steps) == (2e-2, 9)
    assert arguments.lr_scheduler_kwargs == {"num_cycles": 1}
    (evaluated,) = parse(
        "evaluate", ["--model", "m", "--output", "o", "--tasks", "a", "b", f"--config={_tasks(tmp_path)}"]
    )
    assert evaluated.tasks == ["a", "b"]


def _tasks(folder: Path) -> Path:
    (folder / "tasks.yaml").write_text("tasks: [c, d, e]\n")
    return folder / "tasks.yaml"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("- a\n- b\n", "must hold one `name: value` a line, got list"),
        ("a: [", "is not YAML"),
        ("modle: x\n", "--modle"),
    ],
)
def test_a_wrong_yaml_file_is_named(tmp_path, content, text):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(WrongUseError, match=text):
        parse("compress", ["--model", "x", "--output_dir", "y", "--config", str(tmp_path / "run.yaml")])


def test_bfloat16_needs_no_further_flag_on_a_cpu(tmp_path):
    _, arguments = parse("recover", ["--model", "m", "--output_dir", str(tmp_path), "--bf16"])
    assert arguments.bf16
    assert arguments.use_cpu or arguments.device.type != "cpu"


def test_recover_takes_steps_or_epochs(tmp_path):
    needed = ["--model", "m", "--output_dir", str(tmp_path)]
    _, by_default = parse("recover", needed)
    _, by_epochs = parse("recover", [*needed, "--num_train_epochs", "2"])
    assert (by_default.max_steps, by_epochs.max_steps, by_epochs.num_train_epochs) == (100, -1, 2)


def test_recover_ends_in_a_repository_of_the_adapter_and_push_renews_it(tmp_path, monkeypatch, capsys):
    tiny_folder(tmp_path / "base")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts()))
    result = {"format": 1, "label": "IDP", "role": "recovered", "method": "idp", "num_prompts": 4}
    result |= {"extra_parameters": 4 * 4 * 32, "perplexity": {"wiki:x": {"perplexity": 9.5}}, "tasks": {}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "idp.json").write_text(json.dumps(result))
    recover = ["recover", "--model", "base", "--dataset", "text.jsonl", "--output_dir", "run", "--max_steps", "2"]
    recover += ["--block_tokens", "16", "--context_tokens", "4", "--min_tokens", "8", "--num_virtual_tokens", "4"]
    recover += ["--report_to", "none", "--push_to_hub", "--hub_model_id", "user/name", "--hub_strategy", "end"]
    monkeypatch.chdir(tmp_path)
    with HubServer() as server:
        only_hub(server, monkeypatch, tmp_path / "hub")
        server.fail("commit", 403)
        with pytest.raises(SystemExit) as stop:
            main(recover)
        assert stop.value.code == 2
        said = capsys.readouterr()
        *_, last = said.err.strip().splitlines()
        assert last.startswith("idp-peft recover: error: the push to user/name failed at the step 'commit': ")
        assert "The run is complete: the same command again pushes it, or `idp-peft push --adapter run/adapter" in last
        server.heal()
        main(recover)
        files = server.files("user/name")
        assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        assert files["adapter_model.safetensors"] == Path("run/adapter/adapter_model.safetensors").read_bytes()
        assert "objective language modelling, steps 2" in files["README.md"].decode()
        push = ["push", "--adapter", "run/adapter", "--repo", "user/name", "--results", "results"]
        pushed = run(*push, folder=tmp_path, server=server)
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout == f"adapter in {server.url}/user/name\n"
        assert "| **IDP** (this adapter) | 9.50 | 512 |" in server.files("user/name")["README.md"].decode()
    assert TOKEN not in said.out + said.err + pushed.stdout + pushed.stderr


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--adapter", "nowhere"], "`adapter` nowhere is no folder"),
        (["--adapter", "base"], "`adapter` base is no adapter: there is no adapter_config.json in it"),
    ],
)
def test_push_refuses_what_is_no_adapter_in_one_line(more, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["push", "--repo", "user/name", *more])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"idp-peft push: error: {text}\n"


def test_a_flag_is_a_keyword_of_the_same_default():
    """The command line has dataclasses of its own, so that `--help` imports nothing heavy."""
    from idp_peft.evaluation import evaluate
    from idp_peft.recover import RecoverSettings

    def defaults(fields) -> dict:
        return {field.name: field.default for field in fields}

    assert defaults(fields(options.RecoverOptions)) == defaults(fields(RecoverSettings))
    keywords = {name: p.default for name, p in inspect.signature(evaluate).parameters.items()}
    flags = defaults(fields(options.EvaluateOptions))
    assert {n: None if d in (MISSING, inspect.Parameter.empty) else d for n, d in keywords.items()} == {
        name: None if default is MISSING else default for name, default in flags.items()
    }
