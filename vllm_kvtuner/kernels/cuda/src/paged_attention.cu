// Decode attention straight on packed pages, one launch: fold the queries, attend, merge, rotate back.
//
// Defined by the build: HEAD_SIZE, K_BITS, V_BITS, BLOCK_SIZE, GROUP (query heads per KV head), PASS_ROWS (query rows of a
// pass, 4 or 8), NUM_WARPS, STAGE_TOKENS, NUM_STAGES, MIN_CTAS, QUERY_BF16, KEY_HADAMARD, VALUE_HADAMARD, KEY_EQUALIZATION,
// OFFSET_PAIRS (rotary pairs that the key offset keeps, 0 or a multiple of 8), ANGLE_STEP (32), WINDOW (tokens that
// a query sees, 0: all), SKIP_NEWEST and SKIP_FIRST (tokens that it does not see, its newest and the request's first),
// WRITE_LSE (0 or 1), SOFT_CAP (0 or 1).
//
// A *row* is one (query token, query head) of a KV head. A *stage* is STAGE_TOKENS cached tokens of one (block, KV
// head) chunk or several. A *segment* is what one pass reads: all stages of one (request, KV head, pass). Segments
// stand in a row, and every CTA takes an equal share of the work, whichever segments it belongs to. Within a CTA
// the warps take turns, each with a ring of stages of its own. A segment that several CTAs share is merged by the
// one that ends last, in the order of the CTAs, so that results do not depend on timing.
//
// Arithmetic (s a row's scale, m its minimum): logit = s_t (q . codes_t) + m_t sum(q), and the output is
// sum_t (P_t s_t) codes_t + sum_t P_t m_t. Key codes are multiplied as unsigned bytes with q in 16-bit fixed point, whose
// high and low byte are two columns of the matrix instruction, so that 4 rows fill its 8. So are the weights P_t s_t, in units
// of 1 / 65535 of a stage's largest of their row, and value codes are unsigned bytes too. A stage's integer sums are less than
// 2^24: as fp32 numbers they are that many times 2^-149 as they stand, and are added up without being converted.
#include "device.cuh"

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
static_assert((BLOCK_SIZE % STAGE_TOKENS == 0 || STAGE_TOKENS % BLOCK_SIZE == 0), "block");
static_assert(HEAD_SIZE % 32 == 0 && HEAD_SIZE * V_BITS % 128 == 0, "head size");
static_assert(PASS_ROWS == 4 || PASS_ROWS == 8, "rows");

// Words of a key row in a lane: lane t = lane % 4 holds words in runs of K_RUN, as wide as rows are aligned.
constexpr int K_FIELDS = 8 / K_BITS;
constexpr int K_WORDS_ROW = K_ROW / 4;
constexpr int K_WORDS = (K_WORDS_ROW + 3) / 4;
// Of narrow rows lanes take every fourth word, as matrices of 8 rows' 16 bytes give them.
constexpr bool K_MATRICES = K_ROW == 16 || K_ROW == 32;
constexpr int K_RUN = K_MATRICES ? 1 : K_WORDS_ROW % 16 == 0 ? 4 : K_WORDS_ROW % 8 == 0 ? 2 : 1;
// A *unit* of values: two neighbouring bytes of a row in each lane, g = lane / 4. Where rows are wide, a lane holds runs of
// V_RUN units, since matrices of 16-byte pieces of such rows would meet in the same of shared memory's banks.
constexpr int V_FIELDS = 8 / V_BITS;
constexpr int V_UNITS = V_ROW / 16;
constexpr bool V_MATRICES = V_ROW <= 32 || V_UNITS % 2;
constexpr int V_MAX_RUN = PASS_ROWS * HEAD_SIZE > 1024 ? 2 : 8;  // by registers
constexpr int V_RUN = V_MATRICES ? 1 : constant_min(V_UNITS % 8 == 0 ? 8 : V_UNITS % 4 == 0 ? 4 : 2, V_MAX_RUN);
constexpr int V_TILES = HEAD_SIZE / 16;
// Codes of a byte are masked from its lowest bit up, and what lies below is taken off the sums: the highest needs no mask.
// 2-bit keys have it in the query instead, where fields of the same byte meet in a lane of fold_row; with 4 bits that saves
// less than the query's exactness is worth.
constexpr bool CUMULATIVE_KEYS = K_BITS == 2 && K_ROW % 32 == 0;

