"""Every turn of a chat gets the prompt that its first user turn chooses: the one that `generate` keeps with its cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, pipeline

pytest.importorskip("starlette", reason="the proxy's web framework is in the extra 'serving'")
pytest.importorskip("uvicorn", reason="the proxy's server is in the extra 'serving'")

import itertools
from pathlib import Path

from idp_peft import fit_centroids
from idp_peft.serving import ExportedModel, Router, VllmPrompts, export_to_vocab, first_turn
from idp_peft.serving.prompted_request import RequestPrompter
from idp_peft_cli import main
from tests.tiny_chats import chat_tokenizer
from tests.tiny_serving import Saved, saved

CLEAR = 1e-5  # a best score stands so far before the next that no rounding turns them round
WORDS = {kind: " ".join(f"w{30 * kind + 5 + i}" for i in range(6)) for kind in range(3)}  # of each prompt


def says(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def chat(first: int, later: int, turns: int = 3) -> list[dict]:
    """User's turns of one kind and then of another, and answers in between."""
    messages = [says("user", WORDS[first])]
    for _ in range(turns - 1):
        messages += [says("assistant", WORDS[later]), says("user", WORDS[later])]
    return messages


def adapter(folder: Path, selection: str = "centroid") -> Saved:
    one = saved(folder, num_prompts=3, num_virtual_tokens=4, selection=selection)
    if selection == "centroid":
        rows = [{"input_ids": chat_tokenizer()(WORDS[kind])["input_ids"], "prompt_ids": kind} for kind in WORDS]
        fit_centroids(one.model, rows)
        one.model.save_pretrained(one.adapter)
    return one


def prompter_of(one: Saved) -> RequestPrompter:
    exported = ExportedModel.from_folder(export_to_vocab(one.adapter, one.base.parent / "exported", one.base))
    return RequestPrompter(Router.from_pretrained(exported.folder), exported)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return adapter(tmp_path_factory.mktemp("chats"))


@pytest.fixture(scope="module")
def prompter(one):
    return prompter_of(one)


@pytest.fixture(scope="module")
def anew(prompter):
    """One that chooses by the whole chat."""
    return RequestPrompter(prompter.router, prompter.exported, chat_choice="whole")


def ids_of(messages: list[dict], tokenizer=None, **settings) -> list[int]:
    tokenizer = chat_tokenizer() if tokenizer is None else tokenizer
    text = tokenizer.apply_chat_template(messages, tokenize=False, **{"add_generation_prompt": True, **settings})
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def chosen(prompter, messages: list[dict], **fields) -> int:
    (prompt,) = prompter.chat({"messages": messages, **fields})[1]
    return prompt


def chosen_by(prompter, ids: list[int]) -> int:
    return int(prompter.router.route([ids]).prompt_ids[0])


# ---------------------------------------------------------------------- the first turn


@pytest.mark.parametrize(
    ("roles", "count"),
    [
        ("u", 1),
        ("su", 2),
        ("suau", 2),
        ("ssuau", 3),
        ("auau", 2),
        ("saua", 3),
        ("uuau", 2),
        ("usau", 1),
        ("uatatu", 1),
        ("sa", 2),
        ("s", 1),
    ],
)
def test_a_first_turn_ends_where_the_first_user_stops_speaking(roles, count):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = [says(names[role], str(number)) for number, role in enumerate(roles)]
    assert first_turn(messages) == messages[:count]


@pytest.mark.parametrize("first", range(3))
def test_every_turn_gets_the_prompt_of_the_first(prompter, anew, first):
    later = (first + 1) % 3
    alone = chosen_by(prompter, ids_of(chat(first, later, 1)))
    turns = [chat(first, later, turns) for turns in (1, 2, 3)]
    assert [chosen(prompter, messages) for messages in turns] == [alone] * 3
    whole = [chosen(anew, messages) for messages in turns]
    assert whole == [chosen_by(prompter, ids_of(messages)) for messages in turns]
    assert len(set(whole)) > 1, "else the turns of a chat would not differ"


@pytest.mark.parametrize(
    "front",
    [
        [says("system", WORDS[2])],
        [says("system", WORDS[2]), says("system", WORDS[2])],
        [says("assistant", WORDS[2])],
        [says("system", WORDS[2]), says("assistant", WORDS[2])],
    ],
)
def test_what_stands_before_the_first_user_turn_counts(prompter, front):
    messages = [*front, *chat(1, 0)]
    assert chosen(prompter, messages) == chosen_by(prompter, ids_of(messages[: len(front) + 1]))


