// Gather: dequantize a slice of each request's cached tokens back to model space, keys and values in one launch.
//
// Defined by the build: HEAD_SIZE, K_BITS, V_BITS, BLOCK_SIZE, NUM_KV_HEADS, NUMBERS (type of the output: FP32, FP16 or
// BF16), K_LANES and V_LANES (lanes that share a row), MIN_CTAS, KEY_OFFSET, ROTARY_DIM (0: none), IS_NEOX,
// ROTARY_NUMBERS (type of the rotary table), KEY_EQUALIZATION, KEY_HADAMARD, VALUE_HADAMARD.
//
// A warp takes the keys or the values of TILE_TOKENS neighbouring tokens of one KV head: one token a lane while it finds
// their places, then as many rows at a time as 32 lanes hold, the codes of all of them on their way from the start.
#include "device.cuh"

constexpr int NUM_WARPS = 4;
constexpr int TILE_TOKENS = 16;
constexpr int NUMBER_BYTES = number_bytes(NUMBERS);
constexpr float MAGIC = 8388608.0f;  // 2^23: a float of this size holds an integer in its lowest bits

constexpr int K_ROW = HEAD_SIZE * K_BITS / 8;
constexpr int V_ROW = HEAD_SIZE * V_BITS / 8;
constexpr int V_CODES = BLOCK_SIZE * K_ROW;
constexpr int K_META = V_CODES + BLOCK_SIZE * V_ROW;
constexpr int V_META = K_META + BLOCK_SIZE * 4;

struct Arguments {
  const u8* kv_cache;              // chunks of PageLayout
  const int* block_table;          // [requests][blocks]
  const int* cu_seq_lens;          // [requests + 1]
  const int* seq_starts;           // [requests]
  u8 *key, *value;                 // [tokens][KV heads][HEAD_SIZE]
  const float *offset, *partner;   // [KV heads][HEAD_SIZE]
  const u8* cos_sin;               // [positions][ROTARY_DIM]
  const float* equalization;       // [KV heads][HEAD_SIZE]
  u32 block_stride, head_stride;   // bytes
  u32 table_stride;                // numbers
  u32 key_stride, value_stride;    // bytes from token to token
  int num_tokens, num_reqs;
};

// Where a token of the output is cached.
struct Place {
  int position;
  u64 page;  // of its block, bytes from the cache's start

  __device__ __forceinline__ Place(const Arguments& a, int token) {
    // Its request is the first whose slice ends beyond it.
    int request = 0, last = a.num_reqs - 1;
    while (request < last) {
      const int middle = (request + last) / 2;
      if (a.cu_seq_lens[middle + 1] > token)
        last = middle;
      else
        request = middle + 1;
    }
    position = token - a.cu_seq_lens[request] + a.seq_starts[request];
    const int* table = a.block_table + (u64)(u32)request * a.table_stride;
    page = (u64)(u32)table[(u32)position / BLOCK_SIZE] * a.block_stride;
  }
};

// Codes of a row as whole floats, from the bytes that a lane holds.
template <class SHARE, int BITS>
__device__ __forceinline__ void unpack_codes(float (&x)[SHARE::COUNT],
                                             const u32 (&words)[SHARE::BYTE_RUNS][(SHARE::RUN + 3) / 4]) {
  constexpr u32 MASK = 0x01010101u * ((1 << BITS) - 1);
#pragma unroll
  for (int field = 0; field < SHARE::FIELDS; field++) {
#pragma unroll
    for (int run = 0; run < SHARE::BYTE_RUNS; run++) {
#pragma unroll
      for (int v = 0; v < SHARE::RUN; v++) {
        const u32 codes = words[run][v / 4] >> (field * BITS) & MASK;
        x[(field * SHARE::BYTE_RUNS + run) * SHARE::RUN + v] =
            __uint_as_float(__byte_perm(codes, __float_as_uint(MAGIC), 0x7650 + v % 4)) - MAGIC;
      }
    }
  }
}

