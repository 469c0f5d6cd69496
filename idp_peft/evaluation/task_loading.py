"""Names of tasks to the harness's task objects: local ones from the cache, its own ones from the Hub."""

from __future__ import annotations

from functools import cache

from idp_peft.evaluation.tasks import ALL, LOCAL_TASKS, config, expand_tasks
from idp_peft.files.error_reason import missing, reason


def check_tasks(tasks) -> list[str]:
    """The names of the tasks meant, checked without loading any.

    Raises:
        `ValueError`: for a name that is neither local nor the harness's.
        `ImportError`: where the harness is missing.
    """
    names = expand_tasks(tasks)
    if names:
        _need_harness()
    others = [name for name in names if name not in LOCAL_TASKS]
    if others:
        known = set(_harness_tasks().all_tasks)
        if unknown := [name for name in others if name not in known]:
            raise ValueError(
                f"`tasks` knows no {', '.join(map(repr, unknown))}: choose from {', '.join(LOCAL_TASKS)}, {ALL} (these ten), "
                "or a task of lm-evaluation-harness"
            )
    return names


def load_tasks(tasks) -> dict:
    """`{name: task}`; a group of the harness becomes its tasks.

    Raises:
        `ValueError`: for an unknown name, or one of the harness's own whose data cannot be loaded.
    """
    names = check_tasks(tasks)
    if not names:
        return {}
    from lm_eval.api.task import ConfigurableTask

    found = {}
    for name in names:
        if name in LOCAL_TASKS:
            found[name] = ConfigurableTask(config=config(name))
        else:
            found |= _load_from_hub(name)
    return found


@cache
def _harness_tasks():
    """The harness's index of its own tasks: it reads thousands of files for it, so once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load_from_hub(name: str) -> dict:
    try:
        return _harness_tasks().load([name])["tasks"]
    except Exception as error:  # whatever the data's loader raises: it is the user's line that matters
        local = f"local_{name.removesuffix('_openai')}"
        hint = f"; {local} needs no hub" if local in LOCAL_TASKS else ""
        why = reason(error)
        raise ValueError(f"`tasks`: the data of {name!r} could not be loaded from the Hub ({why}){hint}") from error


def _need_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise missing("`tasks` need lm-evaluation-harness: pip install 'idp-peft[eval]'", error) from error
