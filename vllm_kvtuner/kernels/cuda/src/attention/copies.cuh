// paged_attention.cu: shared memory, and the rings of stages that warps copy there.
#pragma once

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

// The parts of a segment that several CTAs share.
struct Parts {
  int complete;     // whether all are there
  int first, last;  // CTAs that have one
};

struct Shared {
  alignas(128) u8 ring[TEAMS][NUM_STAGES][STAGE_BYTES];
  alignas(16) float output[TEAMS][ROUND_ROWS][HEAD_SIZE];
  FoldedQueries folded;
  [[no_unique_address]] TeamShared teams;
  [[no_unique_address]] OffsetShared offset;
  u64 barriers[TEAMS][NUM_STAGES];
  float total[NUM_WARPS][ROUND_ROWS], minima[NUM_WARPS][ROUND_ROWS], top[TEAMS][ROUND_ROWS];
  // Queries as they are of this segment and the next, row by row, and which segments of the CTA those are: copied by
  // the warp that folds them, as soon as its copies come to that segment, since the way to memory is long then.
  alignas(16) u16 raw_query[2][PASS_ROWS][HEAD_SIZE];
  int raw_segment[2][NUM_WARPS];
  int segment;  // of the CTA, that the warps are in
  int more;
  Parts parts;  // of the segment that has just ended
  // Only looked at where a segment ends, so not in registers: this segment and the next one.
  Cursor cursors[2], producers[NUM_WARPS];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "shared memory");

// Fetches a segment's queries, each warp the rows that it folds.
__device__ __forceinline__ void fetch_queries(const Arguments& a, Shared& shared, const Cursor& cursor, int segment, int warp,
                                              int lane) {
  const int at = segment % 2;
#pragma unroll 1
  for (int row = warp; row < PASS_ROWS; row += NUM_WARPS) {
    const u16* source = query_row(a, cursor, row);
    if (source != nullptr)
#pragma unroll 1
      for (int i = lane * 8; i < HEAD_SIZE; i += 256) copy_16(shared_address(&shared.raw_query[at][row][i]), source + i);
  }
  if (lane == 0) shared.raw_segment[at][warp] = segment;
  __syncwarp();
}

// Those, and what belongs to its key offset.
__device__ __forceinline__ void fetch_rows(const Arguments& a, Shared& shared, const Cursor& cursor, int segment, int warp,
                                           int lane) {
  if (warp % TEAM_WARPS == 0) fetch_offset(a, shared.offset, cursor, segment % 2, warp / TEAM_WARPS, lane);
  fetch_queries(a, shared, cursor, segment, warp, lane);
}

// Where the warps of a team wait for each other.
__device__ __forceinline__ void meet_team(int team) {
  if constexpr (TEAM_WARPS == 1)
    __syncwarp();
  else
    meet_warps(1 + team, 32 * TEAM_WARPS);
}

