// Decode attention straight on packed pages, one launch: fold the queries, attend, merge, rotate back.
//
// Defined by the build: HEAD_SIZE, K_BITS, V_BITS, BLOCK_SIZE, GROUP (query heads per KV head), PASS_ROWS (query rows of a
// pass, 4 or 8), STAGE_TOKENS, NUM_STAGES, MIN_CTAS, QUERY_BF16, KEY_HADAMARD, VALUE_HADAMARD, KEY_EQUALIZATION,
// OFFSET_PAIRS (rotary pairs that the key offset keeps, 0 or a multiple of 8), ANGLE_STEP (a multiple of 32), WINDOW (0: none), SOFT_CAP (0 or 1).
//
// A *row* is one (query token, query head) of a KV head. A *stage* is STAGE_TOKENS cached tokens of one (block, KV
// head) chunk or several. A *segment* is what one pass reads: all stages of one (request, KV head, pass). Segments
// stand in a row, and every CTA takes an equal share of their stages, whichever segments those belong to. Within a CTA
// the four warps take turns, each with a ring of stages of its own. A segment that several CTAs share is merged by the
// one that ends last, in the order of the CTAs, so that results do not depend on timing.
//
// Arithmetic (s a row's scale, m its minimum): logit = s_t (q . codes_t) + m_t sum(q), and the output is
// sum_t (P_t s_t) codes_t + sum_t P_t m_t. Key codes are multiplied as unsigned bytes with q in 16-bit fixed point, whose
// high and low byte are two columns of the matrix instruction. Value codes are fp16 subnormals as they stand in their
// word. So 4 rows fill the 8 columns in the first product; in the second, even columns take one half of the tokens and
// odd columns the other. With 8 rows, the first product has two column tiles and the second one row per column.
#include "device.cuh"

constexpr int NUM_WARPS = 4;
constexpr int TILES = PASS_ROWS / 4;

constexpr int K_ROW = HEAD_SIZE * K_BITS / 8;
constexpr int V_ROW = HEAD_SIZE * V_BITS / 8;
constexpr int CONTENT = K_ROW + V_ROW + 8;
// What one copy of a stage brings: whole chunks, or the four parts of a piece of one.
constexpr int PIECE_TOKENS = constant_min(BLOCK_SIZE, STAGE_TOKENS);
constexpr int PIECES = STAGE_TOKENS / PIECE_TOKENS;
constexpr bool WHOLE_CHUNKS = BLOCK_SIZE <= STAGE_TOKENS;
constexpr int COPIES = WHOLE_CHUNKS ? PIECES : 4;
// Entries of the block table that a stage needs, and stages that a warp looks up at once.
constexpr int ENTRIES = WHOLE_CHUNKS ? PIECES : 1;
constexpr int LOOKUP_STAGES = 32 / ENTRIES;
constexpr int PIECE_BYTES = PIECE_TOKENS * CONTENT;
constexpr int STAGE_BYTES = STAGE_TOKENS * CONTENT;
constexpr int V_CODES = PIECE_TOKENS * K_ROW;
constexpr int K_META = V_CODES + PIECE_TOKENS * V_ROW;
constexpr int V_META = K_META + PIECE_TOKENS * 4;
static_assert(STAGE_TOKENS % 16 == 0 && (BLOCK_SIZE % STAGE_TOKENS == 0 || STAGE_TOKENS % BLOCK_SIZE == 0), "stage");
static_assert(HEAD_SIZE % 32 == 0 && HEAD_SIZE * V_BITS % 128 == 0, "head size");
static_assert(PASS_ROWS == 4 || PASS_ROWS == 8, "rows");

// Words of a key row in a lane: lane t = lane % 4 holds words in runs of K_RUN, as wide as rows are aligned.
constexpr int K_FIELDS = 8 / K_BITS;
constexpr int K_WORDS_ROW = K_ROW / 4;
constexpr int K_WORDS = (K_WORDS_ROW + 3) / 4;
constexpr int K_RUN = K_WORDS_ROW % 16 == 0 ? 4 : K_WORDS_ROW % 8 == 0 ? 2 : 1;
// Halfwords of a value row in a lane: g = lane / 4 holds runs of V_RUN.
constexpr int V_FIELDS = 8 / V_BITS;
constexpr int V_HALVES = V_ROW / 16;
constexpr int V_RUN = V_HALVES % 8 == 0 ? 8 : V_HALVES % 4 == 0 ? 4 : V_HALVES % 2 == 0 ? 2 : 1;
constexpr int V_TILES = HEAD_SIZE / 16;

#ifndef STEP_UNROLL
#define STEP_UNROLL 2
#endif
constexpr int STEP_TOKENS = constant_min(STAGE_TOKENS, 32);
constexpr int GROUPS = STEP_TOKENS / 16;
constexpr int NUMBERS = HEAD_SIZE / 32;
constexpr int QUERY_STRIDE = HEAD_SIZE + 16;
// Stages after which warps add their sums up in fp32: the matrix instruction truncates, and that must not pile up.
constexpr int FLUSH_STAGES = NUM_WARPS * 2048 / STAGE_TOKENS;
// A CTA reads at least a stage a warp: fewer are not worth a merge.
constexpr int MIN_STAGES = NUM_WARPS;
// Stages a CTA has at least where shares differ.
constexpr int MIN_SHARED_STAGES = 8 * NUM_WARPS;
constexpr int SLOW_SHARE = 32;
constexpr int OFFSET_STEPS = OFFSET_PAIRS / 8;

#define MASKED __int_as_float(0xFF800000)
constexpr float NOTHING = -1e30f;      // the reference of a row that has seen nothing
constexpr float MAX_WEIGHT = 32768.0f; // of P times a lifted value scale: fp16 holds it
constexpr float MAX_LIFTED = 512.0f;   // of a value scale when the lift is set, so that P may grow by 64 before it is again
constexpr float TRUNCATED = 1.0f - 0x1p-10f;  // fp16 keeps at least this much of a normal number

