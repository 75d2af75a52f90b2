// paged_attention.cu: a warp's matrix products in bytes.
#pragma once

// Integer dot products of 16 tokens with all rows: lane (g, t) gets tokens token_of_row(g) and 8 more of row t of each
// tile, times 2^((K_FIELDS - 1) K_SHIFT).
__device__ __forceinline__ void key_products(const u8* keys, const RowConstants& rows, int lane, int (&dots)[TILES][2]) {
  u32 words[2][K_WORDS];
  load_key_words(keys + key_place(lane), words);
  int sums[TILES][K_FIELDS][4];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int field = 0; field < K_FIELDS; field++)
#pragma unroll
      for (int j = 0; j < 4; j++) sums[tile][field][j] = 0;
#pragma unroll
  for (int i = 0; i < K_WORDS; i += 2) {
#pragma unroll
    for (int field = 0; field < K_FIELDS; field++) {
      const u32 mask = CUMULATIVE_KEYS ? KeyCodes::lowest_fields(field + 1) : KeyCodes::lowest_fields(1) << (field * K_SHIFT);
      u32 a0 = words[0][i] & mask, a1 = words[1][i] & mask;
      if (i + 1 < K_WORDS) {
        u32 a2 = words[0][i + 1] & mask, a3 = words[1][i + 1] & mask;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
          mma_u8s8_k32(sums[tile][field], a0, a1, a2, a3, rows.query[tile][field][i], rows.query[tile][field][i + 1]);
      } else {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
          mma_u8s8_k16(sums[tile][field], a0, a1, rows.query[tile][field][i]);
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int high = 0, low = 0;
#pragma unroll
      for (int field = 0; field < K_FIELDS; field++) {
        high += sums[tile][field][2 * half] << ((K_FIELDS - 1 - field) * K_SHIFT);
        low += sums[tile][field][2 * half + 1] << ((K_FIELDS - 1 - field) * K_SHIFT);
      }
      dots[tile][half] = (high << 8) + low;
    }
}

__device__ __forceinline__ const u8* value_row(const u8* stage, int group, int token) {
  return stage + group_place(group, Piece::V_CODES, V_ROW) + token * V_ROW;
}

// Bytes of values as A operands: words[group][unit][i] holds byte i of the unit in this lane, for tokens r, r + 8, r' and r' + 8 of
// a group of 16, where r and r' are token_of_row(2 t) and token_of_row(2 t + 1). That is how transposed weights come.
struct ValueBytes {
  u32 words[GROUPS][V_RUN][2];

  // Run number `run` of a stage's tokens.
  __device__ __forceinline__ void load(const u8* stage, int run, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
      if constexpr (V_MATRICES) {
        // Tokens token_of_row(0 to 7) and 8 more of one group or two.
        constexpr int AT_ONCE = GROUPS % 2 ? 1 : 2;
        if (group % AT_ONCE) continue;
        u32 rows[2 * AT_ONCE];
        const u8* row = value_row(stage, group + lane / 16 % AT_ONCE, token_of_row(lane % 8) + lane / 8 % 2 * 8);
        load_transposed(rows, row + run * 16);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
          words[group + i][0][0] = __byte_perm(rows[2 * i], rows[2 * i + 1], 0x6240);
          words[group + i][0][1] = __byte_perm(rows[2 * i], rows[2 * i + 1], 0x7351);
        }
      } else {
        u32 rows[4][constant_max(V_RUN / 2, 1)];
#pragma unroll
        for (int i = 0; i < 4; i++)
          load_run<constant_max(V_RUN / 2, 1)>(rows[i], value_row(stage, group, token_of_row(2 * t + i / 2) + i % 2 * 8) +
                                           (run * 8 + g) * (2 * V_RUN));
#pragma unroll
        for (int i = 0; i < V_RUN / 2; i++) {
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const u32 even = __byte_perm(rows[0][i], rows[1][i], half ? 0x7362 : 0x5140);
            const u32 odd = __byte_perm(rows[2][i], rows[3][i], half ? 0x7362 : 0x5140);
            words[group][2 * i + half][0] = __byte_perm(even, odd, 0x5410);
            words[group][2 * i + half][1] = __byte_perm(even, odd, 0x7632);
          }
        }
      }
    }
  }
};

// The second product of a stage. weights[group][tile]: B operands, in ValueBytes's order of tokens.
//   high, low: what the sums of a row's high and low bytes count for, times 2^149.
__device__ __forceinline__ void value_products(const u8* stage, const u32 (&weights)[GROUPS][TILES],
                                               const float (&high)[TILES], const float (&low)[TILES], int lane,
                                               float (&output)[TILES][V_TILES][2]) {
#pragma unroll
  for (int run = 0; run < V_UNITS / V_RUN; run++) {
    ValueBytes bytes;
    bytes.load(stage, run, lane);
#pragma unroll
    for (int unit = 0; unit < V_RUN; unit++) {
#pragma unroll
      for (int field = 0; field < V_FIELDS; field++) {
        const u32 mask = ValueCodes::lowest_fields(field + 1);
        int sums[TILES][4] = {};
#pragma unroll
        for (int group = 0; group < GROUPS; group += 2) {
          const u32 a0 = bytes.words[group][unit][0] & mask, a1 = bytes.words[group][unit][1] & mask;
          if (group + 1 < GROUPS) {
            const u32 a2 = bytes.words[(group + 1) % GROUPS][unit][0] & mask;
            const u32 a3 = bytes.words[(group + 1) % GROUPS][unit][1] & mask;
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
              mma_u8u8_k32(sums[tile], a0, a1, a2, a3, weights[group][tile], weights[(group + 1) % GROUPS][tile]);
          } else {
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) mma_u8u8_k16(sums[tile], a0, a1, weights[group][tile]);
          }
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            float& sum = output[tile][(run * V_RUN + unit) * V_FIELDS + field][half];
            sum = fmaf(__int_as_float(sums[tile][2 * half]), high[tile],
                       fmaf(__int_as_float(sums[tile][2 * half + 1]), low[tile], sum));
          }
      }
    }
  }
}

// The dimension whose codes sum number [tile][half] of a lane holds, with those of lower fields below them, as masked.
__device__ __forceinline__ int value_dim(int tile, int half, int g) {
  const int unit = tile / V_FIELDS, field = tile % V_FIELDS;
  return (unit / V_RUN * 8 + g) * (2 * V_RUN) + unit % V_RUN * 2 + half + field * V_FIELD;
}
