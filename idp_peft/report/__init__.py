"""A report from result files alone: what compression cost, what each method brought back, and how sure that is."""

from idp_peft.report.numbers import Analysis, analyse
from idp_peft.report.results import Result, read_results
from idp_peft.report.write import write_report

__all__ = ["Analysis", "Result", "analyse", "read_results", "write_report"]
