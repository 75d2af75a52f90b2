// paged_attention.cu: the key offset's part of the logits.
//
// q . R_t m = sum over pairs of x cos(w t) + y sin(w t): the coefficients (x, y) turn with the stage's first token, what is left
// of the angle is in A operands that are the same for all stages. A stage of 64 tokens is two of ANGLE_STEP, in even columns
// the first, in odd ones the second. Layers without an offset have the empty twins at the end of this file.
#pragma once

#if OFFSET_PAIRS
// Whether registers hold a key offset's pairs as long as a warp reads a segment.
constexpr bool OFFSET_STAYS = !FP16_PRODUCTS && OFFSET_STEPS == 1 && TILES == 1 && GROUPS > 1;
constexpr int ANGLE_COLUMNS = constant_max(GROUPS / 2, 2);  // angles of a stage, in ANGLE_STEP
constexpr int TURNED = OFFSET_STAYS ? 1 : NUM_WARPS * OFFSET_STEPS * TILES * 2 * OFFSET_TURNS;
static_assert(TEAMS * STAGE_TOKENS % ANGLE_STEP == 0, "a warp's next stage is a whole number of steps further on");

struct OffsetShared {
  // Of all segments: dimensions of a pair, which of the rotary embedding's it is, how far it turns from a warp's stage to its next.
  int dims[OFFSET_PAIRS], index[OFFSET_PAIRS];
  float2 turn[OFFSET_PAIRS];
  // Fetched with a segment's queries: the offset's numbers, and angles at a warp's first stage, of 8 pairs those of t = lane % 4
  // and 4 more, each for even and odd columns.
  alignas(16) float2 numbers[2][TEAMS][OFFSET_PAIRS];
  float2 angles[2][TEAMS][OFFSET_STEPS][2][ANGLE_COLUMNS][4];
  float2 coefficients[PASS_ROWS][OFFSET_PAIRS];  // of cosine and sine
  // The same turned to a warp's next stage, where registers do not hold them: each lane's own.
  float2 turned[TURNED][32];
};

// How much farther on the angle of a column is than the stage's first token, in ANGLE_STEP.
__device__ __forceinline__ int turns_ahead(int column) { return GROUPS >= 4 ? column : 0; }

// What does not depend on segments, asked for in two steps since the second needs the first's answer, and kept when it is there: in
// between a CTA finds its share. The table's first row is its amplitude.
struct OffsetLoads {
  static constexpr int COUNT = (OFFSET_PAIRS + NUM_WARPS * 32 - 1) / (NUM_WARPS * 32);
  int index[COUNT], dims[COUNT];
  float2 angle[COUNT];
  float amplitude[COUNT];

  template <class Each>
  static __device__ __forceinline__ void for_pairs(int thread, const Each& each) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      if (thread + i * NUM_WARPS * 32 < OFFSET_PAIRS) each(i, thread + i * NUM_WARPS * 32);
  }
  __device__ __forceinline__ void ask_pairs(const Arguments& a, int thread) {
    for_pairs(thread, [&](int i, int pair) {
      index[i] = __ldg(a.offset_index + pair);
      dims[i] = __ldg(a.offset_dims + pair);
    });
  }
  __device__ __forceinline__ void ask_angles(const Arguments& a, int thread) {
    for_pairs(thread, [&](int i, int) {
      angle[i] = __ldg(a.coarse_angles + TEAMS * STAGE_TOKENS / ANGLE_STEP * a.rotary_pairs + index[i]);
      amplitude[i] = __ldg(&a.coarse_angles[index[i]].x);
    });
  }
  __device__ __forceinline__ void keep(OffsetShared& offset, int thread) const {
    for_pairs(thread, [&](int i, int pair) {
      offset.index[pair] = index[i];
      offset.dims[pair] = dims[i];
      offset.turn[pair] = make_float2(angle[i].x / amplitude[i], angle[i].y / amplitude[i]);
    });
  }
};

