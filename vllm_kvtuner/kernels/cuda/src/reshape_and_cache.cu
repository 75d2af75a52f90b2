// Store: transform, quantize, pack and scatter new tokens to their slots, keys and values in one launch, and as they are
// to those of a recent window.
//
// Defined by the build: HEAD_SIZE, K_BITS, V_BITS, BLOCK_SIZE, NUM_KV_HEADS, NUMBERS (type of key and value: FP32, FP16
// or BF16), K_LANES and V_LANES (lanes that share a row), MIN_CTAS, KEY_OFFSET, ROTARY_DIM (0: none), IS_NEOX,
// ROTARY_NUMBERS (type of the rotary table), KEY_EQUALIZATION, KEY_HADAMARD, VALUE_HADAMARD, RANGE_SEARCH, RECENT_BLOCK_SIZE
// (of the recent window, 0: none).
//
// A *tile* is what a warp stores at a time: the rows of one KV head and of as many neighbouring tokens as 32 lanes hold,
// so that neighbouring bytes of a chunk are written together. All key tiles stand before all value tiles, and warps take
// them in turn; the numbers of a warp's next tile are on their way while it works on one.
#include "device.cuh"

constexpr int NUM_WARPS = 4;
constexpr int NUM_STEPS = 11;  // factors 1, 0.95, ..., 0.5 of the range search
constexpr int MAX_ROWS = 4;    // of a tile
constexpr int NUMBER_BYTES = number_bytes(NUMBERS);
constexpr float FP16_MAX = 65504.0f;
constexpr float MAGIC = 8388608.0f;  // 2^23: a float of this size is an integer, in its lowest bits

constexpr int K_ROW = HEAD_SIZE * K_BITS / 8;
constexpr int V_ROW = HEAD_SIZE * V_BITS / 8;
constexpr int V_CODES = BLOCK_SIZE * K_ROW;
constexpr int K_META = V_CODES + BLOCK_SIZE * V_ROW;
constexpr int V_META = K_META + BLOCK_SIZE * 4;

struct Arguments {
  const u8 *key, *value;           // [tokens][KV heads][HEAD_SIZE]
  u8* kv_cache;                    // chunks of PageLayout
  const long long* slot_mapping;   // [slots]
  const long long* positions;      // [slots]
  const float *offset, *partner;   // [KV heads][HEAD_SIZE]
  const u8* cos_sin;               // [positions][ROTARY_DIM]
  const float* equalization;       // [KV heads][HEAD_SIZE]
  u32 key_stride, value_stride;    // bytes from token to token
  u32 block_stride, head_stride;   // bytes
  int num_slots;
  u8* recent;                      // [blocks][KV heads][RECENT_BLOCK_SIZE][2][HEAD_SIZE], a key beside its value
  const long long* recent_slots;   // [slots]
  u32 recent_block_stride, recent_head_stride, recent_place_stride;  // bytes
};

// A possible range of a row.
struct __align__(16) Range {
  float minimum, scale;  // fp16 numbers
  float inverse;         // 1 / scale, or 0 for a scale of 0
  float to_unit;         // inverse / levels
};

// 1 / x as IEEE rounds it for fp16 numbers, and nearly always for others that are far from overflow: one Newton step
// leaves an error of 2^-44, and no reciprocal of 11 bits lies so close to the middle between two floats.
__device__ __forceinline__ float reciprocal(float x) {
  const float first = reciprocal_approx(x);
  return fmaf(fmaf(-x, first, 1.0f), first, first);
}

// x / y from y's reciprocal: the remainder corrects the first quotient.
__device__ __forceinline__ float divide(float x, float y, float inverse) {
  const float first = x * inverse;
  return fmaf(fmaf(-y, first, x), inverse, first);
}

// The lowest x of the lanes that share a row.
template <int LANES>
__device__ __forceinline__ float lowest(float x) {
  if constexpr (LANES == 32) {
    // As integers in the same order: one instruction for the warp.
    int bits = __float_as_int(x);
    bits = __reduce_min_sync(FULL_WARP, bits ^ (bits >> 31 & 0x7FFFFFFF));
    return __int_as_float(bits ^ (bits >> 31 & 0x7FFFFFFF));
  } else {
#pragma unroll
    for (int step = LANES / 2; step; step >>= 1) x = fminf(x, __shfl_xor_sync(FULL_WARP, x, step));
    return x;
  }
}