struct Arguments {
  const u16* query;              // [tokens][heads][HEAD_SIZE]
  u16* output;                   // likewise
  const u8* kv_cache;            // chunks of PageLayout
  const int* block_table;        // [requests][blocks]
  const int* seq_lens;           // [requests]
  const int* query_start_loc;    // [requests + 1]
  float* partial;                // [2 CTAs][PASS_ROWS][HEAD_SIZE], unnormalized
  float2* partial_state;         // [2 CTAs][PASS_ROWS], reference to base 2 and total
  int* arrivals;                 // [segments], 0 between launches
  int* claims;                   // [3], 0 between launches: shares taken of each kind, CTAs that have one
  const u8* fast;                // [multiprocessors], 1 for those that read memory faster
  const float* equalization;     // [KV heads][HEAD_SIZE]
  const float2* offset;          // [KV heads][OFFSET_PAIRS], the offset's numbers before RoPE
  const int* offset_dims;        // [OFFSET_PAIRS], dimensions of a pair: first | second << 16
  const int* offset_index;       // [OFFSET_PAIRS], of the rotary embedding's pairs
  const float2* coarse_angles;   // [positions / ANGLE_STEP][rotary_pairs], cosine and sine at every ANGLE_STEP-th position
  const uint4* fine_angles;      // [OFFSET_PAIRS / 8][ANGLE_STEP / 16][2 terms][32 lanes], A operands of 16 positions
  u64 query_stride, output_stride;                 // numbers from token to token
  u64 block_stride, head_stride, table_stride;     // bytes, bytes, numbers
  int num_reqs, num_tokens, num_kv_heads;
  int max_segments;              // of a request
  int rotary_pairs;
  int fast_ctas, fast_share;     // CTAs that get fast_share of the stages where others get SLOW_SHARE
  float scale_log2;              // logits to base 2 per unit of q . k
  float soft_cap_log2;           // the cap to base 2
};

__device__ __forceinline__ float load_query(const u16* pointer) {
#if QUERY_BF16
  return from_bf16(*pointer);
#else
  return from_fp16(*pointer);
#endif
}

__device__ __forceinline__ u16 round_output(float x) {
#if QUERY_BF16
  return to_bf16(x);
#else
  return to_fp16(x);
#endif
}

// The token of row r of the first product, and so of the second's row: within a pair of tokens the order alternates, so
// that shared memory's banks are met evenly by keys (lanes g) and by values (lanes t).
__device__ __forceinline__ int token_of_row(int row) { return row ^ (row >> 1 & 1); }

// ---- which stages ----

struct Request {
  int index, len, num_queries, first_query;
  int first_stage;  // the first that any query sees
  int stages;       // per segment
  int passes;       // over the tokens, for each KV head

  __device__ __forceinline__ void load(const Arguments& a, int request) {
    index = request;
    len = a.seq_lens[request];
    first_query = a.query_start_loc[request];
    num_queries = a.query_start_loc[request + 1] - first_query;
    first_stage = 0;
#if WINDOW
    first_stage = max(len - num_queries + 1 - WINDOW, 0) / STAGE_TOKENS;
#endif
    stages = (len + STAGE_TOKENS - 1) / STAGE_TOKENS - first_stage;
    passes = (num_queries * GROUP + PASS_ROWS - 1) / PASS_ROWS;
    if (num_queries <= 0 || len <= 0) stages = passes = 0;
  }
  __device__ __forceinline__ int units(const Arguments& a) const { return stages * passes * a.num_kv_heads; }
};

// A place in the row of segments.
struct Cursor {
  Request request;
  int kv_head, pass;
  int begin;    // flat index of the segment's first stage
  int stage_begin, stage_end;  // this CTA's share of the segment

  __device__ __forceinline__ void share(int first, int last) {
    stage_begin = max(first - begin, 0);
    stage_end = min(last - begin, request.stages);
  }
  // To the next segment; false at the end of the CTA's share.
  __device__ __forceinline__ bool next(const Arguments& a, int first, int last) {
    begin += request.stages;
    if (begin >= last) return false;
    if (++pass == request.passes) {
      pass = 0;
      if (++kv_head == a.num_kv_heads) {
        kv_head = 0;
        do request.load(a, request.index + 1);
        while (request.stages == 0);
      }
    }
    share(first, last);
    return true;
  }
};

// How stages are shared out: the first CTAs get larger shares.
struct Shares {
  int units, ctas, fast_ctas, fast_share;

  __device__ __forceinline__ int before(int cta) const {
    return min(cta, fast_ctas) * fast_share + max(cta - fast_ctas, 0) * SLOW_SHARE;
  }
  // The flat index of a CTA's first stage.
  __device__ __forceinline__ int begin(int cta) const { return (int)((u64)before(cta) * units / before(ctas)); }
  // The CTA that reads the stage with flat index `unit`: the last that begins at or before it.
  __device__ __forceinline__ int owner(int unit) const {
    const int share = (int)((((u64)unit + 1) * before(ctas) - 1) / units);
    const int fast = fast_ctas * fast_share;
    return share < fast ? share / fast_share : fast_ctas + (share - fast) / SLOW_SHARE;
  }
};

// A CTA's place in the shares, by one thread: a large one for a fast multiprocessor while there are any left, so that
// every CTA gets one wherever it runs. What is computed depends on the places alone, not on who takes them.
__device__ __forceinline__ int claim(const Arguments& a) {
  int fast = a.fast[multiprocessor()];
  int place = atomicAdd(&a.claims[fast], 1);
  if (place >= (fast ? a.fast_ctas : (int)gridDim.x - a.fast_ctas)) {
    fast ^= 1;
    place = atomicAdd(&a.claims[fast], 1);
  }
  if (atomicAdd(&a.claims[2], 1) == (int)gridDim.x - 1) a.claims[0] = a.claims[1] = a.claims[2] = 0;
  return fast ? place : a.fast_ctas + place;
}

// Stages of all requests, and the cursor's place for flat index `first`. Every warp finds them for itself.
__device__ __forceinline__ int total_units(const Arguments& a, int lane) {
  int sum = 0;
  for (int r = lane; r < a.num_reqs; r += 32) {
    Request request;
    request.load(a, r);
    sum += request.units(a);
  }
  return __reduce_add_sync(FULL_WARP, sum);
}

__device__ __forceinline__ void find(const Arguments& a, int first, int last, int lane, Cursor& cursor) {
  int before = 0;
  for (int base = 0;; base += 32) {
    Request request;
    int units = 0;
    if (base + lane < a.num_reqs) {
      request.load(a, base + lane);
      units = request.units(a);
    }
    int until = units;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      int other = __shfl_up_sync(FULL_WARP, until, step);
      if (lane >= step) until += other;
    }
    u32 beyond = __ballot_sync(FULL_WARP, before + until > first);
    if (beyond) {
      int found = __ffs(beyond) - 1;
      int start = before + __shfl_sync(FULL_WARP, until - units, found);
      cursor.request.load(a, base + found);
      const int segment = (first - start) / cursor.request.stages;
      cursor.kv_head = segment / cursor.request.passes;
      cursor.pass = segment % cursor.request.passes;
      cursor.begin = start + segment * cursor.request.stages;
      cursor.share(first, last);
      return;
    }
    before += __shfl_sync(FULL_WARP, until, 31);
  }
}

// ---- queries ----

__device__ __forceinline__ bool row_of(const Request& request, int pass, int row, int& query, int& member) {
  int index = pass * PASS_ROWS + row;
  query = index / GROUP;
  member = index % GROUP;
  return query < request.num_queries;
}

