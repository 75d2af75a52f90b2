// paged_attention.cu: from dot products to weights, and where a warp's sums go.
#pragma once

// Sums that were set aside, in global memory: where a warp reads a long part of a segment.
struct SetAside {
  const Arguments& a;
  int stages;  // since sums were last set aside
  bool used;

  __device__ __forceinline__ explicit SetAside(const Arguments& a) : a(a), stages(0), used(false) {}

  template <class Each>
  __device__ __forceinline__ void for_sums(int lane, const Each& each) {
    const u32 warp = blockIdx.x * NUM_WARPS + threadIdx.x / 32;
    float4* place = (float4*)a.aside + warp * (PASS_ROWS * 4 * SUM_TILES) + lane;
#pragma unroll
    for (int i = 0; i < SUM_TILES; i++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
        each(i, tile, place + (i * TILES + tile) * 32);
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
  float v_scale[PART_GROUPS][2], v_middle[PART_GROUPS][2];  // v_middle: the value of code MIDDLE
};

// Those of a group of 16 tokens; stage: with the lane's place added.
__device__ __forceinline__ void load_meta(const u8* stage, int of_stage, float unit, int group, TokenMeta& meta) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const u8* row = stage + 8 * half * Piece::META_ROW;
    const float2 k_meta = unpack_fp16(*(const u32*)(row + group_place(of_stage, Piece::K_META, Piece::META_ROW)));
    const float2 v_meta = unpack_fp16(*(const u32*)(row + group_place(of_stage, Piece::V_META, Piece::META_ROW)));
    meta.k_scale[group][half] = k_meta.x * (unit * (1.0f / CODE_UNIT));
    meta.k_minimum[group][half] = k_meta.y * unit;
    meta.v_scale[group][half] = v_meta.x;
    meta.v_middle[group][half] = fmaf(v_meta.x, MIDDLE, v_meta.y);
  }
}

// A logit to base 2, from its dot product.
__device__ __forceinline__ float logit_of(float dot, float sum, const TokenMeta& meta, int group, int half) {
  return fmaf(dot, meta.k_scale[group][half], meta.k_minimum[group][half] * sum);
}

// What a row's reference has to be for its largest weight among a warp's tokens to be 2^WEIGHT_EXPONENT.
__device__ __forceinline__ void largest_weights(const float (&dots)[PART_GROUPS][TILES][4], const TokenMeta& meta,
                                                const RowConstants& rows, float (&top)[TILES][2]) {
  float log_scale[PART_GROUPS][2];
#pragma unroll
  for (int group = 0; group < PART_GROUPS; group++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      log_scale[group][half] = fmaxf(log2_approx(meta.v_scale[group][half]), MIN_LOG_SCALE) - (float)WEIGHT_EXPONENT;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int column = 0; column < 2; column++) {
      float most = NOTHING;
#pragma unroll
      for (int group = 0; group < PART_GROUPS; group++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float logit = logit_of(dots[group][tile][2 * half + column], rows.sum[tile][column], meta, group, half);
          most = fmaxf(most, logit + log_scale[group][half]);
        }
#pragma unroll
      for (int step = 4; step < 32; step <<= 1) most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, step));
      top[tile][column] = most;
    }
}

// References to `top` where that is higher.
__device__ __forceinline__ void raise_references(const float (&top)[TILES][2], int lane, Accumulators& sums, SetAside& aside) {
  float decay[TILES][2];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int column = 0; column < 2; column++) {
      const float reference = fmaxf(sums.reference[tile][column], top[tile][column]);
      decay[tile][column] = exp2_approx(sums.reference[tile][column] - reference);
      sums.reference[tile][column] = reference;
      sums.total[tile][column] *= decay[tile][column];
      sums.middles[tile][column] *= decay[tile][column];
#pragma unroll
      for (int i = 0; i < SUM_TILES; i++) {
        sums.output[i][tile][column] *= decay[tile][column];
        sums.output[i][tile][2 + column] *= decay[tile][column];
      }
    }
  aside.decay(decay, lane);
}

