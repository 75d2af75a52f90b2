// paged_attention.cu: queries in the frame of the stored keys, as fp16 numbers.
#pragma once

// Where a number of a row's query stands, in bytes from the row's first matrix, and by how many bits its codes are shifted.
struct QueryPlace {
  int at, shift;

  __device__ __forceinline__ explicit QueryPlace(int dim) {
    const int field = dim / K_FIELD, byte = dim % K_FIELD, word = byte / 4;
    // load_key_words gives the word to lane t as its number i; CodeFormat::spread makes words of 2 numbers of its bytes.
    const int t = word / K_RUN % 4, i = word / (4 * K_RUN) * K_RUN + word % K_RUN;
    const int spread = byte % 2 * K_FIELDS + field, high = byte / 2 % 2;
    const int index = i * 2 * K_FIELDS + spread;
    at = index / 2 * (TILES * 256) + index % 2 * 128 + (2 * t + high) * 2;
    shift = KeyCodes::spread_shift(spread);
  }
};

// All rows of a segment; every warp reads them after the CTA's next barrier.
__device__ __forceinline__ void fold_rows(const Arguments& a, Shared& shared, const Cursor& cursor, int warp, int lane) {
  constexpr int ROWS = (PASS_ROWS + NUM_WARPS - 1) / NUM_WARPS;
  float x[ROWS][NUMBERS], offset_unit[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int row = warp + i * NUM_WARPS;
    if (PASS_ROWS % NUM_WARPS && row >= PASS_ROWS) break;
    const bool present = query_row(a, cursor, row) != nullptr;
    const u16* raw = shared.raw_query[shared.segment % 2][row];
#pragma unroll
    for (int j = 0; j < NUMBERS; j++) x[i][j] = present ? load_query(raw + j * 32 + lane) : 0.0f;
    offset_unit[i] = fold_offset(shared.offset, raw, present, shared.segment % 2, row, warp, lane);
#if KEY_EQUALIZATION
#pragma unroll
    for (int j = 0; j < NUMBERS; j++) x[i][j] *= a.equalization[cursor.kv_head * HEAD_SIZE + j * 32 + lane];
#endif
#if KEY_HADAMARD
    hadamard_row(x[i], lane);
#endif
    float largest = 0.0f;
#pragma unroll
    for (int j = 0; j < NUMBERS; j++) largest = fmaxf(largest, fabsf(x[i][j]));
    largest = warp_max(largest);
    if (lane == 0) shared.folded.largest[row] = largest;
  }
  __syncthreads();
  float largest = 1e-30f;
#pragma unroll
  for (int row = 0; row < PASS_ROWS; row += 32)
    if (PASS_ROWS % 32 == 0 || row + lane < PASS_ROWS) largest = fmaxf(largest, shared.folded.largest[row + lane]);
  const u32 exponent = (__float_as_uint(warp_max(largest)) >> 23) - QUERY_EXPONENT;
  const float unit = __uint_as_float(exponent << 23), inverse = __uint_as_float((254 - exponent) << 23);
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int row = warp + i * NUM_WARPS;
    if (PASS_ROWS % NUM_WARPS && row >= PASS_ROWS) break;
    const int tile = row / 8;
    u8* matrices[TERMS];
#pragma unroll
    for (int term = 0; term < TERMS; term++)
      matrices[term] = &shared.folded.matrices[term][0][tile][0][row % 8 * 16];
    if constexpr (K_WORDS_ROW % 4) {  // words that the row does not have
#pragma unroll
      for (int term = 0; term < TERMS; term++)
        for (int matrix = lane; matrix < 2 * K_STEPS; matrix += 32)
          *(uint4*)(matrices[term] + matrix / 2 * (TILES * 256) + matrix % 2 * 128) = make_uint4(0, 0, 0, 0);
      __syncwarp();
    }
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < NUMBERS; j++) {
      const QueryPlace place(j * 32 + lane);
      const float factor = __uint_as_float((127 - place.shift) << 23), back = __uint_as_float((127 + place.shift) << 23);
      float rest = x[i][j] * inverse * factor;
#pragma unroll
      for (int term = 0; term < TERMS; term++) {
        const u16 rounded = to_fp16(rest);
        *(u16*)(matrices[term] + place.at) = rounded;
        sum = fmaf(from_fp16(rounded), back, sum);
        rest -= from_fp16(rounded);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      shared.folded.sum[row] = sum;
      shared.folded.unit = unit * a.scale_log2;
      if constexpr (OFFSET_PAIRS > 0) shared.folded.offset_factor[row] = offset_unit[i] * a.scale_log2;
    }
  }
  if constexpr (TEAM_WARPS > 1) fence_async_proxy();
}

__device__ __forceinline__ void load_rows(const Shared& shared, const Request& request, int pass, int warp, int lane,
                                          RowConstants& rows) {
#if TEAM_WARPS == 1
  if constexpr (QUERY_STAYS)
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) load_query_step(shared.folded, 0, step, lane, rows.query[step]);
#else
  rows.query = GroupOperand(shared.folded.matrices);
  rows.weights = GroupOperand(shared.teams.weights[warp / TEAM_WARPS]);
#endif
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int column = 0; column < 2; column++) rows.sum[tile][column] = shared.folded.sum[8 * tile + lane % 4 * 2 + column];
  rows.unit = shared.folded.unit;
  rows.seen_by_all = request.len - request.num_queries + 1 + pass * PASS_ROWS / GROUP;
}