// nullptr for a row that the request does not have.
__device__ __forceinline__ const u16* query_row(const Arguments& a, const Cursor& cursor, int row) {
  int query, member;
  if (!row_of(cursor.request, cursor.pass, row, query, member)) return nullptr;
  return a.query + (cursor.request.first_query + query) * a.query_stride +
         (cursor.kv_head * GROUP + member) * HEAD_SIZE;
}

// ---- shared memory ----

struct Shared {
  alignas(128) u8 ring[NUM_WARPS][NUM_STAGES][STAGE_BYTES];
  alignas(16) float output[NUM_WARPS][PASS_ROWS][HEAD_SIZE];
  alignas(16) u8 query[TILES][8][QUERY_STRIDE];
#if OFFSET_PAIRS
  float2 offset[PASS_ROWS][OFFSET_PAIRS];
#endif
  u64 barriers[NUM_WARPS][NUM_STAGES];
  float dot_factor[PASS_ROWS], sum_factor[PASS_ROWS], offset_factor[PASS_ROWS];
  float total[NUM_WARPS][PASS_ROWS], top[NUM_WARPS][PASS_ROWS];
  // Queries as they are of this segment and the next, row by row, and which segments of the CTA those are: copied by
  // the warp that folds them, as soon as its copies come to that segment, since the way to memory is long then.
  alignas(16) u16 raw_query[2][PASS_ROWS][HEAD_SIZE];
  int raw_segment[2][NUM_WARPS];
  int segment;  // of the CTA, that the warps are in
  int cta, arrived, more;
  // Only looked at where a segment ends, so not in registers.
  Cursor cursor, producers[NUM_WARPS];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "shared memory");

// Fetches a segment's queries, each warp the rows that it folds.
__device__ __forceinline__ void fetch_rows(const Arguments& a, Shared& shared, const Cursor& cursor, int segment, int warp,
                                           int lane) {
  const int at = segment % 2;
  for (int row = warp; row < PASS_ROWS; row += NUM_WARPS) {
    const u16* source = query_row(a, cursor, row);
    if (source != nullptr)
      for (int i = lane * 8; i < HEAD_SIZE; i += 256) copy_16(shared_address(&shared.raw_query[at][row][i]), source + i);
  }
  if (lane == 0) shared.raw_segment[at][warp] = segment;
}

// ---- the ring of one warp ----

struct Producer {
  Shared* shared;
  int segment;     // of the CTA
  const u8* head;  // of the cache, at the cursor's KV head
  const int* table;
  int token;       // the stage's first
  int last_token;  // of this CTA's share of the segment
  int len;         // of the request
  // Blocks of this stage and the next ones, one entry a lane, and of those after them: the memory is so deep in copies
  // that a lookup takes longer than a stage.
  int blocks, later_blocks;
  int looked_up;   // stages used of `blocks`
  bool more;

  __device__ __forceinline__ void enter(const Arguments& a, const Cursor& at, int warp, int lane) {
    head = a.kv_cache + at.kv_head * a.head_stride;
    table = a.block_table + at.request.index * a.table_stride;
    token = (at.request.first_stage + at.stage_begin + warp) * STAGE_TOKENS;
    last_token = (at.request.first_stage + at.stage_end) * STAGE_TOKENS;
    len = at.request.len;
    blocks = look_up(lane, 0);
    later_blocks = look_up(lane, LOOKUP_STAGES);
    looked_up = 0;
  }

  // Entries beyond the request may be stale and are not read.
  __device__ __forceinline__ int look_up(int lane, int stages_ahead) const {
    const int of_lane =
        token + (stages_ahead + lane / ENTRIES) * (NUM_WARPS * STAGE_TOKENS) + lane % ENTRIES * PIECE_TOKENS;
    return of_lane < min(last_token, len) ? table[of_lane / BLOCK_SIZE] : 0;
  }

  // To the next stage of this warp, which may be in a later segment.
  __device__ __forceinline__ void settle(const Arguments& a, int first, int last, int warp, int lane) {
    if (token >= last_token) {
      Cursor at = shared->producers[warp];
      do {
        more = at.next(a, first, last);
        if (!more) return;
        segment++;
        enter(a, at, warp, lane);
#if __CUDA_ARCH__ >= 900
        // Unless that segment is so far ahead that its place still holds another's.
        if (segment == shared->segment + 1) fetch_rows(a, *shared, at, segment, warp, lane);
#endif
      } while (token >= last_token);
      __syncwarp();
      if (lane == 0) shared->producers[warp] = at;
      __syncwarp();
    } else if (looked_up == LOOKUP_STAGES) {
      blocks = later_blocks;
      later_blocks = look_up(lane, LOOKUP_STAGES);
      looked_up = 0;
    }
  }

  __device__ __forceinline__ void issue(const Arguments& a, int first, int last, int warp, int lane, u8* target,
                                        u64* barrier, u64 policy) {
    if (more) {
      const int copies = WHOLE_CHUNKS ? min(COPIES, (len - token + PIECE_TOKENS - 1) / PIECE_TOKENS) : COPIES;
      u32 source_blocks[ENTRIES];
#pragma unroll
      for (int i = 0; i < ENTRIES; i++) source_blocks[i] = __shfl_sync(FULL_WARP, blocks, looked_up * ENTRIES + i);
      looked_up++;
      const u32 at = shared_address(target);
#if __CUDA_ARCH__ >= 900
      if (elect_one()) {
        const u32 mbarrier = shared_address(barrier);
        barrier_expect(mbarrier, WHOLE_CHUNKS ? copies * PIECE_BYTES : STAGE_BYTES);
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
          if (i >= copies) break;
          const Copy copy = copy_of(a, i, source_blocks[WHOLE_CHUNKS ? i : 0]);
          copy_bulk(at + copy.target, copy.source, copy.bytes, mbarrier, policy);
        }
      }
#else
#pragma unroll
      for (int i = 0; i < COPIES; i++) {
        if (i >= copies) break;
        const Copy copy = copy_of(a, i, source_blocks[WHOLE_CHUNKS ? i : 0]);
        for (u32 j = lane * 16; j < copy.bytes; j += 512) copy_16(at + copy.target + j, copy.source + j);
      }
#endif
      token += NUM_WARPS * STAGE_TOKENS;
      settle(a, first, last, warp, lane);
    }
#if __CUDA_ARCH__ < 900
    copies_commit();
#endif
  }

  struct Copy {
    const u8* source;
    u32 bytes, target;  // target within the stage
  };

  // Copy i of a stage: a whole chunk, or a part of one in layout.py's order.
  __device__ __forceinline__ Copy copy_of(const Arguments& a, int i, u32 block) const {
    const u8* chunk = head + (u64)block * a.block_stride;
    if (WHOLE_CHUNKS) return {chunk, PIECE_BYTES, (u32)i * PIECE_BYTES};
    const int width = i == 0 ? K_ROW : i == 1 ? V_ROW : 4;
    const int before = i == 0 ? 0 : i == 1 ? K_ROW : i == 2 ? K_ROW + V_ROW : K_ROW + V_ROW + 4;
    return {chunk + before * BLOCK_SIZE + (u32)token % BLOCK_SIZE * width, (u32)(width * PIECE_TOKENS),
            (u32)(before * PIECE_TOKENS)};
  }
};

