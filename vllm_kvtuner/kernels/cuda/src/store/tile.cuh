// What a store reads and does to it before rounding: tokens' numbers, where they go, the transforms.
//
// With FROM_WINDOW it reads tokens from the recent window, which keeps them by then, and leaves that as it is.
#pragma once

constexpr int NUM_WARPS = 4;
constexpr int NUMBER_BYTES = number_bytes(NUMBERS);

// The lowest x of the lanes that share a row.
template <int LANES>
__device__ __forceinline__ float lowest(float x) {
  if constexpr (LANES == 32) {
    // As integers in the same order: one instruction for the warp.
    int bits = __float_as_int(x);
    bits = __reduce_min_sync(FULL_WARP, bits ^ (bits >> 31 & 0x7FFFFFFF));
    return __int_as_float(bits ^ (bits >> 31 & 0x7FFFFFFF));
  } else {
#pragma unroll
    for (int step = LANES / 2; step; step >>= 1) x = fminf(x, __shfl_xor_sync(FULL_WARP, x, step));
    return x;
  }
}

// A tile's numbers as they stand in memory, and where they go.
template <class SHARE>
struct Tile {
  static constexpr int RUN_BYTES = SHARE::RUN * NUMBER_BYTES;
  u32 words[SHARE::RUNS][(RUN_BYTES + 3) / 4];
  int slot;         // -1: not stored
  int window_slot;  // -1: not kept by the window
  int position;     // of a key
  u32 head;
  bool is_key;

  __device__ __forceinline__ void load(const StoreArguments& a, int token, u32 of_head, bool key, int part) {
    is_key = key;
    head = of_head;
    const int present = min(token, a.num_slots - 1);
    slot = token < a.num_slots ? (int)a.slot_mapping[present] : -1;
#if WINDOW_BLOCK_SIZE
    window_slot = token < a.num_slots ? (int)a.window_slots[present] : -1;
#endif
#if FROM_WINDOW
    // Without a place there, no place in the pages: the row that is read instead is anybody's.
    if (window_slot < 0) slot = -1;
    const u8* row = window_row(a, max(window_slot, 0), part);
#else
    const u8* row = (key ? a.key : a.value) + (u64)(u32)present * (key ? a.key_stride : a.value_stride) +
                    (head * (HEAD_SIZE * NUMBER_BYTES) + part * RUN_BYTES);
#endif
#pragma unroll
    for (int run = 0; run < SHARE::RUNS; run++)
      load_bytes<RUN_BYTES>(words[run], row + run * (SHARE::STRIDE * NUMBER_BYTES));
    position = 0;
#if KEY_OFFSET
    // The position of a token that is not stored may be anything.
    if (key && slot >= 0) position = (int)a.positions[present];
#endif
  }

#if WINDOW_BLOCK_SIZE
  // The lane's part of the row's place in the window.
  __device__ __forceinline__ u8* window_row(const StoreArguments& a, int of_slot, int part) const {
    const u32 block = (u32)of_slot / WINDOW_BLOCK_SIZE, place = (u32)of_slot % WINDOW_BLOCK_SIZE;
    return a.window + (u64)block * a.window_block_stride + (u64)head * a.window_head_stride +
           (u64)place * a.window_place_stride + ((is_key ? 0 : HEAD_SIZE * NUMBER_BYTES) + part * RUN_BYTES);
  }
#endif

  // The numbers as they are to the window, if the layer has one and they do not come from there.
  __device__ __forceinline__ void keep(const StoreArguments& a, int part) const {
#if WINDOW_BLOCK_SIZE && !FROM_WINDOW
    if (window_slot < 0) return;
    u8* row = window_row(a, window_slot, part);
#pragma unroll
    for (int run = 0; run < SHARE::RUNS; run++)
      store_bytes<RUN_BYTES>(row + run * (SHARE::STRIDE * NUMBER_BYTES), words[run]);
#endif
  }
};

// What a layer does to a row before it is quantized, in the lanes that share it.
template <class SHARE, bool HADAMARD>
__device__ __forceinline__ void transform_row(const StoreArguments& a, float (&x)[SHARE::COUNT], u32 head, bool is_key,
                                              int position, int part) {
  if (is_key) {
#if KEY_OFFSET
    move_by_offset<SHARE, false, ROTARY_DIM, IS_NEOX, ROTARY_NUMBERS>(
        x, a.offset + head * HEAD_SIZE, a.partner + head * HEAD_SIZE,
        a.cos_sin + (u64)position * (ROTARY_DIM * number_bytes(ROTARY_NUMBERS)), part);
#endif
#if KEY_EQUALIZATION
#pragma unroll
    for (int run = 0; run < SHARE::RUNS; run++) {
      float factor[SHARE::RUN];
      load_numbers<FP32, SHARE::RUN>(
          factor, a.equalization + head * HEAD_SIZE + run * SHARE::STRIDE + part * SHARE::RUN);
#pragma unroll
      for (int v = 0; v < SHARE::RUN; v++) {
        float& number = x[run * SHARE::RUN + v];
        number = divide(number, factor[v], reciprocal(factor[v]));
      }
    }
#endif
  }
  if (HADAMARD) hadamard_rows<SHARE>(x, part);
}