// A stage is attended to at once: as much as registers hold, since warps wait for their own instructions.
constexpr int GROUPS = STAGE_TOKENS / 16;
constexpr int NUMBERS = HEAD_SIZE / 32;
constexpr int QUERY_STRIDE = HEAD_SIZE + 16;
// What a segment counts for besides its stages, at most: measured, about 6 us of a CTA's time. See share_out.
constexpr int MAX_VISIT = 12;
constexpr int MIN_PREFETCHED = 4 * NUM_WARPS;  // units of a share, at least, whose first stages are prefetched
constexpr int OFFSET_STEPS = OFFSET_PAIRS / 8;
// Whether registers hold a key offset's pairs as long as a warp reads a segment.
constexpr bool OFFSET_STAYS = OFFSET_STEPS == 1 && TILES == 1 && GROUPS > 1;
constexpr int TURNED = OFFSET_STAYS ? 1 : NUM_WARPS * OFFSET_STEPS * TILES * 2;
static_assert(STAGE_TOKENS == 16 || STAGE_TOKENS == 32 || STAGE_TOKENS == 64, "stage");

#define MASKED __int_as_float(0xFF800000)
constexpr float NOTHING = -1e30f;      // the reference of a row that has seen nothing
constexpr float MAX_TOTAL = 0x1p16f;     // of P of a lane's tokens in a stage, before the reference is set anew
constexpr float MIN_WEIGHT = 0x1p-100f;  // of a stage's largest weight, so that it has an inverse
constexpr float FULL_WEIGHT = 65535.0f;  // the largest weight of a stage in fixed point
constexpr float OUTPUT_UNIT = 0x1p-48f;  // of Accumulators.output

// The parts read the constants above.
#include "attention/stages.cuh"
#include "attention/offset.cuh"
#include "attention/copies.cuh"
#include "attention/products.cuh"
#include "attention/step.cuh"
#include "attention/fold.cuh"
#include "attention/merge.cuh"

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32, MIN_CTAS)
    paged_attention(const u16* query, u16* output, const u8* kv_cache, const int* block_table, const int* seq_lens,
                    const int* query_start_loc, float* partial, float2* partial_state, int* arrivals,
                    const float* equalization, const float2* offset, const int* offset_dims,
                    const int* offset_index, const float2* coarse_angles, const uint4* fine_angles, u64 query_stride,
                    u64 output_stride, u64 block_stride, u64 head_stride, u64 table_stride, int num_reqs, int num_tokens,
                    int num_kv_heads, int max_segments, int rotary_pairs, float scale_log2, float soft_cap_log2,
                    float* output_lse) {
  Arguments a = {query,         output,        kv_cache,     block_table,   seq_lens,      query_start_loc, partial,
                 partial_state, arrivals,      equalization, offset,        offset_dims,   offset_index,    coarse_angles,
                 fine_angles,   query_stride,  output_stride, block_stride, head_stride,   table_stride,    num_reqs,
                 num_tokens,    num_kv_heads,  max_segments, rotary_pairs,  scale_log2,    soft_cap_log2,   0,
                 output_lse};
  extern __shared__ __align__(128) u8 memory[];
  Shared& shared = *(Shared*)memory;
  const int thread = threadIdx.x, warp = __shfl_sync(FULL_WARP, thread / 32, 0), lane = thread % 32;

#if OFFSET_PAIRS
  OffsetLoads loads;
  loads.ask_pairs(a, thread);
#endif
  const Shares shares = share_out(a, lane);
  const int cta = blockIdx.x;
  if (cta >= shares.ctas) {
    dependency_wait();
    launch_dependents();
    clear_rows(a, thread);
    return;
  }
#if OFFSET_PAIRS
  loads.ask_angles(a, thread);
#endif
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
      shared.cursors[0] = cursor;
      shared.segment = 0;
    }
  }

  u64 policy = 0;