// ---- arithmetic of one warp ----

struct Accumulators {
  float output[V_TILES][4];
  float reference[TILES], total[TILES], minima[TILES];
  float lift;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < V_TILES; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) output[i][j] = 0.0f;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
      reference[i] = NOTHING;
      total[i] = minima[i] = 0.0f;
    }
    // The first scale that is not 0 brings it down.
    lift = __uint_as_float((127u + 40u) << 23);
  }
};

struct RowConstants {
  u32 query[TILES][K_FIELDS][K_WORDS];
  float dot_factor[TILES], sum_factor[TILES];
  int limit[TILES];  // tokens that the row sees
  int seen_by_all;   // tokens that every row sees
  int len;           // tokens of the request
#if OFFSET_PAIRS
  float offset_factor[TILES];
#endif
};

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

// Integer dot products of 16 tokens with all rows: lane (g, t) gets tokens token_of_row(g) and 8 more of row t of each
// tile, times 2^((K_FIELDS - 1) K_BITS).
__device__ __forceinline__ void key_products(const u8* keys, const RowConstants& rows, int lane, int (&dots)[TILES][2]) {
  const int g = lane / 4, t = lane % 4;
  u32 words[2][K_WORDS];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const u8* row = keys + (token_of_row(g) + 8 * half) * K_ROW;
#pragma unroll
    for (int i = 0; i < K_WORDS; i += K_RUN) load_run<K_RUN>(&words[half][i], row + (4 * i + t * K_RUN) * 4);
  }
  int sums[TILES][K_FIELDS][4];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int field = 0; field < K_FIELDS; field++)
#pragma unroll
      for (int j = 0; j < 4; j++) sums[tile][field][j] = 0;
#pragma unroll
  for (int i = 0; i < K_WORDS; i += 2) {
#pragma unroll
    for (int field = 0; field < K_FIELDS; field++) {
      constexpr u32 ONES = K_BITS == 8 ? 0xFFFFFFFFu : K_BITS == 4 ? 0x0F0F0F0Fu : 0x03030303u;
      const u32 mask = ONES << (field * K_BITS);
      u32 a0 = words[0][i] & mask, a1 = words[1][i] & mask;
      if (i + 1 < K_WORDS) {
        u32 a2 = words[0][i + 1] & mask, a3 = words[1][i + 1] & mask;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
          mma_u8s8_k32(sums[tile][field], a0, a1, a2, a3, rows.query[tile][field][i], rows.query[tile][field][i + 1]);
      } else {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
          mma_u8s8_k16(sums[tile][field], a0, a1, rows.query[tile][field][i]);
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int high = 0, low = 0;
#pragma unroll
      for (int field = 0; field < K_FIELDS; field++) {
        high += sums[tile][field][2 * half] << ((K_FIELDS - 1 - field) * K_BITS);
        low += sums[tile][field][2 * half + 1] << ((K_FIELDS - 1 - field) * K_BITS);
      }
      dots[tile][half] = (high << 8) + low;
    }
}

// The second product of 16 tokens: weights[b] is a B operand, b = 0 for tokens token_of_row(2t), token_of_row(2t + 1).
__device__ __forceinline__ void value_products(const u8* values, const u32 (&weights)[2], int lane,
                                               float (&output)[V_TILES][4]) {
  const int g = lane / 4, t = lane % 4;
  // codes[b][c]: code number c of this lane, for two tokens.
  constexpr int RUN_WORDS = V_RUN > 1 ? V_RUN / 2 : 1;
  constexpr int RUN_CODES = HEAD_SIZE / 8 / (V_HALVES / V_RUN);
#pragma unroll
  for (int run = 0; run < V_HALVES / V_RUN; run++) {
    u32 codes[2][RUN_CODES];
#pragma unroll
    for (int b = 0; b < 2; b++) {
      const u8* row = values + (run * 8 + g) * (V_RUN * 2);
      const int even = token_of_row(2 * t) + 8 * b, odd = token_of_row(2 * t + 1) + 8 * b;
      u32 pairs[V_RUN];
      if constexpr (V_RUN == 1) {
        pairs[0] = (u32) * (const u16*)(row + even * V_ROW) | (u32) * (const u16*)(row + odd * V_ROW) << 16;
      } else {
        u32 first[RUN_WORDS], second[RUN_WORDS];
        load_run<RUN_WORDS>(first, row + even * V_ROW);
        load_run<RUN_WORDS>(second, row + odd * V_ROW);
#pragma unroll
        for (int i = 0; i < RUN_WORDS; i++) {
          pairs[2 * i] = __byte_perm(first[i], second[i], 0x5410);
          pairs[2 * i + 1] = __byte_perm(first[i], second[i], 0x7632);
        }
      }
#pragma unroll
      for (int i = 0; i < V_RUN; i++) {
#pragma unroll
        for (int code = 0; code < 16 / V_BITS; code++) {
          constexpr u32 ONES = 0x10001u * ((1 << V_BITS) - 1);
          const int low = code * V_BITS;
          u32 word;
          if (low + V_BITS <= 10)
            word = pairs[i] & (ONES << low);
          else if (V_BITS == 8)
            word = __byte_perm(pairs[i], 0, 0x4341);
          else
            word = (pairs[i] >> 8) & (ONES << (low - 8));
          codes[b][i * (16 / V_BITS) + code] = word;
        }
      }
    }
#pragma unroll
    for (int c = 0; c < RUN_CODES; c += 2)
      mma_fp16(output[(run * RUN_CODES + c) / 2], codes[0][c], codes[0][c + 1], codes[1][c], codes[1][c + 1], weights[0],
               weights[1]);
  }
}

// The dimension that this lane's code number c holds, and what its subnormal must be multiplied by.
__device__ __forceinline__ int value_dim(int c, int g) {
  const int half = c / (16 / V_BITS), code = c % (16 / V_BITS);
  const int position = half / V_RUN * 8 * V_RUN + g * V_RUN + half % V_RUN;
  return 2 * position + code / V_FIELDS + code % V_FIELDS * (HEAD_SIZE / V_FIELDS);
}
__device__ __forceinline__ float value_unit(int c) {
  const int low = c % (16 / V_BITS) * V_BITS;
  const int shift = low + V_BITS <= 10 ? low : low - 8;
  return (float)(1 << 24) / (float)(1 << shift);
}

#if OFFSET_PAIRS
// q . R_t m of STEP_TOKENS tokens from position `token`, in units of offset_factor. Coefficients and angles come anew from
// shared memory and the L1 cache each time: registers for all pairs would leave none for warps.
__device__ __forceinline__ void offset_products(const Arguments& a, const Shared& shared, int token, int lane,
                                                float (&sums)[GROUPS][TILES][2]) {
  const int g = lane / 4, t = lane % 4;
  float products[GROUPS][TILES][4] = {};
#pragma unroll
  for (int step = 0; step < OFFSET_STEPS; step++) {
    u32 operand[TILES][2];
#pragma unroll
    for (int b = 0; b < 2; b++) {
      const int pair = step * 8 + t + 4 * b;
      const float2 angle =
          __ldg(&a.coarse_angles[(u64)(token / ANGLE_STEP) * a.rotary_pairs + __ldg(&a.offset_index[pair])]);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        // The sum of two angles: the coefficients turn with every ANGLE_STEP tokens, cosines and sines within them stay.
        const float2 c = shared.offset[4 * tile + g / 2][pair];
        const float cosine = c.x * angle.x + c.y * angle.y, sine = c.y * angle.x - c.x * angle.y;
        const u32 high = pack_fp16(cosine, sine);
        const float2 rounded = unpack_fp16(high);
        const u32 low = pack_fp16(cosine - rounded.x, sine - rounded.y);
        operand[tile][b] = g % 2 ? low : high;
      }
    }
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
      const uint4* fine = a.fine_angles + ((step * (ANGLE_STEP / 16) + (token / 16 + group) % (ANGLE_STEP / 16)) * 2) * 32;
      const uint4 high = __ldg(fine + lane), low = __ldg(fine + 32 + lane);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        mma_fp16(products[group][tile], low.x, low.y, low.z, low.w, operand[tile][0], operand[tile][1]);
        mma_fp16(products[group][tile], high.x, high.y, high.z, high.w, operand[tile][0], operand[tile][1]);
      }
    }
  }