// The tile of keys or of values with number `index`.
template <int BITS, int LANES, bool HADAMARD>
__device__ __forceinline__ void gather_tile(const Arguments& a, u32 index, bool is_key, int lane) {
  using SHARE = RowShare<HEAD_SIZE, BITS, LANES>;
  constexpr int RUN = SHARE::RUN, COUNT = SHARE::COUNT, TURNS = TILE_TOKENS / SHARE::ROWS;
  const int group = lane / LANES, part = lane % LANES;
  const u32 head = index % NUM_KV_HEADS;
  const int first = (int)(index / NUM_KV_HEADS) * TILE_TOKENS;
  const Place place(a, min(first + lane % TILE_TOKENS, a.num_tokens - 1));
  const u8* cached = a.kv_cache + (u64)head * a.head_stride;

  u32 words[TURNS][SHARE::BYTE_RUNS][(RUN + 3) / 4], meta[TURNS];
  int position[TURNS];
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    const int row = turn * SHARE::ROWS + group;
    position[turn] = __shfl_sync(FULL_WARP, place.position, row);
    const u8* chunk = cached + __shfl_sync(FULL_WARP, place.page, row);
    const u32 slot = (u32)position[turn] % BLOCK_SIZE;
#pragma unroll
    for (int run = 0; run < SHARE::BYTE_RUNS; run++)
      load_bytes<RUN>(words[turn][run], chunk + ((is_key ? 0 : V_CODES) + slot * SHARE::ROW_BYTES +
                                                 run * SHARE::STRIDE + part * RUN));
    meta[turn] = __ldg((const u32*)(chunk + ((is_key ? K_META : V_META) + slot * 4)));
  }
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    float x[COUNT];
    unpack_codes<SHARE, BITS>(x, words[turn]);
    const float2 range = unpack_fp16(meta[turn]);  // scale and minimum
    if (HADAMARD) {
      // Of the codes, whose sums are exact. All numbers of a block but its first get nothing of the minimum.
      constexpr int BLOCK = HEAD_SIZE & -HEAD_SIZE;
      hadamard_rows<SHARE>(x, part);
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        const int dim = i / RUN * SHARE::STRIDE + part * RUN + i % RUN;
        x[i] = fmaf(x[i], range.x, dim % BLOCK == 0 ? range.y * (BLOCK * inverse_root(BLOCK)) : 0.0f);
      }
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; i++) x[i] = fmaf(x[i], range.x, range.y);
    }
    if (is_key) {
#if KEY_EQUALIZATION
#pragma unroll
      for (int run = 0; run < SHARE::RUNS; run++) {
        float factor[RUN];
        load_numbers<FP32, RUN>(factor, a.equalization + head * HEAD_SIZE + run * SHARE::STRIDE + part * RUN);
#pragma unroll
        for (int v = 0; v < RUN; v++) x[run * RUN + v] *= factor[v];
      }
#endif
#if KEY_OFFSET
      move_by_offset<SHARE, true, ROTARY_DIM, IS_NEOX, ROTARY_NUMBERS>(
          x, a.offset + head * HEAD_SIZE, a.partner + head * HEAD_SIZE,
          a.cos_sin + (u64)(u32)position[turn] * (ROTARY_DIM * number_bytes(ROTARY_NUMBERS)), part);
#endif
    }
    const int token = first + turn * SHARE::ROWS + group;
    if (token >= a.num_tokens) continue;
    u8* row = (is_key ? a.key : a.value) + (u64)(u32)token * (is_key ? a.key_stride : a.value_stride) +
              (head * (HEAD_SIZE * NUMBER_BYTES) + part * (RUN * NUMBER_BYTES));
#pragma unroll
    for (int run = 0; run < SHARE::RUNS; run++) {
      u32 numbers[(RUN * NUMBER_BYTES + 3) / 4];
      floats_to_words<NUMBERS, RUN>(numbers, x + run * RUN);
      store_bytes<RUN * NUMBER_BYTES>(row + run * (SHARE::STRIDE * NUMBER_BYTES), numbers);
    }
  }
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32, MIN_CTAS)
    gather_cache(const u8* kv_cache, const int* block_table, const int* cu_seq_lens, const int* seq_starts, u8* key,
                 u8* value, const float* offset, const float* partner, const u8* cos_sin, const float* equalization,
                 u32 block_stride, u32 head_stride, u32 table_stride, u32 key_stride, u32 value_stride, int num_tokens,
                 int num_reqs) {
  launch_dependents();
  const Arguments a = {kv_cache,     block_table,  cu_seq_lens,  seq_starts, key,          value,
                       offset,       partner,      cos_sin,      equalization, block_stride, head_stride,
                       table_stride, key_stride,   value_stride, num_tokens, num_reqs};
  const int thread = threadIdx.x, warp = __shfl_sync(FULL_WARP, thread / 32, 0), lane = thread % 32;
  // Key and value tiles take turns, so that both parts of a chunk are read at about the same time.
  const u32 tiles = (u32)(num_tokens + TILE_TOKENS - 1) / TILE_TOKENS * NUM_KV_HEADS;
  const u32 tile = blockIdx.x / 2 * NUM_WARPS + warp;
  const bool is_key = blockIdx.x % 2 == 0;
  if (tile >= tiles) return;
  if constexpr (K_BITS == V_BITS && K_LANES == V_LANES && KEY_HADAMARD == VALUE_HADAMARD) {
    gather_tile<K_BITS, K_LANES, KEY_HADAMARD>(a, tile, is_key, lane);
  } else if (is_key) {
    gather_tile<K_BITS, K_LANES, KEY_HADAMARD>(a, tile, true, lane);
  } else {
    gather_tile<V_BITS, V_LANES, VALUE_HADAMARD>(a, tile, false, lane);
  }
}
