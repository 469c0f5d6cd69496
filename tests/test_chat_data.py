"""Chats, and prompts with completions: the tokens and labels that TRL makes of them, in every command that reads text."""

from __future__ import annotations

import json
import random

import pytest
import torch

from idp_peft.compression.calibration import calibration_chunks
from idp_peft.evaluation.documents import cut_texts, score_documents
from idp_peft.recover import recover
from idp_peft.recover.adapter import starting_texts
from idp_peft.recover.training import training_examples
from idp_peft.texts.chats import Chat, assistant_only
from idp_peft.texts.data import blocks, load_texts
from idp_peft.texts.examples import read_examples
from tests.commands import run_evaluate, run_recover
from tests.tiny import tiny
from tests.tokenizers_in_use import BOS, EOS, make

datasets = pytest.importorskip("datasets")

# `w62 .. w63` around a user's words, `w64 .. <s>` around the assistant's.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}w64 {% generation %}{{ message['content'] }} <s>{% endgeneration %} "
    "{% else %}w62 {{ message['content'] }} w63 {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}w64 {% endif %}"
)
# That; also: writes the beginning of sequence; names tools; has a variable; writes a prompt differently alone; marks nothing.
WITH_BOS = "{{ bos_token }} " + CHAT_TEMPLATE
WITH_TOOLS = "{% for tool in tools or [] %}w90 {{ tool['name'] }} {% endfor %}" + CHAT_TEMPLATE
WITH_VARIABLE = "{% if thinking %}w91 {% endif %}" + CHAT_TEMPLATE
OTHER_ALONE = CHAT_TEMPLATE.replace("w64 {% endif %}", "w92 w93 {% endif %}")
UNMARKED = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "w80 w81"}
TURNS = [user("w10 w11"), assistant("w12 w13 w14"), user("w15"), assistant("w16")]

# name -> (the row of a dataset, the chat template, SFTConfig's settings, what is put around a text)
AS_TRL = {
    "messages": ({"messages": TURNS[:2]}, CHAT_TEMPLATE, {}, None),
    "many turns": ({"messages": TURNS}, CHAT_TEMPLATE, {}, None),
    "a system message": ({"messages": [SYSTEM, *TURNS]}, CHAT_TEMPLATE, {}, None),
    "the assistant's words": ({"messages": [SYSTEM, *TURNS]}, CHAT_TEMPLATE, {"assistant_only_loss": True}, None),
    "cut off": ({"messages": TURNS}, CHAT_TEMPLATE, {"max_length": 9, "assistant_only_loss": True}, None),
    "a prompt as chat": ({"prompt": TURNS[:1], "completion": TURNS[1:2]}, CHAT_TEMPLATE, {}, None),
    "a prompt of turns": ({"prompt": [SYSTEM, *TURNS[:3]], "completion": TURNS[3:]}, CHAT_TEMPLATE, {}, None),
    "a completion of turns": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, CHAT_TEMPLATE, {}, None),
    "the assistant's words of a completion": (
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        CHAT_TEMPLATE,
        {"assistant_only_loss": True},
        None,
    ),
    "a prompt that is written differently alone": (
        {"prompt": TURNS[:1], "completion": TURNS[1:2]},
        OTHER_ALONE,
        {},
        None,
    ),
    "a text": ({"prompt": "w10 w11", "completion": " w12 w13"}, None, {}, None),
    "a text that ends by itself": ({"prompt": "w10 w11", "completion": " w12 </s>"}, None, {}, None),
    "a text behind a beginning": ({"prompt": "w10 w11", "completion": " w12 w13"}, None, {}, "<s> $A"),
    "a text whose words merge": ({"prompt": "w10 w1", "completion": "1 w12"}, None, {}, "<s> $A"),
    "a template that writes the beginning": ({"messages": TURNS}, WITH_BOS, {}, "<s> $A"),
    "a template that writes it of a prompt": (
        {"prompt": TURNS[:1], "completion": TURNS[1:2]},
        WITH_BOS,
        {},
        "<s> $A",
    ),
    "a template that writes none": ({"messages": TURNS}, CHAT_TEMPLATE, {}, "<s> $A"),
    "a template that writes it though the tokenizer does not": ({"messages": TURNS}, WITH_BOS, {}, None),
    "tools": ({"messages": TURNS, "tools": [{"name": "w70"}, {"name": "w71"}]}, WITH_TOOLS, {}, None),
    "tools as JSON": ({"messages": TURNS, "tools": json.dumps([{"name": "w70"}])}, WITH_TOOLS, {}, None),
    "a variable": ({"messages": TURNS, "chat_template_kwargs": {"thinking": True}}, WITH_VARIABLE, {}, None),
    "ShareGPT's names": (
        {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in TURNS]},
        CHAT_TEMPLATE,
        {},
        None,
    ),
}


