// paged_attention.cu: what a team of 4 warps does with its stages: products by the matrix instructions of a warp group.
//
// A warp has every fourth group of 16 tokens of a stage for the first product, and a fourth of the dimensions for the second. In
// between weights go through shared memory, so references are the team's.
#pragma once

// Dot products of 16 tokens with all rows, as key_products of a warp alone leaves them; they run on.
//   keys: with the lane's place added. query: where B operands of the first step stand.
__device__ __forceinline__ void start_key_products(const u8* keys, GroupOperand query, u32 (&codes)[2][K_WORDS][2 * K_FIELDS],
                                                   float (&dots)[TILES][4]) {
  u32 words[2][K_WORDS];
  load_key_words(keys, words);
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int i = 0; i < K_WORDS; i++) KeyCodes::spread(words[half][i], codes[half][i]);
  group_mma_fence();
#pragma unroll
  for (int term = TERMS - 1; term >= 0; term--)
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
      const int i = step / K_FIELDS, field = step % K_FIELDS;
      const u32 a[4] = {codes[0][i][2 * field], codes[1][i][2 * field], codes[0][i][2 * field + 1], codes[1][i][2 * field + 1]};
      const GroupOperand b = query.further((term * K_STEPS + step) * TILES * 256);
      if (term == TERMS - 1 && step == 0)
        group_mma<false>(dots, a[0], a[1], a[2], a[3], b);
      else
        group_mma<true>(dots, a[0], a[1], a[2], a[3], b);
    }
  group_mma_commit();
}

// A operands of the second product, of a warp's tiles and 16 tokens.
struct TeamValues {
  static constexpr bool WHOLE_UNITS = WARP_V_TILES >= V_FIELDS;
  static_assert(WARP_V_TILES % V_FIELDS == 0 || V_FIELDS % WARP_V_TILES == 0, "a warp's tiles are of whole bytes, or of one");
  static constexpr int UNITS = WHOLE_UNITS ? WARP_V_TILES / V_FIELDS : 1;
  static __device__ __forceinline__ int first_unit(int member) { return member * WARP_V_TILES / V_FIELDS; }

  u32 codes[4][WARP_V_TILES][4];

  // Of 4 groups of tokens from `first`.
  __device__ __forceinline__ void load(const u8* stage, const LanePlaces& places, int first, int member) {
#pragma unroll
    for (int group = 0; group < 4; group += 2)
#pragma unroll
      for (int unit = 0; unit < UNITS; unit++) {
        u32 four[4];
        load_transposed(four, stage + places.values[0] + group_place(first + group, Piece::V_CODES, V_ROW) + unit * 16);
#pragma unroll
        for (int i = 0; i < 4; i++) spread(four[i], unit, member, codes[group + i / 2], i % 2);
      }
  }

  static __device__ __forceinline__ void spread(u32 word, int unit, int member, u32 (&of_tiles)[WARP_V_TILES][4], int half) {
    if constexpr (WHOLE_UNITS) {
      u32 halves[2 * V_FIELDS];
      ValueCodes::spread(word, halves);
#pragma unroll
      for (int i = 0; i < 2 * V_FIELDS; i++) of_tiles[unit * V_FIELDS + i / 2][2 * half + i % 2] = halves[i];
    } else {
      word >>= member * WARP_V_TILES % V_FIELDS * (2 * V_BITS);
#pragma unroll
      for (int i = 0; i < 2 * WARP_V_TILES; i++)
        of_tiles[i / 2][2 * half + i % 2] = word & (0x00010001u * ValueCodes::LEVELS) << (i * V_BITS);
    }
  }
};

// Sets the team's references by the largest weights among all its tokens.
__device__ __forceinline__ void raise_team_references(Shared& shared, const float (&dots)[PART_GROUPS][TILES][4],
                                                      const TokenMeta& meta, const RowConstants& rows, int warp, int lane,
                                                      Accumulators& sums, SetAside& aside) {
  float top[TILES][2];
  largest_weights(dots, meta, rows, top);
  const int team = warp / TEAM_WARPS;
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

// A stage, whose first token is `token`.
__device__ __forceinline__ void attend(const Arguments& a, Shared& shared, const u8* stage, int token, const RowConstants& rows,
                                       KeyOffset& offset, const LanePlaces& places, int warp, int lane, Accumulators& sums,
                                       SetAside& aside) {
  const int team = warp / TEAM_WARPS, member = warp % TEAM_WARPS;
  float dots[PART_GROUPS][TILES][4];
  TokenMeta meta;
  u32 codes[PART_GROUPS][2][K_WORDS][2 * K_FIELDS];
#pragma unroll
  for (int group = 0; group < PART_GROUPS; group++) {
    start_key_products(stage + places.keys + group_place(group * TEAM_WARPS, 0, K_ROW), rows.query, codes[group], dots[group]);
    load_meta(stage + places.meta, group * TEAM_WARPS, rows.unit, group, meta);
  }
  group_mma_wait();
#pragma unroll
  for (int group = 0; group < PART_GROUPS; group++) hold(dots[group]);
  finish_logits(a, shared, member, token + member * 16, rows, offset, lane, meta, dots);
  u32 weights[PART_GROUPS][TILES][2];
  Sums next;
  while (true) {
    const bool surpassed = weigh(dots, meta, rows, sums, weights, next);
#pragma unroll
    for (int group = 0; group < PART_GROUPS; group++) {
      u8* matrices = shared.teams.weights[team][group * TEAM_WARPS + member][0][0];
#pragma unroll
      for (int tile = 0; tile + 1 < TILES; tile += 2)
        store_transposed(matrices + tile * 256 + lane * 16, weights[group][tile][0], weights[group][tile][1],
                         weights[group][tile + 1][0], weights[group][tile + 1][1]);
      if constexpr (TILES % 2)
        store_transposed(matrices + (TILES - 1) * 256 + lane % 16 * 16, weights[group][TILES - 1][0],
                         weights[group][TILES - 1][1]);
    }
    fence_async_proxy();
    if (!meet_warps_any(1 + team, 32 * TEAM_WARPS, surpassed)) break;
    raise_team_references(shared, dots, meta, rows, warp, lane, sums, aside);
  }
  accept(next, sums);
  TeamValues values[PART_GROUPS];
#pragma unroll
  for (int tile = 0; tile < WARP_V_TILES; tile++) hold(sums.output[tile]);
#pragma unroll
  for (int part = 0; part < PART_GROUPS; part++) {
    values[part].load(stage, places, part * 4, member);
    group_mma_fence();
#pragma unroll
    for (int tile = 0; tile < WARP_V_TILES; tile++)
#pragma unroll
      for (int group = 0; group < 4; group++) {
        const u32(&a)[4] = values[part].codes[group][tile];
        group_mma<true>(sums.output[tile], a[0], a[1], a[2], a[3], rows.weights.further((part * 4 + group) * TILES * 256));
      }
    group_mma_commit();
  }
  group_mma_wait();
#pragma unroll
  for (int tile = 0; tile < WARP_V_TILES; tile++) hold(sums.output[tile]);
  aside.after_stage(sums, lane);
}
