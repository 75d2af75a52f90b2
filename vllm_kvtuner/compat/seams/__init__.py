"""Every place where we rely on what vLLM may change in any version: patched names, private ones, and methods that we
override though they are no interface for plugins. tests/compat checks each against the installed vLLM.

Where a version is added, entries that differ get ``since`` and ``before``; those before the oldest served one can go.
"""

from vllm_kvtuner.compat.inspection import Seam
from vllm_kvtuner.compat.seams import blocks, connectors, context_parallel, layers, reports, settings, windows, workers

_CONCERNS = (settings, layers, context_parallel, workers, blocks, windows, connectors, reports)

SEAMS: tuple[Seam, ...] = tuple(seam for concern in _CONCERNS for seam in concern.SEAMS)


def seams_of(version: str) -> list[Seam]:
    """Those of a vLLM version."""
    return [seam for seam in SEAMS if seam.is_in(version)]


def broken_seams(version: str) -> list[str]:
    """What the installed vLLM of that version lacks, each problem in one line."""
    return [problem for seam in seams_of(version) if (problem := seam.problem())]
