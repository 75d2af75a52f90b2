"""Which requests of a batch the decode kernel serves, and which are prefilled."""

from types import SimpleNamespace

import pytest
import torch

from vllm_kvtuner.attention.backend import KVTunerMetadataBuilder

REQUESTS = ((50, 1), (48, 3), (64, 16), (0, 5), (32, 200))
"""Tokens of context and of the query: a decode, what the prefix cache left of two prompts, a prompt, a chunk."""


def build(window=None, attend_cached_prefill=False, speculative=None, requests=REQUESTS, causal=True, pictures=None):
    implementation = SimpleNamespace(
        sliding_window=None,
        recent_window=None if window is None else SimpleNamespace(window=SimpleNamespace(tokens=window, sink_tokens=0)),
        attend_cached_prefill=attend_cached_prefill,
        prefill_workspace_tokens=4096,
        shards=None,
    )
    config = SimpleNamespace(
        speculative_config=speculative and SimpleNamespace(num_speculative_tokens=speculative, parallel_drafting=False),
        use_v2_model_runner=True,
        compilation_config=SimpleNamespace(static_forward_context={"layer": SimpleNamespace(impl=implementation)}),
    )
    builder = KVTunerMetadataBuilder(SimpleNamespace(block_size=16), ["layer"], config, torch.device("cpu"))
    queries = [query for _, query in requests]
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    lens = torch.tensor([context + query for context, query in requests]).int()
    common = SimpleNamespace(
        max_query_len=max(queries), num_reqs=len(requests), num_actual_tokens=int(starts[-1]), query_start_loc=starts,
        query_start_loc_cpu=starts, seq_lens=lens, seq_lens_cpu_upper_bound=lens, block_table_tensor=None,
        positions=None, causal=causal, mm_req_doc_ranges=pictures,
    )  # fmt: skip
    return builder.build(0, common)


@pytest.mark.parametrize("window", [None, 16, 64])
def test_short_prefills_are_decoded(window):
    metadata = build(window)
    assert (metadata.num_decodes, metadata.num_decode_tokens, metadata.max_decode_query_len) == (3, 20, 16)
    assert (metadata.prefill.first_token, metadata.prefill.num_tokens) == (20, 205)


@pytest.mark.parametrize("options", [{"window": 15}, {"attend_cached_prefill": True}], ids=str)
def test_short_prefills_are_prefilled(options):
    """Where a window does not keep all of their tokens, or prefill reads back what it stored."""
    metadata = build(**options)
    assert (metadata.num_decodes, metadata.num_decode_tokens, metadata.max_decode_query_len) == (1, 1, 1)
    assert (metadata.prefill.first_token, metadata.prefill.num_tokens) == (1, 224)


@pytest.mark.parametrize("query_len", [2, 7, 16])
def test_kernels_are_asked_for_what_was_compiled(query_len):
    """However long a batch's short prefills and verifications are: else Triton would compile under a request."""
    assert build(requests=[(50, 1), (48, query_len)]).max_decode_query_len == 16
    assert build(requests=[(50, 1), (48, 1)]).max_decode_query_len == 1
    assert build(requests=[(50, 1), (0, query_len)]).max_decode_query_len == 1, "a prompt without context is prefilled"


@pytest.mark.parametrize("speculative", [2, 4, 15])
def test_verifications_are_asked_for_what_was_compiled(speculative):
    assert build(requests=[(50, 1), (48, 3)], speculative=speculative).max_decode_query_len == speculative + 1
    assert build(requests=[(50, 1), (48, 1)], speculative=speculative).max_decode_query_len == 1


def test_short_prefills_are_decoded_beside_verifications():
    metadata = build(speculative=4)
    assert (metadata.num_decodes, metadata.num_decode_tokens, metadata.max_decode_query_len) == (3, 20, 16)


def test_pictures_are_prefilled_however_few_their_tokens_are():
    """The decode kernel is causal."""
    metadata = build(pictures={2: [(60, 75)]})
    assert (metadata.num_decodes, metadata.prefill.first_token) == (1, 1)
    assert [tuple(run) for run in metadata.mm_prefix_range.runs] == [(2, 4, 15)]
    assert build(pictures={2: [(10, 20)]}).num_decodes == 3, "one that is cached asks for nothing"


@pytest.mark.parametrize("causal", [False, torch.tensor([True, False])], ids=["all", "some requests"])
def test_attention_that_is_not_causal_is_an_error(causal):
    """Whatever asked for it: pages would be attended to causally, and nobody would know."""
    with pytest.raises(ValueError, match="must be causal"):
        build(causal=causal)