// Tokens that rows do not see, in a part that begins with token `token`.
__device__ __forceinline__ void mask(const Shared& shared, int token, const RowConstants& rows, int lane, TokenMeta& meta,
                                     float (&dots)[PART_GROUPS][TILES][4]) {
  const int g = lane / 4, t = lane % 4;
  const Cursor& cursor = shared.cursors[shared.segment % 2];
  const int len = cursor.request.len, seen_by_first = len - cursor.request.num_queries + 1;
#pragma unroll
  for (int group = 0; group < PART_GROUPS; group++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int position = token + group * (16 * TEAM_WARPS) + token_of_row(g) + 8 * half;
      // What stands beyond the request, or in blocks that left its window, may be any bits.
      bool absent = position >= len;
#if WINDOW
      absent |= position < rows.seen_by_all - WINDOW;
#endif
      if (absent) {
        meta.k_scale[group][half] = 1.0f;
        meta.k_minimum[group][half] = meta.v_scale[group][half] = meta.v_middle[group][half] = 0.0f;
      }
      // So that -inf stays that.
      meta.k_scale[group][half] = fmaxf(meta.k_scale[group][half], 1e-30f);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int column = 0; column < 2; column++) {
          const int row = cursor.pass * PASS_ROWS + 8 * tile + 2 * t + column;
          const int limit = min(seen_by_first + row / GROUP, len);  // tokens that the row sees
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

// What besides dot products decides about a part's weights: the key offset, the cap, and which tokens are seen. `first`: the
// part's first group in its stage.
__device__ __forceinline__ void finish_logits(const Arguments& a, Shared& shared, int first, int token, const RowConstants& rows,
                                              KeyOffset& offset, int lane, TokenMeta& meta, float (&dots)[PART_GROUPS][TILES][4]) {
#if OFFSET_PAIRS || SOFT_CAP
  {
    // Dot products become logits.
    float offsets[PART_GROUPS][TILES][4] = {};
    if constexpr (TEAM_WARPS == 1) {
      offset.products(a, token, first / 2, (first + PART_GROUPS) % constant_min(GROUPS, 2) == 0, lane, offsets);
    } else {
#pragma unroll
      for (int group = 0; group < PART_GROUPS; group++)
        offset.products(a, token, group, true, lane, *(float(*)[1][TILES][4])&offsets[group]);
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int column = 0; column < 2; column++) {
        const int row = 8 * tile + lane % 4 * 2 + column;
#pragma unroll
        for (int group = 0; group < PART_GROUPS; group++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            float& dot = dots[group][tile][2 * half + column];
            dot = logit_of(dot, rows.sum[tile][column], meta, group, half);
            if constexpr (OFFSET_PAIRS > 0)
              dot = fmaf(offsets[group][tile][2 * half + column], shared.folded.offset_factor[row], dot);
#if SOFT_CAP
            dot = capped(a, dot);
#endif
          }
      }
#pragma unroll
    for (int group = 0; group < PART_GROUPS; group++)
#pragma unroll
      for (int half = 0; half < 2; half++) meta.k_scale[group][half] = 1.0f, meta.k_minimum[group][half] = 0.0f;
  }
#endif
  bool partly_seen = token + 16 * (TEAM_WARPS * (PART_GROUPS - 1) + 1) > rows.seen_by_all;
#if WINDOW
  partly_seen |= token < rows.seen_by_all + PASS_ROWS - WINDOW;
#endif
#if SKIP_FIRST
  partly_seen |= token < SKIP_FIRST;
#endif
  if (partly_seen) mask(shared, token, rows, lane, meta, dots);
}

// Sums that a part's tokens make, until they are accepted.
struct Sums {
  float total[TILES][2], middles[TILES][2];
};

// Weights of a part's tokens relative to the references, two rows in a word, and the sums with them. Whether references have to
// rise.
__device__ __forceinline__ bool weigh(const float (&dots)[PART_GROUPS][TILES][4], const TokenMeta& meta, const RowConstants& rows,
                                      const Accumulators& sums, u32 (&weights)[PART_GROUPS][TILES][2], Sums& next) {
  float all = 0.0f;
  u32 largest = 0;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
    for (int column = 0; column < 2; column++)
      next.total[tile][column] = sums.total[tile][column], next.middles[tile][column] = sums.middles[tile][column];
#pragma unroll
    for (int group = 0; group < PART_GROUPS; group++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float weight[2];
#pragma unroll
        for (int column = 0; column < 2; column++) {
          const float start = fmaf(meta.k_minimum[group][half], rows.sum[tile][column], -sums.reference[tile][column]);
          const float p = exp2_approx(fmaf(dots[group][tile][2 * half + column], meta.k_scale[group][half], start));
          next.total[tile][column] += p;
          next.middles[tile][column] = fmaf(p, meta.v_middle[group][half], next.middles[tile][column]);
          weight[column] = p * meta.v_scale[group][half];
        }
        weights[group][tile][half] = pack_fp16(weight[0], weight[1]);
        if constexpr (TEAM_WARPS > 1 && MIDDLE > 0.0f) {
          const float2 rounded = unpack_fp16(weights[group][tile][half]);
          next.middles[tile][0] = fmaf(-MIDDLE, rounded.x, next.middles[tile][0]);
          next.middles[tile][1] = fmaf(-MIDDLE, rounded.y, next.middles[tile][1]);
        }
        largest = max_fp16(largest, weights[group][tile][half]);
      }
    all += next.total[tile][0] + next.total[tile][1];
  }
  // 2^15 and more, infinity too.
  return (largest + 0x08000800u & 0x80008000u) || !(all <= MAX_TOTAL);
}

__device__ __forceinline__ void accept(const Sums& next, Accumulators& sums) {
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int column = 0; column < 2; column++)
      sums.total[tile][column] = next.total[tile][column], sums.middles[tile][column] = next.middles[tile][column];
}

