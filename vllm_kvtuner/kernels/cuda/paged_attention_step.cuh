// paged_attention.cu: what a warp does with 16 to 64 tokens.
#pragma once

// STEP_TOKENS tokens from the one at `token`, the first of a piece's part or of a 16-token run within it.
__device__ __forceinline__ void attend(const Arguments& a, const u8* stage, int step, int token, const RowConstants& rows,
#if OFFSET_PAIRS
                                       const Shared& shared, OffsetAngles& angles,
#endif
                                       int lane, Accumulators& sums) {
  const int g = lane / 4;
  float logits[GROUPS][TILES][2], lifted[GROUPS][2], minimum[GROUPS][2];
#if OFFSET_PAIRS
  float offsets[GROUPS][TILES][2];
  offset_products(a, shared, token, angles, lane, offsets);
  const bool last_step = step == STAGE_TOKENS / STEP_TOKENS - 1;
  angles.load(a, token + STEP_TOKENS + (last_step ? (NUM_WARPS - 1) * STAGE_TOKENS : 0), lane);
#endif
#pragma unroll
  for (int group = 0; group < GROUPS; group++) {
    const int place = step * STEP_TOKENS + group * 16;
    const u8* piece = stage + place / PIECE_TOKENS * PIECE_BYTES;
    const int within = place % PIECE_TOKENS;
    int dots[TILES][2];
    key_products(piece + within * K_ROW, rows, lane, dots);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = token_of_row(g) + 8 * half;
      const float2 k_meta = unpack_fp16(*(const u32*)(piece + K_META + (within + row) * 4));
      const float2 v_meta = unpack_fp16(*(const u32*)(piece + V_META + (within + row) * 4));
      lifted[group][half] = v_meta.x * sums.lift;
      minimum[group][half] = v_meta.y;
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        float logit = k_meta.y * rows.sum_factor[tile];
        logit = fmaf(k_meta.x * rows.dot_factor[tile], __int2float_rn(dots[tile][half]), logit);
#if OFFSET_PAIRS
        logit = fmaf(offsets[group][tile][half], rows.offset_factor[tile], logit);
#endif
#if SOFT_CAP
        // To base 2: cap tanh(logit / cap), tanh(y) = 1 - 2 / (e^(2 y) + 1).
        const float power = exp2_approx(logit * (2.885390081777927f / a.soft_cap_log2));
        logit = a.soft_cap_log2 * (1.0f - 2.0f * reciprocal_approx(power + 1.0f));
#endif
        logits[group][tile][half] = logit;
      }
    }
  }
  bool partly_seen = token + STEP_TOKENS > rows.seen_by_all;
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
        if (absent) lifted[group][half] = minimum[group][half] = 0.0f;
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
  float p[GROUPS][TILES][2], weight[GROUPS][TILES][2];
  bool surpassed = false;
#pragma unroll
  for (int group = 0; group < GROUPS; group++)
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        p[group][tile][half] = exp2_approx(logits[group][tile][half] - sums.reference[tile]);
        weight[group][tile][half] = p[group][tile][half] * lifted[group][half];
        // Also where P itself grows without bound, beside scales of 0, and where infinity meets one.
        surpassed |= !(fmaf(p[group][tile][half], 0x1p-64f, weight[group][tile][half]) <= MAX_WEIGHT);
      }
  if (__any_sync(FULL_WARP, surpassed)) {
    float largest = 0.0f;
    float top[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) top[tile] = sums.reference[tile];
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        largest = fmaxf(largest, lifted[group][half]);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) top[tile] = fmaxf(top[tile], logits[group][tile][half]);
      }
#pragma unroll
    for (int step = 4; step < 32; step <<= 1) {
      largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, step));
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) top[tile] = fmaxf(top[tile], __shfl_xor_sync(FULL_WARP, top[tile], step));
    }
    // By a power of two, so that lifting rounds nothing: the largest scale comes down to between 256 and 512.
    float relift = 1.0f;
    if (largest >= MAX_LIFTED) relift = __uint_as_float((127u + 8u + 127u - (__float_as_uint(largest) >> 23)) << 23);
    sums.lift *= relift;
    float decay[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      decay[tile] = exp2_approx(sums.reference[tile] - top[tile]);
      sums.reference[tile] = top[tile];
      sums.total[tile] *= decay[tile];
      sums.minima[tile] *= decay[tile];
    }
#pragma unroll
    for (int i = 0; i < V_TILES; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) sums.output[i][j] *= decay[TILES == 2 ? j % 2 : 0] * relift;
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        lifted[group][half] *= relift;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          p[group][tile][half] = exp2_approx(logits[group][tile][half] - sums.reference[tile]);
          weight[group][tile][half] = p[group][tile][half] * lifted[group][half];
        }
      }
  }
#pragma unroll
  for (int group = 0; group < GROUPS; group++) {
    const int place = step * STEP_TOKENS + group * 16;
    const u8* piece = stage + place / PIECE_TOKENS * PIECE_BYTES;
    u32 packed[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
      packed[i] = TILES == 2 ? truncate_fp16(weight[group][0][i], weight[group][TILES - 1][i])
                             : truncate_fp16(weight[group][0][0], weight[group][0][1]);
    // The minimum's term and the total take the same truncated weights as the codes, since minimum and codes nearly
    // cancel; but P itself where a weight is so small that fp16 loses it.
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float inverse = reciprocal_approx(lifted[group][half]);
      const float2 truncated = unpack_fp16(packed[TILES == 2 ? half : 0]);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const float same = TILES == 2 ? (tile ? truncated.y : truncated.x) : (half ? truncated.y : truncated.x);
        const float used = fmaxf(same * inverse, p[group][tile][half] * TRUNCATED);
        sums.total[tile] += used;
        sums.minima[tile] = fmaf(used, minimum[group][half], sums.minima[tile]);
      }
    }
    u32 weights[2];
    if (TILES == 2) {
      weights[0] = transpose_8x8(packed[0]);
      weights[1] = transpose_8x8(packed[1]);
    } else {
      const u32 both = transpose_8x8(packed[0]);
      const u32 odd = g & 1 ? 0xFFFFFFFFu : 0u;
      weights[0] = both & ~odd;
      weights[1] = both & odd;
    }
    value_products(piece + V_CODES + place % PIECE_TOKENS * V_ROW, weights, lane, sums.output);
  }
}
