"""The local tasks as the harness's command line finds them: one YAML file each, in the folder `lm_eval_tasks`.

A file names its task and this class; what the task is stands in `tasks.py`. Loading a file imports this module, and with
it comes the model type `idp`: the harness's own executable knows the type where one of its tasks is given as such a file.
"""

from __future__ import annotations

from pathlib import Path

from lm_eval.api.task import ConfigurableTask

from idp_peft.evaluation.harness_type import register_model_type
from idp_peft.evaluation.tasks import config as config_of

FOLDER = Path(__file__).parent / "lm_eval_tasks"

register_model_type()


class LocalTask(ConfigurableTask):
    """A local task by its name.

    Args:
        config (`dict`): `task`, the name; anything else of the harness's task settings wins over the definition.
    """

    def __init__(self, config: dict):
        definition = config_of(config["task"])
        given = {name: value for name, value in config.items() if name not in ("class", "metadata")}
        metadata = {**definition["metadata"], **(config.get("metadata") or {})}
        super().__init__(config={**definition, **given, "metadata": metadata})
