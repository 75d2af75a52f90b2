// Matrix instructions of a warp group, 4 warps whose first one's number is a multiple of 4: sm_90a alone has them.
#pragma once

// Where B operands stand in shared memory: of 8 columns' 16 numbers two matrices of 128 bytes, each with 8 columns' 8 numbers in
// rows of 16 bytes; the next 8 columns' follow.
struct GroupOperand {
  static constexpr u32 ALONG_K = 128, ALONG_N = 256;  // bytes from matrix to matrix
  u32 low;                                            // of the descriptor

  __device__ __forceinline__ GroupOperand() {}
  __device__ __forceinline__ explicit GroupOperand(const void* pointer) : low(low_of(shared_address(pointer))) {}
  static __device__ __forceinline__ u32 low_of(u32 address) { return (address & 0x3FFFF) >> 4 | ALONG_K >> 4 << 16; }
  __device__ __forceinline__ GroupOperand further(int bytes) const {
    GroupOperand other;
    other.low = low + (bytes >> 4);
    return other;
  }
};

#define GROUP_TILE(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])

// C[64][8 TILES] += A[64][16] B[16][8 TILES], or = if not ADD, fp16 with fp32 sums. Of A and C each warp has 16 rows, in the registers
// that m16n8k16 has. Runs on until group_mma_wait; before the first of a series, group_mma_fence.
template <bool ADD, int TILES>
__device__ __forceinline__ void group_mma(float (&c)[TILES][4], u32 a0, u32 a1, u32 a2, u32 a3, GroupOperand b) {
  if constexpr (TILES == 1) {
    asm volatile(
        "{.reg .b64 b;\n .reg .pred p;\n setp.ne.u32 p, %9, 0;\n mov.b64 b, {%8, 16};\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, {%4,%5,%6,%7}, b, p, 1, 1, 0;\n}"
        : GROUP_TILE(0)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.low), "n"(ADD));
  } else if constexpr (TILES == 2) {
    asm volatile(
        "{.reg .b64 b;\n .reg .pred p;\n setp.ne.u32 p, %13, 0;\n mov.b64 b, {%12, 16};\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, b, p, 1, 1, 0;\n}"
        : GROUP_TILE(0), GROUP_TILE(1)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.low), "n"(ADD));
  } else if constexpr (TILES == 3) {
    asm volatile(
        "{.reg .b64 b;\n .reg .pred p;\n setp.ne.u32 p, %17, 0;\n mov.b64 b, {%16, 16};\n"
        "wgmma.mma_async.sync.aligned.m64n24k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11}, {%12,%13,%14,%15}, b, p, 1, 1, 0;\n}"
        : GROUP_TILE(0), GROUP_TILE(1), GROUP_TILE(2)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.low), "n"(ADD));
  } else if constexpr (TILES == 4) {
    asm volatile(
        "{.reg .b64 b;\n .reg .pred p;\n setp.ne.u32 p, %21, 0;\n mov.b64 b, {%20, 16};\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, b, p, 1, 1, 0;\n}"
        : GROUP_TILE(0), GROUP_TILE(1), GROUP_TILE(2), GROUP_TILE(3)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.low), "n"(ADD));
  } else if constexpr (TILES == 6) {
    asm volatile(
        "{.reg .b64 b;\n .reg .pred p;\n setp.ne.u32 p, %29, 0;\n mov.b64 b, {%28, 16};\n"
        "wgmma.mma_async.sync.aligned.m64n48k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23}, {%24,%25,%26,%27}, b, p, 1, 1, 0;\n}"
        : GROUP_TILE(0), GROUP_TILE(1), GROUP_TILE(2), GROUP_TILE(3), GROUP_TILE(4), GROUP_TILE(5)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.low), "n"(ADD));
  } else if constexpr (TILES == 8) {
    asm volatile(
        "{.reg .b64 b;\n .reg .pred p;\n setp.ne.u32 p, %37, 0;\n mov.b64 b, {%36, 16};\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, b, p, 1, 1, 0;\n}"
        : GROUP_TILE(0), GROUP_TILE(1), GROUP_TILE(2), GROUP_TILE(3), GROUP_TILE(4), GROUP_TILE(5), GROUP_TILE(6), GROUP_TILE(7)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.low), "n"(ADD));
  }
}
#undef GROUP_TILE

__device__ __forceinline__ void group_mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void group_mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void group_mma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Keeps what uses sums behind the wait before it, and what makes them before the fence after it.
template <int TILES>
__device__ __forceinline__ void hold(float (&c)[TILES][4]) {
#pragma unroll
  for (int i = 0; i < TILES; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) asm volatile("" : "+f"(c[i][j])::"memory");
}

// Makes what this thread wrote to shared memory known to matrix instructions of warp groups, after a barrier.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