#pragma unroll
  for (int group = 0; group < GROUPS; group++)
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      sums[group][tile][0] = products[group][tile][0] + products[group][tile][1];
      sums[group][tile][1] = products[group][tile][2] + products[group][tile][3];
    }
}
#endif

// STEP_TOKENS tokens from the one at `token`, the first of a piece's part or of a 16-token run within it.
__device__ __forceinline__ void attend(const Arguments& a, const u8* stage, int step, int token, const RowConstants& rows,
#if OFFSET_PAIRS
                                       const Shared& shared,
#endif
                                       int lane, Accumulators& sums) {
  const int g = lane / 4;
  float logits[GROUPS][TILES][2], lifted[GROUPS][2], minimum[GROUPS][2];
#if OFFSET_PAIRS
  float offsets[GROUPS][TILES][2];
  offset_products(a, shared, token, lane, offsets);
#endif
#pragma unroll
  for (int group = 0; group < GROUPS; group++) {
    const int place = step * STEP_TOKENS + group * 16;
    const u8* piece = stage + place / PIECE_TOKENS * PIECE_BYTES;
    const int within = place % PIECE_TOKENS;
    int dots[TILES][2];
    key_products(piece + within * K_ROW, rows, lane, dots);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = token_of_row(g) + 8 * half;
      const float2 k_meta = unpack_fp16(*(const u32*)(piece + K_META + (within + row) * 4));
      const float2 v_meta = unpack_fp16(*(const u32*)(piece + V_META + (within + row) * 4));
      lifted[group][half] = v_meta.x * sums.lift;
      minimum[group][half] = v_meta.y;
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        float logit = k_meta.y * rows.sum_factor[tile];
        logit = fmaf(k_meta.x * rows.dot_factor[tile], __int2float_rn(dots[tile][half]), logit);
#if OFFSET_PAIRS
        logit = fmaf(offsets[group][tile][half], rows.offset_factor[tile], logit);
#endif
#if SOFT_CAP
        // To base 2: cap tanh(logit / cap), tanh(y) = 1 - 2 / (e^(2 y) + 1).
        const float power = exp2_approx(logit * (2.885390081777927f / a.soft_cap_log2));
        logit = a.soft_cap_log2 * (1.0f - 2.0f * reciprocal_approx(power + 1.0f));
#endif
        logits[group][tile][half] = logit;
      }
    }
  }
  bool partly_seen = token + STEP_TOKENS > rows.seen_by_all;
#if WINDOW
  partly_seen |= token < rows.seen_by_all + PASS_ROWS - WINDOW;
#endif
  if (partly_seen) {
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int position = token + group * 16 + token_of_row(g) + 8 * half;
        // What stands beyond the request, or in blocks that left its window, may be any bits.
        bool absent = position >= rows.len;
#if WINDOW
        absent |= position < rows.seen_by_all - WINDOW;
#endif
        if (absent) lifted[group][half] = minimum[group][half] = 0.0f;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          bool seen = position < rows.limit[tile];
#if WINDOW
          seen = seen && position >= rows.limit[tile] - WINDOW;
#endif
          if (!seen) logits[group][tile][half] = MASKED;
        }
      }
  }
  float p[GROUPS][TILES][2], weight[GROUPS][TILES][2];
  bool surpassed = false;
#pragma unroll
  for (int group = 0; group < GROUPS; group++)
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        p[group][tile][half] = exp2_approx(logits[group][tile][half] - sums.reference[tile]);
        weight[group][tile][half] = p[group][tile][half] * lifted[group][half];
        // Also where P itself grows without bound, beside scales of 0, and where infinity meets one.
        surpassed |= !(fmaf(p[group][tile][half], 0x1p-64f, weight[group][tile][half]) <= MAX_WEIGHT);
      }
  if (__any_sync(FULL_WARP, surpassed)) {
    float largest = 0.0f;
    float top[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) top[tile] = sums.reference[tile];
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        largest = fmaxf(largest, lifted[group][half]);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) top[tile] = fmaxf(top[tile], logits[group][tile][half]);
      }
#pragma unroll
    for (int step = 4; step < 32; step <<= 1) {
      largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, step));
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) top[tile] = fmaxf(top[tile], __shfl_xor_sync(FULL_WARP, top[tile], step));
    }
    // By a power of two, so that lifting rounds nothing: the largest scale comes down to between 256 and 512.
    float relift = 1.0f;
    if (largest >= MAX_LIFTED) relift = __uint_as_float((127u + 8u + 127u - (__float_as_uint(largest) >> 23)) << 23);
    sums.lift *= relift;
    float decay[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      decay[tile] = exp2_approx(sums.reference[tile] - top[tile]);
      sums.reference[tile] = top[tile];
      sums.total[tile] *= decay[tile];
      sums.minima[tile] *= decay[tile];
    }