// The dimension that rows g (half 0) and g + 8 of a tile stand for, and by how many bits its codes are shifted.
struct ValueDim {
  int dim, shift;

  __device__ __forceinline__ ValueDim(int tile, int half, int g) {
    const int unit = tile / V_FIELDS, spread = 2 * (tile % V_FIELDS) + half;
    const int byte = spread / V_FIELDS, field = spread % V_FIELDS;
    dim = (unit / V_RUN * 8 + g) * (2 * V_RUN) + unit % V_RUN * 2 + byte + field * V_FIELD;
    // A team moves what is beyond its first tile's fields of a unit down.
    const bool moved = TEAM_WARPS > 1 && WARP_V_TILES < V_FIELDS;
    shift = moved ? (2 * (tile % WARP_V_TILES) + half) * V_BITS : ValueCodes::spread_shift(spread);
  }
};

// 8 rows of a warp's sums of a segment to where those of all warps are added up.
__device__ __forceinline__ void keep(Shared& shared, const Accumulators& sums, int tile, int warp, int lane) {
  const int g = lane / 4, t = lane % 4, first = warp % TEAM_WARPS * WARP_V_TILES;
#pragma unroll
  for (int column = 0; column < 2; column++) {
    float total = sums.total[tile][column], minima = sums.middles[tile][column];
#pragma unroll
    for (int step = 4; step < 32; step <<= 1) {
      total += __shfl_xor_sync(FULL_WARP, total, step);
      minima += __shfl_xor_sync(FULL_WARP, minima, step);
    }
    if constexpr (TEAM_WARPS == 1) minima -= MIDDLE * sums.output[WARP_V_TILES][tile][column];
    const int index = 2 * t + column;
    float* output = shared.output[warp / TEAM_WARPS][index];
#pragma unroll
    for (int i = 0; i < WARP_V_TILES; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const ValueDim place(first + i, half, g);
        output[place.dim] = sums.output[i][tile][2 * half + column] * __uint_as_float((127 + 24 - place.shift) << 23);
      }
    if (g == 0) {
      shared.total[warp][index] = total;
      shared.minima[warp][index] = minima;
      shared.top[warp / TEAM_WARPS][index] = sums.reference[tile][column];
    }
  }
}
