"""One measurement of a model: never made twice."""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks.common.cells import Cells

FORMAT = 1


def cell(cells: Cells, name: str, settings: dict, measure: Callable[[], dict]) -> dict:
    """The content of a cell, from its file or by measuring it now.

    Args:
        cells (`Cells`): the model's.
        name (`str`): the cell's.
        settings (`dict`): what decides the result.
        measure (`Callable`): makes the rest of the content; not called where the cell is there.

    Raises:
        `ValueError`: where the cell holds a result of other settings.
    """
    content = cells.read().get(name)
    if content is not None:
        if content["settings"] != settings:
            raise ValueError(
                f"{name} of {cells.path} holds a result of other settings, {content['settings']} and not {settings}: remove "
                "it, or give another --results"
            )
        return content
    wall, processor = time.perf_counter(), time.process_time()
    content = {"format": FORMAT, "settings": settings, **measure()}
    # On a machine that is shared, the time on the processor is the one that means something.
    content["seconds"] = round(time.perf_counter() - wall, 1)
    content["processor_seconds"] = round(time.process_time() - processor, 1)
    cells.add(name, content)
    return content
