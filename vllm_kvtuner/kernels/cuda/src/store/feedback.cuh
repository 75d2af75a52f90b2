// Stores rows with round feedback (pages/feedback.py): channels are rounded from the last to the first, each to the code
// nearest to what it is plus what it takes up of the errors of those behind it.
//
// A *group* is FEEDBACK_ROWS neighbouring tokens of one KV head, keys or values, which a CTA stores at a time. All its
// warps transform the rows. Then a warp for each range that is tried has a row in each lane: 16 channels in a row one
// after the other, from coefficients that all lanes share, then what their errors are to the next 16 by matrix
// instructions. What the errors further behind are to those is summed up before the lanes begin.
//
// Rounding counts in units of 2^BITS steps above the row's minimum, so that codes end where the unit interval does.
#pragma once

constexpr int BLOCK = 16;  // channels between matrix instructions
constexpr int BLOCKS = HEAD_SIZE / BLOCK;
constexpr int TRIANGLE = 144, WEIGHTS = BLOCK;  // floats of a block: coefficients within it, see triangle_at; weights
constexpr int BLOCK_FLOATS = TRIANGLE + WEIGHTS;
constexpr int FRAGMENT_BYTES = 512;  // coefficients of 16 channels on 16 others, as the lanes of matrix instructions take them
constexpr int FRAGMENTS = BLOCKS * (BLOCKS - 1) / 2;
// Larger heads leave no room for them beside the rows.
constexpr bool FRAGMENTS_IN_SHARED = HEAD_SIZE <= 128;
static_assert(HEAD_SIZE % 32 == 0 && (FEEDBACK_ROWS == 16 || FEEDBACK_ROWS == 32), "groups of whole matrices");

// What a side's rounding is made of, in global memory.
struct FeedbackTables {
  const float* ranges;     // [RANGES][2], factors on maximum - minimum: of the step, and of what the minimum moves by
  const float* triangles;  // [KV heads][BLOCKS][BLOCK_FLOATS]
  const u8* fragments;     // [KV heads][FRAGMENTS][FRAGMENT_BYTES]
};

// Where the coefficients stand with which channel `channel` of a block adds to those before it: the last channel's first,
// each channel's filled up to a multiple of 4. Without a loop, which compilers leave where they should count.
__device__ __forceinline__ constexpr int triangle_at(int channel) {
  return TRIANGLE - 4 * (channel / 4 + 1) * (channel / 4 * 2 + channel % 4);
}
static_assert(triangle_at(BLOCK - 1) == 0 && triangle_at(BLOCK - 2) == 16 && triangle_at(0) == TRIANGLE, "triangle");

// Where the coefficients of block `behind` on block `block` before it stand.
__device__ __forceinline__ int fragment_at(int block, int behind) {
  return (behind * (behind - 1) / 2 + block) * FRAGMENT_BYTES;
}

// Shared memory of a CTA. Rows are padded so that the lanes' accesses 16 bytes wide meet different banks.
template <int RANGES>
struct FeedbackMemory {
  static constexpr int ROW = HEAD_SIZE + 4;                   // floats
  static constexpr int ERROR_ROW = 2 * HEAD_SIZE + 16;        // bytes
  static constexpr int CODE_ROW = HEAD_SIZE + 16;             // bytes, a code in each
  static constexpr int SUM_ROW = BLOCK + 4;                   // floats
  static constexpr int COPIES = RANGES * FEEDBACK_ROWS;
  static constexpr int TRIANGLES_AT = 0;
  static constexpr int FRAGMENTS_AT = TRIANGLES_AT + BLOCKS * BLOCK_FLOATS * 4;
  static constexpr int ROWS_AT = FRAGMENTS_AT + (FRAGMENTS_IN_SHARED ? FRAGMENTS * FRAGMENT_BYTES : 0);
  static constexpr int ERRORS_AT = ROWS_AT + FEEDBACK_ROWS * ROW * 4;
  static constexpr int CODES_AT = ERRORS_AT + COPIES * ERROR_ROW;
  static constexpr int SUMS_AT = CODES_AT + COPIES * CODE_ROW;
  static constexpr int COSTS_AT = SUMS_AT + COPIES * SUM_ROW * 4;
  static constexpr int BOUNDS_AT = COSTS_AT + COPIES * 4;     // float2, minimum and maximum of each row
  static constexpr int SLOTS_AT = BOUNDS_AT + FEEDBACK_ROWS * 8;
  static constexpr int BYTES = SLOTS_AT + FEEDBACK_ROWS * 4;
};

