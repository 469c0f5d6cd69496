"""The base of an adapter: where to get it, how it is compressed, and how it was made."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from idp_peft.offline import assets

NOTE = "compression.json"


@dataclass(frozen=True)
class Base:
    """The base of an adapter.

    Args:
        name (`str`, *optional*): as the adapter's config has it: a Hub id or a path. `None` where it is not recorded.
        on_hub (`bool`): whether `name` is a Hub id.
        quantization (`dict`): its `quantization_config`; empty where there is none.
        note (`dict`, *optional*): its `compression.json`, where `idp-peft compress` made it.
    """

    name: str | None = None
    on_hub: bool = False
    quantization: dict = field(default_factory=dict)
    note: dict | None = None

    @property
    def is_packaged(self) -> bool:
        """Whether it is the default model, which every machine can fetch and keeps in a cache of its own."""
        return self.name is not None and Path(self.name).resolve().parent == assets.cache_folder().resolve()

    @property
    def folder(self) -> str:
        """What to call its folder, or its GGUF file: a local base is somewhere else on every machine."""
        return Path(self.name).name if self.name else "base"

    @property
    def is_file(self) -> bool:
        """Whether it is one file: GGUF models are."""
        return self.quantization.get("quant_method") == "gguf"

    @property
    def formats(self) -> list[str]:
        """Names of what was done to its weights, for tags: `["compressed-tensors", "gptq"]`."""
        algorithms = [note["recipe"].partition("-")[0] for note in self.notes]
        method = self.quantization.get("quant_method")
        return list(dict.fromkeys([*([str(method)] if method else []), *algorithms]))

    @property
    def notes(self) -> list[dict]:
        """The notes of every compression, the first one first."""
        notes, note = [], self.note
        while isinstance(note, dict) and isinstance(note.get("recipe"), str):
            notes.insert(0, note)
            note = note.get("earlier")
        return notes

    @property
    def commands(self) -> list[str]:
        """The `idp-peft compress` commands that make it; none where what it was made from is a path of one machine."""
        origin = self.notes[0].get("model") if self.notes else None
        if not is_hub_id(origin) or Path(origin).is_dir():  # "default" reads like an id, too
            return []
        folders = [f"{self.folder}-{step}" for step in range(1, len(self.notes))] + [self.folder]
        sources = [origin, *folders]
        return [_command(note, *places) for note, *places in zip(self.notes, sources, folders, strict=False)]


def base_of(name: str | None, model_config=None) -> Base:
    """The base that an adapter's config names.

    Args:
        name (`str`, *optional*): its `base_model_name_or_path`.
        model_config (`PreTrainedConfig`, *optional*): of the base, where it is loaded; a folder's own files are asked first.
    """
    if not name:
        return Base(quantization=_quantization(model_config))
    folder = Path(name)
    if folder.suffix == ".gguf" and not folder.is_dir():
        return Base(name, quantization={"quant_method": "gguf"})
    written = _read_json(folder / "config.json") or {}
    quantization = written.get("quantization_config") or written.get("compression_config") or {}
    on_hub = is_hub_id(name) and not folder.is_dir()
    return Base(name, on_hub, quantization or _quantization(model_config), _read_json(folder / NOTE))


def is_hub_id(name) -> bool:
    """Whether a text could be the id of a model on the Hub. A folder of that name may exist all the same."""
    if not isinstance(name, str) or name.startswith((".", "/", "~")) or "\\" in name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.endswith(".gguf")


def describe_quantization(quantization: dict) -> str:
    """One line: `gptq, 3 bits, groups of 64`."""
    parts = [str(quantization.get("quant_method", "quantised"))]
    rules = [quantization]
    rules += [(group or {}).get("weights") or {} for group in (quantization.get("config_groups") or {}).values()]
    bits = sorted({bits for rule in rules for bits in (rule.get("bits"), rule.get("num_bits")) if bits})
    bits += [width for width in (4, 8) if quantization.get(f"load_in_{width}bit")]
    parts += [f"{' and '.join(map(str, bits))} bits"] if bits else []
    parts += [str(quantization["bnb_4bit_quant_type"])] if quantization.get("load_in_4bit") else []
    groups = sorted({rule["group_size"] for rule in rules if (rule.get("group_size") or 0) > 0})
    parts += [f"groups of {' and '.join(map(str, groups))}"] if groups else []
    return ", ".join(parts)


def _quantization(model_config) -> dict:
    """The `quantization_config` of a loaded model's config, as plain values."""
    found = getattr(model_config, "quantization_config", None) or {}
    found = found if isinstance(found, dict) else found.to_dict()
    inner = found.get("quantization_config")
    found = {**(inner if isinstance(inner, dict) else {}), **found}
    return json.loads(json.dumps(found, default=lambda value: getattr(value, "value", str(value))))


def _read_json(file: Path) -> dict | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _command(note: dict, source: str, target: str) -> str:
    words = ["idp-peft", "compress", "--model", source, "--recipe", note["recipe"], "--output_dir", target]
    calibration = note.get("calibration") or {}
    flags = {
        "backend": note.get("backend"),
        "group_size": note.get("group_size"),
        "calibration_samples": calibration.get("samples"),
        "calibration_tokens": calibration.get("tokens_per_sample"),
        "seed": note.get("seed"),
    }
    words += [str(word) for name, value in flags.items() if value is not None for word in (f"--{name}", value)]
    return shlex.join(words + (["--symmetric"] if note.get("symmetric") else []))
