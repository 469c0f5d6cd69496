"""The core imports nothing of what is built on it: not at import, not in use, not inside a function."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import idp_peft

ROOT = Path(idp_peft.__file__).parent
# Layers over other libraries: every folder but those that the core may use.
THIN = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"hosting", "models", "texts", "files", "offline"}
CORE = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "__init__")


def thin_imports(source: str) -> tuple[set[str], set[str]]:
    """Thin layers that a module's source names in imports: `(when it is imported, inside functions)`."""
    tree = ast.parse(source)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    at_once, later = set(), set()
    for node in ast.walk(tree):
        (later if id(node) in inside else at_once).update(_layer(name) for name in _names(node))
    return at_once & THIN, later & THIN


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = "idp_peft." * bool(node.level) + (node.module or "")
        return [f"{module.rstrip('.')}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]  # for `import_module`
    return []


def _layer(name: str) -> str:
    """`"hub"` of `"idp_peft.hub.push"`."""
    package, _, rest = name.partition(".")
    return rest.partition(".")[0] if package == "idp_peft" else ""


@pytest.mark.parametrize("module", CORE)
def test_a_core_module_imports_no_thin_layer(module):
    at_once, later = thin_imports((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    assert not at_once
    assert not later


def test_the_layers_are_those_that_there_are():
    assert {"config", "prompt_bank", "prompt_cache", "selection", "probe", "choice", "layer", "model"} <= set(CORE)
    assert {"hub", "composition", "analysis", "compression", "recover", "evaluation", "report", "serving"} <= THIN


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import idp_peft.hub.push", ({"hub"}, set())),
        ("from idp_peft.evaluation import harness", ({"evaluation"}, set())),
        ("from idp_peft import config, report", ({"report"}, set())),
        ("from .analysis.report import SelectionReport", ({"analysis"}, set())),
        ("from . import recover", ({"recover"}, set())),
        ("def run():\n    from idp_peft.composition import compose", (set(), {"composition"})),
        ("import_module('idp_peft.compression')", ({"compression"}, set())),
        ("if TYPE_CHECKING:\n    import idp_peft.evaluation.lm_eval", ({"evaluation"}, set())),
        ("from idp_peft.selection import select\nimport hub, peft.hub", (set(), set())),
    ],
)
def test_the_check_sees_an_import_however_it_is_written(source, found):
    assert thin_imports(source) == found


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
    [("", []), ("idp_peft.compose", ["composition"]), ("model.save_pretrained(tempfile.mkdtemp())", ["hub"])],
    ids=["trained and generated", "composed", "saved"],
)
def test_in_use_a_layer_is_loaded_when_it_is_asked_for(more, loaded):
    """Saving writes a card; the second and third case show that the first can fail."""
    command = [sys.executable, "-W", "ignore", "-c", USE.replace("{more}", more), *THIN]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == loaded
