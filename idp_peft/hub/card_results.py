"""Result files of `idp-peft evaluate` on a model card: a table for readers, entries of `model-index` for the Hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult

MEASURED_BY = "idp-peft evaluate"
_ROLES = ("dense", "compressed", "recovered")


@dataclass(frozen=True)
class Results:
    """What was measured. `rows`: the result files' contents, dense first; `ours`: the adapter's own among them."""

    rows: list[dict]
    ours: dict

    def entries(self) -> list[EvalResult]:
        """The adapter's own results, each metric with how it was measured."""
        limit = {name: self.ours.get("settings", {}).get(name) for name in ("limit", "seed")}
        limit = {} if limit["limit"] is None else limit
        entries = []
        for name, text in self.ours.get("perplexity", {}).items():
            how = {"window": text.get("window"), "stride": text.get("stride"), **limit}
            entries.append(_entry(*_dataset(name, self.ours), "perplexity", "Perplexity", text["perplexity"], how))
        for name, task in self.ours.get("tasks", {}).items():
            entries.append(_entry(name, None, task["metric"], task["metric"], task["score"], limit))
        return entries

    def table(self) -> list[str]:
        """Lines of a Markdown table: every model that was measured, side by side."""
        texts = list(dict.fromkeys(name for row in self.rows for name in row.get("perplexity", {})))
        tasks = list(dict.fromkeys(name for row in self.rows for name in row.get("tasks", {})))
        metrics = {name: task["metric"] for row in self.rows for name, task in row.get("tasks", {}).items()}
        head = ["model", *(f"perplexity on {_plain_name(name)}" for name in texts)]
        head += [*(f"{name}, {metrics[name]} in %" for name in tasks), "extra parameters"]
        lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
        for row in self.rows:
            label = f"**{row['label']}** (this adapter)" if row is self.ours else row["label"]
            cells = [
                f"{row['perplexity'][name]['perplexity']:.2f}" if name in row.get("perplexity", {}) else ""
                for name in texts
            ]
            cells += [
                f"{100 * row['tasks'][name]['score']:.1f}" if name in row.get("tasks", {}) else "" for name in tasks
            ]
            lines.append(_line([label, *cells, f"{row.get('extra_parameters', 0):,}"]))
        return lines


def read_results(sources, num_prompts: int, parameters: int, adapter: str | Path | None = None) -> Results | None:
    """Read result files for the card of one adapter.

    Args:
        sources (`str`, `Path` or a list of them, *optional*): result files, or folders, which stand for the result files
            among their `*.json`.
        num_prompts, parameters (`int`): of the adapter; tell its own result among those of others.
        adapter (`str`, *optional*): its folder, where it has one: a result of exactly that folder is its own.

    Raises:
        `FileNotFoundError`: for a missing file, or a folder without result files.
        `ValueError`: for a file that is no result, or where no result, or more than one, is the adapter's.
    """
    if sources is None:
        return None
    sources = [sources] if isinstance(sources, str | Path) else list(sources)
    rows = sorted((row for source in sources for row in _read(Path(source))), key=lambda row: _ROLES.index(row["role"]))
    fitting = [
        row
        for row in rows
        if (row.get("method"), row.get("num_prompts"), row.get("extra_parameters")) == ("idp", num_prompts, parameters)
    ]
    same = [row for row in fitting if adapter is not None and _is_same(row.get("adapter"), adapter)]
    chosen = same or fitting
    if len(chosen) != 1:
        labels = ", ".join(f"{row['label']!r}" for row in (chosen or rows)) or "none"
        raise ValueError(
            f"`results` must hold one result of this adapter (IDP, {num_prompts} prompts, {parameters:,} parameters), "
            f"got {len(chosen)}, from {labels}: name its file, and those of the models to compare it with"
        )
    return Results(rows, chosen[0])


def _read(source: Path) -> list[dict]:
    if source.is_dir():
        found = [content for path in sorted(source.glob("*.json")) if (content := _content(path)) is not None]
        if not found:
            raise FileNotFoundError(f"`results`: no result file (*.json written by `evaluate`) in the folder {source}")
        return found
    if not source.is_file():
        raise FileNotFoundError(f"`results`: there is no file or folder {source}")
    content = _content(source)
    if content is None:
        raise ValueError(f"`results`: {source} is no result file written by `evaluate`")
    return [content]


def _content(path: Path) -> dict | None:
    """A result file's content, `None` for any other file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_result = (
        isinstance(content, dict) and {"format", "label", "role"} <= content.keys() and content["role"] in _ROLES
    )
    return content if is_result else None


def _is_same(measured: str | None, adapter: str | Path) -> bool:
    return measured is not None and Path(measured).resolve() == Path(adapter).resolve()


def _dataset(name: str, row: dict) -> tuple[str, str | None]:
    """Identifier and split of a measured text; of a file its name alone."""
    settings = row.get("settings", {})
    split = settings.get("dataset_split")
    is_known = split is not None and name == f"{settings.get('dataset')}:{split}"
    return _plain_name(settings["dataset"] if is_known else name), split if is_known else None


def _plain_name(name: str) -> str:
    return Path(name).name if name.startswith(("/", ".", "~")) or name.count("/") > 1 else name


def _entry(dataset: str, split: str | None, metric: str, title: str, value: float, how: dict) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_split=split,
        metric_type=metric,
        metric_name=title,
        metric_value=round(value, 4),
        metric_args={"measured_by": MEASURED_BY, **how},
    )


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
