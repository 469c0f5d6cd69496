"""From result files to a report: a page, a Markdown table and the statistics behind both."""

from __future__ import annotations

import json
from pathlib import Path

from idp_peft.files.whole_file import write_whole
from idp_peft.report.markdown import markdown
from idp_peft.report.numbers import analyse, as_json
from idp_peft.report.page import page
from idp_peft.report.plots import figures
from idp_peft.report.results import read_results


def write_report(results: list[str | Path], output_dir: str | Path, seed: int = 0) -> Path:
    """Write `report.html`, `report.md` and `statistics.json` from result files alone.

    Nothing is written unless all of it could be made, and each file appears whole or not at all. The same files and seed
    give the same bytes.

    Args:
        results (`list[str | Path]`): result files of `evaluate`, or folders with such files. One must be of the compressed
            model; with one of the dense model, recovery is computed.
        output_dir (`str | Path`): made if it does not exist; earlier reports in it are replaced.
        seed (`int`, defaults to `0`): of the bootstrap, at least 0.

    Returns:
        `Path`: of `report.html`.

    Raises:
        `FileNotFoundError`, `ValueError`: for result files that are missing, broken, or do not fit together; one line.
        `ImportError`: without matplotlib.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` must be an integer of at least 0, got {seed!r}")
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"`output_dir` must be a folder, got the file {output_dir}")
    analysis = analyse(read_results(results), seed)
    files = {
        "statistics.json": json.dumps(as_json(analysis.statistics), indent=1, allow_nan=False) + "\n",
        "report.md": markdown(analysis.statistics),
        "report.html": page(analysis, figures(analysis)),
    }
    for name, text in files.items():
        write_whole(output_dir / name, text)
    return output_dir / "report.html"
