"""The model type `idp` of lm-evaluation-harness: a line in the harness's own registry, resolved when it is asked for."""

from __future__ import annotations

from idp_peft.files.error_reason import missing

MODEL_TYPE = "idp"
_TARGET = "idp_peft.evaluation.harness_by_name:HarnessModelByName"


def register_model_type() -> None:
    """Make `lm_eval.simple_evaluate(model="idp", model_args=...)` find us. Calling it again changes nothing.

    Raises:
        `ImportError`: where the harness is missing.
        `RuntimeError`: where another model type already has the name.
    """
    try:
        import lm_eval.models  # noqa: F401  (the registry fills itself only while it is empty)
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise missing(
            "the model type 'idp' needs lm-evaluation-harness: pip install 'idp-peft[eval]'", error
        ) from error
    holder = dict(model_registry.items()).get(MODEL_TYPE)
    if holder is None:
        model_registry.register(MODEL_TYPE, target=_TARGET)
        return
    place = holder if isinstance(holder, str) else f"{holder.__module__}:{holder.__name__}"
    if place != _TARGET:
        raise RuntimeError(f"lm-evaluation-harness already has a model type named {MODEL_TYPE!r} ({place})")
