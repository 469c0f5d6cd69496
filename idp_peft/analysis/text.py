"""The selection report in words."""

from __future__ import annotations

import numpy as np

_SHOWN = 16  # prompts and groups that are listed one by one


def never_chosen_text(report) -> str | None:
    """Which prompts no example chose, and what to do; `None` where all were, or where that says nothing: a fixed choice,
    or fewer examples than prompts."""
    missing, examples = report.never_chosen, len(report.prompt_ids)
    if not missing or report.selection == "fixed" or examples < report.num_prompts:
        return None
    which = ", ".join(str(p) if report.names is None else f"{p} ({report.names[p]!r})" for p in missing)
    said = f"{len(missing)} of {report.num_prompts} prompts were never chosen in {examples} examples: {which}. "
    if report.selection == "random":
        return said + "With selection='random' that is chance: measure on more examples."
    used = report.num_prompts - len(missing)
    if report.selection == "centroid":
        return (
            f"{said}These examples hold nothing of the kinds that these prompts are for. Where the training data should, "
            "set the centroids by it (`idp_peft.fit_centroids`), or name the kinds (`prompt_ids`)."
        )
    if report.assignment == "selected":
        advice = (
            f"With assignment='selected', a prompt that is not chosen does not learn either: train with fewer prompts "
            f"(num_prompts={used}), or with assignment='uniform', which trains all of them"
        )
    else:
        advice = (
            f"assignment={report.assignment!r} trains them, but attention prefers others: use fewer prompts "
            f"(num_prompts={used}), or assignment='selected', which trains those that are chosen"
        )
    return f"{said}{advice}. Whether the chosen ones are the best, `selection_report(..., oracle=True)` says."


def summary_text(report) -> str:
    counts = report.counts
    top = int(counts.argmax())
    parts = [
        f"{len(report.prompt_ids)} examples",
        f"{report.num_prompts - len(report.never_chosen)} of {report.num_prompts} prompts chosen",
        f"most often {_name(report, top)} ({100 * report.shares[top]:.0f} %)",
        f"entropy {report.entropy:.3f} nats ({100 * report.normalized_entropy:.0f} % of log M)",
    ]
    if (margins := report.margins) is not None:
        parts.append(f"margin {margins.mean():.3g}")
    if report.nats is not None:
        parts.append(f"agrees with the oracle {100 * report.oracle_agreement:.0f} %")
    return ", ".join(parts)


def report_text(report) -> str:
    """Several lines, at most about a hundred characters wide."""
    lines = [f"Selection of {len(report.prompt_ids)} examples among {report.num_prompts} prompts ({report.selection})"]
    lines += _prompt_lines(report)
    lines.append(
        f"entropy         {report.entropy:.3f} nats, {100 * report.normalized_entropy:.0f} % of log M (100 %: all alike)"
    )
    lines += _margin_line(report) + _oracle_lines(report) + _group_lines(report) + _cluster_lines(report)
    if (warning := report.warning) is not None:
        lines.append(f"Warning: {warning}")
    return "\n".join(lines)


def _name(report, prompt: int) -> str:
    return f"prompt {prompt}" + ("" if report.names is None else f" ({report.names[prompt]!r})")


def _prompt_lines(report) -> list[str]:
    counts, margins, confusion = report.counts, report.margins, report.confusion
    order = sorted(range(report.num_prompts), key=lambda prompt: (-counts[prompt], prompt))
    listed = range(report.num_prompts) if report.num_prompts <= _SHOWN else order[:_SHOWN]
    labels = {prompt: _name(report, prompt) for prompt in listed}
    width = max(14, *map(len, labels.values()))
    lines = [f"{'':{width}}  chosen   share"]
    lines[0] += f"  {'margin':>8}" if margins is not None else ""
    lines[0] += f"  {'best for':>9}" if confusion is not None else ""
    for prompt, label in labels.items():
        line = f"{label:{width}}  {counts[prompt]:6d}  {100 * report.shares[prompt]:3.0f} %"
        if margins is not None:
            chosen = margins[report.prompt_ids == prompt]
            line += f"  {chosen.mean():8.3g}" if len(chosen) else f"  {'-':>8}"
        if confusion is not None:
            line += f"  {confusion[:, prompt].sum():9d}"
        lines.append(line)
    if report.num_prompts > _SHOWN:
        rest = order[_SHOWN:]
        lines.append(f"... and {len(rest)} more with {counts[rest].sum()} examples")
    return lines


def _margin_line(report) -> list[str]:
    if (margins := report.margins) is None:
        return []
    quantiles = report.margin_quantiles
    share = ""
    if report.selection == "attention":  # a cosine may be negative, so a share of it says nothing
        shares = margins / np.maximum(report.scores.max(1), np.finfo(np.float32).tiny)
        share = f" ({100 * float(shares.mean()):.1f} % of the winner's score)"
    return [
        f"margin          mean {margins.mean():.3g}{share}, median {quantiles[0.5]:.3g}, "
        f"5 to 95 %: {quantiles[0.05]:.3g} to {quantiles[0.95]:.3g}"
    ]


def _oracle_lines(report) -> list[str]:
    if (losses := report.mean_losses) is None:
        return []
    names = {"free": "free choice", "random": "random", "single": "best single", "oracle": "oracle"}
    said = ", ".join(f"{name} {losses[use]:.4f}" for use, name in names.items() if use in losses)
    lines = [
        f"oracle          the choice is the best prompt for {100 * report.oracle_agreement:.0f} % "
        f"(by chance: {100 * report.chance_agreement:.0f} %)",
        f"nats per token  {said}",
    ]
    if report.reads_labels:
        lines.append(
            f"Note: {report.reads_labels} choices read tokens that are scored: no context stands before their labels."
        )
    return lines


def _group_lines(report) -> list[str]:
    if report.groups is None:
        return []
    lines = [
        f"groups          {report.group_information:.3f} nats of information about the prompt "
        f"(shuffled: {report.chance_group_information:.3f})"
    ]
    names, table = report.group_names, report.group_counts
    for group, row in list(zip(names, table, strict=True))[:_SHOWN]:
        top = np.argsort(-row, kind="stable")[:3]
        said = ", ".join(f"{_name(report, int(p))} {100 * row[p] / row.sum():.0f} %" for p in top if row[p])
        lines.append(f"  {group!s:13} {said} ({row.sum()} examples)")
    if len(names) > _SHOWN:
        lines.append(f"  ... and {len(names) - _SHOWN} more groups")
    return lines


def _cluster_lines(report) -> list[str]:
    if report.clusters is None:
        return []
    lines = ["most telling tokens of what chose a prompt, and the examples nearest to its centroid:"]
    for prompt, cluster in list(enumerate(report.clusters))[:_SHOWN]:
        if cluster.examples:
            tokens = " ".join(repr(token) for token in cluster.tokens[:6])
            examples = ", ".join(map(str, cluster.examples[:3]))
            lines.append(f"  {_name(report, prompt):13} {tokens} (examples {examples})")
    return lines