// A row's coefficients, in units of what it returns, which is 1e-30 at least.
__device__ __forceinline__ float fold_offset(OffsetShared& offset, const u16* raw, bool present, int at, int row, int warp,
                                             int lane) {
  constexpr int COUNT = (OFFSET_PAIRS + 31) / 32;
  float2 coefficients[COUNT];
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    int pair = i * 32 + lane;
    coefficients[i] = make_float2(0.0f, 0.0f);
    if (present && pair < OFFSET_PAIRS) {
      const int dims = offset.dims[pair];
      const float first = load_query(raw + (dims & 0xFFFF)), second = load_query(raw + (dims >> 16));
      const float2 m = offset.numbers[at][warp / TEAM_WARPS][pair];
      // q . R_t m is the sum over pairs of (q_a m_a + q_b m_b) cos + (q_b m_a - q_a m_b) sin.
      coefficients[i] = make_float2(first * m.x + second * m.y, second * m.x - first * m.y);
      largest = fmaxf(largest, fmaxf(fabsf(coefficients[i].x), fabsf(coefficients[i].y)));
    }
  }
  largest = fmaxf(warp_max(largest), 1e-30f);
#pragma unroll
  for (int i = 0; i < COUNT; i++)
    if (i * 32 + lane < OFFSET_PAIRS)
      offset.coefficients[row][i * 32 + lane] = make_float2(coefficients[i].x / largest, coefficients[i].y / largest);
  return largest;
}

__device__ __forceinline__ void fetch_offset(const Arguments& a, OffsetShared& offset, const Cursor& cursor, int at, int team,
                                             int lane) {
  const int token = (cursor.request.first_stage + cursor.stage_begin + team) * STAGE_TOKENS;
#pragma unroll 1
  for (int i = lane * 2; i < OFFSET_PAIRS; i += 64)
    copy_16(shared_address(&offset.numbers[at][team][i]), a.offset + cursor.kv_head * OFFSET_PAIRS + i);
#pragma unroll 1
  for (int i = lane; i < OFFSET_STEPS * 8 * ANGLE_COLUMNS; i += 32) {
    const int step = i / (8 * ANGLE_COLUMNS), b = i / (4 * ANGLE_COLUMNS) % 2, column = i / 4 % ANGLE_COLUMNS, t = i % 4;
    const u32 row = token / ANGLE_STEP + turns_ahead(column);
    copy_8(shared_address(&offset.angles[at][team][step][b][column][t]),
           a.coarse_angles + row * (u32)a.rotary_pairs + offset.index[step * 8 + 4 * b + t]);
  }
}

__device__ __forceinline__ float2 turned_by(const float2& c, const float2& angle) {
  return make_float2(c.x * angle.x + c.y * angle.y, c.y * angle.x - c.x * angle.y);
}

// The offset's part of a warp's logits.
struct KeyOffset {
  OffsetShared& shared;
  int warp;
  // Of few pairs in registers; of others in shared memory, and A operands in the L1 cache: no registers would be left.
  float2 coefficients[2], turn[2];
  uint4 fine[constant_min(GROUPS, 2)][2];

