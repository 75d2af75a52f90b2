// paged_attention.cu: what a warp does with 16 or 32 tokens, and where its sums go.
#pragma once

// Sums that were set aside, in global memory: where a warp reads a long part of a segment.
struct SetAside {
  float* place;
  int stages;  // since sums were last set aside
  bool used;

  __device__ __forceinline__ SetAside(const Arguments& a, int cta, int warp)
      : place(a.aside + (u64)(cta * NUM_WARPS + warp) * (WARP_ROWS * HEAD_SIZE)), stages(0), used(false) {}

  template <class Each>
  __device__ __forceinline__ void for_sums(int lane, const Each& each) {
#pragma unroll
    for (int i = 0; i < V_TILES; i++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
        each(i, tile, (float4*)place + (i * TILES + tile) * 32 + lane);
  }

  __device__ __forceinline__ void after_stage(Accumulators& sums, int lane) {
    if (++stages < ASIDE_STAGES) return;
    for_sums(lane, [&](int i, int tile, float4* kept) {
      float(&now)[4] = sums.output[i][tile];
      float4 sum = used ? *kept : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      *kept = make_float4(sum.x + now[0], sum.y + now[1], sum.z + now[2], sum.w + now[3]);
    });
    sums.clear_output();
    stages = 0;
    used = true;
  }

  // Where references rise.
  __device__ __forceinline__ void decay(const float (&factor)[TILES][2], int lane) {
    if (!used) return;
    for_sums(lane, [&](int, int tile, float4* kept) {
      const float4 sum = *kept;
      *kept = make_float4(sum.x * factor[tile][0], sum.y * factor[tile][1], sum.z * factor[tile][0], sum.w * factor[tile][1]);
    });
  }

  __device__ __forceinline__ void take_back(Accumulators& sums, int lane) {
    if (!used) return;
    for_sums(lane, [&](int i, int tile, float4* kept) {
      const float4 sum = *kept;
      sums.output[i][tile][0] += sum.x, sums.output[i][tile][1] += sum.y;
      sums.output[i][tile][2] += sum.z, sums.output[i][tile][3] += sum.w;
    });
  }
};

// Scales and minima of the tokens of a lane.
struct TokenMeta {
  float k_scale[PART_GROUPS][2], k_minimum[PART_GROUPS][2];  // times what makes logits to base 2
  float v_scale[PART_GROUPS][2], v_minimum[PART_GROUPS][2];
};

// A logit to base 2, from its dot product.
__device__ __forceinline__ float logit_of(float dot, float sum, const TokenMeta& meta, int group, int half) {
  return fmaf(dot, meta.k_scale[group][half], meta.k_minimum[group][half] * sum);
}

// Sets every row's reference so that its largest weight among these tokens is 2^WEIGHT_EXPONENT, unless it is higher already.
__device__ __forceinline__ void raise_references(const float (&dots)[PART_GROUPS][TILES][4], const TokenMeta& meta,
                                                 const RowConstants& rows, int lane, Accumulators& sums, SetAside& aside) {
  float log_scale[PART_GROUPS][2], decay[TILES][2];
#pragma unroll
  for (int group = 0; group < PART_GROUPS; group++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      log_scale[group][half] = fmaxf(log2_approx(meta.v_scale[group][half]), MIN_LOG_SCALE) - (float)WEIGHT_EXPONENT;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int column = 0; column < 2; column++) {
      float top = sums.reference[tile][column];
#pragma unroll
      for (int group = 0; group < PART_GROUPS; group++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          top = fmaxf(top, logit_of(dots[group][tile][2 * half + column], rows.sum[tile][column], meta, group, half) + log_scale[group][half]);
#pragma unroll
      for (int step = 4; step < 32; step <<= 1) top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, step));
      decay[tile][column] = exp2_approx(sums.reference[tile][column] - top);
      sums.reference[tile][column] = top;
      sums.total[tile][column] *= decay[tile][column];
      sums.minima[tile][column] *= decay[tile][column];
#pragma unroll
      for (int i = 0; i < V_TILES; i++) {
        sums.output[i][tile][column] *= decay[tile][column];
        sums.output[i][tile][2 + column] *= decay[tile][column];
      }
    }
  aside.decay(decay, lane);
}

