// What all kernels use: integer types, warps, and how a launch overlaps the one before. No header of the CUDA toolkit is
// included, so that NVRTC alone compiles it.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define FULL_WARP 0xFFFFFFFFu

__device__ __forceinline__ constexpr int constant_min(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ constexpr int constant_max(int a, int b) { return a < b ? b : a; }

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

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

// Waits for `threads` threads of whole warps, which all come here with this number of a barrier.
__device__ __forceinline__ void meet_warps(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// The same, and whether any of them has `vote`.
__device__ __forceinline__ bool meet_warps_any(int number, int threads, bool vote) {
  u32 any;
  asm volatile(
      "{.reg .pred mine, any;\n setp.ne.u32 mine, %1, 0;\n barrier.cta.red.or.pred any, %2, %3, mine;\n selp.u32 %0, 1, 0, any;}"
      : "=r"(any)
      : "r"((u32)vote), "r"(number), "r"(threads)
      : "memory");
  return any;
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

// Of the card.
__device__ __forceinline__ u32 multiprocessors() {
  u32 count;
  asm("mov.u32 %0, %%nsmid;" : "=r"(count));
  return count;
}

__device__ __forceinline__ int arrive(int* counter) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

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
