// Rows in the lanes of a warp: loads and stores, the Hadamard rotation, the key offset.
#pragma once

// A row of 32 * COUNT numbers, number i * 32 + lane in x[i], times the Hadamard matrix of pages/transforms.py: block diagonal
// in blocks of the largest power of two that divides the row's size.
template <int COUNT>
__device__ __forceinline__ void hadamard_row(float (&x)[COUNT], int lane) {
  constexpr int SIZE = 32 * COUNT;
  constexpr int BLOCK = SIZE & -SIZE;
#pragma unroll
  for (int step = 1; step < constant_min(BLOCK, 32); step <<= 1) {
    float sign = lane & step ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] = fmaf(sign, x[i], __shfl_xor_sync(FULL_WARP, x[i], step));
  }
#pragma unroll
  for (int step = 1; step < BLOCK / 32; step <<= 1) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      if (!(i & step)) {
        float a = x[i], b = x[i + step];
        x[i] = a + b;
        x[i + step] = a - b;
      }
    }
  }
  const float scale = rsqrtf((float)BLOCK);
#pragma unroll
  for (int i = 0; i < COUNT; i++) x[i] *= scale;
}

// BYTES (a power of two up to 32) from an address that is a multiple of them, or of 16.
template <int BYTES>
__device__ __forceinline__ void load_bytes(u32 (&words)[(BYTES + 3) / 4], const void* source) {
  if constexpr (BYTES == 1) {
    words[0] = __ldg((const u8*)source);
  } else if constexpr (BYTES == 2) {
    words[0] = __ldg((const u16*)source);
  } else if constexpr (BYTES == 4) {
    words[0] = __ldg((const u32*)source);
  } else if constexpr (BYTES == 8) {
    const uint2 pair = __ldg((const uint2*)source);
    words[0] = pair.x, words[1] = pair.y;
  } else {
#pragma unroll
    for (int i = 0; i < BYTES / 16; i++) {
      const uint4 four = __ldg((const uint4*)source + i);
      words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
    }
  }
}

template <int BYTES>
__device__ __forceinline__ void store_bytes(void* target, const u32 (&words)[(BYTES + 3) / 4]) {
  if constexpr (BYTES == 1) {
    *(u8*)target = (u8)words[0];
  } else if constexpr (BYTES == 2) {
    *(u16*)target = (u16)words[0];
  } else if constexpr (BYTES == 4) {
    *(u32*)target = words[0];
  } else if constexpr (BYTES == 8) {
    *(uint2*)target = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < BYTES / 16; i++)
      ((uint4*)target)[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
  }
}

template <int TYPE, int COUNT>
__device__ __forceinline__ void words_to_floats(float* x, const u32* words) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    if (TYPE == FP32) {
      x[i] = __uint_as_float(words[i]);
    } else if (TYPE == BF16) {
      x[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
    } else {
      const float2 pair = unpack_fp16(words[i / 2]);
      x[i] = i % 2 ? pair.y : pair.x;
    }
  }
}

template <int TYPE, int COUNT>
__device__ __forceinline__ void floats_to_words(u32* words, const float* x) {
#pragma unroll
  for (int i = 0; i < COUNT; i += TYPE == FP32 ? 1 : 2) {
    const float next = i + 1 < COUNT ? x[i + 1] : 0.0f;
    if (TYPE == FP32)
      words[i] = __float_as_uint(x[i]);
    else
      words[i / 2] = TYPE == BF16 ? pack_bf16(x[i], next) : pack_fp16(x[i], next);
  }
}

template <int TYPE, int COUNT>
__device__ __forceinline__ void load_numbers(float* x, const void* source) {
  u32 words[(COUNT * number_bytes(TYPE) + 3) / 4];
  load_bytes<COUNT * number_bytes(TYPE)>(words, source);
  words_to_floats<TYPE, COUNT>(x, words);
}

