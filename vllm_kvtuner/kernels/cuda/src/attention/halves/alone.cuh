// paged_attention.cu: what a warp alone does with its stages: products by the matrix instructions of a warp.
#pragma once

// B operands of one step of the first product, of all this warp's rows.
__device__ __forceinline__ void load_query_step(const FoldedQueries& folded, int term, int step, int lane,
                                                u32 (&query)[TILES][2]) {
  const u8* matrices = folded.matrices[term][step][0][0];
  if constexpr (TILES == 1) {
    load_matrices(query[0], matrices + lane % 16 * 16);
  } else {
#pragma unroll
    for (int tile = 0; tile < TILES; tile += 2) {
      u32 four[4];
      load_matrices(four, matrices + tile * 256 + lane * 16);
      query[tile][0] = four[0], query[tile][1] = four[1];
      query[tile + 1][0] = four[2], query[tile + 1][1] = four[3];
    }
  }
}

// Dot products of 16 tokens with all rows, in CODE_UNIT: lane (g, t) gets tokens token_of_row(g), in the first two numbers of a
// tile, and 8 more, each of rows 2 t and 2 t + 1 of the tile.
__device__ __forceinline__ void key_products(const FoldedQueries& folded, const u8* keys, const RowConstants& rows, int lane,
                                             float (&dots)[TILES][4]) {
  u32 words[2][K_WORDS];
  load_key_words(keys, words);
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int j = 0; j < 4; j++) dots[tile][j] = 0.0f;
#pragma unroll
  for (int i = 0; i < K_WORDS; i++) {
    u32 codes[2][2 * K_FIELDS];
#pragma unroll
    for (int half = 0; half < 2; half++) KeyCodes::spread(words[half][i], codes[half]);
#pragma unroll
    for (int field = 0; field < K_FIELDS; field++) {
      const int step = i * K_FIELDS + field;
#pragma unroll
      for (int term = TERMS - 1; term >= 0; term--) {
        u32 query[TILES][2];
        if (!QUERY_STAYS || term > 0) load_query_step(folded, term, step, lane, query);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          const bool here = QUERY_STAYS && term == 0;
          const u32 b0 = here ? rows.query[step % (QUERY_STAYS ? K_STEPS : 1)][tile][0] : query[tile][0];
          const u32 b1 = here ? rows.query[step % (QUERY_STAYS ? K_STEPS : 1)][tile][1] : query[tile][1];
          mma_fp16(dots[tile], codes[0][2 * field], codes[1][2 * field], codes[0][2 * field + 1], codes[1][2 * field + 1], b0, b1);
        }
      }
    }
  }
}

// Words of values for A operands: words[group][unit][i] holds the unit's two bytes in this lane, of tokens token_of_row(2 t) and
// token_of_row(2 t + 1), or of 8 more.
struct ValueWords {
  u32 words[PART_GROUPS][V_RUN][2];

  // Run number `run` of the tokens of PART_GROUPS groups from `first`.
  __device__ __forceinline__ void load(const u8* stage, const LanePlaces& places, int first, int run) {
    if constexpr (VALUE_MATRICES && PART_GROUPS == 2) {
      u32 four[4];
      load_transposed(four, stage + group_place(first, Piece::V_CODES, V_ROW) + places.values[0] + run * 16);
      words[0][0][0] = four[0], words[0][0][1] = four[1];
      words[PART_GROUPS - 1][0][0] = four[2], words[PART_GROUPS - 1][0][1] = four[3];
    } else if constexpr (VALUE_MATRICES) {
      load_transposed(words[0][0], stage + group_place(first, Piece::V_CODES, V_ROW) + places.values[0] + run * 16);
    } else {
#pragma unroll
      for (int group = 0; group < PART_GROUPS; group++) {
        constexpr int WORDS = constant_max(V_RUN / 2, 1);
        u32 rows[4][WORDS];
#pragma unroll
        for (int i = 0; i < 4; i++)
          load_run<WORDS>(rows[i], stage + places.values[i % 2] + group_place(first + group, Piece::V_CODES, V_ROW) +
                                       i / 2 * 8 * V_ROW + run * 16 * V_RUN);
#pragma unroll
        for (int i = 0; i < V_RUN / 2; i++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            words[group][2 * i][half] = __byte_perm(rows[2 * half][i], rows[2 * half + 1][i], 0x5410);
            words[group][2 * i + 1][half] = __byte_perm(rows[2 * half][i], rows[2 * half + 1][i], 0x7632);
          }
      }
    }
  }
};

