"""The selection report as pandas tables."""

from __future__ import annotations

import numpy as np

from idp_peft.files.error_reason import missing


def _pandas():
    try:
        import pandas
    except ImportError as error:
        raise missing("the report's tables need pandas: pip install 'idp-peft[analysis]'", error) from error
    return pandas


def prompt_table(report):
    """One row per prompt; see [`SelectionReport.to_dataframe`]."""
    margins, prompts = report.margins, range(report.num_prompts)
    chosen_by = [report.prompt_ids == prompt for prompt in prompts]
    nothing = [np.nan] * report.num_prompts
    return _pandas().DataFrame(
        {
            "prompt": list(prompts),
            "name": [f"prompt {prompt}" if report.names is None else report.names[prompt] for prompt in prompts],
            "count": report.counts,
            "share": report.shares,
            "margin": nothing
            if margins is None
            else [margins[rows].mean() if rows.any() else np.nan for rows in chosen_by],
            "score": nothing if report.scores is None else report.scores.mean(0),
            "oracle_count": nothing if report.nats is None else report.confusion.sum(0),
            "loss": nothing if report.nats is None else report.nats.sum(0) / report.tokens.sum(),
        }
    )


def example_table(report):
    """One row per example; see [`SelectionReport.examples`]."""
    pandas, count = _pandas(), len(report.prompt_ids)
    nothing = [np.nan] * count
    loss = oracle_loss = nothing
    if report.nats is not None:
        per_token = report.nats / np.where(report.tokens > 0, report.tokens, np.nan)[:, None]  # [N, M]
        loss, oracle_loss = per_token[np.arange(count), report.prompt_ids], per_token.min(1)
    oracle = None if report.nats is None else [None if best < 0 else int(best) for best in report.oracle_ids]
    return pandas.DataFrame(
        {
            "example": range(count),
            "prompt": report.prompt_ids,
            "margin": nothing if report.margins is None else report.margins,
            "oracle": pandas.array([None] * count if oracle is None else oracle, dtype="Int64"),
            "group": [None] * count if report.groups is None else report.groups,
            "loss": loss,
            "oracle_loss": oracle_loss,
        }
    )


def group_table(report):
    """Groups by prompts; see [`SelectionReport.group_table`].

    Raises:
        `ValueError`: for a report without groups.
    """
    if report.groups is None:
        raise ValueError("the report has no groups: give `group`, a column or one value per example")
    names = [f"prompt {p}" if report.names is None else report.names[p] for p in range(report.num_prompts)]
    return _pandas().DataFrame(report.group_counts, index=report.group_names, columns=names)
