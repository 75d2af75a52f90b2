// paged_attention.cu: what a warp holds where products are of bytes: few rows, each in two columns.
//
// Arithmetic: key codes are multiplied as unsigned bytes with q in 16-bit fixed point, whose high and low byte are two columns of
// the matrix instruction, so that 4 rows fill its 8. So are the weights P_t s_t, in units of 1 / 65535 of a stage's largest of
// their row, and value codes are unsigned bytes too. A stage's integer sums are less than 2^24: as fp32 numbers they are that
// many times 2^-149 as they stand, and are added up without being converted.
#pragma once

constexpr int TILES = PASS_ROWS / 4;
constexpr int OFFSET_TURNS = 1;  // sets of a key offset's coefficients; both halves of a long stage are columns of one
constexpr int ROUND_ROWS = PASS_ROWS;  // rows that warps' sums are added up of at once
constexpr int V_MAX_RUN = PASS_ROWS * HEAD_SIZE > 1024 ? 2 : 8;  // by registers
constexpr int V_RUN = value_run(V_MAX_RUN);
// Codes of a byte are masked from its lowest bit up, and what lies below is taken off the sums: the highest needs no mask.
// 2-bit keys have it in the query instead, where fields of the same byte meet in a lane of fold_row; with 4 bits that saves
// less than the query's exactness is worth.
constexpr bool CUMULATIVE_KEYS = K_BITS == 2 && K_ROW % 32 == 0;
constexpr int QUERY_STRIDE = HEAD_SIZE + 16;

constexpr float MAX_TOTAL = 0x1p16f;     // of P of a lane's tokens in a stage, before the reference is set anew
constexpr float MIN_WEIGHT = 0x1p-100f;  // of a stage's largest weight, so that it has an inverse
constexpr float FULL_WEIGHT = 65535.0f;  // the largest weight of a stage in fixed point
constexpr float OUTPUT_UNIT = 0x1p-48f;  // of Accumulators.output

// Of the key offset's products: the row of column g of a tile, and which of a stage's angles it is with.
__device__ __forceinline__ int row_of_column(int tile, int g) { return 4 * tile + g / 2; }
__device__ __forceinline__ int column_of_turn(int, int, int g) { return g % 2; }

constexpr bool VALUE_MATRICES = V_MATRICES;
struct TeamShared {};

// Queries in the frame of the stored keys, of all rows.
struct FoldedQueries {
  alignas(16) u8 query[TILES][8][QUERY_STRIDE];
  float unit[PASS_ROWS], sum[PASS_ROWS], offset_factor[PASS_ROWS];
};

struct Accumulators {
  float output[TILES][V_TILES][2];  // sums of weights times masked bytes, in OUTPUT_UNIT
  float reference[TILES], total[TILES], minima[TILES];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
      for (int i = 0; i < V_TILES; i++) output[tile][i][0] = output[tile][i][1] = 0.0f;
      reference[tile] = NOTHING;
      total[tile] = minima[tile] = 0.0f;
    }
  }
};

struct RowConstants {
  u32 query[TILES][K_FIELDS][K_WORDS];
  float unit[TILES];  // logits to base 2 per unit of the integer dot product
  float sum[TILES];   // of the query, in the same units
  int limit[TILES];  // tokens that the row sees
  int seen_by_all;   // tokens that every row sees
  int len;           // tokens of the request
  float offset_factor[TILES];  // logits per unit of the key offset's products, if there is one
};
