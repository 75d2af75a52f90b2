// What the CUDA kernels share: PTX instructions by name, fp16 and bf16 in integer registers, the Hadamard rotation.
// No header of the CUDA toolkit is included, so that NVRTC alone compiles it.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define FULL_WARP 0xFFFFFFFFu

__device__ __forceinline__ constexpr int constant_min(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ constexpr int constant_max(int a, int b) { return a < b ? b : a; }

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// ---- numbers ----

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

// ---- warps ----

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(FULL_WARP, x, step);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
  return x;
}

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

// Whether this lane is the one that acts for its warp.
__device__ __forceinline__ bool elect_one() {
#if __CUDA_ARCH__ >= 900
  u32 elected;
  asm volatile("{.reg .pred is;\n elect.sync _|is, 0xFFFFFFFF;\n selp.u32 %0, 1, 0, is;}" : "=r"(elected));
  return elected;
#else
  return threadIdx.x % 32 == 0;
#endif
}

__device__ __forceinline__ int arrive(int* counter) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// ---- matrix instructions ----

// C[16][8] += A[16][32] B[32][8], A unsigned and B signed bytes.
__device__ __forceinline__ void mma_u8s8_k32(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_u8s8_k16(int (&c)[4], u32 a0, u32 a1, u32 b0) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a0), "r"(a1), "r"(b0));
}

// Both unsigned.
__device__ __forceinline__ void mma_u8u8_k32(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_u8u8_k16(int (&c)[4], u32 a0, u32 a1, u32 b0) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a0), "r"(a1), "r"(b0));
}

// C[16][8] += A[16][16] B[16][8], fp16 with fp32 sums.
__device__ __forceinline__ void mma_fp16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix of 16-bit numbers, two of row lane / 4 in each lane, transposed.
__device__ __forceinline__ u32 transpose_8x8(u32 word) {
  u32 result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(word));
  return result;
}

// Two or four 8 x 8 matrices of 16-bit numbers from shared memory: lane (g, t) gets numbers 2 t and 2 t + 1 of row g of each.
// Lane i says where row i % 8 of matrix i / 8 is, a multiple of 16 bytes.
__device__ __forceinline__ void load_matrices(u32 (&words)[2], const u8* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(shared_address(row)));
}

__device__ __forceinline__ void load_matrices(u32 (&words)[4], const u8* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row)));
}

// The same transposed: lane (g, t) gets numbers g of rows 2 t and 2 t + 1 of each.
__device__ __forceinline__ void load_transposed(u32 (&words)[2], const u8* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(shared_address(row)));
}

__device__ __forceinline__ void load_transposed(u32 (&words)[4], const u8* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row)));
}

// ---- copies from global to shared memory ----

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void barrier_init(u32 barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

// Makes the initialization known to the copy engine.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n .reg .pred done;\n"
      "again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n @done bra over;\n bra again;\n"
      "over:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// bytes: a multiple of 16, both ends aligned to 16. Cached data is read once a step, so it leaves the L2 cache first.
__device__ __forceinline__ void copy_bulk(u32 target, const void* source, u32 bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          target),
      "l"(source), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// Brings bytes to the L2 cache, where what other kernels write meanwhile is seen too. Sizes and addresses as above.
__device__ __forceinline__ void prefetch_bulk(const void* source, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

__device__ __forceinline__ u64 policy_evict_first() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
#endif

__device__ __forceinline__ void copy_16(u32 target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

__device__ __forceinline__ void copy_8(u32 target, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(target), "l"(source) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void copies_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Waits for the end of the kernel before on the stream, if this one was launched to overlap it.
__device__ __forceinline__ void dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel on the stream start if it was launched to overlap this one; it waits for this one's end itself.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// ---- rows of packed numbers, each in several lanes ----

// Types of numbers in memory.
constexpr int FP32 = 0, FP16 = 1, BF16 = 2;

__device__ __forceinline__ constexpr int number_bytes(int type) { return type == FP32 ? 4 : 2; }

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
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

// How LANES_ lanes share a row of SIZE_ numbers packed into BITS bits each. A lane holds runs of RUN neighbours: its
// number run * RUN + v is dimension run * STRIDE + part * RUN + v, where part is the lane's place among those of the row.
// So all the codes of a byte (pages/layout.py) meet in one lane, which holds RUN neighbouring bytes of BYTE_RUNS places.
template <int SIZE_, int BITS, int LANES_>
struct RowShare {
  static constexpr int SIZE = SIZE_, LANES = LANES_;
  static constexpr int FIELDS = 8 / BITS;
  static constexpr int ROW_BYTES = SIZE / FIELDS;
  static_assert(ROW_BYTES % LANES == 0, "lanes");
  static constexpr int PART = ROW_BYTES / LANES;
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
