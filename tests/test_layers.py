"""Imports point one way, by folder, and no module imports itself through others: not at import, not inside a function."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import idp_peft

ROOT = Path(idp_peft.__file__).parent.parent
CORE = ["config", "prompt_bank", "selection", "probe", "prompt_cache", "forward", "layer", "model"]
BEYOND = ["centroids", "key_values", "scales"]
# A folder imports those before it. The core may use `hosting`, which knows transformers and PEFT and nothing of the method.
ORDER = [
    ["files"],
    ["hosting"],
    ["core"],
    ["offline"],
    ["texts"],
    ["models"],
    ["report", "compression", "composition", "evaluation", "hub"],
    ["analysis", "recover", "serving"],
]
RANK = {folder: rank for rank, folders in enumerate(ORDER) for folder in folders}
# What `idp_peft/__init__.py` gives by name is wired there.
WIRING = {"idp_peft"}


def modules(*packages: str) -> dict[str, Path]:
    """Every module of some packages, by its dotted name."""
    found = {}
    for package in packages:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, module: str, known: dict[str, Path]) -> set[str]:
    """Modules that a module's source imports, wherever in it and however it is written."""
    package = module if known.get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            names += [f"{base}.{alias.name}" for alias in node.names]
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value and node.value in known
        ):
            names.append(node.value)  # for `import_module`
    found = set()
    for name in names:
        while name and name not in known:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {module, ""}


def folder(module: str) -> str:
    """`"hub"` of `"idp_peft.hub.push"`, `"core"` of a module at the top."""
    parts = module.split(".")
    return "core" if len(parts) == 2 and parts[1] in (*CORE, *BEYOND) else parts[1]


OURS = modules("idp_peft")
EVERYTHING = modules("idp_peft", "idp_peft_cli", "benchmarks")


def test_the_method_is_in_eight_files_and_what_goes_beyond_the_paper_in_files_of_its_own():
    top = {path.stem for path in (ROOT / "idp_peft").glob("*.py")} - {"__init__"}
    assert top == {*CORE, *BEYOND}
    assert sum(len((ROOT / "idp_peft" / f"{name}.py").read_text().splitlines()) for name in CORE) <= 2000


def test_every_folder_has_its_place():
    assert {folder(module) for module in OURS if module != "idp_peft"} == set(RANK)


@pytest.mark.parametrize("module", sorted(set(OURS) - WIRING))
def test_imports_point_one_way(module):
    for other in imported(OURS[module].read_text(encoding="utf-8"), module, OURS) - WIRING:
        assert folder(other) == folder(module) or RANK[folder(other)] < RANK[folder(module)], other


def test_nothing_imports_the_command_line_but_itself():
    for module, path in EVERYTHING.items():
        if not module.startswith("idp_peft_cli"):
            found = imported(path.read_text(encoding="utf-8"), module, EVERYTHING)
            assert not {name for name in found if name.startswith("idp_peft_cli")} or module in RUNS_COMMANDS, module


# They run the command line as a user does, which is what they measure.
RUNS_COMMANDS = {"benchmarks.faults.child", "benchmarks.faults.served_model", "benchmarks.demo.__main__"}


def test_no_module_imports_itself_through_others():
    graph = {
        module: imported(path.read_text(encoding="utf-8"), module, EVERYTHING) - WIRING
        for module, path in EVERYTHING.items()
    }
    assert circle(graph) == []


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle; empty where there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for other in sorted(graph.get(module, ())):
            if found := walk(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def test_the_check_sees_a_circle():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import idp_peft.hub.push", {"idp_peft.hub.push"}),
        ("from idp_peft.evaluation import harness", {"idp_peft.evaluation.harness"}),
        ("from idp_peft import config, report", {"idp_peft.config", "idp_peft.report"}),
        ("from ..analysis.cka import f", {"idp_peft.analysis.cka"}),
        ("from . import push", {"idp_peft.hub.push"}),
        ("def run():\n    from idp_peft.composition import compose", {"idp_peft.composition.compose"}),
        ("import_module('idp_peft.compression')", {"idp_peft.compression"}),
        ("if TYPE_CHECKING:\n    import idp_peft.serving", {"idp_peft.serving"}),
        ("import hub, peft.hub", set()),
    ],
)
def test_the_check_sees_an_import_however_it_is_written(source, found):
    assert imported(source, "idp_peft.hub.facts", OURS) == found


THIN = [name for names in ORDER[3:] for name in names]
USE = """
import sys, tempfile, torch
import idp_peft
from peft import PeftModel, get_peft_model
from tests.tiny import tiny, token_batch

model = get_peft_model(tiny("llama"), idp_peft.IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
ids, mask = token_batch([5, 9])
model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, prompt_ids=[0, "auto"])
with torch.no_grad(), model.disable_adapter():
    model(input_ids=ids)
{more}
# PEFT's model classes with a card are made at import, and their card when it is asked for.
ours = (name.split(".")[1] for name in sys.modules if name.startswith("idp_peft.") and ".peft_model" not in name)
ours = {name for name in ours if name != "hub"} | {"hub"} & {name.split(".")[1] for name in sys.modules if name in ("idp_peft.hub.push", "idp_peft.hub.live_model")}
print(*sorted(set(ours) & set(sys.argv[1:])))
"""


@pytest.mark.parametrize(
    ("more", "loaded"),
    [
        ("", []),
        ("idp_peft.compose", ["composition", "models"]),
        ("model.save_pretrained(tempfile.mkdtemp())", ["hub", "models", "offline"]),
    ],
    ids=["trained and generated", "composed", "saved"],
)
def test_in_use_a_layer_is_loaded_when_it_is_asked_for(more, loaded):
    """Saving writes a card; the second and third case show that the first can fail."""
    command = [sys.executable, "-W", "ignore", "-c", USE.replace("{more}", more), *THIN]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == loaded
