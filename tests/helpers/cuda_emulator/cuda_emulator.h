// The parts of CUDA C++ that this project's kernels use, on a CPU: the threads of a CTA are fibers that take turns, and
// whatever involves a warp or the CTA is a meeting of its fibers. A fiber runs until it meets others, far ahead of the
// lanes beside it, which brings out what relies on lanes in lockstep. CTAs run one after the other.
#include <immintrin.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(bytes) alignas(bytes)
#define __CUDA_ARCH__ 800

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, gridDim;

using std::max;
using std::min;

[[noreturn]] static void fail(const char* what, int line) {
  std::fprintf(stderr, "emulated kernel, line %d: %s (thread %u of CTA %u)\n", line, what, threadIdx.x, blockIdx.x);
  std::abort();
}

template <class TO, class FROM>
static TO reinterpret_bits(FROM value) {
  static_assert(sizeof(TO) == sizeof(FROM), "size");
  TO result;
  std::memcpy(&result, &value, sizeof(TO));
  return result;
}

static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float __uint_as_float(unsigned x) { return reinterpret_bits<float>(x); }
static unsigned __float_as_uint(float x) { return reinterpret_bits<unsigned>(x); }
static float __int_as_float(int x) { return reinterpret_bits<float>(x); }
static int __float_as_int(float x) { return reinterpret_bits<int>(x); }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fmaf_rd(float a, float b, float c) { return (float)std::floor((double)a * b + (double)c); }  // near 2^23
static float __saturatef(float x) { return x > 0 ? std::min(x, 1.0f) : 0.0f; }
static float __int2float_rn(int x) { return (float)x; }
static int __float2int_rn(float x) { return (int)std::lrintf(x); }
static float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
static int __ffs(unsigned x) { return __builtin_ffs((int)x); }
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
template <class T>
static T aligned_load(const T* pointer, int line) {
  if ((uintptr_t)pointer % sizeof(T)) fail("misaligned load", line);
  return *pointer;
}
#define __ldg(pointer) aligned_load(pointer, __LINE__)
#define __ldcg(pointer) aligned_load(pointer, __LINE__)
#define __ldcs(pointer) aligned_load(pointer, __LINE__)
static int atomicAdd(int* target, int value) {
  const int before = *target;
  *target += value;
  return before;
}

// ---- fibers ----

constexpr int MAX_THREADS = 1024;
constexpr int STACK_BYTES = 1 << 18;
static ucontext_t scheduler, fibers[MAX_THREADS];
static char* stacks[MAX_THREADS];
static bool ended[MAX_THREADS];
static int current, num_threads;
static void (*kernel_body)();

static void take_turns() { swapcontext(&fibers[current], &scheduler); }

// Meetings of a warp: every lane leaves a contribution, and reads the others' once all have come.
struct Contribution {
  int line, generation;
  uint32_t words[8];
};
static Contribution contributions[MAX_THREADS];

static const Contribution* meet(const uint32_t* words, int count, int line) {
  const int warp = current / 32 * 32;
  Contribution& own = contributions[current];
  std::copy(words, words + count, own.words);
  own.line = line;
  own.generation++;
  for (;;) {
    bool all = true;
    for (int i = 0; i < 32; i++) {
      if (ended[warp + i]) fail("a lane has ended where its warp meets", line);
      all = all && contributions[warp + i].generation >= own.generation;
    }
    if (all) break;
    take_turns();
  }
  for (int i = 0; i < 32; i++)
    if (contributions[warp + i].generation == own.generation && contributions[warp + i].line != line)
      fail("lanes of a warp meet at different places", line);
  return &contributions[warp];
}

// Nobody may overwrite a contribution that others have still to read.
static void part() {
  static int left[MAX_THREADS / 32], rounds[MAX_THREADS / 32];
  const int warp = current / 32;
  const int round = rounds[warp];
  if (++left[warp] == 32) {
    left[warp] = 0;
    rounds[warp]++;
  }
  while (rounds[warp] == round) take_turns();
}