#pragma unroll
    for (int i = 0; i < V_TILES; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) sums.output[i][j] *= decay[TILES == 2 ? j % 2 : 0] * relift;
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        lifted[group][half] *= relift;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          p[group][tile][half] = exp2_approx(logits[group][tile][half] - sums.reference[tile]);
          weight[group][tile][half] = p[group][tile][half] * lifted[group][half];
        }
      }
  }
#pragma unroll
  for (int group = 0; group < GROUPS; group++) {
    const int place = step * STEP_TOKENS + group * 16;
    const u8* piece = stage + place / PIECE_TOKENS * PIECE_BYTES;
    u32 packed[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
      packed[i] = TILES == 2 ? truncate_fp16(weight[group][0][i], weight[group][TILES - 1][i])
                             : truncate_fp16(weight[group][0][0], weight[group][0][1]);
    // The minimum's term and the total take the same truncated weights as the codes, since minimum and codes nearly
    // cancel; but P itself where a weight is so small that fp16 loses it.
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float inverse = reciprocal_approx(lifted[group][half]);
      const float2 truncated = unpack_fp16(packed[TILES == 2 ? half : 0]);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const float same = TILES == 2 ? (tile ? truncated.y : truncated.x) : (half ? truncated.y : truncated.x);
        const float used = fmaxf(same * inverse, p[group][tile][half] * TRUNCATED);
        sums.total[tile] += used;
        sums.minima[tile] = fmaf(used, minimum[group][half], sums.minima[tile]);
      }
    }
    u32 weights[2];
    if (TILES == 2) {
      weights[0] = transpose_8x8(packed[0]);
      weights[1] = transpose_8x8(packed[1]);
    } else {
      const u32 both = transpose_8x8(packed[0]);
      const u32 odd = g & 1 ? 0xFFFFFFFFu : 0u;
      weights[0] = both & ~odd;
      weights[1] = both & odd;
    }
    value_products(piece + V_CODES + place % PIECE_TOKENS * V_ROW, weights, lane, sums.output);
  }
}

// ---- the CTA's rows ----

// A row of the query into the frame of the stored keys, in 16-bit fixed point; by one warp.
__device__ __forceinline__ void fold_row(const Arguments& a, Shared& shared, const Cursor& cursor, int row, int lane) {
  const int kv_head = cursor.kv_head;
  float x[NUMBERS];
  const u16* source = query_row(a, cursor, row);
  const bool present = source != nullptr;
  const u16* raw = shared.raw_query[shared.segment % 2][row];
#pragma unroll
  for (int i = 0; i < NUMBERS; i++) x[i] = present ? load_query(raw + i * 32 + lane) : 0.0f;
#if OFFSET_PAIRS
  float2 coefficients[(OFFSET_PAIRS + 31) / 32];
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < (OFFSET_PAIRS + 31) / 32; i++) {
    int pair = i * 32 + lane;
    coefficients[i] = make_float2(0.0f, 0.0f);
    if (present && pair < OFFSET_PAIRS) {
      int dims = a.offset_dims[pair];
      float first = load_query(raw + (dims & 0xFFFF)), second = load_query(raw + (dims >> 16));
      float2 m = a.offset[kv_head * OFFSET_PAIRS + pair];
      // q . R_t m is the sum over pairs of (q_a m_a + q_b m_b) cos + (q_b m_a - q_a m_b) sin.
      coefficients[i] = make_float2(first * m.x + second * m.y, second * m.x - first * m.y);
      largest = fmaxf(largest, fmaxf(fabsf(coefficients[i].x), fabsf(coefficients[i].y)));
    }
  }
  largest = fmaxf(warp_max(largest), 1e-30f);
#pragma unroll
  for (int i = 0; i < (OFFSET_PAIRS + 31) / 32; i++)
    if (i * 32 + lane < OFFSET_PAIRS)
      shared.offset[row][i * 32 + lane] = make_float2(coefficients[i].x / largest, coefficients[i].y / largest);
  if (lane == 0) shared.offset_factor[row] = largest * a.scale_log2;
#endif
#if KEY_EQUALIZATION
#pragma unroll
  for (int i = 0; i < NUMBERS; i++) x[i] *= a.equalization[kv_head * HEAD_SIZE + i * 32 + lane];
#endif
#if KEY_HADAMARD
  hadamard_row(x, lane);
#endif
  float absmax = 0.0f;
#pragma unroll
  for (int i = 0; i < NUMBERS; i++) absmax = fmaxf(absmax, fabsf(x[i]));
  absmax = fmaxf(warp_max(absmax), 1e-30f);
  // 32512 = 127 * 256: the high byte rounds to at most 127.
  const float unit = absmax * (1.0f / 32512.0f), inverse = 32512.0f / absmax;
  int sum = 0;
  u8* high = shared.query[row / 4][2 * (row % 4)];
#pragma unroll
  for (int i = 0; i < NUMBERS; i++) {
    int fixed = __float2int_rn(x[i] * inverse);
    sum += fixed;
    high[i * 32 + lane] = (u8)((fixed + 128) >> 8);
    high[QUERY_STRIDE + i * 32 + lane] = (u8)fixed;
  }
  sum = __reduce_add_sync(FULL_WARP, sum);
  if (lane == 0) {
    const float factor = unit * a.scale_log2;
    shared.dot_factor[row] = factor / (float)(1 << ((K_FIELDS - 1) * K_BITS));
    shared.sum_factor[row] = factor * (float)sum;
  }
}

__device__ __forceinline__ void load_rows(const Shared& shared, const Request& request, int pass, int lane,
                                          RowConstants& rows) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
    for (int field = 0; field < K_FIELDS; field++)
#pragma unroll
      for (int i = 0; i < K_WORDS; i++) {
        const int word = i / K_RUN * 4 * K_RUN + t * K_RUN + i % K_RUN;
        rows.query[tile][field][i] = 0;
        if (K_WORDS_ROW % 4 == 0 || word < K_WORDS_ROW)
          rows.query[tile][field][i] = *(const u32*)&shared.query[tile][g][4 * word + field * K_ROW];
      }
    const int row = 4 * tile + t;
    rows.dot_factor[tile] = shared.dot_factor[row];
    rows.sum_factor[tile] = shared.sum_factor[row];
#if OFFSET_PAIRS
    rows.offset_factor[tile] = shared.offset_factor[row];
