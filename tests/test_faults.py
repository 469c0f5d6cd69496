"""What a killed run, a full disk or a second process leaves behind: the same adapter comes out, or one line says why not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from idp_peft.files.folder_lock import alone_in, hold, is_free
from idp_peft.files.whole_folder import whole_folder
from idp_peft.recover.checkpoints import MARKER, is_whole, last_whole_checkpoint
from idp_peft_cli import main
from tests.test_recover import flags, here, run, same, weights  # noqa: F401  (`here` is a fixture)
from tests.tiny_folder import tiny_folder, tiny_texts

pytest.importorskip("datasets")
STEPS = {"max_steps": 8, "save_steps": 2, "learning_rate": 0.05, "assignment": "uniform", "save_total_limit": 3}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a model, text, a run that ended after step 6 of 8, and the adapter of one that was never stopped."""
    folder, before = tmp_path_factory.mktemp("stopped"), Path.cwd()
    tiny_folder(folder / "model")
    tiny_folder(folder / "teacher", seed=1)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts()))
    os.chdir(folder)
    try:
        run("whole", **STEPS)
        step = Trainer.training_step

        def dies(self, *args, **kwargs):
            if self.state.global_step == 7:
                raise SystemExit("killed")
            return step(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "training_step", dies)
            with pytest.raises(SystemExit, match="killed"):
                run("run", **STEPS)
    finally:
        os.chdir(before)
    assert sorted(path.name for path in (folder / "run").glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 6)]
    return folder


@pytest.fixture
def copied(stopped, tmp_path, monkeypatch):
    """A copy of it, as the working directory."""
    shutil.copytree(stopped, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "copy"


def steps_trained(monkeypatch) -> list[int]:
    """The steps that are trained from here on."""
    seen, step = [], Trainer.training_step

    def training_step(self, *args, **kwargs):
        seen.append(self.state.global_step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return seen


FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
    MARKER,
]


def test_the_list_of_files_is_that_of_a_checkpoint(stopped):
    found = {path.name for path in (stopped / "run" / "checkpoint-6").iterdir()}
    assert found - {"README.md"} == set(FILES)


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", [missing, empty, cut, changed])
@pytest.mark.parametrize("name", FILES)
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(name, harm, copied, monkeypatch, caplog):
    harm(copied / "run" / "checkpoint-6" / name)
    trained = steps_trained(monkeypatch)
    adapter = run("run", **STEPS)
    assert trained == [4, 5, 6, 7]
    assert "checkpoint-6 is cut (the run was killed, or its disk was full): it is removed" in caplog.text
    assert same(adapter, copied / "whole" / "adapter")


def test_a_run_without_a_whole_checkpoint_starts_anew(copied, monkeypatch):
    for folder in (copied / "run").glob("checkpoint-*"):
        missing(folder / "optimizer.pt")
    trained = steps_trained(monkeypatch)
    assert same(run("run", **STEPS), copied / "whole" / "adapter")
    assert trained == list(range(8))


def test_a_whole_checkpoint_is_gone_on_from(copied, monkeypatch):
    trained = steps_trained(monkeypatch)
    assert same(run("run", **STEPS), copied / "whole" / "adapter")
    assert trained == [6, 7]


def test_a_checkpoint_that_the_user_names_must_be_whole(copied):
    missing(copied / "run" / "checkpoint-4" / "scheduler.pt")
    with pytest.raises(ValueError, match="`resume_from_checkpoint` 'run/checkpoint-4' is no whole checkpoint"):
        run("run", resume_from_checkpoint="run/checkpoint-4", **STEPS)


def test_a_checkpoint_whose_best_one_is_gone_is_not_whole(copied):
    folder = copied / "run" / "checkpoint-6"
    assert is_whole(folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps(state | {"best_model_checkpoint": "elsewhere/checkpoint-4"}))
    from idp_peft.recover.checkpoints import digests

    (folder / MARKER).write_text(json.dumps(digests(folder)))
    assert is_whole(folder)
    shutil.rmtree(copied / "run" / "checkpoint-4")
    assert not is_whole(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "null", '{"optimizer.pt": 3}', '{"optimizer.pt": [1, "x"]}', "\0"]
)
def test_a_marker_that_is_none_marks_nothing(content, copied):
    (copied / "run" / "checkpoint-6" / MARKER).write_text(content)
    assert last_whole_checkpoint(copied / "run").name == "checkpoint-4"