// What copies a team's stages, each of its warps a part of every stage.
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
    token = (at.request.first_stage + at.stage_begin + warp / TEAM_WARPS) * STAGE_TOKENS;
    last_token = (at.request.first_stage + at.stage_end) * STAGE_TOKENS;
    len = at.request.len;
    blocks = look_up(lane, 0);
    later_blocks = look_up(lane, LOOKUP_STAGES);
    looked_up = 0;
  }

  // Entries beyond the request may be stale and are not read.
  __device__ __forceinline__ int look_up(int lane, int stages_ahead) const {
    const int of_lane =
        token + (stages_ahead + lane / ENTRIES) * (TEAMS * STAGE_TOKENS) + lane % ENTRIES * PIECE_TOKENS;
    return of_lane < min(last_token, len) ? table[of_lane / BLOCK_SIZE] : 0;
  }

  // To the next stage of this team, which may be in a later segment.
  __device__ __forceinline__ void settle(const Work& a, const Share& share, int warp, int lane) {
    if (token >= last_token) {
      Cursor at = shared->producers[warp];
      do {
        more = at.next(a, share);
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

  // Brings the stage to the L2 cache, where it may yet be written to.
  __device__ __forceinline__ void prefetch(const Arguments& a, int member) const {
#if __CUDA_ARCH__ >= 900
    if (token >= last_token) return;
    u32 source_blocks[WARP_COPIES];
    blocks_of_stage(source_blocks, member);
    if (elect_one())
      for_copies(member, [&](int i, int mine) {
        const Copy copy = copy_of(a, i, source_blocks[WHOLE_CHUNKS ? mine : 0]);
        prefetch_bulk(copy.source, copy.bytes);
      });
#endif
  }

  // Copies that the stage needs.
  __device__ __forceinline__ int copies() const {
    return WHOLE_CHUNKS ? min(COPIES, (int)((u32)(len - token + PIECE_TOKENS - 1) / PIECE_TOKENS)) : COPIES;
  }

  // Those of a stage that one of the team's warps makes, number `of_warp` of them: every TEAM_WARPS-th.
  template <class Each>
  __device__ __forceinline__ void for_copies(int member, const Each& each) const {
    const int needed = copies();
    if (needed == COPIES && COPIES % TEAM_WARPS == 0) {
#pragma unroll
      for (int i = 0; i < COPIES / TEAM_WARPS; i++) each(i * TEAM_WARPS + member, i);
    } else {
#pragma unroll
      for (int i = 0; i < WARP_COPIES; i++)
        if (i * TEAM_WARPS + member < needed) each(i * TEAM_WARPS + member, i);
    }
  }

  // Of those, the blocks of the cache.
  __device__ __forceinline__ void blocks_of_stage(u32 (&source_blocks)[WARP_COPIES], int member) const {
#pragma unroll
    for (int i = 0; i < (WHOLE_CHUNKS ? WARP_COPIES : 1); i++)
      source_blocks[i] = __shfl_sync(FULL_WARP, blocks, looked_up * ENTRIES + (i * TEAM_WARPS + member) % ENTRIES);
  }

  __device__ __forceinline__ void issue(const Work& a, const Share& share, int warp, int lane, u8* target, u64* barrier,
                                        u64 policy) {
    if (more) {
      u32 source_blocks[WARP_COPIES];
      const int member = warp % TEAM_WARPS;
      blocks_of_stage(source_blocks, member);
      looked_up++;
      const u32 at = shared_address(target);
#if __CUDA_ARCH__ >= 900
      if (elect_one()) {
        const u32 mbarrier = shared_address(barrier);
        u32 bytes = WHOLE_CHUNKS ? copies() * Piece::BYTES : STAGE_BYTES;
        if constexpr (TEAM_WARPS > 1) {
          bytes = 0;
          for_copies(member, [&](int i, int) { bytes += WHOLE_CHUNKS ? Piece::BYTES : part_width(i) * PIECE_TOKENS; });
        }
        barrier_expect(mbarrier, bytes);
        for_copies(member, [&](int i, int mine) {
          const Copy copy = copy_of(a, i, source_blocks[WHOLE_CHUNKS ? mine : 0]);
          copy_bulk(at + copy.target, copy.source, copy.bytes, mbarrier, policy);
        });
      }
#else
      for_copies(member, [&](int i, int mine) {
        const Copy copy = copy_of(a, i, source_blocks[WHOLE_CHUNKS ? mine : 0]);
        for (u32 j = lane * 16; j < copy.bytes; j += 512) copy_16(at + copy.target + j, copy.source + j);
      });
#endif
      token += TEAMS * STAGE_TOKENS;
      settle(a, share, warp, lane);
    }
#if __CUDA_ARCH__ < 900
    copies_commit();
#endif
  }

  // Bytes of a token in a part of a chunk.
  static __device__ __forceinline__ int part_width(int i) { return i == 0 ? K_ROW : i == 1 ? V_ROW : Chunk::META_ROW; }

  struct Copy {
    const u8* source;
    u32 bytes, target;  // target within the stage
  };

  // Copy i of a stage: a whole chunk, or a part of one in pages/layout.py's order.
  __device__ __forceinline__ Copy copy_of(const Arguments& a, int i, u32 block) const {
    const u8* chunk = head + (u64)block * (u32)a.block_stride;  // a stride of 32 bits: one instruction less
    if (WHOLE_CHUNKS) return {chunk, Piece::BYTES, (u32)i * Piece::BYTES};
    // Part i of the chunk, and of the piece in shared memory.
    const int width = part_width(i);
    const int source = i == 0 ? Chunk::K_CODES : i == 1 ? Chunk::V_CODES : i == 2 ? Chunk::K_META : Chunk::V_META;
    const int place = i == 0 ? Piece::K_CODES : i == 1 ? Piece::V_CODES : i == 2 ? Piece::K_META : Piece::V_META;
    return {chunk + source + (u32)token % BLOCK_SIZE * width, (u32)(width * PIECE_TOKENS), (u32)place};
  }
};
