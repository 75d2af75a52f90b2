"""The stages that go from one table to the next, and what each stage took: nothing here needs torch or vLLM."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvtuner_tools.calibration.artifacts import SensitivityTable, digest, read_artifact
from kvtuner_tools.calibration.cluster import cluster, write_clusters
from kvtuner_tools.calibration.options import GROUPS, STAGES, CalibrationOptions
from kvtuner_tools.calibration.prune import prune, read_candidates, write_candidates
from kvtuner_tools.results import write_json
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS

TABLE_STAGES = ("prune", "cluster")
SENSITIVITY_FILE = "sensitivity.json"
"""Name of the errors' table in a calibration's output folder."""
CANDIDATES_FILE = "candidates.json"
CLUSTERS_FILE = "clusters.json"
COSTS_FILE = "costs.json"
COSTS_SCHEMA = "kvtuner-costs/1"


class TableStages:
    """Those stages on one output folder.

    Args:
        out: the folder; made if it does not exist.
        options: what is asked for.
    """

    def __init__(self, out: Path, options: CalibrationOptions) -> None:
        self.out = out
        self.options = options
        out.mkdir(parents=True, exist_ok=True)

    def run(self, stage: str) -> str:
        """Run a stage, by its name.

        Returns:
            What came of it and what it took, in a line.

        Raises:
            ValueError: a stage before it has not been run, or its input is wrong.
        """
        started = time.monotonic()
        message = getattr(self, stage)()
        seconds = time.monotonic() - started
        self._add_cost(stage, seconds)
        return f"{stage}: {message} ({seconds:.1f} s)"

    def prune(self) -> str:
        table = SensitivityTable.read(self.out / SENSITIVITY_FILE)
        options = self.options
        candidates = prune(table, unquantized=options.unquantized_layers, keep_all=options.keep_all_pairs)
        write_candidates(self.out / CANDIDATES_FILE, candidates)
        counts = [len(layer.pairs) for layer in candidates]
        return f"{min(counts)} to {max(counts)} of {len(QUANTIZED_PAIRS)} pairs per layer"

    def cluster(self) -> str:
        clusters = cluster(read_candidates(self.out / CANDIDATES_FILE), self.options.cluster_factor)
        write_clusters(self.out / CLUSTERS_FILE, clusters)
        return f"{len(clusters)} clusters of {sum(len(each.layers) for each in clusters)} layers"

    def _add_cost(self, stage: str, seconds: float) -> None:
        """Add to what earlier runs with the same options took."""
        options = asdict(self.options)
        names = [name for each in STAGES[: STAGES.index(stage) + 1] for name in GROUPS[each] if name != "trials"]
        words = {name: list(each) for name, each in self.options.engine.items()}
        inputs = digest({"model": self.options.model, "engine": words, **{name: options[name] for name in names}})
        costs = read_costs(self.out)
        before = costs.get(stage, {})
        total = seconds + (before["seconds"] if before.get("inputs") == inputs else 0.0)
        costs[stage] = {"inputs": inputs, "seconds": round(total, 2)}
        write_json(self.out / COSTS_FILE, {"schema": COSTS_SCHEMA, "stages": costs})


def read_costs(out: Path) -> dict[str, dict[str, Any]]:
    """Stage -> its inputs' digest and the seconds it took; empty where nothing has run.

    Raises:
        ValueError: a file of another schema.
    """
    path = out / COSTS_FILE
    return read_artifact(path, COSTS_SCHEMA, ("stages",))["stages"] if path.exists() else {}