// Tokens that rows do not see, in a part that begins with token `token`.
__device__ __forceinline__ void mask(int token, const RowConstants& rows, int lane, TokenMeta& meta,
                                     float (&dots)[PART_GROUPS][TILES][4]) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int group = 0; group < PART_GROUPS; group++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int position = token + group * 16 + token_of_row(g) + 8 * half;
      // What stands beyond the request, or in blocks that left its window, may be any bits.
      bool absent = position >= rows.len;
#if WINDOW
      absent |= position < rows.seen_by_all - WINDOW;
#endif
      if (absent) {
        meta.k_scale[group][half] = 1.0f;
        meta.k_minimum[group][half] = meta.v_scale[group][half] = meta.v_minimum[group][half] = 0.0f;
      }
      // So that -inf stays that.
      meta.k_scale[group][half] = fmaxf(meta.k_scale[group][half], 1e-30f);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int column = 0; column < 2; column++) {
          const int limit = rows.limit(8 * tile + 2 * t + column);
          bool seen = position < limit;
#if WINDOW
          seen = seen && position >= limit - WINDOW;
#endif
#if SKIP_FIRST
          seen = seen && position >= SKIP_FIRST;
#endif
          if (!seen) dots[group][tile][2 * half + column] = MASKED;
        }
    }
}

// PART_GROUPS groups of 16 tokens of a stage from `first`, which begin with token `token`.
__device__ __forceinline__ void attend_part(const Arguments& a, Shared& shared, const u8* stage, int first, int token,
                                            const RowConstants& rows, KeyOffset& offset, int lane, Accumulators& sums,
                                            SetAside& aside) {
  const int g = lane / 4;
  float dots[PART_GROUPS][TILES][4];
  TokenMeta meta;
#pragma unroll
  for (int group = 0; group < PART_GROUPS; group++) {
    const int place = (first + group) * 16;
    const u8* piece = stage + place / PIECE_TOKENS * Piece::BYTES;
    const int within = place % PIECE_TOKENS;
    key_products(shared.folded, piece + within * K_ROW, rows, lane, dots[group]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = token_of_row(g) + 8 * half;
      const float2 k_meta = unpack_fp16(*(const u32*)(piece + Piece::K_META + (within + row) * Piece::META_ROW));
      const float2 v_meta = unpack_fp16(*(const u32*)(piece + Piece::V_META + (within + row) * Piece::META_ROW));
      meta.k_scale[group][half] = k_meta.x * (rows.unit * (1.0f / CODE_UNIT));
      meta.k_minimum[group][half] = k_meta.y * rows.unit;
      meta.v_scale[group][half] = v_meta.x;
      meta.v_minimum[group][half] = v_meta.y;
    }
  }
#if OFFSET_PAIRS || SOFT_CAP
  {
    // Dot products become logits.
    float offsets[PART_GROUPS][TILES][4] = {};
    offset.products(a, token, OFFSET_TURNS == 2 ? first / 2 : 0, (first + PART_GROUPS) % constant_min(GROUPS, 2) == 0, lane, offsets);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int column = 0; column < 2; column++) {
        const int row = rows.row_group * WARP_ROWS + 8 * tile + lane % 4 * 2 + column;
#pragma unroll
        for (int group = 0; group < PART_GROUPS; group++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            float& dot = dots[group][tile][2 * half + column];
            dot = logit_of(dot, rows.sum[tile][column], meta, group, half);
            if constexpr (OFFSET_PAIRS > 0)
              dot = fmaf(offsets[group][tile][2 * half + column], shared.folded.offset_factor[row], dot);
#if SOFT_CAP
            // cap tanh(logit / cap), tanh(y) = 1 - 2 / (e^(2 y) + 1).
            const float power = exp2_approx(dot * (2.885390081777927f / a.soft_cap_log2));
            dot = a.soft_cap_log2 * (1.0f - 2.0f * reciprocal_approx(power + 1.0f));
#endif
          }
      }
#pragma unroll
    for (int group = 0; group < PART_GROUPS; group++)
#pragma unroll
      for (int half = 0; half < 2; half++) meta.k_scale[group][half] = 1.0f, meta.k_minimum[group][half] = 0.0f;
  }
