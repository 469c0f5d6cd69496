"""The command line of lm-evaluation-harness, as it is, with the model type `idp` and the local tasks in addition.

    python -m idp_peft.evaluation.lm_eval --model idp --model_args pretrained=BASE,peft=ADAPTER --tasks local_arc_easy,hellaswag

In Python, `import idp_peft.evaluation.lm_eval` is all that `lm_eval.simple_evaluate(model="idp", model_args=...)` needs. The
harness's own executable finds us too, where the file `lm_eval.yaml` beside this one is among its `--tasks`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from idp_peft.evaluation.harness_arguments import check_arguments
from idp_peft.evaluation.harness_type import MODEL_TYPE, register_model_type

register_model_type()


def main() -> None:
    """The harness's own `main`, with our checks between parsing and execution."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    command_line = HarnessCLI()
    arguments = command_line.parse_args()
    try:
        _check(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    _add_local_tasks(arguments)
    command_line.execute(arguments)


def _setting(arguments, name: str):
    """A setting as the harness reads it: the command line's, else that of the file named by `--config`."""
    value = getattr(arguments, name, None)
    if not value and getattr(arguments, "config", None):
        from lm_eval.config.evaluate_config import EvaluatorConfig

        value = EvaluatorConfig.load_yaml_config(arguments.config).get(name)
    return value


def _check(arguments) -> None:
    """Checks that need no task files, which take the harness long to read.

    Raises:
        `ValueError`: for a `model_args` that we do not know, or an IDP adapter that chooses under another model type.
    """
    from lm_eval.utils import simple_parse_args_string

    model_args = _setting(arguments, "model_args") or {}
    if isinstance(model_args, str):
        model_args = simple_parse_args_string(model_args)
    model = _setting(arguments, "model")
    if model == MODEL_TYPE:
        check_arguments(model_args)
    elif "peft" in model_args and _chooses(str(model_args["peft"]), model_args.get("revision")):
        raise ValueError(
            f"`peft` {model_args['peft']} is an IDP adapter, and --model {model or 'hf'} would let every answer choose the "
            f"prompt that it is scored with: use --model {MODEL_TYPE}, where a question chooses one for all its answers"
        )


def _chooses(peft: str, revision: str | None) -> bool:
    """Whether an adapter is IDP's and its inputs choose. An adapter that cannot be read is left to the harness."""
    path = Path(peft).expanduser() / "adapter_config.json"
    if not path.is_file():
        if Path(peft).is_absolute() or Path(peft).exists():
            return False
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            path = Path(hf_hub_download(peft, "adapter_config.json", revision=revision))
        except (OSError, HfHubHTTPError, HFValidationError):
            return False
    config = json.loads(path.read_text(encoding="utf-8"))
    return config.get("peft_type") == "IDP" and config.get("num_prompts") != 1 and config.get("selection") != "fixed"


def _add_local_tasks(arguments) -> None:
    """Our folder of tasks, before the user's own (a later one wins)."""
    if not hasattr(arguments, "include_path"):
        return
    from idp_peft.evaluation.local_task import FOLDER

    users = _setting(arguments, "include_path") or []
    arguments.include_path = [str(FOLDER), *([users] if isinstance(users, str) else users)]


if __name__ == "__main__":
    main()
