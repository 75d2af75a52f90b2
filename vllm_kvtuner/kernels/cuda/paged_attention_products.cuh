// paged_attention.cu: sums and constants of one warp, and its matrix products.
#pragma once

struct Accumulators {
  float output[V_TILES][4];
  float reference[TILES], total[TILES], minima[TILES];
  float lift;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < V_TILES; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) output[i][j] = 0.0f;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
      reference[i] = NOTHING;
      total[i] = minima[i] = 0.0f;
    }
    // The first scale that is not 0 brings it down.
    lift = __uint_as_float((127u + 40u) << 23);
  }
};

struct RowConstants {
  u32 query[TILES][K_FIELDS][K_WORDS];
  float dot_factor[TILES], sum_factor[TILES];
  int limit[TILES];  // tokens that the row sees
  int seen_by_all;   // tokens that every row sees
  int len;           // tokens of the request
#if OFFSET_PAIRS
  float offset_factor[TILES];
#endif
};

template <int WORDS>
__device__ __forceinline__ void load_run(u32* words, const u8* pointer) {
  if constexpr (WORDS == 4) {
    uint4 run = *(const uint4*)pointer;
    words[0] = run.x, words[1] = run.y, words[2] = run.z, words[3] = run.w;
  } else if constexpr (WORDS == 2) {
    uint2 run = *(const uint2*)pointer;
    words[0] = run.x, words[1] = run.y;
  } else {
    words[0] = *(const u32*)pointer;
  }
}

// Integer dot products of 16 tokens with all rows: lane (g, t) gets tokens token_of_row(g) and 8 more of row t of each
// tile, times 2^((K_FIELDS - 1) K_BITS).
__device__ __forceinline__ void key_products(const u8* keys, const RowConstants& rows, int lane, int (&dots)[TILES][2]) {
  const int g = lane / 4, t = lane % 4;
  u32 words[2][K_WORDS];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const u8* row = keys + (token_of_row(g) + 8 * half) * K_ROW;
#pragma unroll
    for (int i = 0; i < K_WORDS; i += K_RUN) load_run<K_RUN>(&words[half][i], row + (4 * i + t * K_RUN) * 4);
  }
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
      constexpr u32 ONES = K_BITS == 8 ? 0xFFFFFFFFu : K_BITS == 4 ? 0x0F0F0F0Fu : 0x03030303u;
      const u32 mask = ONES << (field * K_BITS);
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
        high += sums[tile][field][2 * half] << ((K_FIELDS - 1 - field) * K_BITS);
        low += sums[tile][field][2 * half + 1] << ((K_FIELDS - 1 - field) * K_BITS);
      }
      dots[tile][half] = (high << 8) + low;
    }
}

// The second product of 16 tokens: weights[b] is a B operand, b = 0 for tokens token_of_row(2t), token_of_row(2t + 1).
__device__ __forceinline__ void value_products(const u8* values, const u32 (&weights)[2], int lane,
                                               float (&output)[V_TILES][4]) {
  const int g = lane / 4, t = lane % 4;
  // codes[b][c]: code number c of this lane, for two tokens.
  constexpr int RUN_WORDS = V_RUN > 1 ? V_RUN / 2 : 1;
  constexpr int RUN_CODES = HEAD_SIZE / 8 / (V_HALVES / V_RUN);
#pragma unroll
  for (int run = 0; run < V_HALVES / V_RUN; run++) {
    u32 codes[2][RUN_CODES];
#pragma unroll
    for (int b = 0; b < 2; b++) {
      const u8* row = values + (run * 8 + g) * (V_RUN * 2);
      const int even = token_of_row(2 * t) + 8 * b, odd = token_of_row(2 * t + 1) + 8 * b;
      u32 pairs[V_RUN];
      if constexpr (V_RUN == 1) {
        pairs[0] = (u32) * (const u16*)(row + even * V_ROW) | (u32) * (const u16*)(row + odd * V_ROW) << 16;
      } else {
        u32 first[RUN_WORDS], second[RUN_WORDS];
        load_run<RUN_WORDS>(first, row + even * V_ROW);
        load_run<RUN_WORDS>(second, row + odd * V_ROW);
#pragma unroll
        for (int i = 0; i < RUN_WORDS; i++) {
          pairs[2 * i] = __byte_perm(first[i], second[i], 0x5410);
          pairs[2 * i + 1] = __byte_perm(first[i], second[i], 0x7632);
        }
      }
#pragma unroll
      for (int i = 0; i < V_RUN; i++) {
#pragma unroll
        for (int code = 0; code < 16 / V_BITS; code++) {
          constexpr u32 ONES = 0x10001u * ((1 << V_BITS) - 1);
          const int low = code * V_BITS;
          u32 word;
          if (low + V_BITS <= 10)
            word = pairs[i] & (ONES << low);
          else if (V_BITS == 8)
            word = __byte_perm(pairs[i], 0, 0x4341);
          else
            word = (pairs[i] >> 8) & (ONES << (low - 8));
          codes[b][i * (16 / V_BITS) + code] = word;
        }
      }
    }
#pragma unroll
    for (int c = 0; c < RUN_CODES; c += 2)
      mma_fp16(output[(run * RUN_CODES + c) / 2], codes[0][c], codes[0][c + 1], codes[1][c], codes[1][c + 1], weights[0],
               weights[1]);
  }
}