template <class T>
static T shuffle(T value, int source, int line) {
  uint32_t words[2] = {};
  std::memcpy(words, &value, sizeof(T));
  const Contribution* all = meet(words, 2, line);
  std::memcpy(&value, all[source & 31].words, sizeof(T));
  part();
  return value;
}
#define LANE (current % 32)
#define __shfl_sync(mask, value, source) shuffle(value, source, __LINE__)
#define __shfl_xor_sync(mask, value, bits) shuffle(value, LANE ^ (bits), __LINE__)
#define __shfl_up_sync(mask, value, distance) shuffle(value, LANE < (distance) ? LANE : LANE - (distance), __LINE__)

template <class REDUCE>
static auto reduce(int value, int line, REDUCE join, uint32_t start) {
  const uint32_t word = (uint32_t)value;
  const Contribution* all = meet(&word, 1, line);
  uint32_t result = start;
  for (int i = 0; i < 32; i++) result = join(result, all[i].words[0], i);
  part();
  return result;
}
#define __ballot_sync(mask, vote) reduce((vote) ? 1 : 0, __LINE__, [](uint32_t a, uint32_t b, int i) { return a | b << i; }, 0)
#define __any_sync(mask, vote) (__ballot_sync(mask, vote) != 0)
#define __reduce_add_sync(mask, value) (int)reduce(value, __LINE__, [](uint32_t a, uint32_t b, int) { return a + b; }, 0)
#define __reduce_min_sync(mask, value) \
  (int)reduce(value, __LINE__, [](uint32_t a, uint32_t b, int) { return (uint32_t)min((int)a, (int)b); }, 0x7FFFFFFFu)
#define __syncwarp() (void)__ballot_sync(0, false)

static void meet_all(int line) {
  static int came, rounds;
  const int round = rounds;
  for (int i = 0; i < num_threads; i++)
    if (ended[i]) fail("a thread has ended where its CTA meets", line);
  if (++came == num_threads) {
    came = 0;
    rounds++;
  }
  while (rounds == round) take_turns();
}
#define __syncthreads() meet_all(__LINE__)

// A numbered barrier of `threads` threads; whether any of them has voted.
static bool meet_some(int number, int threads, int line, bool vote = false) {
  static int came[16], rounds[16];
  static bool voting[16], result[16];
  if (number < 1 || number > 15 || threads % 32) fail("no such barrier", line);
  const int round = rounds[number];
  voting[number] |= vote;
  if (++came[number] == threads) {
    result[number] = voting[number];
    voting[number] = false;
    came[number] = 0;
    rounds[number]++;
  }
  while (rounds[number] == round) take_turns();
  return result[number];
}

static void run_fiber() {
  kernel_body();
  ended[current] = true;
  swapcontext(&fibers[current], &scheduler);
}

static void run_cta(unsigned cta, unsigned ctas, int threads, void (*body)()) {
  kernel_body = body;
  blockIdx = {cta, 0, 0};
  gridDim = {ctas, 1, 1};
  num_threads = threads;
  for (int i = 0; i < threads; i++) {
    ended[i] = false;
    contributions[i] = {};
    if (!stacks[i]) stacks[i] = (char*)std::malloc(STACK_BYTES);
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = stacks[i];
    fibers[i].uc_stack.ss_size = STACK_BYTES;
    fibers[i].uc_link = nullptr;
    makecontext(&fibers[i], run_fiber, 0);
  }
  for (int running = threads; running;) {
    running = 0;
    for (int i = 0; i < threads; i++) {
      if (ended[i]) continue;
      current = i;
      threadIdx = {(unsigned)i, 0, 0};
      swapcontext(&scheduler, &fibers[i]);
      running += !ended[i];
    }
  }
}

// ---- numbers and matrix instructions, which src/device writes in PTX ----

static float half_to_float(uint32_t bits) { return _cvtsh_ss((unsigned short)bits); }
static uint32_t float_to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
static uint32_t max_halves(uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (int i = 0; i < 32; i += 16) result |= float_to_half(std::fmax(half_to_float(a >> i & 0xFFFF), half_to_float(b >> i & 0xFFFF))) << i;
  return result;
}
static uint32_t float_to_bfloat(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? bits >> 16 | 64 : bits + 0x7FFF + (bits >> 16 & 1) >> 16;
}

