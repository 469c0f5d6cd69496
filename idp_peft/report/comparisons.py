"""Which models are compared with which, and what a comparison says."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from idp_peft.report import choices
from idp_peft.report.bootstrap import Estimate, Means
from idp_peft.report.results import Result
from idp_peft.report.statistics import LEVEL, holm

MEASURED = "as measured"  # the use of a model's prompts that its file reports; the others are in `choices`


@dataclass
class Comparison:
    """`left` minus `right` on one text, one task or the mean over tasks.

    Args:
        place (`str`): name of the text or task, or "mean over tasks".
        kind (`str`): "repair" (recovered against compressed), "method" (IDP against another) or "choice".
        left, right (`str`): labels; of a choice, `right` is another use of the prompts of `left`.
        difference (`Estimate`): its interval is not corrected for the number of comparisons.
        test (`str`): where `p` comes from.
        p, p_holm (`float`, *optional*): before and after Holm's correction over the table.
        verdict (`str`): "better", "worse" or "no difference seen", of `left`, by `p_holm`.
    """

    place: str
    kind: str
    left: str
    right: str
    difference: Estimate
    test: str
    p: float | None
    p_holm: float | None = None
    verdict: str = "no difference seen"

    def as_dict(self) -> dict:
        values = asdict(self)
        values["difference"].pop("p")  # `p` is the test's, which need not be the bootstrap's
        return values


def pairs(results: list[Result], means: Means) -> list[tuple[str, tuple, tuple]]:
    """(kind, left, right) of every comparison wanted; left and right are names of columns, (label, use).

    Every recovered model against the compressed one; IDP against every other recovered one; IDP's free choice against
    its cross-fitted best single prompt and against a random choice. What `means` does not hold is left out.
    """
    compressed = next(r.label for r in results if r.role == "compressed")
    recovered = [r for r in results if r.role == "recovered"]
    idp = [r.label for r in recovered if r.method == "idp"]
    wanted = [("repair", (r.label, MEASURED), (compressed, MEASURED)) for r in recovered]
    done = set()
    for left in idp:
        done.add(left)
        wanted += [("method", (left, MEASURED), (r.label, MEASURED)) for r in recovered if r.label not in done]
    for left in idp:
        wanted += [("choice", (left, MEASURED), (left, use)) for use in (choices.SINGLE, choices.RANDOM)]
    return [(kind, left, right) for kind, left, right in wanted if left in means.points and right in means.points]


def compare(place: str, results: list[Result], means: Means, exact: dict | None = None) -> list[Comparison]:
    """Make the comparisons of one place, not yet corrected.

    Args:
        exact (`dict`, *optional*): (left, right) -> p of an exact test, which then replaces the bootstrap's.
    """
    made = []
    for kind, left, right in pairs(results, means):
        difference = means.difference(left, right)
        p, test = difference.p, "paired bootstrap"
        if exact and (left, right) in exact:
            p, test = exact[left, right], "McNemar, exact"
        other = right[1] if kind == "choice" else right[0]
        made.append(Comparison(place, kind, left[0], other, difference, test, p))
    return made


def correct(family: list[Comparison], higher_is_better: bool) -> list[Comparison]:
    """Correct the p-values of one table's comparisons by Holm's method, in place, and say what each one shows."""
    tested = [comparison for comparison in family if comparison.p is not None]
    for comparison, p in zip(tested, holm([comparison.p for comparison in tested]), strict=True):
        comparison.p_holm = p
        if p < 1 - LEVEL and comparison.difference.value != 0:
            better = (comparison.difference.value > 0) == higher_is_better
            comparison.verdict = "better" if better else "worse"
    return family