// The dimension that this lane's code number c holds, and what its subnormal must be multiplied by.
__device__ __forceinline__ int value_dim(int c, int g) {
  const int half = c / (16 / V_BITS), code = c % (16 / V_BITS);
  const int position = half / V_RUN * 8 * V_RUN + g * V_RUN + half % V_RUN;
  return 2 * position + code / V_FIELDS + code % V_FIELDS * (HEAD_SIZE / V_FIELDS);
}
__device__ __forceinline__ float value_unit(int c) {
  const int low = c % (16 / V_BITS) * V_BITS;
  const int shift = low + V_BITS <= 10 ? low : low - 8;
  return (float)(1 << 24) / (float)(1 << shift);
}

#if OFFSET_PAIRS
// By how much a lane's pairs are turned at a multiple of ANGLE_STEP tokens. That row of the table is as far away as the cache
// is, so a warp loads it one step ahead, unless so many pairs take too many registers.
constexpr bool ANGLES_AHEAD = OFFSET_STEPS <= 2;
struct OffsetAngles {
  float2 at[ANGLES_AHEAD ? OFFSET_STEPS : 1][2];

  static __device__ __forceinline__ float2 angle(const Arguments& a, int token, int step, int b, int lane) {
    const int pair = step * 8 + lane % 4 + 4 * b;
    return __ldg(&a.coarse_angles[(u64)(token / ANGLE_STEP) * a.rotary_pairs + __ldg(&a.offset_index[pair])]);
  }
  __device__ __forceinline__ void load(const Arguments& a, int token, int lane) {
    if (!ANGLES_AHEAD) return;
#pragma unroll
    for (int step = 0; step < OFFSET_STEPS; step++)
#pragma unroll
      for (int b = 0; b < 2; b++) at[step][b] = angle(a, token, step, b, lane);
  }
};

// q . R_t m of STEP_TOKENS tokens from position `token`, in units of offset_factor. Coefficients and angles come anew from
// shared memory and the L1 cache each time: registers for all pairs would leave none for warps.
__device__ __forceinline__ void offset_products(const Arguments& a, const Shared& shared, int token, OffsetAngles& angles,
                                                int lane, float (&sums)[GROUPS][TILES][2]) {
  const int g = lane / 4, t = lane % 4;
  float products[GROUPS][TILES][4] = {};
#pragma unroll
  for (int step = 0; step < OFFSET_STEPS; step++) {
    u32 operand[TILES][2];
#pragma unroll
    for (int b = 0; b < 2; b++) {
      const int pair = step * 8 + t + 4 * b;
      const float2 angle = ANGLES_AHEAD ? angles.at[step][b] : OffsetAngles::angle(a, token, step, b, lane);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        // The sum of two angles: the coefficients turn with every ANGLE_STEP tokens, cosines and sines within them stay.
        const float2 c = shared.offset[4 * tile + g / 2][pair];
        const float cosine = c.x * angle.x + c.y * angle.y, sine = c.y * angle.x - c.x * angle.y;
        const u32 high = pack_fp16(cosine, sine);
        const float2 rounded = unpack_fp16(high);
        const u32 low = pack_fp16(cosine - rounded.x, sine - rounded.y);
        operand[tile][b] = g % 2 ? low : high;
      }
    }
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
      const uint4* fine = a.fine_angles + ((step * (ANGLE_STEP / 16) + (token / 16 + group) % (ANGLE_STEP / 16)) * 2) * 32;
      const uint4 high = __ldg(fine + lane), low = __ldg(fine + 32 + lane);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        mma_fp16(products[group][tile], low.x, low.y, low.z, low.w, operand[tile][0], operand[tile][1]);
        mma_fp16(products[group][tile], high.x, high.y, high.z, high.w, operand[tile][0], operand[tile][1]);
      }
    }
  }
#pragma unroll
  for (int group = 0; group < GROUPS; group++)
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      sums[group][tile][0] = products[group][tile][0] + products[group][tile][1];
      sums[group][tile][1] = products[group][tile][2] + products[group][tile][3];
    }
}
#endif
