// paged_attention.cu: what a warp does with 16 to 64 tokens.
#pragma once

// The largest of a row's numbers, of all tokens of a stage.
__device__ __forceinline__ float token_max(const float (&numbers)[GROUPS][TILES][2], int tile) {
  // In pairs: a chain of maxima would be waited for.
  float x[GROUPS];
#pragma unroll
  for (int group = 0; group < GROUPS; group++) x[group] = fmaxf(numbers[group][tile][0], numbers[group][tile][1]);
#pragma unroll
  for (int step = 1; step < GROUPS; step <<= 1)
#pragma unroll
    for (int group = 0; group + step < GROUPS; group += 2 * step) x[group] = fmaxf(x[group], x[group + step]);
#pragma unroll
  for (int step = 4; step < 32; step <<= 1) x[0] = fmaxf(x[0], __shfl_xor_sync(FULL_WARP, x[0], step));
  return x[0];
}

// P and its sum over this lane's tokens, its product with the value scales, and the largest of those in a row.
__device__ __forceinline__ void weigh(const float (&logits)[GROUPS][TILES][2], const float (&unit)[TILES],
                                      const float (&scale)[GROUPS][2], const Accumulators& sums,
                                      float (&p)[GROUPS][TILES][2], float (&total)[TILES],
                                      float (&weight)[GROUPS][TILES][2], float (&largest)[TILES]) {
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    total[tile] = 0.0f;
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        p[group][tile][half] = exp2_approx(fmaf(logits[group][tile][half], unit[tile], -sums.reference[tile]));
        total[tile] += p[group][tile][half];
        weight[group][tile][half] = p[group][tile][half] * scale[group][half];
      }
    largest[tile] = token_max(weight, tile);
  }
}

// Sums of products are exact, however long a segment is.
struct SetAside {
  __device__ __forceinline__ explicit SetAside(const Arguments&) {}
  __device__ __forceinline__ void take_back(Accumulators&, int) {}
};

// A stage, whose first token is `token`: at once, as much as registers hold, since warps wait for their own instructions.
__device__ __forceinline__ void attend(const Arguments& a, const Shared&, const u8* stage, int token, const RowConstants& rows,
                                       KeyOffset& offset, const LanePlaces&, int, int lane, Accumulators& sums, SetAside&) {
  const int g = lane / 4;
  float logits[GROUPS][TILES][2], scale[GROUPS][2], minimum[GROUPS][2];
  // Of a stage of 64 tokens, columns are the first 32 and the second by turns.
  float offsets[constant_min(GROUPS, 2)][TILES][4] = {};
  offset.products(a, token, 0, true, lane, offsets);
#pragma unroll
  for (int group = 0; group < GROUPS; group++) {
    const int place = group * 16;
    const u8* piece = stage + place / PIECE_TOKENS * Piece::BYTES;
    const int within = place % PIECE_TOKENS;
    int dots[TILES][2];
    key_products(piece + within * K_ROW, rows, lane, dots);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = token_of_row(g) + 8 * half;
      const float2 k_meta = unpack_fp16(*(const u32*)(piece + Piece::K_META + (within + row) * Piece::META_ROW));
      const float2 v_meta = unpack_fp16(*(const u32*)(piece + Piece::V_META + (within + row) * Piece::META_ROW));
      scale[group][half] = v_meta.x;
      minimum[group][half] = v_meta.y;
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        float logit = fmaf(k_meta.x, __int2float_rn(dots[tile][half]), k_meta.y * rows.sum[tile]);
        if constexpr (OFFSET_PAIRS > 0) logit = fmaf(offsets[group % 2][tile][2 * half + group / 2], rows.offset_factor[tile], logit);
#if SOFT_CAP
        logit = capped(a, logit * rows.unit[tile]);
#endif
        logits[group][tile][half] = logit;
      }
    }
  }
  bool partly_seen = token + STAGE_TOKENS > rows.seen_by_all;