// Rounds the row of each lane in one range; lanes from FEEDBACK_ROWS on repeat others' rows.
//   rows, errors, codes, sums: of the group, the last three of this range; see FeedbackMemory.
//   Returns e^T M e where WITH_COST, in units of the row.
template <int BITS, bool WITH_COST, class MEMORY>
__device__ __forceinline__ float round_rows(const float* rows, u8* errors, u8* codes, float* sums,
                                            const float* triangles, const u8* fragments, const Range& range, int lane) {
  constexpr float SIZE = 1 << BITS, UNIT = 1.0f / SIZE;
  // Half a step, and so much more that what comes to the middle between two codes is the upper one, as in pages/feedback.py.
  constexpr float MIDDLE = 0.5f * UNIT + 0x1p-23f;
  constexpr int TILES = FEEDBACK_ROWS / 16;
  const int row = lane % FEEDBACK_ROWS, g = lane / 4, t = lane % 4;
  // Rows of scale 0 have code 0 alone, and their errors are what they are above the minimum.
  const bool any = range.scale > 0.0f;
  const float to_unit = (any ? range.inverse : 1.0f) * UNIT;
  const float size = any ? SIZE * (1.0f - 0x1p-24f) : 0.0f;  // so that the end of the unit interval has the last code
  rows += row * MEMORY::ROW;
  u8* own_errors = errors + row * MEMORY::ERROR_ROW;
  // Row i % 16 of a matrix of 16 x 16 errors, its first or last 8 columns.
  const u8* error_rows = errors + lane % 16 * MEMORY::ERROR_ROW + lane / 16 * 16;
  float cost = 0.0f;
  float ahead[TILES][2][4] = {};  // of the next block: what errors behind the block at hand are to it

  auto fragment = [&](int block, int behind) {
    const uint4* words = (const uint4*)(fragments + fragment_at(block, behind)) + lane;
    return FRAGMENTS_IN_SHARED ? *words : __ldg(words);
  };
  auto load_errors = [&](u32 (&a)[TILES][4], int behind) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
      load_matrices(a[tile], error_rows + tile * 16 * MEMORY::ERROR_ROW + behind * (2 * BLOCK));
  };
  auto multiply_errors = [&](const u32 (&a)[TILES][4], const uint4& b) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      mma_fp16(ahead[tile][0], a[tile][0], a[tile][1], a[tile][2], a[tile][3], b.x, b.y);
      mma_fp16(ahead[tile][1], a[tile][0], a[tile][1], a[tile][2], a[tile][3], b.z, b.w);
    }
  };

#pragma unroll 1
  for (int block = BLOCKS - 1; block >= 0; block--) {
    if (block < BLOCKS - 1) {
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float* pair = sums + (tile * 16 + i / 2 * 8 + g) * MEMORY::SUM_ROW + i % 2 * 8 + 2 * t;
          *(float2*)pair = make_float2(ahead[tile][i % 2][i / 2 * 2], ahead[tile][i % 2][i / 2 * 2 + 1]);
          ahead[tile][i % 2][i / 2 * 2] = ahead[tile][i % 2][i / 2 * 2 + 1] = 0.0f;
        }
      }
      __syncwarp();
    }
    // Two at a time, so that loads wait for one another less.
    uint4 next;
    if (block > 0) {
      next = fragment(block - 1, block);
#pragma unroll 1
      for (int behind = BLOCKS - 1; behind > block; behind -= 2) {
        const bool two = behind - 1 > block;
        u32 a[2][TILES][4];
        const uint4 b0 = fragment(block - 1, behind), b1 = fragment(block - 1, behind - two);
        load_errors(a[0], behind);
        load_errors(a[1], behind - two);
        multiply_errors(a[0], b0);
        if (two) multiply_errors(a[1], b1);
      }
    }
    float exact[BLOCK], aim[BLOCK];