#endif
    int query, member;
    row_of(request, pass, row, query, member);
    rows.limit[tile] = min(request.len - request.num_queries + 1 + query, request.len);
  }
  rows.len = request.len;
  rows.seen_by_all = request.len - request.num_queries + 1 + pass * PASS_ROWS / GROUP;
}

// Adds a warp's sums in fp32 to what it has kept of the segment so far.
__device__ __forceinline__ void keep(Shared& shared, Accumulators& sums, bool first, int warp, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
    for (int step = 4; step < 32; step <<= 1) {
      sums.total[tile] += __shfl_xor_sync(FULL_WARP, sums.total[tile], step);
      sums.minima[tile] += __shfl_xor_sync(FULL_WARP, sums.minima[tile], step);
    }
    const int row = 4 * tile + t;
    float* output = shared.output[warp][row];
    const float before = first ? NOTHING : shared.top[warp][row];
    const float top = fmaxf(before, sums.reference[tile]);
    const float factor = exp2_approx(sums.reference[tile] - top), decay = exp2_approx(before - top);
    const float unlift = 1.0f / sums.lift;
#pragma unroll
    for (int c = 0; c < 2 * V_TILES; c++) {
      const float sum = TILES == 2 ? sums.output[c / 2][c % 2 * 2 + tile]
                                   : sums.output[c / 2][c % 2 * 2] + sums.output[c / 2][c % 2 * 2 + 1];
      const float x = fmaf(sum, value_unit(c) * unlift, sums.minima[tile]) * factor;
      float& target = output[value_dim(c, g)];
      target = first ? x : fmaf(target, decay, x);
    }
    __syncwarp();
    if (g == 0) {
      const float total = sums.total[tile] * factor;
      shared.total[warp][row] = first ? total : fmaf(shared.total[warp][row], decay, total);
      shared.top[warp][row] = top;
    }
  }
  __syncwarp();
}

// A row of what all warps have kept, unnormalized: number i * 32 + lane in x[i].
__device__ __forceinline__ void add_up(const Shared& shared, int row, int lane, float (&x)[NUMBERS], float& top,
                                       float& total) {
  top = NOTHING;
#pragma unroll
  for (int i = 0; i < NUM_WARPS; i++) top = fmaxf(top, shared.top[i][row]);
  total = 0.0f;
#pragma unroll
  for (int j = 0; j < NUMBERS; j++) x[j] = 0.0f;
#pragma unroll
  for (int i = 0; i < NUM_WARPS; i++) {
    const float weight = exp2_approx(shared.top[i][row] - top);
    total = fmaf(shared.total[i][row], weight, total);
#pragma unroll
    for (int j = 0; j < NUMBERS; j++) x[j] = fmaf(shared.output[i][row][j * 32 + lane], weight, x[j]);
  }
}

// A normalized row to the output.
__device__ __forceinline__ void write_row(const Arguments& a, const Cursor& cursor, int row, float (&x)[NUMBERS],
                                          float total, int lane) {
  const Request& request = cursor.request;
  int query, member;
  if (!row_of(request, cursor.pass, row, query, member)) return;
#pragma unroll
  for (int i = 0; i < NUMBERS; i++) x[i] /= total;
#if VALUE_HADAMARD
  hadamard_row(x, lane);
#endif
  u16* target =
      a.output + (request.first_query + query) * a.output_stride + (cursor.kv_head * GROUP + member) * HEAD_SIZE;
#pragma unroll
  for (int i = 0; i < NUMBERS; i++) target[i * 32 + lane] = round_output(x[i]);
}

// Leaves this CTA's part of a segment to the CTA that ends last, which merges all parts in their order.
__device__ __forceinline__ void share_segment(const Arguments& a, Shared& shared, const Cursor& cursor,
                                              const Shares& shares, int cta, int warp, int lane) {
  const int slot = 2 * cta + (cursor.stage_begin > 0 ? 0 : 1);
  for (int row = warp; row < PASS_ROWS; row += NUM_WARPS) {
    float x[NUMBERS], top, total;
    add_up(shared, row, lane, x, top, total);
#pragma unroll
    for (int i = 0; i < NUMBERS; i++) a.partial[((u64)slot * PASS_ROWS + row) * HEAD_SIZE + i * 32 + lane] = x[i];
    if (lane == 0) a.partial_state[slot * PASS_ROWS + row] = make_float2(top, total);
  }
  __syncthreads();
  const int first = shares.owner(cursor.begin);
  const int last = shares.owner(cursor.begin + cursor.request.stages - 1);
  int* arrivals = a.arrivals + cursor.request.index * a.max_segments + cursor.kv_head * cursor.request.passes + cursor.pass;
  if (warp == 0 && lane == 0) {
    // Releases what all threads wrote before the barrier, and acquires what the others released.
    shared.arrived = arrive(arrivals);
    if (shared.arrived == last - first) *arrivals = 0;
  }
  __syncthreads();
  if (shared.arrived != last - first) return;
  for (int row = warp; row < PASS_ROWS; row += NUM_WARPS) {
    float top = NOTHING, total = 0.0f;
    float x[NUMBERS] = {};
    // A part is the second of its CTA only in the CTA where the segment begins.
    auto slot_of = [&](int part) { return (u64)(2 * part + (part == first ? 1 : 0)) * PASS_ROWS + row; };
    for (int base = first; base <= last; base += 32) {
      const bool present = base + lane <= last;
      const float2 state = present ? __ldcg(&a.partial_state[slot_of(base + lane)]) : make_float2(NOTHING, 0.0f);
      const float newer = fmaxf(top, warp_max(state.x));
      const float decay = exp2_approx(top - newer);
      const float weight = present ? exp2_approx(state.x - newer) : 0.0f;
      top = newer;
      total = fmaf(total, decay, warp_sum(state.y * weight));
#pragma unroll
      for (int i = 0; i < NUMBERS; i++) x[i] *= decay;
      constexpr int BATCH = NUMBERS <= 4 ? 16 : 8;
      for (int begin = base; begin < min(base + 32, last + 1); begin += BATCH) {
        float parts[BATCH][NUMBERS];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
          const float* part = a.partial + slot_of(min(begin + j, last)) * HEAD_SIZE;
#pragma unroll
          for (int i = 0; i < NUMBERS; i++) parts[j][i] = __ldcg(part + i * 32 + lane);
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
          const float factor = __shfl_sync(FULL_WARP, weight, (begin - base + j) % 32);
#pragma unroll
          for (int i = 0; i < NUMBERS; i++) x[i] = fmaf(parts[j][i], begin + j <= last ? factor : 0.0f, x[i]);
        }
      }
    }
    write_row(a, cursor, row, x, total, lane);
  }
}

