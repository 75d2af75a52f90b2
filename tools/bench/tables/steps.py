"""The step times that a wheel has, from the published results of engines."""

from pathlib import Path

from kvtuner_tools.bench.step_times import StepTimes, group
from kvtuner_tools.model_files import load_model_shape

from .published import Published

PREFIX = "serve_steps_"
"""How names of results begin that have decode steps of one card."""
SHAPES = Path("tools") / "bench" / "shapes"


def measured_steps(published: Published) -> tuple[StepTimes, ...]:
    """One entry for each card and model."""
    found = []
    for name in published.names():
        if not name.startswith(PREFIX):
            continue
        result = published.result(name)
        shape = load_model_shape(str(published.root / SHAPES / result["model"]))
        layers = [shape.layers[index] for index in shape.attention_layers]
        settings = {
            each["label"]: (
                each["stored_bits"],
                tuple((point["batch"], point["context"], point["decode_ms"]) for point in each["points"]),
            )
            for each in result["settings"]
            if each["error"] is None
        }
        found.append(
            StepTimes(
                device=result["device"],
                model=result["model"],
                layers=group((each.num_kv_heads, each.head_size) for each in layers),
                vllm=result["versions"]["vllm"],
                date=result["created"][:10],
                settings=settings,
            )
        )
    return tuple(found)
