"""The selection report: what was chosen, from the numbers of every example."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from idp_peft.analysis.clusters import Cluster
from idp_peft.analysis.information import chance_information, entropy, joint_counts, mutual_information
from idp_peft.report.choices import ORACLE, RANDOM, SAME_ITEMS, SINGLE, other_uses

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_USES = {"random": RANDOM, "single": SINGLE, "single_optimistic": SAME_ITEMS, "oracle": ORACLE}


@dataclass(frozen=True, repr=False)
class SelectionReport:
    """The choices of N examples among M prompts. `print` it, or take it apart.

    Args:
        prompt_ids (`np.ndarray`): int64 `[N]`, the prompt that each example chose.
        num_prompts (`int`): M.
        names (`list[str]`, *optional*): M names of the prompts (`config.prompt_names`).
        selection (`str`): the rule, `config.selection`.
        assignment (`str`): how training examples get their prompt, `config.assignment`.
        scores (`np.ndarray`, *optional*): float32 `[N, M]`, what the choice is the argmax of; `None` where nothing is
            compared (one prompt, or `selection` `"random"` or `"fixed"`).
        nats (`np.ndarray`, *optional*): float64 `[N, M]`, negative log-likelihood summed over an example's labels with
            each prompt forced; `None` without `oracle=True`.
        tokens (`np.ndarray`, *optional*): int64 `[N]`, how many labels were scored; `None` without `oracle=True`.
        groups (`list`, *optional*): N values of the group.
        reads_labels (`int`): examples whose choice reads tokens that are to be predicted, because no context stands
            before them: their loss under free choice is better than it would be in use.
        clusters (`list[Cluster]`, *optional*): of each of M prompts, the most telling tokens of what chose it, and the examples
            nearest to its centroid; `None` unless `selection` is `"centroid"`.
    """

    prompt_ids: np.ndarray
    num_prompts: int
    names: list[str] | None = None
    selection: str = "attention"
    assignment: str = "selected"
    scores: np.ndarray | None = None
    nats: np.ndarray | None = None
    tokens: np.ndarray | None = None
    groups: list | None = None
    reads_labels: int = 0
    clusters: list[Cluster] | None = None

    # ------------------------------------------------------------------ how often

    @property
    def counts(self) -> np.ndarray:
        """int64 `[M]`: how many examples chose each prompt."""
        return np.bincount(self.prompt_ids, minlength=self.num_prompts)

    @property
    def shares(self) -> np.ndarray:
        """float64 `[M]`, from 0 to 1: `counts / N`."""
        return self.counts / len(self.prompt_ids)

    @property
    def entropy(self) -> float:
        """Entropy of the choice in nats: 0 (always the same prompt) to log M (all alike)."""
        return entropy(self.counts)

    @property
    def normalized_entropy(self) -> float:
        """`entropy / log M`, from 0 to 1; 0 for a single prompt."""
        return self.entropy / np.log(self.num_prompts) if self.num_prompts > 1 else 0.0

    @property
    def never_chosen(self) -> list[int]:
        """Prompts that no example chose."""
        return np.flatnonzero(self.counts == 0).tolist()

    # ------------------------------------------------------------------ how clearly

    @property
    def margins(self) -> np.ndarray | None:
        """float32 `[N]`: the winner's score minus the runner-up's, at least 0; `None` without scores."""
        if self.scores is None:
            return None
        best = np.partition(self.scores, -2, axis=1)[:, -2:]
        return best[:, 1] - best[:, 0]

    @property
    def margin_quantiles(self) -> dict[float, float] | None:
        """Quantiles 5, 25, 50, 75 and 95 % of the margins; `None` without scores."""
        margins = self.margins
        return None if margins is None else {q: float(np.quantile(margins, q)) for q in _QUANTILES}

    # ------------------------------------------------------------------ how well

    @property
    def oracle_ids(self) -> np.ndarray | None:
        """int64 `[N]`: the prompt with the lowest loss on the example's labels; -1 where it has none to score."""
        return None if self.nats is None else np.where(self.tokens > 0, self.nats.argmin(1), -1)

    @property
    def oracle_agreement(self) -> float | None:
        """Share of the scored examples that chose their oracle prompt."""
        return None if self.nats is None else float((self.prompt_ids == self.oracle_ids)[self.tokens > 0].mean())

    @property
    def chance_agreement(self) -> float | None:
        """The agreement that choices with these counts would have if they had nothing to do with the oracle's."""
        if self.nats is None:
            return None
        confusion = self.confusion
        return float((confusion.sum(0) * confusion.sum(1)).sum() / confusion.sum() ** 2)

    @property
    def confusion(self) -> np.ndarray | None:
        """int64 `[M, M]`: scored examples by chosen prompt (rows) and oracle prompt (columns)."""
        if self.nats is None:
            return None
        scored = self.tokens > 0
        return joint_counts(self.prompt_ids[scored], self.oracle_ids[scored], (self.num_prompts, self.num_prompts))

    @property
    def mean_losses(self) -> dict[str, float] | None:
        """Loss in nats per scored token, where every token weighs the same, under uses of the same prompts.

        `free`: the model's choice. `random`: any prompt, in expectation. `single`: one prompt for all, picked on one half
        of the examples and scored on the other. `single_optimistic`: the same, picked on the examples themselves.
        `oracle`: each example's best, a bound that no honest choice reaches. `None` without `oracle=True`.
        """
        if self.nats is None:
            return None
        scored = self.tokens > 0
        nats, chosen = self.nats[scored], self.prompt_ids[scored]
        uses = other_uses(nats, is_text=True, seed=0)
        summed = {"free": nats[np.arange(len(nats)), chosen]}
        summed |= {name: uses[use] for name, use in _USES.items() if use in uses}
        return {name: float(values.sum() / self.tokens.sum()) for name, values in summed.items()}

    # ------------------------------------------------------------------ by group

    @property
    def group_names(self) -> list | None:
        """The groups, in the order in which they first occur."""
        return None if self.groups is None else list(dict.fromkeys(self.groups))

    @property
    def group_counts(self) -> np.ndarray | None:
        """int64 `[groups, M]`: how many examples of each group chose each prompt."""
        return None if self.groups is None else joint_counts(*self._pairs())

    @property
    def group_information(self) -> float | None:
        """Mutual information of group and prompt in nats: 0 where the group says nothing about the prompt, at most the
        entropy of either."""
        return None if self.groups is None else mutual_information(self.group_counts)

    @property
    def chance_group_information(self) -> float | None:
        """What `group_information` is on average when the groups are shuffled."""
        return None if self.groups is None else chance_information(*self._pairs())

    def _pairs(self) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        number = {name: index for index, name in enumerate(self.group_names)}
        rows = np.array([number[group] for group in self.groups])
        return rows, self.prompt_ids, (len(number), self.num_prompts)

    # ------------------------------------------------------------------ for people, tables and logs

    def label(self, prompt: int) -> str:
        """What to call a prompt: its name, or its number."""
        return str(prompt) if self.names is None else self.names[prompt]

    @property
    def warning(self) -> str | None:
        """What to do about prompts that no example chose; `None` where there is nothing to say."""
        from idp_peft.analysis.text import never_chosen_text

        return never_chosen_text(self)

    @property
    def summary(self) -> str:
        """One line, for logs."""
        from idp_peft.analysis.text import summary_text

        return summary_text(self)

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """Plain numbers for a logger, `None`s left out.

        `{prefix}_prompt_share_{i}`, `_selection_entropy` (nats), `_selection_entropy_normalized`, `_selection_margin` (mean);
        with the oracle `_oracle_agreement`, `_oracle_gain` and `_random_gain`: nats per token that the oracle gains over
        the free choice, and the free choice over a random one.
        """
        numbers = {f"prompt_share_{prompt}": share for prompt, share in enumerate(self.shares)}
        numbers |= {"selection_entropy": self.entropy, "selection_entropy_normalized": self.normalized_entropy}
        if (margins := self.margins) is not None:
            numbers["selection_margin"] = margins.mean(dtype=np.float64)
        if (losses := self.mean_losses) is not None:
            numbers["oracle_agreement"] = self.oracle_agreement
            numbers["oracle_gain"] = losses["free"] - losses["oracle"]
            numbers["random_gain"] = losses["random"] - losses["free"]
        return {f"{prefix}_{name}": float(value) for name, value in numbers.items()}

    def to_dataframe(self):
        """`pandas.DataFrame`, one row per prompt: `prompt`, `name`, `count`, `share`, `margin` (mean over the examples that
        chose it), `score` (mean over all), `oracle_count` and `loss` (nats per token, forced on all examples)."""
        from idp_peft.analysis.tables import prompt_table

        return prompt_table(self)

    def examples(self):
        """`pandas.DataFrame`, one row per example: `example`, `prompt`, `margin`, `oracle`, `group`, `loss` and `oracle_loss`
        (nats per token); empty where not measured."""
        from idp_peft.analysis.tables import example_table

        return example_table(self)

    def group_table(self):
        """`pandas.DataFrame`: how many examples of each group (rows) chose each prompt (columns)."""
        from idp_peft.analysis.tables import group_table

        return group_table(self)

    def plot(self):
        """`matplotlib.figure.Figure`: shares with counts, margins, and where measured the oracle's choices and the groups.

        Drawn without pyplot: no window opens, and the caller's figures and backend are left alone. A notebook shows it.
        """
        from idp_peft.analysis.figure import draw

        return draw(self)

    def __str__(self) -> str:
        from idp_peft.analysis.text import report_text

        return report_text(self)

    def __repr__(self) -> str:
        return f"SelectionReport({self.summary})"
