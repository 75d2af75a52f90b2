"""Decode cases of ``bench kernel`` results, whatever schema they were written with."""

from collections.abc import Mapping
from typing import Any

from kvtuner_tools.bench.points import LayerHeads, QueryTokens


def query_tokens_of(entry: Mapping[str, Any]) -> str:
    """Query tokens of a case's requests; schemas before 4 have one number for all cases, and none in failed ones."""
    return str(entry.get("query_tokens", 1))


def rows_of(entry: Mapping[str, Any]) -> int:
    """Query rows that a KV head has at most: query heads of its group times query tokens of a request."""
    return LayerHeads.parse(entry["shape"]).group * QueryTokens.parse(query_tokens_of(entry)).most
