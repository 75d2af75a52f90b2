"""What vLLM takes from NIXL's bindings."""

from dataclasses import dataclass


@dataclass
class nixlXferTelemetry:
    """Of one transfer: microseconds, bytes and descriptors."""

    xferDuration: float
    postDuration: float
    totalBytes: int
    descCount: int