def test_a_chat_without_a_user_chooses_by_all_of_it(prompter):
    messages = [says("system", WORDS[0]), says("assistant", f"{WORDS[2]} {WORDS[2]}")]
    assert chosen(prompter, messages) == chosen_by(prompter, ids_of(messages)) == 2


# ---------------------------------------------------------------------- the same choice everywhere


@pytest.mark.parametrize("path", ["peft", "native"])
@pytest.mark.parametrize("selection", ["centroid", "attention"])
def test_generate_with_a_cache_that_comes_back_and_the_proxy_agree_on_each_turn(tmp_path, path, selection):
    one = adapter(tmp_path, selection)
    prompter = prompter_of(one)
    model = one.model if path == "peft" else one.model.get_base_model()
    for first in range(3):
        cache = DynamicCache()
        for turns in (1, 2, 3):
            messages = chat(first, (first + 1) % 3, turns)
            ids = torch.tensor([ids_of(messages)])
            # Its one token is not in the cache yet: what stands there is the beginning of the next turn.
            model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
            assert cache.get_seq_length() == ids.shape[1]
            selection = one.model.last_selection
            if turns == 1:
                best, second = selection.scores[0].topk(2).values
                if best - second <= CLEAR * best:
                    break
            assert [chosen(prompter, messages)] == selection.prompt_ids.tolist()


def test_a_pipeline_chooses_by_the_whole_chat_unless_it_is_given_the_prompt_of_its_first_turn(one, prompter):
    write = pipeline("text-generation", model=one.model, tokenizer=chat_tokenizer())
    messages = chat(1, 0)
    write(messages, max_new_tokens=2, do_sample=False)
    assert one.model.last_selection.prompt_ids.tolist() == [chosen_by(prompter, ids_of(messages))]
    prompt = prompter.router.route([ids_of(first_turn(messages))]).prompt_ids
    (answer,) = write(messages, max_new_tokens=8, do_sample=False, prompt_ids=prompt)
    said = one.generate(ids_of(messages), chosen(prompter, messages))
    assert chosen(prompter, messages) != chosen_by(prompter, ids_of(messages)), "else both would say the same"
    assert answer["generated_text"][-1]["content"].split() == chat_tokenizer().decode(said).split()


def test_a_chat_body_for_vllm_has_the_same_prompt(one, prompter):
    prompts = VllmPrompts(Router.from_pretrained(one.adapter, one.base))
    for first in range(3):
        messages = chat(first, (first + 1) % 3)
        assert prompts.chat_body(messages) == prompts.chat_body(messages, chosen(prompter, messages))


# ---------------------------------------------------------------------- how the first turn is rendered


@pytest.fixture
def routed(prompter, monkeypatch):
    """The token ids that the router is asked about for a chat."""
    rows, route = [], prompter.router.route
    monkeypatch.setattr(prompter.router, "route", lambda some: rows.extend(some) or route(some))

    def ask(messages: list[dict], **fields) -> list[int]:
        chosen(prompter, messages, **fields)
        return rows.pop()

    return ask


@pytest.mark.parametrize("generation_prompt", [True, False])
def test_it_is_rendered_with_what_the_request_says_of_the_template(routed, prompter, monkeypatch, generation_prompt):
    """Tools, variables, and whether a generation prompt follows."""
    tokenizer = prompter.router.tokenizer
    template = "{{ tools[0].function.name ~ ' ' ~ loud ~ ' ' }}" + tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", template)
    tools = [{"type": "function", "function": {"name": "w50", "parameters": {}}}]
    settings = {"add_generation_prompt": generation_prompt, "tools": tools}
    expected = ids_of(chat(1, 0, 1), tokenizer, loud="w60", **settings)
    assert (expected[:2], expected[-1]) == ([50, 60], 4 if generation_prompt else 3)
    for turns in (1, 2, 3):
        assert routed(chat(1, 0, turns), chat_template_kwargs={"loud": "w60"}, **settings) == expected


def test_an_answer_that_the_client_began_changes_nothing(routed, prompter):
    begun = {"continue_final_message": True, "add_generation_prompt": False}
    for turns in (1, 2):
        messages = [*chat(1, 0, turns), says("assistant", f"{WORDS[0]} {WORDS[0]}")]
        assert routed(messages, **begun) == routed(chat(1, 0, 1))