// The range of a row between low and high, shrunk by factor number `step` about its middle; rounded as pages/codes.py does.
template <int LEVELS>
__device__ __forceinline__ Range make_range(float low, float high, int step) {
  const float stretch = divide((float)(20 - step), 20.0f * LEVELS, 1.0f / (20.0f * LEVELS));
  const float shift = divide((float)step, 40.0f, 1.0f / 40.0f);
  const float range = __fsub_rn(high, low);
  const u16 scale = to_fp16(fminf(__fmul_rn(range, stretch), FP16_MAX));
  const u16 minimum = to_fp16(fminf(fmaxf(__fadd_rn(low, __fmul_rn(range, shift)), -FP16_MAX), FP16_MAX));
  Range result;
  result.minimum = from_fp16(minimum);
  result.scale = from_fp16(scale);
  result.inverse = result.scale > 0.0f ? reciprocal(result.scale) : 0.0f;
  result.to_unit = result.inverse * (1.0f / LEVELS);
  return result;
}

// Squared error of a lane's numbers under a range.
template <int LEVELS, int COUNT>
__device__ __forceinline__ float squared_error(const float (&x)[COUNT], const Range& range) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    const float above = x[i] - range.minimum;
    const float code = fmaf(__saturatef(above * range.to_unit), (float)LEVELS, MAGIC) - MAGIC;
    const float error = fmaf(-range.scale, code, above);
    sum = fmaf(error, error, sum);
  }
  return sum;
}

// Sums each of x over the lanes of a row. Lanes with their highest bit set keep the second half of the sums, and so on:
// the lane's sums are those from `begin` on, in x[0], x[1], ..., where infinity stands for a sum that does not exist.
template <int COUNT, int STEP>
__device__ __forceinline__ int spread_sums(float* x, int part) {
  if constexpr (STEP == 0) {
    return 0;
  } else if constexpr (COUNT == 1) {
    x[0] += __shfl_xor_sync(FULL_WARP, x[0], STEP);
    return spread_sums<1, STEP / 2>(x, part);
  } else {
    constexpr int HALF = (COUNT + 1) / 2;
    const bool second = part & STEP;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
      const float other = i + HALF < COUNT ? x[i + HALF] : __int_as_float(0x7F800000);
      const float sent = second ? x[i] : other, kept = second ? other : x[i];
      x[i] = kept + __shfl_xor_sync(FULL_WARP, sent, STEP);
    }
    return (second ? HALF : 0) + spread_sums<HALF, STEP / 2>(x, part);
  }
}

// Sums that a lane is left with.
__device__ __forceinline__ constexpr int spread_count(int count, int lanes) {
  for (; lanes > 1; lanes /= 2) count = (count + 1) / 2;
  return count;
}

// Which of a row's ranges has the least squared error, the first if several have.
template <class SHARE, int LEVELS>
__device__ __forceinline__ int best_range(const float (&x)[SHARE::COUNT], const Range* ranges, int part, int lane) {
  constexpr int LANES = SHARE::LANES;
  if constexpr (SHARE::COUNT > 8) {
    // Many numbers a lane: other warps fill the waits for the sums, and the loop keeps the code small.
    int best = 0;
    float least = __int_as_float(0x7F800000);
#pragma unroll 1
    for (int step = 0; step < NUM_STEPS; step++) {
      float error = squared_error<LEVELS>(x, ranges[step]);
#pragma unroll
      for (int distance = LANES / 2; distance; distance >>= 1) error += __shfl_xor_sync(FULL_WARP, error, distance);
      if (error < least) {
        least = error;
        best = step;
      }
    }
    return best;
  } else {
    float errors[NUM_STEPS];
#pragma unroll
    for (int step = 0; step < NUM_STEPS; step++) errors[step] = squared_error<LEVELS>(x, ranges[step]);
    const int begin = spread_sums<NUM_STEPS, LANES / 2>(errors, part);
    constexpr int LEFT = spread_count(NUM_STEPS, LANES);
    int best = 0;
    float least = errors[0];
#pragma unroll
    for (int i = 1; i < LEFT; i++) {
      if (errors[i] < least) {
        least = errors[i];
        best = i;
      }
    }
    // Later lanes of the row hold later ranges.
    u32 winners = __ballot_sync(FULL_WARP, least == lowest<LANES>(least));
    winners &= (u32)((1ull << LANES) - 1) << (lane - part);
    // A row that holds NaN has no winner.
    return __shfl_sync(FULL_WARP, winners ? begin + best : 0, winners ? __ffs(winners) - 1 : lane);
  }
}

// 2^23 + code as float bits, codes rounded as pages/codes.py does.
template <int BITS>
__device__ __forceinline__ u32 code_of(float x, const Range& range) {
  constexpr float SIZE = 1 << BITS;
  const float place = fminf(__fmul_rn(__fsub_rn(x, range.minimum), range.inverse), SIZE - 1.0f);
  // floor(place + 1/2): powers of two scale without rounding, and the unit interval ends where codes do.
  return __float_as_uint(__fmaf_rd(__saturatef(fmaf(place, 1.0f / SIZE, 0.5f / SIZE)), SIZE, MAGIC));
}