  __device__ __forceinline__ KeyOffset(OffsetShared& shared, int warp) : shared(shared), warp(warp) {}
  // What does not depend on segments.
  __device__ __forceinline__ void load(const Arguments& a, int lane) {
    if (OFFSET_STAYS)
#pragma unroll
      for (int i = 0; i < constant_min(GROUPS, 2); i++)
#pragma unroll
        for (int term = 0; term < 2; term++) fine[i][term] = fine_operand(a, 0, i, term, lane);
  }
  __device__ __forceinline__ void enter(int at, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int step = 0; step < OFFSET_STEPS; step++)
#pragma unroll
      for (int b = 0; b < 2; b++) {
        const int pair = step * 8 + t + 4 * b;
#pragma unroll
        for (int turn_index = 0; turn_index < OFFSET_TURNS; turn_index++) {
          const float2 angle = shared.angles[at][warp / TEAM_WARPS][step][b][column_of_turn(warp, turn_index, g)][t];
#pragma unroll
          for (int tile = 0; tile < TILES; tile++) {
            const float2 c = turned_by(shared.coefficients[row_of_column(tile, g)][pair], angle);
            if (OFFSET_STAYS)
              coefficients[b] = c, turn[b] = shared.turn[pair];
            else
              *place(step, tile, b, turn_index, lane) = c;
          }
        }
      }
  }
  __device__ __forceinline__ float2* place(int step, int tile, int b, int turn_index, int lane) {
    const int index = (((warp * OFFSET_STEPS + step) * TILES + tile) * 2 + b) * OFFSET_TURNS + turn_index;
    return &shared.turned[OFFSET_STAYS ? 0 : index][lane];
  }
  static __device__ __forceinline__ uint4 fine_operand(const Arguments& a, int step, int i, int term, int lane) {
    return __ldg(a.fine_angles + ((step * (ANGLE_STEP / 16) + i) * 2 + term) * 32 + lane);
  }
  // A column's operand of a pair, in two terms of fp16; if `last`, the coefficients then turn to the next stage.
  __device__ __forceinline__ void operand(int step, int tile, int b, int turn_index, bool last, int lane, u32& high,
                                          u32& low) {
    float2* kept = place(step, tile, b, turn_index, lane);
    const float2 c = OFFSET_STAYS ? coefficients[b] : *kept;
    high = pack_fp16(c.x, c.y);
    const float2 rounded = unpack_fp16(high);
    low = pack_fp16(c.x - rounded.x, c.y - rounded.y);
    if (!last) return;
    const float2 next = turned_by(c, OFFSET_STAYS ? turn[b] : shared.turn[step * 8 + lane % 4 + 4 * b]);
    if (OFFSET_STAYS)
      coefficients[b] = next;
    else
      *kept = next;
  }

  // q . R_t m of COUNT times 16 tokens from position `token`, in units of offset_factor, as the matrix instruction leaves them.
  // `last`: whether no other tokens of this stage are with these coefficients.
  template <int COUNT>
  __device__ __forceinline__ void products(const Arguments& a, int token, int turn_index, bool last, int lane,
                                           float (&products)[COUNT][TILES][4]) {
#pragma unroll 2
    for (int step = 0; step < OFFSET_STEPS; step++) {
      u32 high[TILES][2], low[TILES][2];
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int b = 0; b < 2; b++) operand(step, tile, b, turn_index, last, lane, high[tile][b], low[tile][b]);
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        const int place = COUNT == 1 ? token / 16 % (ANGLE_STEP / 16) : i;
        const uint4 coarser = OFFSET_STAYS ? fine[i][0] : fine_operand(a, step, place, 0, lane);
        const uint4 finer = OFFSET_STAYS ? fine[i][1] : fine_operand(a, step, place, 1, lane);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          mma_fp16(products[i][tile], finer.x, finer.y, finer.z, finer.w, high[tile][0], high[tile][1]);
          mma_fp16(products[i][tile], coarser.x, coarser.y, coarser.z, coarser.w, low[tile][0], low[tile][1]);
          mma_fp16(products[i][tile], coarser.x, coarser.y, coarser.z, coarser.w, high[tile][0], high[tile][1]);
        }
      }
    }
  }
};
#else
struct OffsetShared {};

struct OffsetLoads {
  __device__ __forceinline__ void ask_pairs(const Arguments&, int) {}
  __device__ __forceinline__ void ask_angles(const Arguments&, int) {}
  __device__ __forceinline__ void keep(OffsetShared&, int) const {}
};

__device__ __forceinline__ float fold_offset(OffsetShared&, const u16*, bool, int, int, int, int) { return 0.0f; }

__device__ __forceinline__ void fetch_offset(const Arguments&, OffsetShared&, const Cursor&, int, int, int) {}

struct KeyOffset {
  __device__ __forceinline__ KeyOffset(OffsetShared&, int) {}
  __device__ __forceinline__ void load(const Arguments&, int) {}
  __device__ __forceinline__ void enter(int, int) {}
  template <int COUNT>
  __device__ __forceinline__ void products(const Arguments&, int, int, bool, int, float (&)[COUNT][TILES][4]) {}
};
#endif