@pytest.mark.parametrize(
    "alone",
    ["{{ raise_exception('too short') }}", "{{ messages[1].content.strip() }}", "{{ '' }}", "{{ ' ' }}"],
)
def test_where_the_template_refuses_a_lone_first_turn_the_whole_chat_chooses(prompter, monkeypatch, alone):
    tokenizer = prompter.router.tokenizer
    template = f"{{% if messages | length == 1 %}}{alone}{{% else %}}{tokenizer.chat_template}{{% endif %}}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    messages = chat(1, 0)
    assert chosen(prompter, messages) == chosen_by(prompter, ids_of(messages)) == 0


def test_a_template_that_renders_a_beginning_in_another_way_chooses_by_that(prompter, monkeypatch):
    """As those that put the system prompt into the last user turn, or cut the reasoning out of earlier answers."""
    tokenizer = prompter.router.tokenizer
    template = "w{{ 9 + messages | length }}{{ ' ' }}" + tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", template)
    messages = chat(1, 0)
    first = ids_of(first_turn(messages), tokenizer)
    assert ids_of(messages, tokenizer)[: len(first)] != first
    assert chosen(prompter, messages) == chosen_by(prompter, first) == 1


# ---------------------------------------------------------------------- the engine's cache


def test_ten_turns_through_the_proxy_each_find_those_before_in_the_engines_cache(tmp_path):
    pytest.importorskip("gguf", reason="GGUF files need the package gguf")
    from tests.llama_cpp import LlamaServer
    from tests.test_export_gguf import on_file
    from tests.tiny_proxy import starting

    template = (
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    one = on_file(tmp_path, positions=1024, chat_template=template, prompts={"selection": "centroid"})
    exported = one.export(tmp_path / "served")
    engine = LlamaServer(tmp_path / "served" / "model.gguf", context=1024)
    texts = [router_text(exported, kind) for kind in (1, 2)]

    def talk(chat_choice: str) -> list[tuple[str, int, int]]:
        """Of ten turns the prompt, the tokens that the engine read, and those it had in its cache."""
        prompter = RequestPrompter(Router.from_pretrained(exported.folder), exported, chat_choice=chat_choice)
        messages, turns = [], []
        with starting(prompter) as start:
            client = start(engine.url)
            for turn in range(10):
                messages.append(says("user", texts[turn > 0] * 4))
                answer = client.post(
                    "/v1/chat/completions", json={"messages": messages, "max_tokens": 4, "temperature": 0}
                )
                assert answer.status_code == 200, answer.text
                usage = answer.json()["usage"]
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                turns.append((answer.headers["x-idp-prompt"], usage["prompt_tokens"], cached))
                messages.append(says("assistant", texts[1] * 4))
        return turns

    kept, anew = talk("first_turn"), talk("whole")
    assert {prompt for prompt, _, _ in kept} == {"1"}
    for (_, before, _), (_, _, cached) in itertools.pairwise(kept):
        assert cached >= before
    assert {prompt for prompt, _, _ in anew} == {"1", "2"}
    assert any(cached < before for (_, before, _), (_, _, cached) in itertools.pairwise(anew))


def router_text(exported: ExportedModel, kind: int) -> str:
    """Text of the tokens that `on_file` made prompt number `kind` for."""
    return Router.from_pretrained(exported.folder).tokenizer.decode([3 + 10 * kind + i for i in range(5)])


# ---------------------------------------------------------------------- the command


def test_the_command_takes_the_rule(prompter, monkeypatch, capsys):
    import uvicorn

    rules = []
    monkeypatch.setattr(uvicorn, "run", lambda *_, **__: None)
    monkeypatch.setattr("idp_peft.serving.proxy.proxy_app", lambda prompter, _: rules.append(prompter.chat_choice))
    start = ["proxy", "--model", str(prompter.exported.folder), "--engine", "http://127.0.0.1:9"]
    main(start)
    main([*start, "--chat_choice", "whole"])
    assert rules == ["first_turn", "whole"]
    with pytest.raises(SystemExit):
        main([*start, "--chat_choice", "last"])
    assert "last" in capsys.readouterr().err


def test_another_rule_is_refused(prompter):
    with pytest.raises(ValueError, match="`chat_choice` must be one of first_turn, whole, got 'last'"):
        RequestPrompter(prompter.router, prompter.exported, chat_choice="last")
