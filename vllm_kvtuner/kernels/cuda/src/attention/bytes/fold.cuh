// paged_attention.cu: queries in the frame of the stored keys, in fixed point.
#pragma once

// A row of the query into the frame of the stored keys, in 16-bit fixed point; by one warp.
__device__ __forceinline__ void fold_row(const Arguments& a, Shared& shared, const Cursor& cursor, int row, int warp,
                                         int lane) {
  const int kv_head = cursor.kv_head;
  float x[NUMBERS];
  const u16* source = query_row(a, cursor, row);
  const bool present = source != nullptr;
  const u16* raw = shared.raw_query[shared.segment % 2][row];
#pragma unroll
  for (int i = 0; i < NUMBERS; i++) x[i] = present ? load_query(raw + i * 32 + lane) : 0.0f;
  const float offset_unit = fold_offset(shared.offset, raw, present, shared.segment % 2, row, warp, lane);
#if KEY_EQUALIZATION
#pragma unroll
  for (int i = 0; i < NUMBERS; i++) x[i] *= a.equalization[kv_head * HEAD_SIZE + i * 32 + lane];
#endif
#if KEY_HADAMARD
  hadamard_row(x, lane);
#endif
  // Bytes hold a field and those below it. So what a field's number is multiplied by is taken off where the field above, of the
  // same byte, is multiplied too: sum of q_f c_f = sum of (q_f - q_(f + 1) / 2^K_SHIFT) (c_f + what stands below it).
  constexpr int FIELD = CUMULATIVE_KEYS ? K_FIELD / 32 : NUMBERS;
#pragma unroll
  for (int i = 0; i + FIELD < NUMBERS; i++) x[i] -= x[i + FIELD] * (1.0f / (float)(1 << K_SHIFT));
  float absmax = 0.0f;
#pragma unroll
  for (int i = 0; i < NUMBERS; i++) absmax = fmaxf(absmax, fabsf(x[i]));
  absmax = fmaxf(warp_max(absmax), 1e-30f);
  // 32512 = 127 * 256: the high byte rounds to at most 127. A power of two leaves a 16-bit number as it is unless it is less than
  // 2^-7 (bf16) or 2^-4 (fp16) of the largest; rotated and scaled ones have no such form.
#if KEY_HADAMARD || KEY_EQUALIZATION
  const float unit = absmax * (1.0f / 32512.0f);
#else
  const float unit = __uint_as_float(((__float_as_uint(absmax * (32768.0f / 32512.0f)) >> 23) - 14) << 23);
#endif
  const float inverse = 1.0f / unit;
  float sum = 0.0f;
  u8* high = shared.folded.query[row / 4][2 * (row % 4)];
#pragma unroll
  for (int i = 0; i < NUMBERS; i++) {
    int fixed = __float2int_rn(x[i] * inverse);
    // With its share in the fields below.
    float shares = 1.0f;
#pragma unroll
    for (int below = 0; below < i / FIELD; below++) shares = fmaf(shares, 1.0f / (float)(1 << K_SHIFT), 1.0f);
    sum = fmaf((float)fixed, shares, sum);
    high[i * 32 + lane] = (u8)((fixed + 128) >> 8);
    high[QUERY_STRIDE + i * 32 + lane] = (u8)fixed;
  }
  sum = warp_sum(sum);
  if (lane == 0) {
    constexpr float HIGHEST = (float)(1 << ((K_FIELDS - 1) * K_SHIFT));
    shared.folded.unit[row] = unit * a.scale_log2 / HIGHEST;
    shared.folded.sum[row] = sum * HIGHEST;
    if constexpr (OFFSET_PAIRS > 0) shared.folded.offset_factor[row] = offset_unit / unit * HIGHEST;
  }
}

// All rows of a segment; every warp reads them after the CTA's next barrier.
__device__ __forceinline__ void fold_rows(const Arguments& a, Shared& shared, const Cursor& cursor, int warp, int lane) {
  for (int row = warp; row < PASS_ROWS; row += NUM_WARPS) fold_row(a, shared, cursor, row, warp, lane);
}

__device__ __forceinline__ void load_rows(const Shared& shared, const Request& request, int pass, int, int lane,
                                          RowConstants& rows) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
    for (int field = 0; field < K_FIELDS; field++)
#pragma unroll
      for (int i = 0; i < K_WORDS; i++) {
        const int word = i / K_RUN * 4 * K_RUN + t * K_RUN + i % K_RUN;
        rows.query[tile][field][i] = 0;
        if (K_WORDS_ROW % 4 == 0 || word < K_WORDS_ROW)
          rows.query[tile][field][i] = *(const u32*)&shared.folded.query[tile][g][4 * word + field * K_FIELD];
      }
    const int row = 4 * tile + t;
    rows.unit[tile] = shared.folded.unit[row];
    rows.sum[tile] = shared.folded.sum[row];
    if constexpr (OFFSET_PAIRS > 0) rows.offset_factor[tile] = shared.folded.offset_factor[row];
    int query, member;
    row_of(request, pass, row, query, member);
    rows.limit[tile] = min(request.len - request.num_queries + 1 + query, request.len);
  }
  rows.len = request.len;
  rows.seen_by_all = request.len - request.num_queries + 1 + pass * PASS_ROWS / GROUP;
}
