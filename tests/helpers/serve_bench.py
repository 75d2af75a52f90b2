"""Made-up measurements of an engine of ``kvtuner bench serve``."""

ENGINE = {"startup_s": 70.0, "kv_tokens": 1000, "block_size": 16}
POINT = {
    "batch": 64,
    "context": 1024,
    "prefill_s": 1.5,
    "warm_s": 0.1,
    "decode_ms": 7.654,
    "decode_tok_s": 8361.6,
}


def lines(engine: dict, *points: dict) -> list[dict]:
    """What an engine writes while it is measured."""
    return [{"engine": engine}, *({"points": point} for point in points)]
