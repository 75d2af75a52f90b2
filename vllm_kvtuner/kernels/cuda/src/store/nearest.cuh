// Stores rows as their nearest codes.
//
// A *tile* is what a warp stores at a time: the rows of one KV head and of as many neighbouring tokens as 32 lanes hold,
// so that neighbouring bytes of a chunk are written together. All key tiles stand before all value tiles, and warps take
// them in turn; the numbers of a warp's next tile are on their way while it works on one.
#pragma once

constexpr int MAX_ROWS = 4;  // of a tile

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
template <class CODES, class SHARE>
__device__ __forceinline__ int best_range(const float (&x)[SHARE::COUNT], const Range* ranges, int part, int lane) {
  constexpr int LANES = SHARE::LANES;
  if constexpr (SHARE::COUNT > 8) {
    // Many numbers a lane: other warps fill the waits for the sums, and the loop keeps the code small.
    int best = 0;
    float least = __int_as_float(0x7F800000);
#pragma unroll 1
    for (int step = 0; step < RANGE_STEPS; step++) {
      float error = CODES::squared_error(x, ranges[step]);
#pragma unroll
      for (int distance = LANES / 2; distance; distance >>= 1) error += __shfl_xor_sync(FULL_WARP, error, distance);
      if (error < least) {
        least = error;
        best = step;
      }
    }
    return best;
  } else {
    float errors[RANGE_STEPS];
#pragma unroll
    for (int step = 0; step < RANGE_STEPS; step++) errors[step] = CODES::squared_error(x, ranges[step]);
    const int begin = spread_sums<RANGE_STEPS, LANES / 2>(errors, part);
    constexpr int LEFT = spread_count(RANGE_STEPS, LANES);
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

// Stores the tiles `tile`, `tile + step`, ... below `end`. Returns the first that is not below it.
template <int BITS, int LANES, bool HADAMARD>
__device__ __forceinline__ int store_tiles(const StoreArguments& a, int tile, int step, int end, int key_tiles,
                                           Range (&all_ranges)[MAX_ROWS][RANGE_STEPS], int lane) {
  using CODES = CodeFormat<BITS>;
  using SHARE = RowShare<HEAD_SIZE, CODES, LANES>;
  static_assert(SHARE::ROWS <= MAX_ROWS, "rows");
  constexpr int COUNT = SHARE::COUNT;
  const int group = lane / LANES, part = lane % LANES;
  auto load = [&](Tile<SHARE>& target, int index) {
    const bool key = index < key_tiles;
    const u32 of_side = key ? index : index - key_tiles;
    target.load(a, (int)(of_side / NUM_KV_HEADS) * SHARE::ROWS + group, of_side % NUM_KV_HEADS, key, part);
  };
  if (tile >= end) return tile;
  Tile<SHARE> next;
  load(next, tile);
  for (; tile < end; tile += step) {
    next.keep(a, part);
    float x[COUNT];
#pragma unroll
    for (int run = 0; run < SHARE::RUNS; run++)
      words_to_floats<NUMBERS, SHARE::RUN>(x + run * SHARE::RUN, next.words[run]);
    const int slot = next.slot;
    const u32 head = next.head;
    const bool is_key = next.is_key;
    const int position = next.position;
    if (tile + step < end) load(next, tile + step);

    transform_row<SHARE, HADAMARD>(a, x, head, is_key, position, part);

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
      for (int i = 0; i < RANGE_STEPS; i += LANES)
        if (i + part < RANGE_STEPS) ranges[i + part] = CODES::make_range(low, high, i + part);
      __syncwarp();
      range = ranges[best_range<CODES, SHARE>(x, ranges, part, lane)];
    } else {
      range = CODES::make_range(low, high, 0);
    }

    if (slot < 0) continue;
    const u32 block = (u32)slot / Chunk::TOKENS, place = (u32)slot % Chunk::TOKENS;
    u8* chunk = a.kv_cache + (u64)block * a.block_stride + (u64)head * a.head_stride;
    CODES::template write<SHARE>(chunk + ((is_key ? Chunk::K_CODES : Chunk::V_CODES) + place * SHARE::ROW_BYTES), x,
                                  range, part);
    if (part == 0)
      *(u32*)(chunk + ((is_key ? Chunk::K_META : Chunk::V_META) + place * Chunk::META_ROW)) =
          pack_fp16(range.scale, range.minimum);
  }
  return tile;
}

__device__ __forceinline__ int tiles_of(int num_slots, int lanes) {
  const int rows = 32 / lanes;
  return (num_slots + rows - 1) / rows * NUM_KV_HEADS;
}
