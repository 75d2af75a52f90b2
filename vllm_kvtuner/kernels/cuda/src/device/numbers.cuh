// Numbers: approximate functions by their PTX names, fp16 and bf16 in integer registers, division without a slow path.
#pragma once

// Types of numbers in memory.
constexpr int FP32 = 0, FP16 = 1, BF16 = 2;

__device__ __forceinline__ constexpr int number_bytes(int type) { return type == FP32 ? 4 : 2; }

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger ones of two pairs of fp16 numbers; of a number and NaN the number.
__device__ __forceinline__ u32 max_fp16(u32 a, u32 b) {
  u32 word;
  asm("max.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}

// Two fp16 numbers of a word.
__device__ __forceinline__ float2 unpack_fp16(u32 word) {
  float2 pair;
  asm("{.reg .f16 low, high;\n mov.b32 {low, high}, %2;\n cvt.f32.f16 %0, low;\n cvt.f32.f16 %1, high;}"
      : "=f"(pair.x), "=f"(pair.y)
      : "r"(word));
  return pair;
}

__device__ __forceinline__ u32 pack_fp16(float low, float high) {
  u32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ float from_fp16(u16 bits) {
  float x;
  asm("{.reg .f16 h;\n mov.b16 h, %1;\n cvt.f32.f16 %0, h;}" : "=f"(x) : "h"(bits));
  return x;
}

__device__ __forceinline__ u16 to_fp16(float x) {
  u16 bits;
  asm("{.reg .f16 h;\n cvt.rn.f16.f32 h, %1;\n mov.b16 %0, h;}" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ float from_bf16(u16 bits) { return __uint_as_float((u32)bits << 16); }

// Round to nearest even; NaN stays NaN.
__device__ __forceinline__ u16 to_bf16(float x) {
  u16 bits;
  asm("{.reg .b16 h;\n cvt.rn.bf16.f32 h, %1;\n mov.b16 %0, h;}" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// 1 / x as IEEE rounds it for fp16 numbers, and nearly always for others that are far from overflow: one Newton step
// leaves an error of 2^-44, and no reciprocal of 11 bits lies so close to the middle between two floats.
__device__ __forceinline__ float reciprocal(float x) {
  const float first = reciprocal_approx(x);
  return fmaf(fmaf(-x, first, 1.0f), first, first);
}

// x / y from y's reciprocal: the remainder corrects the first quotient.
__device__ __forceinline__ float divide(float x, float y, float inverse) {
  const float first = x * inverse;
  return fmaf(fmaf(-y, first, x), inverse, first);
}
