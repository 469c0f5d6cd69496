"""Every class that transformers names for causal language models, with text or with pictures and sound beside it: what IDP
does with it. `python -m tests.every_model.sweep` writes `results/<transformers>.json` and goes on where it was."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import torch
import transformers as tf
from transformers.models.auto import modeling_auto

from tests.every_model.check import CHECKS, Case
from tests.every_model.shrink import tiny_model
from tests.every_model.variants import VARIANTS

RESULTS = Path(__file__).parent / "results"
_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
)


@dataclass(frozen=True)
class Outcome:
    """What became of one row.

    Args:
        status (`str`): `"works"`: every check holds. `"refused"`: `get_peft_model` raised. `"not built"`: transformers makes
            no tiny model of the class here. `"fails by itself"`: the base cannot be called with text alone. `"wrong"`: a
            check failed, which must not be.
        reason (`str`): the error, or the checks that failed.
    """

    status: str
    reason: str = ""


def model_names() -> list[str]:
    """The classes, in the order of transformers' own lists."""
    found: dict[str, None] = {}
    for mapping in _MAPPINGS:
        for names in getattr(modeling_auto, mapping, {}).values():
            found.update(dict.fromkeys([names] if isinstance(names, str) else names))
    return list(found)


def rows() -> list[str]:
    """One row per class, and one per variant that the config of a class chooses: `"Class"` or `"Class: variant"`."""
    found = []
    for name in model_names():
        found += [name, *(f"{name}: {variant}" for variant in VARIANTS.get(name, {}))]
    return found


def outcome(row: str) -> Outcome:
    """Build the model of a row twice, wrap one, and compare."""
    name, _, variant = row.partition(": ")
    arguments = VARIANTS[name][variant] if variant else {}

    def build(attention: str = "sdpa"):
        return tiny_model(getattr(tf, name), attention=attention, **arguments)

    try:
        base = build()
    except Exception as error:  # whatever keeps transformers from building it
        return Outcome("not built", _one_line(error))
    try:
        case = Case(base, build)
    except ValueError as error:
        return Outcome("refused", str(error))
    try:
        with torch.no_grad():
            case.base(input_ids=case.alone(0))
    except Exception as error:  # of the base, which IDP has not touched
        return Outcome("fails by itself", _one_line(error))
    try:
        with torch.no_grad():
            case.concatenated(case.alone(0), 1)
    except Exception:  # the checks report it, if positions do not help
        case.needs_positions = True
    wrong = []
    for check in CHECKS:
        try:
            check(case)
        except Exception as error:  # every check is reported, whatever it raised
            wrong.append(f"{check.__name__}: {_one_line(error)}")
    return Outcome("wrong", "; ".join(wrong)) if wrong else Outcome("works")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def results_file(version: str = tf.__version__) -> Path:
    return RESULTS / f"{version}.json"


def read_results(version: str = tf.__version__) -> dict[str, Outcome]:
    """The committed outcomes of a version of transformers; none where there is no file."""
    file = results_file(version)
    return {row: Outcome(**it) for row, it in json.loads(file.read_text())["rows"].items()} if file.exists() else {}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help="rows to run again (default: those that have no outcome yet)")
    parser.add_argument("--again", action="store_true", help="run every row again")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    tf.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    known = {} if options.again else read_results()
    todo = options.rows or [row for row in rows() if row not in known]
    for row in todo:
        known[row] = outcome(row)
        print(f"{row}: {known[row].status} {known[row].reason}", flush=True)
        _write({row: known[row] for row in rows() if row in known})
    return int(any(it.status == "wrong" for it in known.values()))


def _write(known: dict[str, Outcome]) -> None:
    versions = {"transformers": tf.__version__, "peft": peft.__version__, "torch": torch.__version__.partition("+")[0]}
    content = {**versions, "rows": {row: asdict(it) for row, it in known.items()}}
    RESULTS.mkdir(exist_ok=True)
    results_file().write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