// Four bytes of four words.
__device__ __forceinline__ u32 join_bytes(u32 a, u32 b, u32 c, u32 d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Packs a lane's codes and writes them to the row's place in its chunk.
template <class SHARE, int BITS>
__device__ __forceinline__ void write_codes(u8* row, const float (&x)[SHARE::COUNT], const Range& range, int part) {
  constexpr int RUN = SHARE::RUN;
#pragma unroll
  for (int run = 0; run < SHARE::BYTE_RUNS; run++) {
    u32 bytes[RUN < 4 ? 4 : RUN] = {};
#pragma unroll
    for (int v = 0; v < RUN; v++) {
#pragma unroll
      for (int field = 0; field < SHARE::FIELDS; field++)
        bytes[v] += code_of<BITS>(x[(field * SHARE::BYTE_RUNS + run) * RUN + v], range) << (field * BITS);
    }
    u32 words[(RUN + 3) / 4];
#pragma unroll
    for (int i = 0; i < (RUN + 3) / 4; i++)
      words[i] = join_bytes(bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]);
    store_bytes<RUN>(row + run * SHARE::STRIDE + part * RUN, words);
  }
}

// A tile's numbers as they stand in memory, and where they go.
template <class SHARE>
struct Tile {
  static constexpr int RUN_BYTES = SHARE::RUN * NUMBER_BYTES;
  u32 words[SHARE::RUNS][(RUN_BYTES + 3) / 4];
  int slot;      // -1: not stored
  int recent_slot;
  int position;  // of a key
  u32 head;
  bool is_key;

  __device__ __forceinline__ void load(const Arguments& a, u32 index, bool key, int group, int part) {
    is_key = key;
    head = index % NUM_KV_HEADS;
    const int token = (int)(index / NUM_KV_HEADS) * SHARE::ROWS + group;
    const int present = min(token, a.num_slots - 1);
    const u8* row = (key ? a.key : a.value) + (u64)(u32)present * (key ? a.key_stride : a.value_stride) +
                    (head * (HEAD_SIZE * NUMBER_BYTES) + part * RUN_BYTES);
#pragma unroll
    for (int run = 0; run < SHARE::RUNS; run++)
      load_bytes<RUN_BYTES>(words[run], row + run * (SHARE::STRIDE * NUMBER_BYTES));
    slot = token < a.num_slots ? (int)a.slot_mapping[present] : -1;
#if RECENT_BLOCK_SIZE
    recent_slot = token < a.num_slots ? (int)a.recent_slots[present] : -1;
#endif
#if KEY_OFFSET
    // The position of a token that is not stored may be anything.
    position = key && slot >= 0 ? (int)a.positions[present] : 0;
#endif
  }

#if RECENT_BLOCK_SIZE
  // The numbers as they are to the window.
  __device__ __forceinline__ void keep(const Arguments& a, int part) const {
    if (recent_slot < 0) return;
    const u32 block = (u32)recent_slot / RECENT_BLOCK_SIZE, place = (u32)recent_slot % RECENT_BLOCK_SIZE;
    u8* row = a.recent + (u64)block * a.recent_block_stride + (u64)head * a.recent_head_stride +
              (u64)place * a.recent_place_stride + ((is_key ? 0 : HEAD_SIZE * NUMBER_BYTES) + part * RUN_BYTES);
#pragma unroll
    for (int run = 0; run < SHARE::RUNS; run++)
      store_bytes<RUN_BYTES>(row + run * (SHARE::STRIDE * NUMBER_BYTES), words[run]);
  }
#endif
};

