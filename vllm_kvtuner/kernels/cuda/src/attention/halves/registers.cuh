// paged_attention.cu: what a warp holds where products are of fp16 numbers: many rows, each in one column.
//
// Arithmetic: codes are multiplied where they stand in a word of two, as the fp16 numbers that their bits are, 2^-24 of an
// integer; see CodeFormat::spread. q is rounded to fp16 in units that all rows of a pass share, a power of two, and to two such numbers
// where it is rotated or scaled, since products of 11 bits would move logits of hundreds. Weights P_t s_t are rounded to fp16,
// which moves a token's codes in all dimensions alike, and rotated values gather that in one of them. So values count from the
// middle of their range: codes less MIDDLE, times rounded weights, and P_t (m_t + s_t MIDDLE). Of the first, MIDDLE times the
// rounded weights' sum is taken off.
// The reference that exponents are relative to is set so that a row's largest is 2^8, and anew where one exceeds 2^15. Products
// are added up in the accumulators of the matrix instruction, which cut off what is below their last bit: every ASIDE_TOKENS
// tokens they are set aside in fp32.
#pragma once

constexpr int TILES = PASS_ROWS / 8;
static_assert(PASS_ROWS % 8 == 0, "rows fill the columns of matrix instructions");
// Groups of 16 tokens that a warp attends to at once, by registers: neighbours, or every fourth of a team's stage.
constexpr int PART_GROUPS = TEAM_WARPS > 1 ? GROUPS / TEAM_WARPS : constant_min(GROUPS, MAX_PART_GROUPS);
static_assert(TEAM_WARPS == 1 || PART_GROUPS * TEAM_WARPS == GROUPS, "a team's stage");
constexpr int WARP_V_TILES = V_TILES / TEAM_WARPS;  // of 16 dimensions, that a warp has sums of
constexpr int SUM_TILES = WARP_V_TILES + (TEAM_WARPS == 1);
static_assert(WARP_V_TILES * TEAM_WARPS == V_TILES, "head size");
// Sets of a key offset's coefficients, one for each ANGLE_STEP of a stage that a warp has tokens of.
constexpr int OFFSET_TURNS = TEAM_WARPS > 1 ? PART_GROUPS : constant_max(GROUPS / 2, 1);
constexpr int ROUND_ROWS = 8;
constexpr bool VALUE_MATRICES = V_MATRICES || TEAM_WARPS > 1;
constexpr int V_RUN = VALUE_MATRICES ? 1 : value_run(V_BITS == 8 ? 4 : 8);

constexpr int TERMS = KEY_HADAMARD || KEY_EQUALIZATION ? 2 : 1;  // fp16 numbers that a query's number is the sum of
constexpr int K_STEPS = K_WORDS * K_FIELDS;  // matrix instructions along head_size, of 16 numbers
// Whether registers hold the first term.
constexpr bool QUERY_STAYS = TEAM_WARPS == 1 && TILES * K_STEPS <= QUERY_REGISTERS / 2;

constexpr int QUERY_EXPONENT = 13;            // of the largest number of a pass's queries
constexpr float CODE_UNIT = 0x1p-24f;         // of codes as fp16 numbers
constexpr int WEIGHT_EXPONENT = 8;            // of a row's largest weight when its reference is set
// Of a row's codes; 0 where a team, which has no registers for sums of weights, need not take it off.
constexpr float MIDDLE = TEAM_WARPS == 1 || VALUE_HADAMARD ? 0.5f * (float)ValueCodes::LEVELS : 0.0f;
constexpr u32 TWO_ONES = 0x3C003C00u;         // as fp16 numbers
constexpr float MIN_LOG_SCALE = -24.0f;       // of the scales that count for that
constexpr float MAX_TOTAL = 0x1p64f;          // of P of a lane's tokens, before the reference is set anew
constexpr int ASIDE_TOKENS = V_BITS == 8 ? 1024 : 2048;  // of one warp or team
constexpr int ASIDE_STAGES = ASIDE_TOKENS / STAGE_TOKENS;

// Of the key offset's products: the row of column g of a tile, and which of a stage's angles it is with.
__device__ __forceinline__ int row_of_column(int tile, int g) { return 8 * tile + g; }
__device__ __forceinline__ int column_of_turn(int warp, int turn_index, int) {
  return TEAM_WARPS > 1 ? 2 * turn_index + warp % TEAM_WARPS / 2 : turn_index;
}

#if TEAM_WARPS > 1
struct TeamShared {
  // B operands of the second product: of each 16 tokens two matrices of 8 rows' 8 tokens.
  alignas(128) u8 weights[TEAMS][GROUPS][TILES][2][128];
  float top[NUM_WARPS][PASS_ROWS];  // largest of a warp's tokens, where references rise
};
#else
struct TeamShared {};
#endif

// Queries in the frame of the stored keys, of all rows: B operands of the first product.
struct FoldedQueries {
  // Of each step two matrices of 8 rows' 8 numbers.
  alignas(128) u8 matrices[TERMS][K_STEPS][TILES][2][128];
  float sum[PASS_ROWS], offset_factor[PASS_ROWS];
  float largest[PASS_ROWS];
  float unit;  // logits to base 2 per unit of q . k
};

struct Accumulators {
  // Sums of weights times codes, in CODE_UNIT times 2^CodeFormat::spread_shift; as the matrix instruction has them. A warp alone
  // has sums of the weights in one tile more, alike in all of its rows.
  float output[SUM_TILES][TILES][4];
  float reference[TILES][2], total[TILES][2], middles[TILES][2];  // middles: sums of P v_middle

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int column = 0; column < 2; column++) {
        reference[tile][column] = NOTHING;
        total[tile][column] = middles[tile][column] = 0.0f;
      }
    clear_output();
  }

  __device__ __forceinline__ void clear_output() {
#pragma unroll
    for (int i = 0; i < SUM_TILES; i++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int j = 0; j < 4; j++) output[i][tile][j] = 0.0f;
  }
};

struct RowConstants {
#if TEAM_WARPS == 1
  u32 query[QUERY_STAYS ? K_STEPS : 1][TILES][2];
#else
  GroupOperand query, weights;  // the first matrices of both
#endif
  float sum[TILES][2];  // of rows 2 t and 2 t + 1 of a tile
  float unit;           // logits to base 2 per unit of q . k
  int seen_by_all;      // tokens that every row of the pass sees
};
