"""The Python of the README, the pages of docs/ and the notebooks' text runs as it stands there, and where it has a batch, each
row comes out as it does alone.

`tests/test_docs.py` does so for the pages on the ecosystem and on patterns.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import idp_peft
from idp_peft import IDPConfig
from idp_peft.analysis import attention_map, compare_patterns, record_patterns
from idp_peft.models.loading import load_model
from idp_peft.serving import Router, export_to_vocab
from tests.test_docs import check, letters
from tests.tiny import tiny
from tests.tiny_chats import chat_tokenizer
from tests.tiny_gguf import tiny_gguf

for library in ("matplotlib", "pandas"):
    pytest.importorskip(library)
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]
TEXTS = ["a short one", "a longer question", "and that"]


def blocks(page: Path) -> list[str]:
    """The Python of a page; of a notebook, what stands in its text. The cells are run by `tests/test_notebooks.py`."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
    found = re.findall(r"^( *)```python\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, code in found]


def adapter(folder: Path, base: str = "base", **config) -> PeftModel:
    """A tiny base in the folder `base`, and an adapter on it."""
    tiny("llama").save_pretrained(base)
    letters().save_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = IDPConfig(task_type="CAUSAL_LM", **{"num_virtual_tokens": 4, **config})
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return model.eval()


# ------------------------------------------------------------------ what a reader has before, and what comes out


def readme():
    adapter(Path("unused"))
    with pytest.MonkeyPatch.context() as patch:
        for kind in (AutoModelForCausalLM, AutoTokenizer):  # the Hub's model is the tiny one
            real = kind.from_pretrained

            def from_base(name, *args, real=real, **kwargs):
                return real("base" if str(name).startswith("HuggingFaceTB/") else name, *args, **kwargs)

            patch.setattr(kind, "from_pretrained", from_base)
        yield {}
        names = yield
        tokenizer, model, answers, batch = (names[name] for name in ("tokenizer", "model", "answers", "batch"))
        assert Path("adapter/adapter_model.safetensors").is_file()
        width, found = batch["input_ids"].shape[1], []
        for row, mask, answer in zip(batch["input_ids"], batch["attention_mask"], answers[:, :], strict=True):
            alone = model.generate(row[mask.bool()][None], max_new_tokens=8)[0, int(mask.sum()) :].tolist()
            both = min(len(alone), len(answer) - width)
            assert both >= 3
            assert answer[width : width + both].tolist() == alone[:both]
            found.append(int(model.last_selection.prompt_ids))
        model.generate(**batch, max_new_tokens=1)
        assert model.last_selection.prompt_ids.tolist() == found
        assert tokenizer.padding_side == "left"


def loading():
    pytest.importorskip("gguf", reason="gguf is not installed")
    adapter(Path("run/adapter"))
    base = load_model(tiny_gguf(Path("models/small.gguf")))
    tiny_gguf(Path("models/other.gguf"), seed=1)
    in_file = get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    in_file.save_pretrained("run-gguf/adapter")
    yield {}
    names = yield
    model = idp_peft.load("run/adapter")[0]
    rows, masks = (names["batch"][name] for name in ("input_ids", "attention_mask"))
    for row, mask, new in zip(rows, masks, names["tokens"][:, -4:], strict=True):
        ids = row[mask.bool()][None]
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4)[0, -4:], new)
    batch, other = names["tokenizer"](TEXTS, padding=True, return_tensors="pt"), idp_peft.load("run-gguf/adapter")[0]
    with torch.no_grad():
        assert torch.equal(names["model"](**batch).logits, other(**batch).logits)
        assert torch.equal(other(**batch).logits, in_file(**batch).logits)


def serving():
    adapter(Path("run/adapter"))
    adapter(Path("run/keys"), prompts="key_values", init_weights=False)
    export_to_vocab("run/adapter", "served")
    generated, posted = [], []
    engine = SimpleNamespace(generate=lambda prompts, sampling: generated.append(prompts))
    client = SimpleNamespace(post=lambda url, json: posted.append((url, json)))
    messages = [{"role": "user", "content": "How does one?"}]
    messages += [{"role": "assistant", "content": "So?"}, {"role": "user", "content": "Not that"}]
    given = {"llm": engine, "sampling": None, "httpx": client, "url": "http://it", "texts": TEXTS, "messages": messages}
    yield {**given, "write": lambda chat, prompt_ids: (chat, prompt_ids)}
    names = yield
    assert names["body"]["prompt"][-len(names["ids"]) :] == names["ids"]
    router, prompts = Router.from_pretrained("run/adapter"), names["prompts"]
    for mixed, rows in zip((False, True), generated, strict=True):
        for text, row in zip(TEXTS, rows, strict=True):
            (alone,) = prompts.for_llm([text], mixed=mixed)
            assert alone.keys() == row.keys()
            assert all(torch.equal(torch.as_tensor(alone[name]), torch.as_tensor(row[name])) for name in row)
    completions = "http://it/v1/completions"
    assert [url for url, _ in posted] == [completions, "http://it/v1/chat/completions", completions]
    keys = names["keys"]
    assert posted[2][1]["prompt"] == [
        [chosen] * keys.router.config.num_virtual_tokens + keys.router.token_ids(text)
        for text, chosen in zip(TEXTS, keys.router.route(TEXTS).prompt_ids.tolist(), strict=True)
    ]
    alone = [prompts.completion_body([text])["prompt_embeds"] for text in TEXTS]
    assert posted[0][1]["prompt_embeds"] == alone
    chat, chosen = names["answer"]
    alone = router.tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    assert (chat, chosen.tolist()) == (messages, router.route([alone]).prompt_ids.tolist())
    assert router.route(TEXTS).prompt_ids.tolist() == [router.route([text]).prompt_ids.item() for text in TEXTS]


