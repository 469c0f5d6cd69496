"""An error that a library wraps in another one reaches the user with what went wrong, wherever we pass it on."""

from __future__ import annotations

import builtins
import json
import re

import pytest

from idp_peft.files.error_reason import missing, reason

ROOT = "the disk is full"


def wrapped() -> OSError:
    """What libraries raise: a general text over the one that says what happened."""
    try:
        try:
            raise RuntimeError(f"{ROOT}\n  at line 3")
        except RuntimeError as error:
            raise OSError("An error occurred while loading") from error
    except OSError as error:
        return error


def caught(function) -> BaseException:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def by_context():
    try:
        raise KeyError(ROOT)
    except KeyError:
        raise ValueError("general")  # noqa: B904  (as it happens to libraries)


def suppressed():
    try:
        raise KeyError(ROOT)
    except KeyError:
        raise ValueError("general") from None


def repeated():
    try:
        raise ValueError(ROOT)
    except ValueError as error:
        raise OSError(f"general: {ROOT}") from error


def without_words():
    raise StopIteration


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (by_context, f"general: '{ROOT}'"),
        (suppressed, "general"),
        (repeated, f"general: {ROOT}"),
        (without_words, "StopIteration"),
    ],
)
def test_a_reason_is_the_whole_chain_in_one_line(function, text):
    assert reason(caught(function)) == text


def test_a_reason_is_one_line_and_not_a_page_and_ends_where_errors_turn_in_a_circle():
    assert reason(wrapped()) == f"An error occurred while loading: {ROOT} at line 3"
    assert len(reason(ValueError("word " * 1000))) <= 300
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert reason(one) == "one: other"


def test_a_library_that_is_there_and_broken_is_not_called_missing():
    text = "needs it: pip install it"
    assert str(missing(text, ModuleNotFoundError("No module named 'it'", name="it"))) == text
    assert str(missing(text, ImportError("it is required"))) == text
    broken = ImportError("cannot import name 'x' from 'y'", name="y")
    assert str(missing(text, broken)) == f"{text} (cannot import name 'x' from 'y')"
    chained = ModuleNotFoundError("Could not import module 'z'", name="z")
    chained.__cause__ = RuntimeError(ROOT)
    assert str(missing(text, chained)) == f"{text} (Could not import module 'z': {ROOT})"


def a_model(monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM

    from idp_peft.models.loading import load_model
    from tests.tiny_folder import tiny_folder

    folder = tiny_folder(tmp_path / "model")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", raising)
    load_model(folder)


def a_tokenizer(monkeypatch, tmp_path):
    from transformers import AutoTokenizer

    from idp_peft.models.loading import load_tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", raising)
    load_tokenizer("some/model")


def an_adapter(monkeypatch, tmp_path):
    from peft import PeftConfig

    import idp_peft

    monkeypatch.setattr(PeftConfig, "from_pretrained", raising)
    idp_peft.load("some/adapter")


def an_adapter_of_the_harness(monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    from peft import PeftConfig

    from idp_peft.evaluation import harness_by_name

    monkeypatch.setattr(PeftConfig, "from_pretrained", raising)
    harness_by_name._adapter_config("some/adapter", None)


def an_adapter_to_compose(monkeypatch, tmp_path):
    from huggingface_hub import hf_hub_download  # noqa: F401  (what is replaced)

    from idp_peft.composition import prompt_sources

    monkeypatch.setattr(prompt_sources, "hf_hub_download", raising)
    monkeypatch.setattr(prompt_sources, "find_file", lambda *_: None)
    monkeypatch.setattr(prompt_sources.PeftConfig, "from_pretrained", lambda *_: None)
    monkeypatch.setattr(prompt_sources, "_check_method", lambda *_: None)
    prompt_sources._from_files("some/adapter")


def the_base_of_a_composition(monkeypatch, tmp_path):
    from transformers import AutoConfig

    from idp_peft.composition.base_skeleton import skeleton

    monkeypatch.setattr(AutoConfig, "from_pretrained", raising)
    skeleton("some/model")


def a_task_of_the_harness(monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from idp_peft.evaluation.task_loading import load_tasks

    monkeypatch.setattr(TaskManager, "load", raising)
    load_tasks("arc_easy")


def a_dataset(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    from idp_peft.texts.data import load_texts

    monkeypatch.setattr(datasets, "load_dataset", raising)
    load_texts("some/dataset")


def a_dataset_on_disk(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    from idp_peft.texts.data import load_texts

    (tmp_path / "state.json").write_text(json.dumps({}))
    monkeypatch.setattr(datasets, "load_from_disk", raising)
    load_texts(str(tmp_path))


def a_gradient(monkeypatch, tmp_path):
    from idp_peft.models import gradient_probe
    from tests.tiny import tiny

    monkeypatch.setattr(gradient_probe, "_severed", raising)
    raise ValueError(str(gradient_probe.probe_gradients(tiny("llama"))))


def the_library_of_datasets(monkeypatch, tmp_path):
    from idp_peft.texts.data import load_texts

    plain = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(ROOT, name="huggingface_hub")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    load_texts("some/dataset")


def raising(*_, **__):
    raise wrapped()


PASSED_ON = [
    a_model,
    a_tokenizer,
    an_adapter,
    an_adapter_of_the_harness,
    an_adapter_to_compose,
    the_base_of_a_composition,
    a_task_of_the_harness,
    a_dataset,
    a_dataset_on_disk,
    a_gradient,
    the_library_of_datasets,
]


@pytest.mark.parametrize("function", PASSED_ON)
def test_every_error_that_is_passed_on_has_its_reason(function, monkeypatch, tmp_path):
    with pytest.raises((ValueError, OSError, ImportError), match=re.escape(ROOT)) as error:
        function(monkeypatch, tmp_path)
    assert "\n" not in str(error.value)
    assert str(error.value) != str(wrapped())
