"""The tables of a result file of `benchmarks.kinds`."""

from __future__ import annotations

import numpy as np

from benchmarks.common.markdown import head, row


def tables(result: dict) -> str:
    """Nats per token by prompt and kind; and how much of the damage each use of the prompts repairs."""
    kinds, of_block = result["kinds"], np.array(result["block_kinds"])
    by_prompt = np.array(result["by_prompt"])  # [blocks, prompts]
    nats = {name: np.array(values) for name, values in result["nats"].items()}
    lines = ["Nats per token on held-out blocks, prompt by kind:", "", *head(["prompt trained on", *kinds])]
    for prompt, name in enumerate(kinds):
        values = [by_prompt[of_block == kind, prompt].mean() for kind in kinds]
        lines.append(row([name, *(f"{value:.3f}" for value in values)]))
    for name, values in nats.items():
        lines.append(row([name, *(f"{values[of_block == kind].mean():.3f}" for kind in kinds)]))
    own = np.array([kinds.index(kind) for kind in of_block])
    lines += ["", "What each use of the prompts repairs, and how often it takes the prompt of the text's kind:", ""]
    lines += head(["use", "right", "damage repaired"])
    damage = (nats["compressed"] - nats["dense"]).mean()

    def use(name: str, values: np.ndarray, right: float | None = None) -> None:
        said = "" if right is None else f"{100 * right:.1f} %"
        lines.append(row([name, said, f"{100 * (nats['compressed'] - values).mean() / damage:.1f} %"]))

    def chosen(prompts: np.ndarray) -> np.ndarray:
        return by_prompt[np.arange(len(by_prompt)), prompts]

    use("the kind's own prompt", chosen(own), 1.0)
    use("best prompt of each block (oracle)", by_prompt.min(1))
    for selection, prompts in result["choices"].items():
        prompts = np.array(prompts)
        use(f'selection="{selection}"', chosen(prompts), float((prompts == own).mean()))
    best = int(by_prompt.mean(0).argmin())
    use(f"one prompt for all: {kinds[best]}", by_prompt[:, best], float((own == best).mean()))
    use("a random prompt", by_prompt.mean(1), 1 / len(kinds))
    for name, values in nats.items():
        if name not in ("dense", "compressed"):
            use(f"{name}, trained on all kinds", values)
    return "\n".join([*lines, ""])
