"""The local tasks: ten zero-shot question sets that need no hub, in the harness's own prompt formats.

Formats and metrics are those of the harness's tasks of the same name. What differs: SciQ's choices are shuffled, LAMBADA's
passages have no line breaks, TriviaQA is the Wikipedia part of the validation split, and its answers stop after 32 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from idp_peft.evaluation.task_data import task_file
from idp_peft.offline.assets import cache_folder

PREFIX = "local_"
ALL = "all_local"


@dataclass(frozen=True)
class TaskScore:
    """What one question's score means.

    Args:
        metric (`str`): the metric of record: `acc_norm` (likelihood per character) where choices are sentences,
            `acc` where they are short, `exact_match` where the answer is open. The choice of OLMo's evaluations and of
            most compression papers; a result holds every metric of the task.
        chance (`float`, *optional*): what guessing scores; `None` where it is not known.
    """

    metric: str
    chance: float | None


# ARC has a few questions with three or five choices. Always answering yes scores 0.622 on BoolQ.
SCORES = {
    "arc_easy": TaskScore("acc", 0.25),
    "arc_challenge": TaskScore("acc_norm", 0.25),
    "sciq": TaskScore("acc", 0.25),
    "hellaswag": TaskScore("acc_norm", 0.25),
    "piqa": TaskScore("acc_norm", 0.5),
    "winogrande": TaskScore("acc", 0.5),
    "boolq": TaskScore("acc", 0.5),
    "triviaqa": TaskScore("exact_match", 0.0),
    "lambada": TaskScore("acc", 0.0),
    "webqs": TaskScore("exact_match", 0.0),
}
LOCAL_TASKS = tuple(PREFIX + name for name in SCORES)


def _mean(metric: str, **options) -> dict:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True, **options}


def _multiple_choice(text: str, metrics: tuple[str, ...] = ("acc", "acc_norm"), **fields) -> dict:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [_mean(metric) for metric in metrics],
        **fields,
    }


def _definitions() -> dict[str, dict]:
    question = "Question: {{question}}\nAnswer:"
    return {
        "arc_easy": _multiple_choice("query"),
        "arc_challenge": _multiple_choice("query"),
        "hellaswag": _multiple_choice("query"),
        "sciq": _multiple_choice("{{support.lstrip()}}\n" + question),
        "piqa": _multiple_choice("Question: {{goal}}\nAnswer:"),
        # The harness takes a number as the text to mean that the choices are contexts and the target follows them.
        "winogrande": _multiple_choice(
            "gold", metrics=("acc",), doc_to_choice="contexts", doc_to_target="continuation"
        ),
        "boolq": _multiple_choice(
            "{{passage}}\nQuestion: {{question}}?\nAnswer:", metrics=("acc",), doc_to_choice=["no", "yes"]
        ),
        "webqs": _multiple_choice(question, metrics=("exact_match",)),
        "lambada": {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": "word",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                _mean("acc"),
            ],
        },
        "triviaqa": {
            "output_type": "generate_until",
            "doc_to_text": "Question: {{question}}?\nAnswer:",
            "doc_to_target": "aliases",
            # No accepted answer is longer; the harness's 256 would only prolong what is wrong already.
            "generation_kwargs": {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": 32},
            "filter_list": [
                {"name": "remove_whitespace", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
            ],
            "metric_list": [_mean("exact_match", ignore_case=True, ignore_punctuation=True)],
        },
    }


def config(name: str) -> dict:
    """The harness's config of a local task, by its full name (`"local_sciq"`); fetches its questions if need be."""
    short = name.removeprefix(PREFIX)
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(task_file(short))},
            "cache_dir": str(cache_folder() / "datasets"),
        },
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1},
        **_definitions()[short],
    }


def expand_tasks(tasks: str | list[str] | tuple[str, ...] | None) -> list[str]:
    """Names of tasks, each once, in the order given: from a list or a comma-separated string; `all_local` is the ten."""
    names = ",".join([tasks] if isinstance(tasks, str) else tasks or [])
    expanded: list[str] = []
    for name in filter(None, map(str.strip, names.split(","))):
        expanded += LOCAL_TASKS if name == ALL else [name]
    return list(dict.fromkeys(expanded))
