"""The pages of docs/: their Python runs, from top to bottom, and their commands are ones that the command lines take."""

from __future__ import annotations

import json
import re
import shlex
import sys
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import RepoCard
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from idp_peft import IDPConfig
from idp_peft_cli.parsing import WrongUseError, parse
from tests.hub_server import HubServer, metadata_errors, only_hub
from tests.test_chat_data import CHAT_TEMPLATE
from tests.tiny import tiny
from tests.tokenizers_in_use import BOS, IN_USE, make

for library in ("accelerate", "datasets", "matplotlib", "pandas"):
    pytest.importorskip(library)
DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
ECOSYSTEM = (DOCS / "ecosystem.md").read_text(encoding="utf-8")
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} {% endfor %}"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def letters() -> PreTrainedTokenizerFast:
    """One token per printable character, so that any text is one that tiny models can read."""
    words = {"<pad>": 0, "<s>": 1, **{chr(code): code - 30 for code in range(32, 127)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)


@pytest.fixture(scope="module")
def after(tmp_path_factory):
    """The hub, the folder and the names that a reader of the page on the ecosystem is left with, and what was printed."""
    pytest.importorskip("trl", reason="the page has a section on TRL")
    from accelerate.state import AcceleratorState

    base, here = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("here")
    tiny("llama").save_pretrained(base)
    letters().save_pretrained(base)
    names: dict = {}
    AcceleratorState._reset_state(True)
    with HubServer() as server, pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the hosts, and of prompts that were never chosen
        server.add(BASE, base)
        only_hub(server, patch, here / "hub")
        patch.chdir(here)
        for number, code in enumerate(blocks(ECOSYSTEM, "python"), 1):
            torch.manual_seed(0)
            exec(compile(code, f"ecosystem.md, block {number}", "exec"), names)
    AcceleratorState._reset_state(True)
    return server, here, names


def test_what_is_pushed_has_our_card(after):
    server, *_ = after
    for name in ("you/prompts", "you/trained", "you/chats"):
        files = server.files(name)
        card = RepoCard(files["README.md"].decode())
        assert not metadata_errors(card.content)
        assert (card.data["library_name"], card.data["base_model"]) == ("peft", BASE), name
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert "This model was trained with SFT" in card.text


def test_the_trainer_evaluated_with_metrics_and_the_callbacks_numbers(after):
    _, here, _ = after
    written = json.loads((here / "run" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    evaluated = [entry for entry in written if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 4]
    assert all({"eval_accuracy", "eval_prompt_share_0", "eval_selection_entropy"} <= set(entry) for entry in evaluated)


def test_a_composed_bank_is_named_as_the_page_says_and_split_into_as_many_folders(after):
    _, here, names = after
    (said,) = re.findall(r"prompt_names\)  # (\[.*\])", ECOSYSTEM)
    assert str(names["bank"].active_peft_config.prompt_names) == said
    assert str([Path(folder).name for folder in names["folders"]]) == said
    assert names["logits"].shape[:2] == names["batch"]["input_ids"].shape
    assert (here / "tuned" / "adapter_model.safetensors").is_file()


def test_every_row_of_the_pages_batches_is_what_it_is_alone(after):
    """The pipeline's answers, a composed bank's logits and what it writes; the tokenizer is the one that `load` gave."""
    _, _, names = after
    write, tokenizer, bank, batch = (names[name] for name in ("write", "tokenizer", "bank", "batch"))
    texts = re.findall(r'"([^"]+)"', re.search(r"write\(\[(.*?)\]", ECOSYSTEM).group(1))
    assert len(texts) == len(names["answers"]) == 2
    for text, answer in zip(texts, names["answers"], strict=True):
        assert write([text], max_new_tokens=4, do_sample=False) == [answer]
    texts = re.findall(r'"([^"]+)"', re.search(r"batch = tokenizer\(\[(.*?)\]", ECOSYSTEM).group(1))
    for row, (text, prompt) in enumerate(zip(texts, ["boolq", "piqa", "auto", None], strict=True)):
        one = tokenizer(text, return_tensors="pt")
        count = one["input_ids"].shape[1]
        with torch.no_grad():
            logits = bank(**one, prompt_ids=[prompt]).logits[0]
            tokens = bank.generate(**one, prompt_ids="piqa", max_new_tokens=4)[0, count:]
        assert (names["logits"][row, batch["attention_mask"][row].bool()] - logits).abs().max() <= 1e-4
        assert torch.equal(names["tokens"][row, batch["input_ids"].shape[1] :], tokens)


def test_the_report_has_its_table_and_figure(after):
    _, here, names = after
    assert len(names["table"]) == names["report"].num_prompts == 4
    assert (here / "selection.png").stat().st_size > 10_000


def test_the_page_on_patterns_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("dense", "compressed")):
        tiny("llama", seed=seed).save_pretrained(name)
        letters().save_pretrained(name)
    configs = {"idp-adapter": IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)}
    configs["lora-adapter"] = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    for name, config in configs.items():
        get_peft_model(tiny("llama", seed=1), config).save_pretrained(name)
    names: dict = {}
    for number, code in enumerate(blocks((DOCS / "patterns.md").read_text(encoding="utf-8"), "python"), 1):
        exec(compile(code, f"patterns.md, block {number}", "exec"), names)
    assert (tmp_path / "patterns.png").stat().st_size > 10_000
    assert names["closed"].shape == (3,)
    assert names["tokens"].shape == (sum(map(len, names["texts"])), 32)
    for text, start in zip(names["texts"], (0, len(names["texts"][0])), strict=True):
        with names["idp"].disable_adapter():
            alone = names["record_patterns"](names["idp"], [text], tokenizer=names["tokenizer"])
        alone = torch.as_tensor(alone.activations("mlp_output", layer=1))
        together = torch.as_tensor(names["tokens"])[start : start + len(text)]
        assert torch.allclose(together, alone, atol=1e-5)
    assert repr(names["same"]) == repr(names["recorded"])
    assert names["recorded"].prompt_ids == {"forced": [0, 0]}


def test_the_page_on_texts_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = make("<s> $A")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained("base")
    turns = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8"}]
    Path("texts.jsonl").write_text(json.dumps({"text": " ".join(["w9"] * 600)}))
    Path("chats.jsonl").write_text(json.dumps({"messages": turns}))
    names: dict = {}
    for number, code in enumerate(blocks((DOCS / "texts.md").read_text(encoding="utf-8"), "python"), 1):
        exec(compile(code, f"texts.md, block {number}", "exec"), names)
        if number == 1:
            assert names["blocks"] == [[BOS] + [9] * 255] * 2
    assert names["predicted"] == "w7 w8 <s>"


def test_the_targets_of_a_page_hold_no_token_that_a_tokenizer_puts_around_texts():
    (code,) = [code for code in blocks(ECOSYSTEM, "python") if "def encode" in code]
    for build, front, _ in IN_USE.values():
        names = {"tokenizer": build()}
        exec(re.search(r"^def encode.*?\n\n", code, re.DOTALL | re.MULTILINE).group(), names)
        row = names["encode"]("w5 w6", "w7")
        assert row["labels"][-1] == 7
        assert row["input_ids"][: len(front)] == front
        assert [label for label in row["labels"] if label != -100] == [7]


def commands(page: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for block in blocks(page, "bash") for line in block.splitlines()]


def check(command: list[str]) -> None:
    """Raise where a command is none that the command lines take."""
    program, *words = command
    if program == "idp-peft":
        parse(words[0], words[1:])
        return
    from idp_peft.evaluation.harness_arguments import check_arguments

    assert program == "lm_eval" or (program, *words[:2]) == ("python", "-m", "idp_peft.evaluation.lm_eval"), program
    from lm_eval._cli import HarnessCLI

    words = ["run", *words] if program == "lm_eval" else ["run", *words[2:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lm_eval", *words])
        arguments = HarnessCLI().parse_args()
    assert arguments.model == "idp"
    check_arguments(arguments.model_args)


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_the_commands_of_a_page_are_ones_that_the_command_lines_take(page):
    pytest.importorskip("lm_eval")
    for command in commands(page.read_text(encoding="utf-8")):
        check(command)


@pytest.mark.parametrize(
    "line",
    [
        "idp-peft push --adapter a --repo_id me/it",
        "idp-peft upload --adapter a",
        "python -m idp_peft.evaluation.lm_eval --model idp --model_args pretrained=a,adapter=b --tasks hellaswag",
        "lm_eval --model idp --model_arguments pretrained=a --tasks hellaswag",
        "lm-eval --model hf",
    ],
)
def test_a_wrong_command_would_be_noticed(line):
    pytest.importorskip("lm_eval")
    with pytest.raises((AssertionError, WrongUseError, ValueError, KeyError, SystemExit)):
        check(shlex.split(line))


def test_the_page_on_the_ecosystem_is_short():
    size = len(ECOSYSTEM.encode())
    assert size < 8 * 1024


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_every_file_that_a_page_links_exists(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (DOCS / link).exists(), link