#pragma unroll
    for (int i = 0; i < BLOCK; i += 4) {
      const float4 four = *(const float4*)(rows + block * BLOCK + i);
      const float numbers[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        exact[i + j] = __fmul_rn(__fsub_rn(numbers[j], range.minimum), to_unit);
        aim[i + j] = exact[i + j] + MIDDLE;
      }
    }
    if (block < BLOCKS - 1) {
#pragma unroll
      for (int i = 0; i < BLOCK; i += 4) {
        const float4 four = *(const float4*)(sums + row * MEMORY::SUM_ROW + i);
        aim[i] += four.x, aim[i + 1] += four.y, aim[i + 2] += four.z, aim[i + 3] += four.w;
      }
    }

    const float* triangle = triangles + block * BLOCK_FLOATS;
    u32 bits[BLOCK];
    float error[BLOCK];
    float place = __saturatef(aim[BLOCK - 1]);
#pragma unroll
    for (int i = BLOCK - 1; i >= 0; i--) {
      const float shifted = __fmaf_rd(place, size, MAGIC);
      bits[i] = __float_as_uint(shifted);
      const float code = shifted - MAGIC;
      error[i] = fmaf(code, -UNIT, exact[i]);
#pragma unroll
      for (int j = BLOCK - 4; j >= 0; j -= 4) {
        if (j >= i) continue;
        const float4 four = *(const float4*)(triangle + triangle_at(i) + j);
        const float coefficient[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int v = 3; v >= 0; v--) {
          if (j + v >= i) continue;
          // The next channel's place on its own, since all that follows waits for it.
          if (j + v == i - 1) place = __saturatef(fmaf(coefficient[v], error[i], aim[j + v]));
          aim[j + v] = fmaf(coefficient[v], error[i], aim[j + v]);
        }
      }
      if constexpr (WITH_COST) {
        const float apart = fmaf(code, -UNIT, aim[i]) - MIDDLE;
        cost = fmaf(triangle[TRIANGLE + i] * apart, apart, cost);
      }
    }
    u32 words[4], halves[8];
#pragma unroll
    for (int i = 0; i < 4; i++)
      words[i] = __byte_perm(__byte_perm(bits[4 * i], bits[4 * i + 1], 0x0040),
                             __byte_perm(bits[4 * i + 2], bits[4 * i + 3], 0x0040), 0x5410);
    store_bytes<16>(codes + row * MEMORY::CODE_ROW + block * BLOCK, words);
    if (block == 0) break;
#pragma unroll
    for (int i = 0; i < 8; i++) halves[i] = pack_fp16(error[2 * i], error[2 * i + 1]);
    store_bytes<32>(own_errors + block * (2 * BLOCK), halves);
    __syncwarp();
    u32 a[TILES][4];
    load_errors(a, block);
    multiply_errors(a, next);
  }
  const float unit = any ? range.scale * SIZE : SIZE;
  return cost * unit * unit;
}