#if __CUDA_ARCH__ >= 900
  policy = policy_evict_first();
  if (lane == 0) {
    for (int i = 0; i < NUM_STAGES; i++) barrier_init(shared_address(&shared.barriers[warp][i]));
    barrier_init_done();
  }
#endif
#if OFFSET_PAIRS
  loads.keep(shared.offset, thread);
#endif
  __syncthreads();
  Producer producer;
  producer.shared = &shared;
  producer.segment = 0;
  producer.more = true;
  producer.enter(a, shared.cursors[0], warp, lane);
#if OFFSET_PAIRS
  OffsetTurns turns;
  turns.load(a, lane);
  fetch_offset(a, shared.offset, shared.cursors[0], 0, warp, lane);
#endif
  // Other requests' tokens of this step may stand in these blocks, so they are copied only when the store has ended. Where there
  // is little to read, to ask twice takes longer than it saves.
  if (shares.even >= MIN_PREFETCHED) producer.prefetch(a);
  const bool clear = must_clear(a);
  // Up to here only what steps share was read, which no kernel just before this one writes, or brought to the L2 cache.
  dependency_wait();
  launch_dependents();
  fetch_queries(a, shared, shared.cursors[0], 0, warp, lane);
  producer.settle(a, first, last, warp, lane);
#if __CUDA_ARCH__ < 900
  copies_wait_all();  // else the ring's copies would be waited for with them
#endif
#pragma unroll 1
  for (int i = 0; i < NUM_STAGES; i++)
    producer.issue(a, first, last, warp, lane, shared.ring[warp][i], &shared.barriers[warp][i], policy);

  if (clear) clear_rows(a, thread);
  int slot = 0;
  u32 parity = 0;
  Accumulators sums;
  bool more = true;
  while (more) {
    const Cursor& cursor = shared.cursors[shared.segment % 2];
    const Request& request = cursor.request;
    const bool fetched = shared.raw_segment[shared.segment % 2][warp] == shared.segment;
    __syncwarp();
    if (!fetched) fetch_rows(a, shared, cursor, shared.segment, warp, lane);
    copies_wait_all();
    __syncwarp();
    for (int row = warp; row < PASS_ROWS; row += NUM_WARPS) fold_row(a, shared, cursor, row, warp, lane);
    __syncthreads();
    if (thread == 0) {
      Cursor next = cursor;
      shared.more = next.next(a, first, last);
      shared.cursors[(shared.segment + 1) % 2] = next;
    }
    RowConstants rows;
    load_rows(shared, request, cursor.pass, lane, rows);

    const int first_stage = request.first_stage, stage_end = cursor.stage_end;
#if OFFSET_PAIRS
    turns.enter(shared.offset, shared.segment % 2, warp, lane);
#endif
    sums.clear();
#pragma unroll 1
    for (int stage = cursor.stage_begin + warp; stage < stage_end; stage += NUM_WARPS) {
#if __CUDA_ARCH__ >= 900
      barrier_wait(shared_address(&shared.barriers[warp][slot]), parity);
#else
      copies_wait<NUM_STAGES - 1>();
      __syncwarp();
#endif
      attend(a, shared.ring[warp][slot], (first_stage + stage) * STAGE_TOKENS, rows,
#if OFFSET_PAIRS
             shared.offset, turns, warp,
#endif
             lane, sums);
      __syncwarp();
      producer.issue(a, first, last, warp, lane, shared.ring[warp][slot], &shared.barriers[warp][slot], policy);
      if (++slot == NUM_STAGES) {
        slot = 0;
        parity ^= 1;
      }
    }
    keep(shared, sums, warp, lane);
    __syncthreads();

    more = shared.more;
    const bool whole = cursor.stage_begin == 0 && cursor.stage_end == request.stages;
    end_segment(a, shared, cursor, whole, cta, warp, lane);
    __syncthreads();
    if (!whole) announce_part(a, shared, cursor, shares, warp, lane);
    if (thread == 0) shared.segment++;
    __syncthreads();
  }
}