def distributed():
    model = adapter(Path("unused"), assignment="uniform")
    accelerator = Accelerator(cpu=True)
    asked = {}

    def loaded(name, **settings):
        asked.update(settings, name=name)
        return tiny("llama")

    def quantization(**settings):  # bitsandbytes may not be there
        assert settings.keys() <= inspect.signature(BitsAndBytesConfig).parameters.keys()
        return settings

    yield {
        **{"accelerator": accelerator, "model": accelerator.prepare(model), "name": "a-70b-base", "torch": torch},
        **{"BitsAndBytesConfig": quantization, "get_peft_model": get_peft_model, "IDPConfig": IDPConfig},
        "AutoModelForCausalLM": SimpleNamespace(from_pretrained=loaded),
    }
    names = yield
    saved, ids = idp_peft.load("adapter")[0], torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(saved(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert asked["name"] == "a-70b-base"
    assert asked["quantization_config"] == names["quantization"]
    assert names["model"].active_peft_config.num_prompts == 8


def system_prompt():
    """The compressed model behind its own keys and values gives what it gives when it reads the text."""
    compressed, dense = tiny("llama"), tiny("llama", seed=1)
    yield {"tokenizer": chat_tokenizer(), "compressed": compressed, "dense": dense}
    names = yield
    saved = PeftModel.from_pretrained(tiny("llama"), "adapter").eval()
    own = PeftModel.from_pretrained(tiny("llama"), "adapter").eval()
    idp_peft.start_at(own, tiny("llama"), [names["prefix"]])
    ids = names["ids"]
    whole = torch.tensor([[*names["prefix"], *ids[0].tolist()]])
    with torch.no_grad():
        reads = tiny("llama")(input_ids=whole).logits[:, len(names["prefix"]) :]
        assert torch.allclose(own(input_ids=ids).logits, reads, atol=1e-4)
        assert torch.equal(saved(input_ids=ids).logits, names["model"](input_ids=ids).logits)
        assert not torch.allclose(saved(input_ids=ids).logits, reads, atol=1e-3)


def patterns_notebook():
    adapter(Path("you/your-adapter"))
    dense = tiny("llama", seed=1)
    yield {
        **{"idp_peft": idp_peft, "record_patterns": record_patterns, "compare_patterns": compare_patterns},
        **{"texts": TEXTS, "dense": dense},
    }
    names = yield
    tokens = names["compressed"].activations("mlp_output", layer=1)
    with names["model"].disable_adapter():
        alone = [record_patterns(names["model"], [text], tokenizer=names["tokenizer"]) for text in TEXTS]
    alone = torch.cat([torch.as_tensor(each.activations("mlp_output", layer=1)) for each in alone])
    assert torch.allclose(torch.as_tensor(tokens), alone, atol=1e-5)


def selection_notebook():
    adapter(Path("you/your-adapter"))
    yield {"idp_peft": idp_peft, "attention_map": attention_map, "texts": TEXTS, "tasks": ["one", "two", "one"]}
    names = yield
    alone = [idp_peft.selection_report(names["model"], [row]).prompt_ids.item() for row in names["rows"]]
    assert names["report"].prompt_ids.tolist() == alone


READERS = {
    "README.md": readme,
    "loading.md": loading,
    "serving.md": serving,
    "distributed.md": distributed,
    "system_prompt.md": system_prompt,
    "patterns.ipynb": patterns_notebook,
    "what_was_selected.ipynb": selection_notebook,
}
BY_OTHERS = {"ecosystem.md", "multimodal.md", "patterns.md", "texts.md", "training.md"}  # by other tests


@pytest.mark.parametrize("page", list(READERS))
@pytest.mark.filterwarnings("ignore")  # those of the hosts, and of prompts that were never chosen
def test_the_python_of_a_page_runs_and_a_batch_in_it_is_each_row_alone(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (path,) = [path for path in PAGES if path.name == page]
    reader = READERS[page]()
    names = next(reader)
    next(reader)
    for number, code in enumerate(blocks(path), 1):
        torch.manual_seed(0)
        code = code.replace("train_dataset=...", "train_dataset=data")
        exec(compile(code, f"{page}, block {number}", "exec"), names)
    with pytest.raises(StopIteration):
        reader.send(names)


def test_no_page_with_python_is_left_out():
    assert {page.name for page in PAGES if blocks(page)} == READERS.keys() | BY_OTHERS


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_our_commands_on_a_page_are_ones_that_the_command_line_takes(page):
    for line in re.findall(r"^ *(idp-peft [a-z]+ --.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        check(shlex.split(line, comments=True))