#if WINDOW
  partly_seen |= token < rows.seen_by_all + PASS_ROWS - WINDOW;
#endif
#if SKIP_FIRST
  partly_seen |= token < SKIP_FIRST;
#endif
  if (partly_seen) {
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int position = token + group * 16 + token_of_row(g) + 8 * half;
        // What stands beyond the request, or in blocks that left its window, may be any bits.
        bool absent = position >= rows.len;
#if WINDOW
        absent |= position < rows.seen_by_all - WINDOW;
#endif
        if (absent) scale[group][half] = minimum[group][half] = 0.0f;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          bool seen = position < rows.limit[tile];
#if WINDOW
          seen = seen && position >= rows.limit[tile] - WINDOW;
#endif
#if SKIP_FIRST
          seen = seen && position >= SKIP_FIRST;
#endif
          if (!seen) logits[group][tile][half] = MASKED;
        }
      }
  }
  float unit[TILES];  // of logits, to base 2
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) unit[tile] = SOFT_CAP ? 1.0f : rows.unit[tile];
  float p[GROUPS][TILES][2], total[TILES], weight[GROUPS][TILES][2], largest[TILES];
  weigh(logits, unit, scale, sums, p, total, weight, largest);
  bool surpassed = false;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) surpassed |= !(total[tile] <= MAX_TOTAL);
  if (__any_sync(FULL_WARP, surpassed)) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const float top = fmaxf(sums.reference[tile], token_max(logits, tile) * unit[tile]);
      const float decay = exp2_approx(sums.reference[tile] - top);
      sums.reference[tile] = top;
      sums.total[tile] *= decay;
      sums.minima[tile] *= decay;
#pragma unroll
      for (int i = 0; i < V_TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) sums.output[tile][i][half] *= decay;
    }
    weigh(logits, unit, scale, sums, p, total, weight, largest);
  }
  u32 packed[GROUPS][TILES];
  float high[TILES], low[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    sums.total[tile] += total[tile];
    const float most = fmaxf(largest[tile], MIN_WEIGHT);
    const float inverse = FULL_WEIGHT * reciprocal_approx(most);
    low[tile] = most * (0x1p101f / FULL_WEIGHT);  // 2^149 OUTPUT_UNIT
    high[tile] = low[tile] * 256.0f;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
      u32 fixed[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        sums.minima[tile] = fmaf(p[group][tile][half], minimum[group][half], sums.minima[tile]);
        // The sum's lowest bits are the rounded integer.
        fixed[half] = __float_as_uint(fmaf(weight[group][tile][half], inverse, 0x1p23f));
      }
      // The two high bytes for one column, the two low ones for the next.
      packed[group][tile] = transpose_8x8(__byte_perm(fixed[0], fixed[1], 0x4051));
    }
  }
  value_products(stage, packed, high, low, lane, sums.output);
}

// A warp's sums of a segment to where those of all warps are added up.
__device__ __forceinline__ void keep(Shared& shared, Accumulators& sums, int, int warp, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
    for (int step = 4; step < 32; step <<= 1) {
      sums.total[tile] += __shfl_xor_sync(FULL_WARP, sums.total[tile], step);
      sums.minima[tile] += __shfl_xor_sync(FULL_WARP, sums.minima[tile], step);
    }
    const int row = 4 * tile + t;
    float* output = shared.output[warp][row];
#pragma unroll
    for (int i = 0; i < V_TILES; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int field = i % V_FIELDS;
        const float below = field ? sums.output[tile][constant_max(i - 1, 0)][half] : 0.0f;
        const float unit = 1.0f / OUTPUT_UNIT / (float)(1 << (field * V_SHIFT));
        output[value_dim(i, half, g)] = fmaf(sums.output[tile][i][half] - below, unit, sums.minima[tile]);
      }
    if (g == 0) {
      shared.total[warp][row] = sums.total[tile];
      shared.top[warp][row] = sums.reference[tile];
    }
  }
}
