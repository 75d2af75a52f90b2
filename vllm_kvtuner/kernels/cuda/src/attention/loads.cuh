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

// Words of 16 tokens' keys: lane (g, t) gets those of tokens token_of_row(g), in words[0], and of 8 more.
__device__ __forceinline__ void load_key_words(const u8* keys, int lane, u32 (&words)[2][K_WORDS]) {
  const int g = lane / 4, t = lane % 4;
  if constexpr (K_MATRICES) {
    // The matrices of tokens token_of_row(0 to 7), then of 8 more.
    const u8* row = keys + (token_of_row(lane % 8) + lane / 8 % 2 * 8) * K_ROW;
    if constexpr (K_WORDS == 2) {
      u32 four[4];
      load_matrices(four, row + lane / 16 * 16);
      words[0][0] = four[0], words[1][0] = four[1], words[0][K_WORDS - 1] = four[2], words[1][K_WORDS - 1] = four[3];
    } else {
      u32 two[2];
      load_matrices(two, row);
      words[0][0] = two[0], words[1][0] = two[1];
    }
  } else {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u8* row = keys + (token_of_row(g) + 8 * half) * K_ROW;
#pragma unroll
      for (int i = 0; i < K_WORDS; i += K_RUN) load_run<K_RUN>(&words[half][i], row + (4 * i + t * K_RUN) * 4);
    }
  }
}

// Values of the stage's token `token` of a group of 16.
__device__ __forceinline__ const u8* value_row(const u8* stage, int group, int token) {
  const int place = group * 16;
  return stage + place / PIECE_TOKENS * Piece::BYTES + Piece::V_CODES + (place % PIECE_TOKENS + token) * V_ROW;
}
