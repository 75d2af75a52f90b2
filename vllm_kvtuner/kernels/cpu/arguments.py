"""What the compiled operations are told: structures that the host fills, and their C text, from one list each."""

import ctypes

from vllm_kvtuner.kernels.arguments import Arguments, Field

CACHE = Arguments(
    Field("void*", "data", "of block 0, KV head 0"),
    Field("i64", "block_stride", "bytes from a block to the next"),
    Field("i64", "head_stride", "bytes from a KV head to the next"),
    Field("i64", "token_stride", "bytes from a token to the next; of plain rows alone"),
    Field("int", "block_size", "tokens of a block"),
    Field("int", "type", "of plain rows"),
    Field("int", "k_bits", "of a key's code; PLAIN for rows as they are, each key beside its value"),
    Field("int", "v_bits", "of a value's"),
    Field("int", "k_codes", "bytes from a chunk's start, as the others"),
    Field("int", "v_codes", ""),
    Field("int", "k_meta", ""),
    Field("int", "v_meta", ""),
)
TRANSFORMS = Arguments(
    Field("const float*", "offset", "[num_kv_heads, D], or null"),
    Field("const float*", "table", "[positions, rotary_dim], cosines before sines"),
    Field("const float*", "equalization", "[num_kv_heads, D], or null"),
    Field("int", "rotary_dim", "0 where nothing is rotated"),
    Field("int", "is_neox", "pairs (i, i + rotary_dim / 2), else (2 i, 2 i + 1)"),
    Field("int", "key_hadamard", ""),
    Field("int", "value_hadamard", ""),
)
ROUNDING = Arguments(
    Field(
        "const float*", "ranges", "[num_ranges, 2], factors on maximum - minimum: the step, what the minimum moves by"
    ),
    Field("const float*", "columns", "[num_kv_heads, D, D], row j has what errors of j count before it; null: nearest"),
    Field("const float*", "weights", "[num_kv_heads, D], of the distance to a code"),
    Field("int", "num_ranges", ""),
    Field("int", "bits", "of a code"),
    Field("int", "levels", "the largest code"),
)
LAYER = Arguments(
    Field("Cache", "cache", "", CACHE.structure),
    Field("Transforms", "transforms", "", TRANSFORMS.structure),
    Field("Rounding", "key", "", ROUNDING.structure),
    Field("Rounding", "value", "", ROUNDING.structure),
)
STORE = Arguments(
    Field("const Layer*", "layer", ""),
    Field("Cache", "window", "of plain rows", CACHE.structure),
    Field("const void*", "key", "[tokens, num_kv_heads, D]"),
    Field("const void*", "value", "likewise"),
    Field("i64", "key_stride", "numbers from a token to the next"),
    Field("i64", "value_stride", ""),
    Field("const i64*", "slots", "[num_slots], -1 for none"),
    Field("const i64*", "positions", "[num_slots], needed with a key offset"),
    Field("const i64*", "window_slots", "[num_slots], null without a window"),
    Field("int", "type", "of keys and values, and of the window"),
    Field("int", "num_slots", ""),
    Field("int", "num_kv_heads", ""),
    Field("int", "threads", ""),
)
GATHER = Arguments(
    Field("const Layer*", "layer", ""),
    Field("const int*", "block_table", "[num_reqs, table_stride]"),
    Field("const int*", "cu_seq_lens", "[num_reqs + 1]"),
    Field("const int*", "seq_starts", "[num_reqs]"),
    Field("void*", "key_out", "[tokens, num_kv_heads, D]"),
    Field("void*", "value_out", ""),
    Field("i64", "table_stride", ""),
    Field("i64", "key_stride", ""),
    Field("i64", "value_stride", ""),
    Field("int", "type", "of the outputs"),
    Field("int", "num_reqs", ""),
    Field("int", "num_tokens", ""),
    Field("int", "num_kv_heads", ""),
    Field("int", "threads", ""),
)
ATTEND = Arguments(
    Field("const Layer*", "layer", ""),
    Field("const void*", "query", "[num_tokens, num_heads, D]"),
    Field("void*", "output", "likewise"),
    Field("float*", "lse", "[num_heads, lse_stride], or null"),
    Field("const float*", "sinks", "[num_heads], a logit more in every softmax, or null"),
    Field("const int*", "block_table", "[num_reqs, table_stride]"),
    Field("const int*", "seq_lens", "[num_reqs]"),
    Field("const int*", "query_start_loc", "[num_reqs + 1]"),
    Field("i64", "query_stride", "numbers from a token to the next"),
    Field("i64", "output_stride", ""),
    Field("i64", "lse_stride", ""),
    Field("i64", "table_stride", ""),
    Field("int", "type", "of queries"),
    Field("int", "output_type", ""),
    Field("int", "num_reqs", ""),
    Field("int", "num_tokens", "rows of output; those beyond the last query become 0"),
    Field("int", "num_heads", ""),
    Field("int", "num_kv_heads", ""),
    Field("int", "sliding_window", "0 for none"),
    Field("int", "skip_newest", ""),
    Field("int", "skip_first", ""),
    Field("int", "in_window", "attend to what the span skips, and merge with what output and lse hold"),
    Field("int", "threads", ""),
    Field("float", "scale", ""),
    Field("float", "soft_cap", "0 for none"),
)

DECLARATIONS = "\n".join(
    arguments.members(name)
    for name, arguments in (
        ("Cache", CACHE),
        ("Transforms", TRANSFORMS),
        ("Rounding", ROUNDING),
        ("Layer", LAYER),
        ("Store", STORE),
        ("Gather", GATHER),
        ("Attend", ATTEND),
    )
)
"""Their C text, which comes behind the numbers' types."""


def declare(library: ctypes.CDLL) -> None:
    """Say what the functions of a compiled library take."""
    for name, arguments in (("store", STORE), ("gather", GATHER), ("attend", ATTEND)):
        function = getattr(library, f"kvtuner_{name}")
        function.argtypes = [ctypes.POINTER(arguments.structure)]
        function.restype = None
