// Code formats, the twins of pages/codes.py: how the numbers of a row become the codes of a packed page, and back.
//
// All kernels read a number as scale * code + minimum; what decoding multiplies rests on that.
#pragma once

constexpr int RANGE_STEPS = 11;  // factors 1, 0.95, ..., 0.5 of the range search
constexpr float FP16_MAX = 65504.0f;
constexpr float MAGIC = 8388608.0f;  // 2^23: a float of this size is an integer, in its lowest bits

// A possible range of a row.
struct __align__(16) Range {
  float minimum, scale;  // fp16 numbers
  float inverse;         // 1 / scale, or 0 for a scale of 0
  float to_unit;         // inverse / LEVELS
};

// Asymmetric uniform codes per row: row ~ scale * code + minimum, scale and minimum fp16.
template <int BITS>
struct UniformCodes {
  static constexpr int CODE_BITS = BITS;
  static constexpr int LEVELS = (1 << BITS) - 1;  // the largest code
  static constexpr int FIELDS = 8 / BITS;         // codes of a byte
  static constexpr int FIELD_SHIFT = BITS;        // a masked code of field i counts 2^(i * FIELD_SHIFT) times

  // Ones in each byte of a word where its lowest `fields` codes stand.
  static __device__ __forceinline__ constexpr u32 lowest_fields(int fields) {
    return 0x01010101u * ((1u << (fields * BITS)) - 1);
  }

  // Codes of a word of 4 bytes as fp16 numbers, as they stand: word i holds 2^(spread_shift(i) - 24) times two codes. Of bytes 0
  // and 2 their fields in order, then those of bytes 1 and 3.
  static __device__ __forceinline__ void spread(u32 word, u32 (&halves)[2 * FIELDS]) {
    static_assert(BITS == 2 || BITS == 4 || BITS == 8, "fp16 numbers of 10 bits hold these");
    if constexpr (BITS == 8) {
      halves[0] = word & 0x00FF00FFu;
      halves[1] = __byte_perm(word, 0, 0x4341);
    } else {
      const u32 up = word >> (BITS == 2 ? 6 : 8);
#pragma unroll
      for (int i = 0; i < 2 * FIELDS; i++) {
        const bool moved = BITS == 2 ? i > FIELDS : i >= FIELDS;
        halves[i] = (moved ? up : word) & (0x00010001u * LEVELS) << spread_shift(i);
      }
    }
  }
  static __device__ __forceinline__ constexpr int spread_shift(int i) {
    const int shift = i % FIELDS * BITS;
    // The lowest field of a high byte fits where it is, and with it the three above, moved.
    return BITS == 2 && i >= FIELDS ? (i == FIELDS ? 8 : shift + 2) : shift;
  }

  // The range of a row between low and high, shrunk by factor number `step` about its middle; rounded as pages/codes.py
  // does.
  static __device__ __forceinline__ Range make_range(float low, float high, int step) {
    const float stretch = divide((float)(20 - step), 20.0f * LEVELS, 1.0f / (20.0f * LEVELS));
    return make_range(low, high, stretch, divide((float)step, 40.0f, 1.0f / 40.0f));
  }

  // Likewise, by the factors on high - low that the step and what the minimum moves by have.
  static __device__ __forceinline__ Range make_range(float low, float high, float stretch, float shift) {
    const float range = __fsub_rn(high, low);
    const u16 scale = to_fp16(fminf(__fmul_rn(range, stretch), FP16_MAX));
    const u16 minimum = to_fp16(fminf(fmaxf(__fadd_rn(low, __fmul_rn(range, shift)), -FP16_MAX), FP16_MAX));
    Range result;
    result.minimum = from_fp16(minimum);
    result.scale = from_fp16(scale);
    result.inverse = result.scale > 0.0f ? reciprocal(result.scale) : 0.0f;
    result.to_unit = result.inverse * (1.0f / LEVELS);
    return result;
  }