def tokenizer_of(template, around=None):
    tokenizer = make(around)
    tokenizer.chat_template = template
    return tokenizer


def documents(rows: list[dict], tmp_path, **settings):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_texts(str(file), **settings)


@pytest.mark.parametrize("name", AS_TRL)
def test_tokens_and_labels_are_those_of_trl(name, tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed: `pip install idp-peft[test]` has it")
    from trl import SFTConfig, SFTTrainer

    row, template, settings, around = AS_TRL[name]
    settings = {"max_length": 64, "report_to": [], "use_cpu": True, "bf16": False, **settings}
    theirs = SFTTrainer(
        tiny("llama"),
        SFTConfig(str(tmp_path / "trl"), **settings),
        train_dataset=datasets.Dataset.from_list([row]),
        processing_class=tokenizer_of(template, around),
    ).train_dataset
    (document,) = documents([row], tmp_path)
    if settings.get("assistant_only_loss"):
        (document,) = assistant_only([document])
    (block,) = blocks(tokenizer_of(template, around), [document], settings["max_length"])
    assert block.ids == theirs[0]["input_ids"]
    labelled = block.labelled or [True] * len(block.ids)
    labels = [token if one else -100 for token, one in zip(block.ids, labelled, strict=True)]
    assert labels == theirs[0]["labels"]
    (example,) = training_examples([block], 4)
    if block.labelled is not None:
        assert example["labels"] == labels, "what stands before the first label is the context"
    else:
        context = min(4, len(labels) // 2)
        assert example["labels"] == [-100] * context + labels[context:], (
            "of messages, as of texts, the first tokens are"
        )


def test_the_cases_mask_and_cut_and_differ_as_they_say(tmp_path):
    found = {}
    for name, (row, template, settings, around) in AS_TRL.items():
        (document,) = documents([row], tmp_path)
        if settings.get("assistant_only_loss"):
            (document,) = assistant_only([document])
        (found[name],) = blocks(tokenizer_of(template, around), [document], settings.get("max_length", 64))
    assert found["messages"].ids == [62, 10, 11, 63, 64, 12, 13, 14, BOS]
    assert found["messages"].labelled is None
    words = [
        token
        for token, one in zip(found["the assistant's words"].ids, found["the assistant's words"].labelled, strict=True)
        if one
    ]
    assert words == [12, 13, 14, BOS, 16, BOS]
    assert len(found["cut off"].ids) == 9
    assert found["a text"].ids == [10, 11, 12, 13, EOS]
    assert found["a text"].labelled == [False] * 2 + [True] * 3
    assert found["a text that ends by itself"].ids == [10, 11, 12, EOS]
    assert found["a text behind a beginning"].ids == [BOS, 10, 11, 12, 13, EOS]
    assert found["a text whose words merge"].labelled == [False] * 2 + [True] * 3
    assert found["a template that writes the beginning"].ids[:2] == [BOS, 62]
    assert found["a template that writes none"].ids[0] == 62
    assert found["tools"].ids[:4] == [90, 70, 90, 71]
    assert found["a variable"].ids[0] == 91


# ------------------------------------------------------------------ where the chats are


@pytest.mark.parametrize(
    ("columns", "column", "expected"),
    [
        ({"messages": TURNS}, "text", "chat"),
        ({"conversations": TURNS}, "text", "chat"),
        ({"dialogue": TURNS}, "dialogue", "chat"),
        ({"prompt": "w5", "completion": "w6"}, "text", "pair"),
        ({"prompt": "w5", "completion": "w6", "messages": TURNS}, "text", "chat"),
        ({"text": "w5 w6", "messages": TURNS}, "text", "text"),
        ({"text": "w5 w6", "messages": TURNS}, "messages", "chat"),
        ({"prompt": "w5 w6", "completion": "w6"}, "prompt", "text"),
    ],
)
def test_a_column_named_text_comes_first_then_messages_then_prompt_and_completion(columns, column, expected, tmp_path):
    (document,) = documents([columns], tmp_path, column=column)
    kinds = {str: "text", list: "chat"}
    found = kinds.get(type(document)) or ("chat" if document.prompt is None else "pair")
    assert found == expected


def test_rows_with_nothing_to_predict_are_left_out(tmp_path):
    rows = [{"messages": TURNS}, {"messages": []}, {"messages": None}]
    assert len(documents(rows, tmp_path)) == 1
    rows = [
        {"prompt": "w5", "completion": "w6"},
        {"prompt": "w5", "completion": ""},
        {"prompt": None, "completion": "w7"},
    ]
    assert [one.prompt for one in documents(rows, tmp_path)] == ["w5", None]


def test_fields_that_a_table_filled_with_nothing_are_not_there_for_the_template(tmp_path):
    """Parquet files of before the Json type give every message every field."""
    template = "{% for m in messages %}{{ m['content'] or 'w60' }}{% if m['tool_calls'] is defined %} w61{% endif %} {% endfor %}"
    turns = [
        {**user("w10"), "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "x": None}]},
    ]
    features = datasets.Features(
        {
            "messages": [
                {
                    "role": datasets.Value("string"),
                    "content": datasets.Value("string"),
                    "tool_calls": [{"name": datasets.Value("string"), "x": datasets.Value("string")}],
                }
            ]
        }
    )
    datasets.Dataset.from_list([{"messages": turns}], features=features).to_parquet(tmp_path / "a.parquet")
    (document,) = load_texts(str(tmp_path / "a.parquet"))
    assert document.completion[0] == user("w10")
    assert document.completion[1] == {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    (block,) = blocks(tokenizer_of(template), [document], 16)
    assert block.ids == [10, 60, 61]


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        (
            {"messages": "w5 w6"},
            "text",
            r"`messages` in row 0 of '.*' must be a list of messages with `role` and `content`, got 'w5 w6'",
        ),
        ({"prompt": TURNS[:1], "completion": "w5"}, "text", "`completion` in row 0 of .* must be a list of messages"),
        ({"prompt": "w5", "completion": TURNS[1:2]}, "text", "`prompt` in row 0 of .* must be a list of messages"),
        (
            {"messages": TURNS, "tools": "w5"},
            "text",
            "`tools` in row 0 of .* must be a list, or the JSON of one: Expecting",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "url": "x"}, {"type": "text", "text": "w5"}]}
                ]
            },
            "text",
            "`messages` in row 0 of .* must hold text alone, got a message with image",
        ),
    ],
)
def test_what_is_no_chat_is_refused_by_its_row(row, column, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        documents([row], tmp_path, column=column)


def test_a_tokenizer_without_a_template_and_one_that_refuses_are_one_clear_error():
    with pytest.raises(ValueError, match="the tokenizer has no chat template to write them with: take a model whose"):
        blocks(make(), [Chat(TURNS)], 16)
    strict = tokenizer_of("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        ValueError, match=r"the tokenizer's chat template refuses row 3 of 'a\.jsonl': roles must alternate"
    ):
        blocks(strict, [Chat(TURNS, name="row 3 of 'a.jsonl'")], 16)


def test_assistant_only_loss_needs_chats_and_a_template_that_marks_the_assistant():
    for document in ("w5", Chat("w6", "w5")):
        with pytest.raises(ValueError, match="`assistant_only_loss` needs chats, and the dataset holds texts"):
            assistant_only([document])
    with pytest.raises(ValueError, match="needs a chat template that marks the assistant's words"):
        blocks(tokenizer_of(UNMARKED), assistant_only([Chat(TURNS)]), 16)


def test_a_template_that_trl_knows_a_marked_version_of_is_rendered_with_that():
    pytest.importorskip("trl")
    from trl.chat_template_utils import qwen3_chat_template

    document, *_ = assistant_only([Chat([user("w10"), assistant("w11")])])
    tokenizer = tokenizer_of(qwen3_chat_template)
    (block,) = blocks(tokenizer, [document], 64)
    assert any(block.labelled)
    assert not all(block.labelled)


# ------------------------------------------------------------------ what each command makes of them


PAIRS = [Chat(f" w{12 + i} w13 w14 w15", f"w10 w{11 + i}") for i in range(6)]


def test_a_chat_is_one_example_and_left_out_where_its_prompt_fills_the_block():
    found = blocks(make(), [Chat(" w30", " ".join(["w20"] * 12)), Chat(" w31" * 12, "w20")], 8, min_tokens=32)
    assert [block.ids for block in found] == [[20] + [31] * 7]


def test_the_context_of_a_completion_is_its_prompt_however_short():
    (block,) = blocks(make("<s> $A"), [Chat(" ".join(["", *["w31"] * 12]), "w20")], 16)
    (example,) = training_examples([block], 6)
    assert example["labels"] == [-100, -100, *[31] * 12, EOS]


def test_a_completion_without_a_prompt_is_read_as_a_text_is(tmp_path):
    (chat,) = documents([{"prompt": [], "completion": TURNS}], tmp_path)
    (block,) = blocks(tokenizer_of(CHAT_TEMPLATE), [chat], 16)
    assert block.labelled is None
    (block,) = blocks(make("<s> $A"), [Chat(" ".join(f"w{i}" for i in range(10, 19)), "")], 16)
    (example,) = training_examples([block], 4)
    assert example["labels"] == [-100] * 4 + block.ids[4:]


def test_prompts_do_not_start_at_what_all_chats_have_in_common():
    found = blocks(
        tokenizer_of(WITH_BOS, "<s> $A"), [Chat([SYSTEM, user(f"w{i} w9"), assistant("w5")]) for i in range(10, 15)], 32
    )
    assert [start[:3] for start in starting_texts(found)] == [[BOS, token, 9] for token in range(10, 15)]
    alike = blocks(tokenizer_of(WITH_BOS, "<s> $A"), [Chat(TURNS), Chat(TURNS)], 32)
    assert starting_texts(alike) == [alike[0].ids] * 2
    texts = blocks(make(), ["w5 w6 w7", "w5 w6 w8"], 8, min_tokens=2)
    assert starting_texts(texts) == [[5, 6, 7], [5, 6, 8]], "texts are taken as they begin"


@pytest.mark.parametrize("kind", ["plain", "idp"])
@pytest.mark.parametrize("stride", [4, 6, 8])
def test_perplexity_scores_completions_alone_behind_what_stands_before_them(kind, stride, make):
    """Against each window written out: the completion's tokens, once each, under the prompt that its own prompt chooses."""
    model = tiny("llama") if kind == "plain" else make("llama")
    tokenizer = tokenizer_of(CHAT_TEMPLATE, "<s> $A")
    found = score_documents(model, tokenizer, [*PAIRS, Chat(" w20", " ".join(["w30"] * 20))], window=12, stride=stride)
    for number, (document, item) in enumerate(zip(PAIRS, found["items"][:6], strict=True)):
        ids = [BOS, 10, 11 + number, 12 + number, 13, 14, 15, EOS]
        with torch.no_grad():
            context = {} if kind == "plain" else {"selection_mask": torch.tensor([[1] * 3 + [0] * 5])}
            logits = model(input_ids=torch.tensor([ids]), **context).logits[0].log_softmax(-1)
        assert item["tokens"] == 5, document
        assert item["nats"] == pytest.approx(-sum(float(logits[t - 1, ids[t]]) for t in range(3, 8)), abs=1e-3)
        if kind == "idp":
            assert item["prompt"] == int(model.last_selection.prompt_ids[0])
    assert found["items"][6]["tokens"] == 2, "of a long one the windows with something to score"
    assert found["selection_reads"] == "context"


def test_without_a_context_completions_still_choose_by_their_prompts(make):
    model, tokenizer = make("llama"), tokenizer_of(CHAT_TEMPLATE)
    draw = random.Random(0)
    words = [[draw.randrange(4, 97) for _ in range(10)] for _ in range(20)]
    pairs = [
        Chat("".join(f" w{token}" for token in row[3:]), " ".join(f"w{token}" for token in row[:3])) for row in words
    ]
    found = score_documents(model, tokenizer, [*pairs, "w5 w6 w7"], window=12, stride=12)
    assert found["selection_reads"] == "window", "the text's has no context"

    def chosen(row: list[int]) -> int:
        with torch.no_grad():
            model(input_ids=torch.tensor([row]))
        return int(model.last_selection.prompt_ids[0])

    assert [item["prompt"] for item in found["items"][:20]] == [chosen(row[:3]) for row in words]
    assert [chosen(row[:3]) for row in words] != [chosen([*row, EOS]) for row in words], "it would be seen"


def test_windows_of_a_long_chat_score_each_wanted_token_once():
    turns = [one for i in range(5) for one in (user(f"w{20 + i} w30 w31"), assistant(f"w{40 + i} w50"))]
    tokenizer = tokenizer_of(WITH_BOS, "<s> $A")
    (document,) = assistant_only([Chat(turns)])
    windows = cut_texts(tokenizer, [document], 12, 7)
    scored = [token for part in windows for token, one in zip(part.tokens, part.scored, strict=True) if one]
    assert scored == [token for i in range(5) for token in (40 + i, 50, BOS)]
    assert all(part.tokens[0] == BOS and part.context >= 1 and len(part.tokens) <= 12 for part in windows)


def test_messages_are_scored_as_the_text_that_they_are():
    tokenizer = tokenizer_of(CHAT_TEMPLATE)
    text = tokenizer.apply_chat_template(TURNS * 3, tokenize=False)
    as_text, as_chat = (score_documents(tiny("llama"), tokenizer, [one], 12, 8) for one in (text, Chat(TURNS * 3)))
    assert as_text["items"] == as_chat["items"]


def test_calibration_reads_chats_as_they_are_written():
    tokenizer = tokenizer_of(CHAT_TEMPLATE)
    (chunk,) = calibration_chunks(tokenizer, [Chat(TURNS)], 1, 15, seed=0)
    assert chunk == [62, 10, 11, 63, 64, 12, 13, 14, BOS, 62, 15, 63, 64, 16, BOS]
    rows = calibration_chunks(tokenizer, [Chat(" w6 w7", "w5")] * 4, 4, 4, seed=0)
    assert rows == [[5, 6, 7, EOS]] * 4, "the end that a completion has is not written twice"


def test_a_report_reads_messages_and_prompts_with_completions(make):
    import idp_peft

    tokenizer, model = tokenizer_of(CHAT_TEMPLATE), make("llama")
    rows = read_examples([{"messages": TURNS}, {"prompt": "w5", "completion": " w6"}, Chat(TURNS)], tokenizer)
    assert [row.labels is None for row in rows] == [True, False, True]
    assert rows[1].input_ids == [5, 6, EOS]
    assert rows[1].labels == [-100, 6, EOS]
    pairs = [{"prompt": document.prompt, "completion": document.completion} for document in PAIRS]
    report = idp_peft.selection_report(model, pairs, tokenizer=tokenizer, oracle=True, batch_size=2)
    assert report.tokens.tolist() == [5] * 6
    assert report.reads_labels == 0
    with pytest.raises(ValueError, match="`tokenizer` must be given for chats, as example 0 is one"):
        read_examples([{"messages": TURNS}])


COMMANDS = {
    "messages": ([{"messages": [SYSTEM, user(f"w{i} w9 w8"), assistant(f"w{i + 1} w7")]} for i in range(10, 30)], {}),
    "the assistant's words": (
        [{"messages": [SYSTEM, user(f"w{i} w9 w8"), assistant(f"w{i + 1} w7")]} for i in range(10, 30)],
        {"assistant_only_loss": True},
    ),
    "prompts": ([{"prompt": f"w{i} w9", "completion": f" w{i + 1} w7"} for i in range(10, 30)], {}),
    "prompts as chats": (
        [{"prompt": [user(f"w{i} w9")], "completion": [assistant(f"w{i + 1} w7")]} for i in range(10, 30)],
        {},
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_recover_and_evaluate_take_chats(name, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from idp_peft.evaluation import evaluate

    rows, more = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    tiny("llama").save_pretrained("model")
    tokenizer_of(WITH_BOS, "<s> $A").save_pretrained("model")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"model": "model", "dataset": "chats.jsonl", **more}
    training = {"output_dir": "run", "max_steps": 2, "use_cpu": True, "disable_tqdm": True, "num_virtual_tokens": 3}

    def words(values):
        return [word for flag, value in values.items() for word in (f"--{flag}", str(value))]

    run_recover(words({**flags, **training}), recover)
    scored = {**flags, "adapter": "run/adapter", "output": "result.json", "window": 16, "stride": 12}
    run_evaluate(words(scored), evaluate)
    result = json.loads((tmp_path / "result.json").read_text())
    items = result["perplexity"]["chats.jsonl:held_out"]["items"]
    expected = {"messages": 10, "the assistant's words": 3, "prompts": 3, "prompts as chats": 3}
    assert {item["tokens"] for item in items} == {expected[name]}
    assert len(items) == 20


def test_chats_for_a_model_without_a_template_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    from idp_peft.recover import run

    monkeypatch.chdir(tmp_path)
    make().save_pretrained("model")
    tiny("llama").config.save_pretrained("model")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
    monkeypatch.setattr(run, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        recover("model", "run", dataset="chats.jsonl")
    with pytest.raises(ValueError, match="`assistant_only_loss` needs chats, and `dataset` 'self' is text"):
        recover("model", "run", teacher="model", dataset="self", assistant_only_loss=True)