// C[16][8] += A[16][K] B[K][8] with the registers of mma.m16n8k*: lane (g, t) has rows g and g + 8 of A and C and column g
// of B. `words` are the lane's registers, first A's and then B's; PER_WORD numbers stand in each.
template <int K, int PER_WORD, class SUM, class NUMBER_A, class NUMBER_B>
static void multiply(SUM (&c)[4], const uint32_t* words, int a_words, int b_words, int line, NUMBER_A a_number,
                     NUMBER_B b_number) {
  const Contribution* all = meet(words, a_words + b_words, line);
  const int g = LANE / 4, t = LANE % 4;
  for (int i = 0; i < 4; i++) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    double sum = 0;
    for (int k = 0; k < K; k++) {
      const int lane = k / PER_WORD % 4, high = k / PER_WORD / 4, place = k % PER_WORD;
      const uint32_t a = all[row % 8 * 4 + lane].words[row / 8 + 2 * high];
      const uint32_t b = all[column * 4 + lane].words[a_words + high];
      sum += a_number(a, place) * b_number(b, place);
    }
    c[i] = (SUM)(c[i] + sum);
  }
  part();
}
static double unsigned_byte(uint32_t word, int place) { return (double)(word >> 8 * place & 255); }
static double signed_byte(uint32_t word, int place) { return (double)(int8_t)(word >> 8 * place); }
static double half_number(uint32_t word, int place) { return (double)half_to_float(word >> 16 * place & 0xFFFF); }

// Lane (g, t) leaves numbers 2 t and 2 t + 1 of row g of an 8 x 8 matrix, and gets those of column g.
static uint32_t transposed(uint32_t word, int line) {
  const Contribution* all = meet(&word, 1, line);
  const int g = LANE / 4, t = LANE % 4;
  uint32_t result = 0;
  for (int i = 0; i < 2; i++) result |= (all[(2 * t + i) * 4 + g / 2].words[0] >> 16 * (g % 2) & 0xFFFF) << 16 * i;
  part();
  return result;
}

// Lane i gives the address of row i % 8 of matrix i / 8; lane (g, t) gets numbers 2 t and 2 t + 1 of row g of each, or
// numbers g of rows 2 t and 2 t + 1.
template <bool TRANSPOSED, int COUNT>
static void read_matrices(uint32_t (&words)[COUNT], const unsigned char* row, int line) {
  if (LANE < 8 * COUNT && (uintptr_t)row % 16) fail("misaligned matrix", line);
  uint32_t address[2];
  std::memcpy(address, &row, 8);
  const Contribution* all = meet(address, 2, line);
  const int g = LANE / 4, t = LANE % 4;
  for (int matrix = 0; matrix < COUNT; matrix++) {
    words[matrix] = 0;
    for (int i = 0; i < 2; i++) {
      const unsigned short* source;
      std::memcpy(&source, all[8 * matrix + (TRANSPOSED ? 2 * t + i : g)].words, 8);
      words[matrix] |= (uint32_t)source[TRANSPOSED ? g : 2 * t + i] << 16 * i;
    }
  }
  part();
}

// The opposite of read_matrices<true>.
template <int COUNT>
static void write_transposed(unsigned char* row, const uint32_t (&words)[COUNT], int line) {
  if (LANE < 8 * COUNT && (uintptr_t)row % 16) fail("misaligned matrix", line);
  uint32_t address[2];
  std::memcpy(address, &row, 8);
  const Contribution* all = meet(address, 2, line);
  const int g = LANE / 4, t = LANE % 4;
  for (int matrix = 0; matrix < COUNT; matrix++)
    for (int i = 0; i < 2; i++) {
      unsigned short* target;
      std::memcpy(&target, all[8 * matrix + 2 * t + i].words, 8);
      target[g] = (unsigned short)(words[matrix] >> 16 * i);
    }
  part();
}

template <int BYTES>
static void copy_bytes(unsigned char* target, const void* source, int line) {
  if ((uintptr_t)target % BYTES || (uintptr_t)source % BYTES) fail("misaligned copy", line);
  std::memcpy(target, source, BYTES);
}
