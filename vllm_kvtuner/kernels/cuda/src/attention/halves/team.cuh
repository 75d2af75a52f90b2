// paged_attention.cu: what a team of 4 warps does with its stages: products by the matrix instructions of a warp group.
//
// A warp has 16 of a stage's 64 tokens for the first product, and WARP_V_TILES / V_TILES of the dimensions for the second. In between
// weights go through shared memory, so references are the team's.
#pragma once

// Dot products of a warp's 16 tokens with all rows, as key_products of a warp alone leaves them.
__device__ __forceinline__ void key_products(const FoldedQueries& folded, const u8* keys, int lane, float (&dots)[TILES][4]) {
  u32 words[2][K_WORDS], codes[2][K_WORDS][2 * K_FIELDS];
  load_key_words(keys, lane, words);
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int i = 0; i < K_WORDS; i++) KeyCodes::spread(words[half][i], codes[half][i]);
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int j = 0; j < 4; j++) dots[tile][j] = 0.0f;
  hold(dots);
  group_mma_fence();
#pragma unroll
  for (int term = TERMS - 1; term >= 0; term--)
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
      const int i = step / K_FIELDS, field = step % K_FIELDS;
      group_mma(dots, codes[0][i][2 * field], codes[1][i][2 * field], codes[0][i][2 * field + 1], codes[1][i][2 * field + 1],
                matrices_of(folded.matrices[term][step]), true);
    }
  group_mma_commit();
  group_mma_wait();
  hold(dots);
}

// Values of 16 tokens in a warp's tiles, for A operands.
struct TeamValues {
  static constexpr bool WHOLE_UNITS = WARP_V_TILES >= V_FIELDS;
  static constexpr int UNITS = WHOLE_UNITS ? WARP_V_TILES / V_FIELDS : 1;
  u32 words[GROUPS][UNITS][2];

  __device__ __forceinline__ void load(const u8* stage, int member, int lane) {
    const int first = member * WARP_V_TILES / V_FIELDS;
#pragma unroll
    for (int group = 0; group < GROUPS; group += 2) {
      const u8* row = value_row(stage, group + lane / 16, token_of_row(lane % 8) + lane / 8 % 2 * 8) + first * 16;
#pragma unroll
      for (int unit = 0; unit < UNITS; unit++) {
        u32 four[4];
        load_transposed(four, row + unit * 16);
        words[group][unit][0] = four[0], words[group][unit][1] = four[1];
        words[group + 1][unit][0] = four[2], words[group + 1][unit][1] = four[3];
      }
    }
  }

  // A operands of a tile of the warp's.
  __device__ __forceinline__ void operands(int group, int tile, int member, u32 (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if constexpr (WHOLE_UNITS) {
        u32 codes[2 * V_FIELDS];
        ValueCodes::spread(words[group][tile / V_FIELDS][half], codes);
        a[2 * half] = codes[2 * (tile % V_FIELDS)], a[2 * half + 1] = codes[2 * (tile % V_FIELDS) + 1];
      } else {
        const u32 word = words[group][0][half] >> (member * WARP_V_TILES % V_FIELDS * (2 * V_BITS));
        constexpr u32 LOWEST = 0x00010001u * ValueCodes::LEVELS;
        a[2 * half] = word & LOWEST << (2 * tile * V_BITS), a[2 * half + 1] = word & LOWEST << ((2 * tile + 1) * V_BITS);
      }
    }
  }
};

__device__ __forceinline__ void value_products(const u8* const (&weights)[GROUPS], const TeamValues& values, int member,
                                               float (&output)[WARP_V_TILES][TILES][4]) {
  u32 a[WARP_V_TILES][GROUPS][4];
#pragma unroll
  for (int tile = 0; tile < WARP_V_TILES; tile++)
#pragma unroll
    for (int group = 0; group < GROUPS; group++) values.operands(group, tile, member, a[tile][group]);
#pragma unroll
  for (int tile = 0; tile < WARP_V_TILES; tile++) hold(output[tile]);
  group_mma_fence();
#pragma unroll
  for (int tile = 0; tile < WARP_V_TILES; tile++)
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
      group_mma(output[tile], a[tile][group][0], a[tile][group][1], a[tile][group][2], a[tile][group][3],
                matrices_of(weights[group]), true);
  group_mma_commit();
  group_mma_wait();
#pragma unroll
  for (int tile = 0; tile < WARP_V_TILES; tile++) hold(output[tile]);
}

// A stage, whose first token is `token`.
__device__ __forceinline__ void attend(const Arguments& a, Shared& shared, const u8* stage, int token, const RowConstants& rows,
                                       KeyOffset& offset, int warp, int lane, Accumulators& sums, SetAside& aside) {
  const int team = warp / TEAM_WARPS, member = warp % TEAM_WARPS;
  const int place = member * 16;
  const u8* piece = stage + place / PIECE_TOKENS * Piece::BYTES;
  float dots[1][TILES][4];
  TokenMeta meta;
  key_products(shared.folded, piece + place % PIECE_TOKENS * K_ROW, lane, dots[0]);
  load_meta(piece, place % PIECE_TOKENS, rows.unit, 0, lane, meta);
  finish_logits(a, shared, member, token + place, rows, offset, lane, meta, dots);
  u32 weights[1][TILES][2];
  Sums next;
  while (true) {
    const bool surpassed = weigh(dots, meta, rows, sums, weights, next);
#pragma unroll
    for (int tile = 0; tile < TILES; tile += 2) {
      u8* matrices = shared.teams.weights[team][member][tile][0];
      if constexpr (TILES % 2 == 0)
        store_transposed(matrices + lane * 16, weights[0][tile][0], weights[0][tile][1], weights[0][(tile + 1) % TILES][0],
                         weights[0][(tile + 1) % TILES][1]);
      else
        store_transposed(matrices + lane % 16 * 16, weights[0][tile][0], weights[0][tile][1]);
    }
    fence_async_proxy();
    if (!meet_warps_any(1 + team, 32 * TEAM_WARPS, surpassed)) break;
    float top[TILES][2];
    largest_weights(dots, meta, rows, top);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int column = 0; column < 2; column++)
        if (lane < 4) shared.teams.top[warp][8 * tile + 2 * lane + column] = top[tile][column];
    meet_team(team);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int column = 0; column < 2; column++)
#pragma unroll
        for (int i = 0; i < TEAM_WARPS; i++)
          top[tile][column] = fmaxf(top[tile][column], shared.teams.top[team * TEAM_WARPS + i][8 * tile + lane % 4 * 2 + column]);
    raise_references(top, lane, sums, aside);
  }
  accept(next, sums);
  TeamValues values;
  values.load(stage, member, lane);
  const u8* of_groups[GROUPS];
#pragma unroll
  for (int group = 0; group < GROUPS; group++) of_groups[group] = shared.teams.weights[team][group][0][0];
  value_products(of_groups, values, member, sums.output);
  aside.after_stage(sums, lane);
}