// Rows that no segment writes: tokens beyond the last query, and queries of requests without cached tokens.
__device__ __forceinline__ void clear_rows(const Arguments& a, int thread) {
  const int row_size = a.num_kv_heads * GROUP * HEAD_SIZE;
  const int used = a.query_start_loc[a.num_reqs];
  for (int token = used + blockIdx.x; token < a.num_tokens; token += gridDim.x)
    for (int i = thread; i < row_size; i += NUM_WARPS * 32) a.output[token * a.output_stride + i] = 0;
  for (int r = blockIdx.x; r < a.num_reqs; r += gridDim.x) {
    if (a.seq_lens[r] > 0) continue;
    for (int token = a.query_start_loc[r]; token < a.query_start_loc[r + 1]; token++)
      for (int i = thread; i < row_size; i += NUM_WARPS * 32) a.output[token * a.output_stride + i] = 0;
  }
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32, MIN_CTAS)
    paged_attention(const u16* query, u16* output, const u8* kv_cache, const int* block_table, const int* seq_lens,
                    const int* query_start_loc, float* partial, float2* partial_state, int* arrivals, int* claims,
                    const u8* fast,
                    const float* equalization, const float2* offset, const int* offset_dims, const int* offset_index,
                    const float2* coarse_angles, const uint4* fine_angles, u64 query_stride, u64 output_stride, u64 block_stride, u64 head_stride,
                    u64 table_stride, int num_reqs, int num_tokens, int num_kv_heads, int max_segments,
                    int rotary_pairs, int fast_ctas, int fast_share, float scale_log2, float soft_cap_log2) {
  const Arguments a = {query,        output,        kv_cache,      block_table,  seq_lens,      query_start_loc,
                       partial,      partial_state, arrivals,      claims,       fast,          equalization,
                       offset,       offset_dims,   offset_index,  coarse_angles, fine_angles,  query_stride,
                       output_stride, block_stride, head_stride,   table_stride, num_reqs,      num_tokens,
                       num_kv_heads, max_segments,  rotary_pairs,  fast_ctas,    fast_share,    scale_log2,
                       soft_cap_log2};
  extern __shared__ __align__(128) u8 memory[];
  Shared& shared = *(Shared*)memory;
  const int thread = threadIdx.x, warp = __shfl_sync(FULL_WARP, thread / 32, 0), lane = thread % 32;

  // Where there is little to do, nobody waits for memory.
  const int units = total_units(a, lane);
  Shares shares = {units, min((int)gridDim.x, (units + MIN_STAGES - 1) / MIN_STAGES), 0, SLOW_SHARE};
  int cta = blockIdx.x;
  if (a.fast_ctas && units >= MIN_SHARED_STAGES * (int)gridDim.x) {
    shares.fast_ctas = a.fast_ctas;
    shares.fast_share = a.fast_share;
    if (thread == 0) shared.cta = claim(a);
    __syncthreads();
    cta = shared.cta;
  }
  if (cta >= shares.ctas) {
    clear_rows(a, thread);
    return;
  }
  const int first = shares.begin(cta), last = shares.begin(cta + 1);
  {
    Cursor cursor;
    find(a, first, last, lane, cursor);
    if (lane == 0) {
      shared.producers[warp] = cursor;
      shared.raw_segment[1][warp] = -1;
    }
    __syncwarp();
    if (thread == 0) {
      shared.cursor = cursor;
      shared.segment = 0;
    }
    fetch_rows(a, shared, cursor, 0, warp, lane);
  }

  u64 policy = 0;
#if __CUDA_ARCH__ >= 900
  policy = policy_evict_first();
  if (lane == 0) {
    for (int i = 0; i < NUM_STAGES; i++) barrier_init(shared_address(&shared.barriers[warp][i]));
    barrier_init_done();
  }
#endif
  __syncthreads();
  const Cursor& cursor = shared.cursor;
  Producer producer;
  producer.shared = &shared;
  producer.segment = 0;
  producer.more = true;
  producer.enter(a, cursor, warp, lane);
  producer.settle(a, first, last, warp, lane);
  // Ahead of the ring's copies, which would hold them up.
  copies_wait_all();
#pragma unroll 1
  for (int i = 0; i < NUM_STAGES; i++)
    producer.issue(a, first, last, warp, lane, shared.ring[warp][i], &shared.barriers[warp][i], policy);

  clear_rows(a, thread);
  int slot = 0;
  u32 parity = 0;
  Accumulators sums;
  bool more = true;
  while (more) {
    const Request& request = cursor.request;
    const bool fetched = shared.raw_segment[shared.segment % 2][warp] == shared.segment;
    __syncwarp();
    if (!fetched) fetch_rows(a, shared, cursor, shared.segment, warp, lane);
    copies_wait_all();
    __syncwarp();
    for (int row = warp; row < PASS_ROWS; row += NUM_WARPS) fold_row(a, shared, cursor, row, lane);
    __syncthreads();
    RowConstants rows;
    load_rows(shared, request, cursor.pass, lane, rows);

    const int first_stage = request.first_stage, stage_end = cursor.stage_end;
    for (int begin = cursor.stage_begin; begin < stage_end; begin += FLUSH_STAGES) {
      sums.clear();
      const int end = min(begin + FLUSH_STAGES, stage_end);
#pragma unroll 1
      for (int stage = begin + warp; stage < end; stage += NUM_WARPS) {
#if __CUDA_ARCH__ >= 900
        barrier_wait(shared_address(&shared.barriers[warp][slot]), parity);
#else
        copies_wait<NUM_STAGES - 1>();
        __syncwarp();
#endif
#pragma unroll STEP_UNROLL
        for (int step = 0; step < STAGE_TOKENS / STEP_TOKENS; step++)
          attend(a, shared.ring[warp][slot], step,
                 (first_stage + stage) * STAGE_TOKENS + step * STEP_TOKENS, rows,
#if OFFSET_PAIRS
                 shared,
#endif
                 lane, sums);
        __syncwarp();
        producer.issue(a, first, last, warp, lane, shared.ring[warp][slot], &shared.barriers[warp][slot], policy);
        if (++slot == NUM_STAGES) {
          slot = 0;
          parity ^= 1;
        }
      }
      keep(shared, sums, begin == cursor.stage_begin, warp, lane);
    }
    __syncthreads();

    if (cursor.stage_begin == 0 && cursor.stage_end == request.stages) {
      for (int row = warp; row < PASS_ROWS; row += NUM_WARPS) {
        float x[NUMBERS], top, total;
        add_up(shared, row, lane, x, top, total);
        write_row(a, cursor, row, x, total, lane);
      }
    } else {
      share_segment(a, shared, cursor, shares, cta, warp, lane);
    }
    __syncthreads();
    if (thread == 0) {
      Cursor next = shared.cursor;
      shared.more = next.next(a, first, last);
      shared.cursor = next;
      shared.segment++;
    }
    __syncthreads();
    more = shared.more;
  }
}
