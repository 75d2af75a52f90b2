// Number types of tensors and pages, and vectors of numbers.
//
// Everything is plain C++17: loops that the compiler vectorizes, and no header of torch or Python. HEAD_SIZE is a macro,
// numbers of a row, so that loops over it have a constant length. Sums that may be taken in any order say so by
// `omp simd reduction`; -ffast-math would do more than that, and lose NaN and infinity.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using i64 = std::int64_t;

constexpr int D = HEAD_SIZE;
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float FP16_MAX = 65504.0f;

enum Type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline int size_of(int type) { return type == FLOAT32 ? 4 : 2; }

inline float as_float(u32 bits) {
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}

inline u32 as_bits(float number) {
  u32 bits;
  std::memcpy(&bits, &number, 4);
  return bits;
}

inline float from_half(u16 half) {
  const u32 sign = u32(half & 0x8000) << 16, magnitude = half & 0x7fff;
  // Exponents move from a bias of 15 to one of 127; infinity and NaN have the largest, subnormals none.
  const u32 normal = (magnitude << 13) + (magnitude >= 0x7c00 ? 224u << 23 : 112u << 23);
  const float subnormal = float(int(magnitude)) * 0x1p-24f;
  return as_float(sign | (magnitude < 0x400 ? as_bits(subnormal) : normal));
}

// To nearest, ties to even; beyond what fp16 holds, infinity.
inline u16 to_half(float number) {
  const u32 bits = as_bits(number), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return u16(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return u16(sign | 0x7c00);
  if (magnitude < 0x38800000) {
    // Adding 1/2 leaves the subnormal in the lowest bits, rounded by the processor.
    return u16(sign | (as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f)));
  }
  return u16(sign | ((magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

inline float from_bfloat(u16 number) { return as_float(u32(number) << 16); }

inline u16 to_bfloat(float number) {
  const u32 bits = as_bits(number);
  return number != number ? u16((bits >> 16) | 0x40) : u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A row of D numbers as fp32.
inline void load_row(const void* from, int type, float* row) {
  const u16* halves = static_cast<const u16*>(from);
  if (type == FLOAT32) {
    std::memcpy(row, from, D * sizeof(float));
  } else if (type == BFLOAT16) {
    for (int d = 0; d < D; ++d) row[d] = from_bfloat(halves[d]);
  } else {
    for (int d = 0; d < D; ++d) row[d] = from_half(halves[d]);
  }
}

inline void store_row(const float* row, int type, void* to) {
  u16* halves = static_cast<u16*>(to);
  if (type == FLOAT32) {
    std::memcpy(to, row, D * sizeof(float));
  } else if (type == BFLOAT16) {
    for (int d = 0; d < D; ++d) halves[d] = to_bfloat(row[d]);
  } else {
    for (int d = 0; d < D; ++d) halves[d] = to_half(row[d]);
  }
}

// Row `index` of a tensor whose rows are `stride` numbers apart.
inline const void* row_at(const void* tensor, int type, i64 index, i64 stride) {
  return static_cast<const u8*>(tensor) + index * stride * size_of(type);
}

inline void* row_at(void* tensor, int type, i64 index, i64 stride) {
  return static_cast<u8*>(tensor) + index * stride * size_of(type);
}

inline float dot(const float* a, const float* b, int size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

// e^x for x <= 0: 2^n times a polynomial of the rest (Cephes' expf), within 2 units in the last place; 0 below -87.
inline float exp_negative(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;
  const float n = std::floor(bounded * 1.44269504f + 0.5f);
  const float rest = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const float power = as_float(u32(int(n) + 127) << 23);
  return x < -87.0f ? 0.0f : sum * power;
}

inline float tanh_of(float x) {
  const float e = exp_negative(-2.0f * std::fabs(x));
  return std::copysign((1.0f - e) / (1.0f + e), x);
}

}  // namespace