  // Squared error of a lane's numbers under a range.
  template <int COUNT>
  static __device__ __forceinline__ float squared_error(const float (&x)[COUNT], const Range& range) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const float above = x[i] - range.minimum;
      const float code = fmaf(__saturatef(above * range.to_unit), (float)LEVELS, MAGIC) - MAGIC;
      const float error = fmaf(-range.scale, code, above);
      sum = fmaf(error, error, sum);
    }
    return sum;
  }

  // 2^23 + code as float bits, codes rounded as pages/codes.py does.
  static __device__ __forceinline__ u32 quantize(float x, const Range& range) {
    constexpr float SIZE = 1 << BITS;
    const float place = fminf(__fmul_rn(__fsub_rn(x, range.minimum), range.inverse), SIZE - 1.0f);
    // floor(place + 1/2): powers of two scale without rounding, and the unit interval ends where codes do.
    return __float_as_uint(__fmaf_rd(__saturatef(fmaf(place, 1.0f / SIZE, 0.5f / SIZE)), SIZE, MAGIC));
  }

  // Bytes of a row's codes that a lane holds; SHARE (device/rows.cuh) says which, and part is the lane's place in the row.
  template <class SHARE>
  struct Bytes {
    u32 words[SHARE::BYTE_RUNS][(SHARE::RUN + 3) / 4];

    // From the row whose codes begin `offset` bytes into a chunk.
    __device__ __forceinline__ void load(const u8* chunk, u32 offset, int part) {
#pragma unroll
      for (int run = 0; run < SHARE::BYTE_RUNS; run++)
        load_bytes<SHARE::RUN>(words[run], chunk + (offset + run * SHARE::STRIDE + part * SHARE::RUN));
    }
  };

  // Packs a lane's codes and writes them to the row's place in its chunk.
  template <class SHARE>
  static __device__ __forceinline__ void write(u8* row, const float (&x)[SHARE::COUNT], const Range& range, int part) {
#pragma unroll
    for (int run = 0; run < SHARE::BYTE_RUNS; run++) {
      u32 words[(SHARE::RUN + 3) / 4];
      pack<SHARE>(words, x, range, run);
      store_bytes<SHARE::RUN>(row + run * SHARE::STRIDE + part * SHARE::RUN, words);
    }
  }

  // Bytes of a lane's codes in run number `run`, whose numbers SHARE has in x.
  template <class SHARE>
  static __device__ __forceinline__ void pack(u32 (&words)[(SHARE::RUN + 3) / 4], const float (&x)[SHARE::COUNT],
                                              const Range& range, int run) {
    constexpr int RUN = SHARE::RUN;
    u32 bytes[RUN < 4 ? 4 : RUN] = {};
#pragma unroll
    for (int v = 0; v < RUN; v++) {
#pragma unroll
      for (int field = 0; field < FIELDS; field++)
        bytes[v] += quantize(x[(field * SHARE::BYTE_RUNS + run) * RUN + v], range) << (field * BITS);
    }
#pragma unroll
    for (int i = 0; i < (RUN + 3) / 4; i++)
      words[i] = join_bytes(bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]);
  }

  // Codes of a row as whole floats, from the bytes that a lane holds.
  template <class SHARE>
  static __device__ __forceinline__ void unpack(float (&x)[SHARE::COUNT], const Bytes<SHARE>& bytes) {
#pragma unroll
    for (int field = 0; field < FIELDS; field++) {
#pragma unroll
      for (int run = 0; run < SHARE::BYTE_RUNS; run++) {
#pragma unroll
        for (int v = 0; v < SHARE::RUN; v++) {
          const u32 codes = bytes.words[run][v / 4] >> (field * BITS) & lowest_fields(1);
          x[(field * SHARE::BYTE_RUNS + run) * SHARE::RUN + v] =
              __uint_as_float(__byte_perm(codes, __float_as_uint(MAGIC), 0x7650 + v % 4)) - MAGIC;
        }
      }
    }
  }

  // A number from its code; meta: scale and minimum.
  static __device__ __forceinline__ float dequantize(float code, const float2& meta) {
    return fmaf(code, meta.x, meta.y);
  }

 private:
  // Four bytes of four words.
  static __device__ __forceinline__ u32 join_bytes(u32 a, u32 b, u32 c, u32 d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
  }
};

// The format of codes of BITS, as code_format of pages/codes.py gives it.
template <int BITS>
using CodeFormat = UniformCodes<BITS>;
