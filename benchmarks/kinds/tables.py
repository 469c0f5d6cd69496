"""The tables of a result file of `benchmarks.kinds`."""

from __future__ import annotations

import numpy as np

from benchmarks.common.markdown import head, row


def tables(result: dict) -> str:
    """Nats per token by prompt and kind; and how much of the damage each use of the prompts repairs."""
    kinds, of_block = result["kinds"], np.array(result["block_kinds"])
    by_prompt = np.array(result["by_prompt"])  # [blocks, prompts]
    nats = {name: np.array(values) for name, values in result["nats"].items()}
    every = [*kinds, *result["unseen"]]
    lines = ["Nats per token on held-out blocks, prompt by kind:", "", *head(["prompt trained on", *every])]
    for prompt, name in enumerate(kinds):
        values = [by_prompt[of_block == kind, prompt].mean() for kind in every]
        lines.append(row([name, *(f"{value:.3f}" for value in values)]))
    for name, values in nats.items():
        lines.append(row([name, *(f"{values[of_block == kind].mean():.3f}" for kind in every)]))
    lines += ["", "What each use of the prompts repairs, and how often it takes the prompt of the text's kind:", ""]
    lines += _uses(result, by_prompt, nats, np.isin(of_block, kinds))
    if result["unseen"]:
        lines += ["", f"The same on kinds that no prompt was trained on ({', '.join(result['unseen'])}):", ""]
        lines += _uses(result, by_prompt, nats, np.isin(of_block, result["unseen"]))
    return "\n".join([*lines, ""])


def _uses(result: dict, by_prompt: np.ndarray, nats: dict[str, np.ndarray], rows: np.ndarray) -> list[str]:
    """One line per use of the prompts, on some of the blocks."""
    kinds, of_block = result["kinds"], np.array(result["block_kinds"])[rows]
    own = np.array([kinds.index(kind) if kind in kinds else -1 for kind in of_block])
    by_prompt, nats = by_prompt[rows], {name: values[rows] for name, values in nats.items()}
    lines = head(["use", "right", "damage repaired", "blocks made worse"])
    damage = (nats["compressed"] - nats["dense"]).mean()

    def use(name: str, values: np.ndarray, prompts: np.ndarray | None = None) -> None:
        right = "" if prompts is None or (own < 0).any() else f"{100 * (prompts == own).mean():.1f} %"
        repaired = (nats["compressed"] - values).mean() / damage
        worse = (values > nats["compressed"]).mean()
        lines.append(row([name, right, f"{100 * repaired:.1f} %", f"{100 * worse:.1f} %"]))

    def choice(name: str, prompts: np.ndarray) -> None:
        use(name, by_prompt[np.arange(len(by_prompt)), prompts], prompts)

    if (own >= 0).all():
        choice("the kind's own prompt", own)
    choice("best prompt of each block (oracle)", by_prompt.argmin(1))
    for selection, prompts in result["choices"].items():
        choice(f'selection="{selection}"', np.array(prompts)[rows])
    best = int(by_prompt.mean(0).argmin())
    choice(f"one prompt for all: {kinds[best]}", np.full(len(own), best))
    use("a random prompt", by_prompt.mean(1))
    for name, values in nats.items():
        if name not in ("dense", "compressed"):
            use(f"{name}, trained on all kinds", values)
    return lines