// Stores the groups from `group` to `end` - 1 of one side, ordered by KV heads.
template <bool IS_KEY, int BITS, int RANGES, bool HADAMARD>
__device__ __forceinline__ void store_groups(const StoreArguments& a, const FeedbackTables& tables, int group, int end,
                                             int groups_of_head, u8* memory) {
  using CODES = CodeFormat<BITS>;
  using MEMORY = FeedbackMemory<RANGES>;
  using SHARE = RowShare<HEAD_SIZE, CodeFormat<8>, NUM_WARPS * 32 / FEEDBACK_ROWS>;  // plain runs of numbers
  static_assert(RANGES <= NUM_WARPS, "a warp rounds in one range");
  constexpr int LANES = SHARE::LANES, FIELDS = CODES::FIELDS;
  constexpr int ROW_BYTES = HEAD_SIZE * BITS / 8, ROW_PARTS = ROW_BYTES / 8;
  float* triangles = (float*)(memory + MEMORY::TRIANGLES_AT);
  float* rows = (float*)(memory + MEMORY::ROWS_AT);
  float* costs = (float*)(memory + MEMORY::COSTS_AT);
  float2* bounds = (float2*)(memory + MEMORY::BOUNDS_AT);
  int* slots = (int*)(memory + MEMORY::SLOTS_AT);
  const int thread = threadIdx.x, warp = __shfl_sync(FULL_WARP, thread / 32, 0), lane = thread % 32;
  const int row = thread / LANES, part = thread % LANES;
  // CTAs of a multiprocessor start warps in the same order, so each rounds with other ones.
  int turn = warp + blockIdx.x / multiprocessors();
  int loaded = -1;  // head whose coefficients are here
  for (; group < end; group++, turn++) {
    const int head = group / groups_of_head, first = group % groups_of_head * FEEDBACK_ROWS;
#if FROM_WINDOW
    // A CUDA graph's batch is filled up by tokens without a slot, of which whole groups may consist. All warps see it.
    const bool present = lane < FEEDBACK_ROWS && first + lane < a.num_slots && a.slot_mapping[first + lane] >= 0;
    if (!__any_sync(FULL_WARP, present)) continue;
#endif
    if (head != loaded) {
      // Nobody rounds any more: the last group was written behind a barrier.
      const u8* source = (const u8*)(tables.triangles + (u64)(u32)head * (BLOCKS * BLOCK_FLOATS));
      for (int i = thread * 16; i < BLOCKS * BLOCK_FLOATS * 4; i += NUM_WARPS * 32 * 16)
        copy_16(shared_address(memory + MEMORY::TRIANGLES_AT) + i, source + i);
      if constexpr (FRAGMENTS_IN_SHARED) {
        source = tables.fragments + (u64)(u32)head * (FRAGMENTS * FRAGMENT_BYTES);
        for (int i = thread * 16; i < FRAGMENTS * FRAGMENT_BYTES; i += NUM_WARPS * 32 * 16)
          copy_16(shared_address(memory + MEMORY::FRAGMENTS_AT) + i, source + i);
      }
      loaded = head;
    }
    {
      Tile<SHARE> tile;
      tile.load(a, first + row, head, IS_KEY, part);
      tile.keep(a, part);
      float x[SHARE::COUNT];
#pragma unroll
      for (int run = 0; run < SHARE::RUNS; run++)
        words_to_floats<NUMBERS, SHARE::RUN>(x + run * SHARE::RUN, tile.words[run]);
      transform_row<SHARE, HADAMARD>(a, x, head, IS_KEY, tile.position, part);
      float low = FP16_MAX, negative_high = FP16_MAX;
      bool nan = false;
#pragma unroll
      for (int i = 0; i < SHARE::COUNT; i++) {
        nan |= x[i] != x[i];
        x[i] = fminf(fmaxf(x[i], -FP16_MAX), FP16_MAX);
        low = fminf(low, x[i]);
        negative_high = fminf(negative_high, -x[i]);
      }
      low = lowest<LANES>(low);
      const float high = -lowest<LANES>(negative_high);
      const u32 with_nan = __ballot_sync(FULL_WARP, nan) >> (lane - part) & ((1u << LANES) - 1);
#pragma unroll
      for (int run = 0; run < SHARE::RUNS; run++) {
        float* numbers = rows + row * MEMORY::ROW + run * SHARE::STRIDE + part * SHARE::RUN;
        u32 words[SHARE::RUN];
        floats_to_words<FP32, SHARE::RUN>(words, x + run * SHARE::RUN);
        store_bytes<SHARE::RUN * 4>(numbers, words);
      }
      if (part == 0) {
        bounds[row] = make_float2(with_nan ? __int_as_float(0x7FC00000) : low, high);
        slots[row] = tile.slot;
      }
    }
    copies_wait_all();
    __syncthreads();
    const int number = turn % NUM_WARPS;
    if (number < RANGES) {
      const float2 bound = bounds[lane % FEEDBACK_ROWS];
      const float stretch = __ldg(tables.ranges + 2 * number), shift = __ldg(tables.ranges + 2 * number + 1);
      const Range range = CODES::make_range(bound.x, bound.y, stretch, shift);
      const u8* fragments = FRAGMENTS_IN_SHARED
                                ? memory + MEMORY::FRAGMENTS_AT
                                : tables.fragments + (u64)(u32)head * (FRAGMENTS * FRAGMENT_BYTES);
      const int copy = number * FEEDBACK_ROWS;
      const float cost = round_rows<BITS, (RANGES > 1), MEMORY>(
          rows, memory + MEMORY::ERRORS_AT + copy * MEMORY::ERROR_ROW, memory + MEMORY::CODES_AT + copy * MEMORY::CODE_ROW,
          (float*)(memory + MEMORY::SUMS_AT) + copy * MEMORY::SUM_ROW, triangles, fragments, range, lane);
      if (RANGES > 1) costs[copy + lane % FEEDBACK_ROWS] = cost;
    }
    __syncthreads();
    // The range of least cost, the first of equals; all costs of a row that holds NaN are NaN or count for nothing.
    auto best_of = [&](int of_row) {
      int best = 0;
      if constexpr (RANGES > 1) {
        float least = costs[of_row];
#pragma unroll
        for (int i = 1; i < RANGES; i++) {
          const float cost = costs[i * FEEDBACK_ROWS + of_row];
          if (cost < least) {
            least = cost;
            best = i;
          }
        }
      }
      return best;
    };
    auto chunk_of = [&](int slot) {
      return a.kv_cache + (u64)((u32)slot / Chunk::TOKENS) * a.block_stride + (u64)(u32)head * a.head_stride;
    };
    for (int item = thread; item < FEEDBACK_ROWS * ROW_PARTS; item += NUM_WARPS * 32) {
      const int of_row = item / ROW_PARTS, at = item % ROW_PARTS * 8, slot = slots[of_row];
      if (slot < 0) continue;
      const u8* codes = memory + MEMORY::CODES_AT + (best_of(of_row) * FEEDBACK_ROWS + of_row) * MEMORY::CODE_ROW + at;
      u32 words[2] = {};
#pragma unroll
      for (int field = 0; field < FIELDS; field++) {
        const uint2 pair = *(const uint2*)(codes + field * ROW_BYTES);
        words[0] |= pair.x << (field * BITS);
        words[1] |= pair.y << (field * BITS);
      }
      store_bytes<8>(chunk_of(slot) + ((IS_KEY ? Chunk::K_CODES : Chunk::V_CODES) +
                                       (u32)slot % Chunk::TOKENS * ROW_BYTES + at), words);
    }
    if (thread < FEEDBACK_ROWS && slots[thread] >= 0) {
      const int slot = slots[thread], best = best_of(thread);
      const float2 bound = bounds[thread];
      const Range range = CODES::make_range(bound.x, bound.y, __ldg(tables.ranges + 2 * best),
                                            __ldg(tables.ranges + 2 * best + 1));
      const u32 nan = 0x7FFF7FFF;
      *(u32*)(chunk_of(slot) +
              ((IS_KEY ? Chunk::K_META : Chunk::V_META) + (u32)slot % Chunk::TOKENS * Chunk::META_ROW)) =
          bound.x == bound.x ? pack_fp16(range.scale, range.minimum) : nan;
    }
    __syncthreads();
  }
}