#endif
  bool partly_seen = token + 16 * PART_GROUPS > rows.seen_by_all;
#if WINDOW
  partly_seen |= token < rows.seen_by_all + PASS_ROWS - WINDOW;
#endif
#if SKIP_FIRST
  partly_seen |= token < SKIP_FIRST;
#endif
  if (partly_seen) mask(token, rows, lane, meta, dots);

  u32 weights[PART_GROUPS][TILES][2];
  while (true) {
    float total[TILES][2], minima[TILES][2], all = 0.0f;
    u32 largest = 0;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
      for (int column = 0; column < 2; column++)
        total[tile][column] = sums.total[tile][column], minima[tile][column] = sums.minima[tile][column];
#pragma unroll
      for (int group = 0; group < PART_GROUPS; group++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float weight[2];
#pragma unroll
          for (int column = 0; column < 2; column++) {
            const float start = fmaf(meta.k_minimum[group][half], rows.sum[tile][column], -sums.reference[tile][column]);
            const float p = exp2_approx(fmaf(dots[group][tile][2 * half + column], meta.k_scale[group][half], start));
            total[tile][column] += p;
            minima[tile][column] = fmaf(p, meta.v_minimum[group][half], minima[tile][column]);
            weight[column] = p * meta.v_scale[group][half];
          }
          weights[group][tile][half] = pack_fp16(weight[0], weight[1]);
          largest = max_fp16(largest, weights[group][tile][half]);
        }
      all += total[tile][0] + total[tile][1];
    }
    // 2^15 and more, infinity too.
    const bool surpassed = (largest + 0x08000800u & 0x80008000u) || !(all <= MAX_TOTAL);
    if (!__any_sync(FULL_WARP, surpassed)) {
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int column = 0; column < 2; column++)
          sums.total[tile][column] = total[tile][column], sums.minima[tile][column] = minima[tile][column];
      break;
    }
    raise_references(dots, meta, rows, lane, sums, aside);
  }
#pragma unroll
  for (int group = 0; group < PART_GROUPS; group++)
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int half = 0; half < 2; half++) weights[group][tile][half] = transpose_8x8(weights[group][tile][half]);
  value_products(stage, first, weights, lane, sums.output);
}

// A stage, whose first token is `token`.
__device__ __forceinline__ void attend(const Arguments& a, Shared& shared, const u8* stage, int token, const RowConstants& rows,
                                       KeyOffset& offset, int lane, Accumulators& sums, SetAside& aside) {
#pragma unroll
  for (int first = 0; first < GROUPS; first += PART_GROUPS)
    attend_part(a, shared, stage, first, token + 16 * first, rows, offset, lane, sums, aside);
  aside.after_stage(sums, lane);
}

// 8 rows of a warp's sums of a segment to where those of all warps are added up.
__device__ __forceinline__ void keep(Shared& shared, Accumulators& sums, int tile, int stage_warp, int row_group, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int column = 0; column < 2; column++) {
    float total = sums.total[tile][column], minima = sums.minima[tile][column];
#pragma unroll
    for (int step = 4; step < 32; step <<= 1) {
      total += __shfl_xor_sync(FULL_WARP, total, step);
      minima += __shfl_xor_sync(FULL_WARP, minima, step);
    }
    const int index = row_group * 8 + 2 * t + column;
    float* output = shared.output[stage_warp][index];
#pragma unroll
    for (int i = 0; i < V_TILES; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const ValueDim place(i, half, g);
        const float unit = __uint_as_float((127 + 24 - place.shift) << 23);
        output[place.dim] = fmaf(sums.output[i][tile][2 * half + column], unit, minima);
      }
    if (g == 0) {
      shared.total[stage_warp][index] = total;
      shared.top[stage_warp][index] = sums.reference[tile][column];
    }
  }
}