// How LANES_ lanes share a row of SIZE_ numbers in a code format (codes.cuh). A lane holds runs of RUN neighbours: its
// number run * RUN + v is dimension run * STRIDE + part * RUN + v, where part is the lane's place among those of the row.
// So all the codes of a byte (pages/layout.py) meet in one lane, which holds RUN neighbouring bytes of BYTE_RUNS places.
template <int SIZE_, class CODES, int LANES_>
struct RowShare {
  static constexpr int SIZE = SIZE_, LANES = LANES_;
  static constexpr int FIELDS = CODES::FIELDS;
  static constexpr int ROW_BYTES = SIZE * CODES::CODE_BITS / 8;
  static constexpr int FIELD_SIZE = SIZE / FIELDS;  // numbers of a row that stand in one field of their bytes
  static_assert(FIELD_SIZE % LANES == 0, "lanes");
  static constexpr int PART = FIELD_SIZE / LANES;
  static constexpr int RUN = PART % 8 == 0 ? 8 : PART % 4 == 0 ? 4 : PART % 2 == 0 ? 2 : 1;
  static constexpr int STRIDE = LANES * RUN;
  static constexpr int BYTE_RUNS = PART / RUN;
  static constexpr int RUNS = FIELDS * BYTE_RUNS;
  static constexpr int COUNT = RUNS * RUN;
  static constexpr int ROWS = 32 / LANES;  // rows of a warp
};

__device__ __forceinline__ constexpr float inverse_root(int power_of_two) {
  double root = 1.0;
  int rest = power_of_two;
  for (; rest >= 4; rest /= 4) root *= 0.5;
  return (float)(rest == 2 ? root * 0.70710678118654752440 : root);
}

// The rows of a warp times the Hadamard matrix of pages/transforms.py: block diagonal in blocks of the largest power of two
// that divides a row's size.
template <class SHARE>
__device__ __forceinline__ void hadamard_rows(float (&x)[SHARE::COUNT], int part) {
  constexpr int BLOCK = SHARE::SIZE & -SHARE::SIZE;
#pragma unroll
  for (int step = 1; step < BLOCK; step <<= 1) {
    if (step >= SHARE::RUN && step < SHARE::STRIDE) {
      const int distance = step / SHARE::RUN;
      const float sign = part & distance ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < SHARE::COUNT; i++) x[i] = fmaf(sign, x[i], __shfl_xor_sync(FULL_WARP, x[i], distance));
    } else {
      const int distance = step < SHARE::RUN ? step : step / SHARE::STRIDE * SHARE::RUN;
#pragma unroll
      for (int i = 0; i < SHARE::COUNT; i++) {
        if (i & distance) continue;
        const float a = x[i], b = x[(i + distance) % SHARE::COUNT];
        x[i] = a + b;
        x[(i + distance) % SHARE::COUNT] = a - b;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < SHARE::COUNT; i++) x[i] *= inverse_root(BLOCK);
}

// x + R_t m, or x - R_t m where not ADD, with R_t m = m cos + partner sin (pages/transforms.py); each step rounded as torch does.
//   offset, partner: m and what the sines multiply, of the row's KV head.
//   cos_sin: the rotary table's row of the position, numbers of TYPE, for the first ROTATED dimensions; unread if 0.
template <class SHARE, bool ADD, int ROTATED, bool NEOX, int TYPE>
__device__ __forceinline__ void move_by_offset(float (&x)[SHARE::COUNT], const float* offset, const float* partner,
                                               const u8* cos_sin, int part) {
  constexpr int RUN = SHARE::RUN, HALF = ROTATED / 2, BYTES = number_bytes(TYPE);
  constexpr bool WHOLE_RUNS = NEOX && HALF % RUN == 0;
#pragma unroll
  for (int run = 0; run < SHARE::RUNS; run++) {
    const int first = run * SHARE::STRIDE + part * RUN;
    float m[RUN];
    load_numbers<FP32, RUN>(m, offset + first);
    if (first < ROTATED) {
      float cos[RUN], sin[RUN], other[RUN];
      load_numbers<FP32, RUN>(other, partner + first);
      if constexpr (WHOLE_RUNS) {
        const u8* pairs = cos_sin + first % HALF * BYTES;
        load_numbers<TYPE, RUN>(cos, pairs);
        load_numbers<TYPE, RUN>(sin, pairs + HALF * BYTES);
      } else {
#pragma unroll
        for (int v = 0; v < RUN; v++) {
          const int dim = first + v;
          cos[v] = 1.0f, sin[v] = 0.0f;
          if (dim >= ROTATED) continue;
          const u8* pair = cos_sin + (NEOX ? dim % HALF : dim / 2) * BYTES;
          load_numbers<TYPE, 1>(cos + v, pair);
          load_numbers<TYPE, 1>(sin + v, pair + HALF * BYTES);
        }
      }
#pragma unroll
      for (int v = 0; v < RUN; v++) m[v] = __fadd_rn(__fmul_rn(m[v], cos[v]), __fmul_rn(other[v], sin[v]));
    }
#pragma unroll
    for (int v = 0; v < RUN; v++) x[run * RUN + v] += ADD ? m[v] : -m[v];
  }
}