# ---------------------------------------------------------------------- the run's own record


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"format": 2, "status": "new", "settings": {}}', "\0"])
def test_a_record_that_cannot_be_read_is_one_line(content, copied, capsys):
    (copied / "run" / "run.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["recover", *flags("run", **STEPS)])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "`output_dir` 'run' holds a run.json that cannot be read" in line
    assert "choose another folder, or remove this one to train anew" in line


def test_a_first_record_that_was_never_finished_is_swept(copied):
    shutil.rmtree("run")
    Path("run").mkdir()
    Path("run/.run.json.abcd1234").write_text('{"form')
    assert same(run("run", **STEPS), copied / "whole" / "adapter")
    assert not list(Path("run").glob(".run.json.*"))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", ""])
@pytest.mark.parametrize("harm", [missing, cut])
def test_a_complete_run_whose_adapter_is_damaged_makes_it_again(name, harm, copied):
    shutil.copytree("whole", "again")
    if name:
        harm(Path("again/adapter") / name)
    else:
        shutil.rmtree("again/adapter")
    record = json.loads(Path("again/run.json").read_text())
    record["settings"]["output_dir"] = "again"
    adapter = run("again", **STEPS)
    assert same(adapter, copied / "whole" / "adapter")
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "IDP"


CHANGES = {
    "model": lambda: tiny_folder(Path("model"), seed=5),
    "teacher": lambda: tiny_folder(Path("teacher"), seed=5),
    "dataset": lambda: Path("text.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in tiny_texts(seed=5))
    ),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_run_does_not_go_on_with_other_inputs(name, here, monkeypatch):  # noqa: F811
    settings = {**STEPS, "teacher": "teacher"}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", lambda *_, **__: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run("run", **settings)
    CHANGES[name]()
    with pytest.raises(ValueError, match=f"`{name}` .* is not what it was when the run in 'run' began"):
        run("run", **settings)


# ---------------------------------------------------------------------- two at once, and what was left behind

_HOLD = (
    "import sys, pathlib; from idp_peft.files.folder_lock import hold\n"
    "assert hold(pathlib.Path(sys.argv[1])) is not None; print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def other_process():
    """other_process(folder) -> a process that holds a folder until it is killed."""
    processes = []

    def start(folder: Path) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        processes.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_is_not_in_the_way(copied, other_process, capsys):
    first = other_process(copied / "run")
    with pytest.raises(SystemExit) as stop:
        main(["recover", *flags("run", **STEPS)])
    assert stop.value.code == 2
    assert "error: another process is working in run: wait for it, or choose another folder" in capsys.readouterr().err
    first.kill()
    first.wait()
    assert same(run("run", **STEPS), copied / "whole" / "adapter")


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(ValueError, match="no"), alone_in(tmp_path / "a" / "b"):
        raise ValueError("no")
    assert not (tmp_path / "a" / "b").exists()
    with alone_in(tmp_path / "c"):
        (tmp_path / "c" / "file").touch()
        assert not is_free(tmp_path / "c")
        assert hold(tmp_path / "c") is None
    assert is_free(tmp_path / "c")


def test_what_a_killed_process_left_of_an_output_is_swept_by_the_next(tmp_path, other_process):
    left, in_use = tmp_path / ".model-0123abcd", tmp_path / ".model-in__use_"
    kept = [tmp_path / ".model-x", tmp_path / ".models-0123abcd", tmp_path / ".model-0123abcde"]
    for folder in (left, in_use, *kept):
        folder.mkdir()
        (folder / "half").write_text("half")
    other_process(in_use)
    with whole_folder(tmp_path / "model") as folder:
        assert not left.exists()
        (folder / "file").write_text("text")
        with whole_folder(tmp_path / "other") as second:
            (second / "file").write_text("text")
        assert folder.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [in_use.name, *(path.name for path in kept), "model", "other"]
    )


# ---------------------------------------------------------------------- what the machine refuses

REFUSED = {
    "a folder that cannot be made": "/proc/idp/run",
    "a file for a folder": "text.jsonl/run",
    "a name that is too long": "x" * 300,
}


@pytest.mark.parametrize("command", ["recover", "compress", "export", "report", "evaluate"])
@pytest.mark.parametrize("name", list(REFUSED))
def test_an_output_that_cannot_be_written_is_one_line(name, command, copied, capsys):
    where = REFUSED[name]
    commands = {
        "recover": flags(where, **STEPS),
        "compress": ["--model=model", "--recipe=rtn-4bit", "--dataset=text.jsonl", f"--output_dir={where}"],
        "export": ["--to-vocab", "--adapter=whole/adapter", "--model=model", f"--output_dir={where}"],
        "report": [f"--results={result_file(copied)}", f"--output_dir={where}"],
        "evaluate": [
            "--model=model",
            "--dataset=text.jsonl",
            f"--output={where}/result.json",
            "--window=16",
            "--stride=8",
        ],
    }
    with pytest.raises(SystemExit) as stop:
        main([command, *commands[command]])
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert any("error: " in line for line in errors.splitlines()), errors


def result_file(folder: Path) -> Path:
    from tests.report_files import five

    (folder / "results").mkdir()
    return five(folder / "results")[0].parent


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "run/file"),
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "python without a name", "torch", "safetensors"],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(error, copied, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", _raises(error))
        with pytest.raises(SystemExit) as stop:
            main(["recover", *flags("run", **STEPS)])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "a file could not be written, the disk may be full (" in line
    assert "make room and run the same command again" in line
    assert same(run("run", **STEPS), copied / "whole" / "adapter")


def _raises(error: Exception):
    def save(*args, **kwargs):
        raise error

    return save


def test_the_table_of_the_readme_is_the_one_of_the_result_files():
    from benchmarks.faults import __main__ as faults

    folder = Path(faults.__file__).parent
    files = [faults.RESULTS / f"{name}.json" for name in faults.WHAT]
    readme = (folder / "README.md").read_text(encoding="utf-8")
    found = faults.table(files)
    assert f"<!-- runs: begin -->\n{found}<!-- runs: end -->" in readme
    assert all(line.endswith("| 0 |") for line in found.splitlines()[2:])  # nothing lost
    signals = [moment for one in json.loads(files[0].read_text())["tries"] for moment in one["moments"]]
    killed = sum(moment["killed"] for moment in signals)
    assert f"Of the {len(signals)} signals of `kills`, {killed} reached a process that still ran." in readme
