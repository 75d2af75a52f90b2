// paged_attention.cu: how codes come from shared memory to registers.
#pragma once

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

// Where a group of 16 tokens stands in a stage, of what takes `width` bytes a token and begins at `part` of a piece.
__device__ __forceinline__ constexpr int group_place(int group, int part, int width) {
  return group * 16 / PIECE_TOKENS * Piece::BYTES + part + group * 16 % PIECE_TOKENS * width;
}

// The same for a lane's token or row of matrices, from the group's first token's keys.
__device__ __forceinline__ int key_place(int lane) {
  return K_MATRICES ? (token_of_row(lane % 8) + lane / 8 % 2 * 8) * K_ROW + (K_WORDS == 2 ? lane / 16 * 16 : 0)
                    : token_of_row(lane / 4) * K_ROW + lane % 4 * K_RUN * 4;
}

// What a lane adds to those places: computed once, and then the answer of a shuffle, since the compiler
// would compute it again and again.
struct LanePlaces {
  int keys, meta;  // of token token_of_row(g), or of the matrices of 16 tokens
  int values[2];   // of tokens token_of_row(2 t) and token_of_row(2 t + 1); or, first, of the matrices of 32 tokens

  // member: the group of 16 tokens of every 4 that the warp has in the first product, first_unit: of values that it has in the
  // second; 0 where it has all.
  __device__ __forceinline__ LanePlaces(int lane, int member, int first_unit, bool value_matrices) {
    const int g = lane / 4, t = lane % 4, row = token_of_row(lane % 8) + lane / 8 % 2 * 8;
    keys = key_place(lane) + group_place(member, 0, K_ROW);
    meta = token_of_row(g) * Chunk::META_ROW + group_place(member, 0, Chunk::META_ROW);
    values[0] = row * V_ROW + lane / 16 * group_place(1, 0, V_ROW) + first_unit * 16;
    values[1] = 0;
    if (!value_matrices)
#pragma unroll
      for (int i = 0; i < 2; i++) values[i] = token_of_row(2 * t + i) * V_ROW + g * (2 * V_RUN);
    keys = __shfl_sync(FULL_WARP, keys, lane), meta = __shfl_sync(FULL_WARP, meta, lane);
#pragma unroll
    for (int i = 0; i < 2; i++) values[i] = __shfl_sync(FULL_WARP, values[i], lane);
  }
};

// Words of 16 tokens' keys: lane (g, t) gets those of tokens token_of_row(g), in words[0], and of 8 more.
//   keys: those of the lane.
__device__ __forceinline__ void load_key_words(const u8* keys, u32 (&words)[2][K_WORDS]) {
  if constexpr (K_MATRICES && K_WORDS == 2) {
    u32 four[4];
    load_matrices(four, keys);
    words[0][0] = four[0], words[1][0] = four[1], words[0][K_WORDS - 1] = four[2], words[1][K_WORDS - 1] = four[3];
  } else if constexpr (K_MATRICES) {
    u32 two[2];
    load_matrices(two, keys);
    words[0][0] = two[0], words[1][0] = two[1];
  } else {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < K_WORDS; i += K_RUN) load_run<K_RUN>(&words[half][i], keys + half * 8 * K_ROW + i * 16);
  }
}