// Stores the tiles `tile`, `tile + step`, ... below `end`. Returns the first that is not below it.
template <int BITS, int LANES, bool HADAMARD>
__device__ __forceinline__ int store_tiles(const Arguments& a, int tile, int step, int end, int key_tiles,
                                           Range (&all_ranges)[MAX_ROWS][NUM_STEPS], int lane) {
  using SHARE = RowShare<HEAD_SIZE, BITS, LANES>;
  static_assert(SHARE::ROWS <= MAX_ROWS, "rows");
  constexpr int LEVELS = (1 << BITS) - 1, COUNT = SHARE::COUNT;
  const int group = lane / LANES, part = lane % LANES;
  auto load = [&](Tile<SHARE>& target, int index) {
    const bool key = index < key_tiles;
    target.load(a, key ? index : index - key_tiles, key, group, part);
  };
  if (tile >= end) return tile;
  Tile<SHARE> next;
  load(next, tile);
  for (; tile < end; tile += step) {
#if RECENT_BLOCK_SIZE
    next.keep(a, part);
#endif
    float x[COUNT];
#pragma unroll
    for (int run = 0; run < SHARE::RUNS; run++)
      words_to_floats<NUMBERS, SHARE::RUN>(x + run * SHARE::RUN, next.words[run]);
    const int slot = next.slot;
    const u32 head = next.head;
    const bool is_key = next.is_key;
#if KEY_OFFSET
    const int position = next.position;
#endif
    if (tile + step < end) load(next, tile + step);

    if (is_key) {
#if KEY_OFFSET
      move_by_offset<SHARE, false, ROTARY_DIM, IS_NEOX, ROTARY_NUMBERS>(
          x, a.offset + head * HEAD_SIZE, a.partner + head * HEAD_SIZE,
          a.cos_sin + (u64)position * (ROTARY_DIM * number_bytes(ROTARY_NUMBERS)), part);
#endif
#if KEY_EQUALIZATION
#pragma unroll
      for (int run = 0; run < SHARE::RUNS; run++) {
        float factor[SHARE::RUN];
        load_numbers<FP32, SHARE::RUN>(
            factor, a.equalization + head * HEAD_SIZE + run * SHARE::STRIDE + part * SHARE::RUN);
#pragma unroll
        for (int v = 0; v < SHARE::RUN; v++) {
          float& number = x[run * SHARE::RUN + v];
          number = divide(number, factor[v], reciprocal(factor[v]));
        }
      }
#endif
    }
    if (HADAMARD) hadamard_rows<SHARE>(x, part);

    float low = x[0], negative_high = -x[0];
#pragma unroll
    for (int i = 1; i < COUNT; i++) {
      low = fminf(low, x[i]);
      negative_high = fminf(negative_high, -x[i]);
    }
    low = lowest<LANES>(low);
    const float high = -lowest<LANES>(negative_high);
    Range range;
    if (RANGE_SEARCH && BITS < 8) {
      Range* ranges = all_ranges[group];
      __syncwarp();
#pragma unroll
      for (int i = 0; i < NUM_STEPS; i += LANES)
        if (i + part < NUM_STEPS) ranges[i + part] = make_range<LEVELS>(low, high, i + part);
      __syncwarp();
      range = ranges[best_range<SHARE, LEVELS>(x, ranges, part, lane)];
    } else {
      range = make_range<LEVELS>(low, high, 0);
    }

    if (slot < 0) continue;
    const u32 block = (u32)slot / BLOCK_SIZE, place = (u32)slot % BLOCK_SIZE;
    u8* chunk = a.kv_cache + (u64)block * a.block_stride + (u64)head * a.head_stride;
    write_codes<SHARE, BITS>(chunk + ((is_key ? 0 : V_CODES) + place * SHARE::ROW_BYTES), x, range, part);
    if (part == 0) *(u32*)(chunk + ((is_key ? K_META : V_META) + place * 4)) = pack_fp16(range.scale, range.minimum);
  }
  return tile;
}

__device__ __forceinline__ int tiles_of(int num_slots, int lanes) {
  const int rows = 32 / lanes;
  return (num_slots + rows - 1) / rows * NUM_KV_HEADS;
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32, MIN_CTAS)
    reshape_and_cache(const u8* key, const u8* value, u8* kv_cache, const long long* slot_mapping,
                      const long long* positions, const float* offset, const float* partner, const u8* cos_sin,
                      const float* equalization, u32 key_stride, u32 value_stride, u32 block_stride, u32 head_stride,
                      int num_slots, u8* recent, const long long* recent_slots, u32 recent_block_stride,
                      u32 recent_head_stride, u32 recent_place_stride) {
  launch_dependents();
  const Arguments a = {key,          value,        kv_cache,     slot_mapping, positions, offset, partner, cos_sin,
                       equalization, key_stride,   value_stride, block_stride, head_stride, num_slots, recent,
                       recent_slots, recent_block_stride, recent_head_stride, recent_place_stride};
  __shared__ Range ranges[NUM_WARPS][MAX_ROWS][NUM_STEPS];
  const int thread = threadIdx.x, warp = __shfl_sync(FULL_WARP, thread / 32, 0), lane = thread % 32;
  const int key_tiles = tiles_of(num_slots, K_LANES), tiles = key_tiles + tiles_of(num_slots, V_LANES);
  const int step = gridDim.x * NUM_WARPS;
  int tile = blockIdx.x * NUM_WARPS + warp;
  if constexpr (K_BITS == V_BITS && K_LANES == V_LANES && KEY_HADAMARD == VALUE_HADAMARD) {
    store_tiles<K_BITS, K_LANES, KEY_HADAMARD>(a, tile, step, tiles, key_tiles, ranges[warp], lane);
  } else {
    tile = store_tiles<K_BITS, K_LANES, KEY_HADAMARD>(a, tile, step, key_tiles, key_tiles, ranges[warp], lane);
    store_tiles<V_BITS, V_LANES, VALUE_HADAMARD>(a, tile, step, tiles, key_tiles, ranges[warp], lane);
  }
}