// The second product of PART_GROUPS groups of tokens from `first`. weights[group][tile]: B operands, in ValueWords's order
// of tokens.
__device__ __forceinline__ void value_products(const u8* stage, const LanePlaces& places, int first,
                                               const u32 (&weights)[PART_GROUPS][TILES][2],
                                               float (&output)[SUM_TILES][TILES][4]) {
#pragma unroll
  for (int group = 0; group < PART_GROUPS; group++)
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
      mma_fp16(output[WARP_V_TILES][tile], TWO_ONES, TWO_ONES, TWO_ONES, TWO_ONES, weights[group][tile][0], weights[group][tile][1]);
#pragma unroll
  for (int run = 0; run < V_UNITS / V_RUN; run++) {
    ValueWords values;
    values.load(stage, places, first, run);
#pragma unroll
    for (int unit = 0; unit < V_RUN; unit++)
#pragma unroll
      for (int group = 0; group < PART_GROUPS; group++) {
        u32 codes[2][2 * V_FIELDS];
#pragma unroll
        for (int half = 0; half < 2; half++) ValueCodes::spread(values.words[group][unit][half], codes[half]);
#pragma unroll
        for (int i = 0; i < V_FIELDS; i++)
#pragma unroll
          for (int tile = 0; tile < TILES; tile++)
            mma_fp16(output[(run * V_RUN + unit) * V_FIELDS + i][tile], codes[0][2 * i], codes[0][2 * i + 1], codes[1][2 * i],
                     codes[1][2 * i + 1], weights[group][tile][0], weights[group][tile][1]);
      }
  }
}

// PART_GROUPS groups of 16 tokens of a stage from `first`, which begin with token `token`; `place`: from where `places` point.
__device__ __forceinline__ void attend_part(const Arguments& a, Shared& shared, const u8* stage, int place, int first, int token,
                                            const RowConstants& rows, KeyOffset& offset, const LanePlaces& places, int lane,
                                            Accumulators& sums, SetAside& aside) {
  float dots[PART_GROUPS][TILES][4];
  TokenMeta meta;
#pragma unroll
  for (int group = 0; group < PART_GROUPS; group++) {
    key_products(shared.folded, stage + places.keys + group_place(place + group, 0, K_ROW), rows, lane, dots[group]);
    load_meta(stage + places.meta, place + group, rows.unit, group, meta);
  }
  finish_logits(a, shared, first, token, rows, offset, lane, meta, dots);
  u32 weights[PART_GROUPS][TILES][2];
  Sums next;
  while (__any_sync(FULL_WARP, weigh(dots, meta, rows, sums, weights, next))) {
    float top[TILES][2];
    largest_weights(dots, meta, rows, top);
    raise_references(top, lane, sums, aside);
  }
  accept(next, sums);
#pragma unroll
  for (int group = 0; group < PART_GROUPS; group++)
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int half = 0; half < 2; half++) weights[group][tile][half] = transpose_8x8(weights[group][tile][half]);
  value_products(stage, places, place, weights, sums.output);
}

// A stage, whose first token is `token`.
__device__ __forceinline__ void attend(const Arguments& a, Shared& shared, const u8* stage, int token, const RowConstants& rows,
                                       KeyOffset& offset, const LanePlaces& places, int, int lane, Accumulators& sums,
                                       SetAside& aside) {
  // One part's code where parts follow each other at even distances: what is seldom needed is in it too.
  constexpr bool EVEN = PIECE_TOKENS == 16 || PIECE_TOKENS == STAGE_TOKENS || PIECE_TOKENS == 16 * PART_GROUPS;
  if constexpr (EVEN) {
    LanePlaces of_part = places;
#pragma unroll 1
    for (int first = 0; first < GROUPS; first += PART_GROUPS) {
      attend_part(a, shared, stage, 0, first, token + 16 * first, rows, offset, of_part, lane, sums, aside);
      of_part.keys += group_place(PART_GROUPS, 0, K_ROW);
      of_part.meta += group_place(PART_GROUPS, 0, Chunk::META_ROW);
      of_part.values[0] += group_place(PART_GROUPS, 0, V_ROW);
      of_part.values[1] += group_place(PART_GROUPS, 0, V_ROW);
    }
  } else {
#pragma unroll
    for (int first = 0; first < GROUPS; first += PART_GROUPS)
      attend_part(a, shared, stage, first, first, token + 16 * first, rows, offset, places, lane, sums, aside);
  }
  aside.after_stage(sums, lane);
}
