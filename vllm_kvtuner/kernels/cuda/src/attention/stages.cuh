// paged_attention.cu: which stages of which segments a CTA reads.
#pragma once

__device__ __forceinline__ float load_query(const u16* pointer) {
#if QUERY_BF16
  return from_bf16(*pointer);
#else
  return from_fp16(*pointer);
#endif
}

// A capped logit, both to base 2 and in units of 1: cap tanh(logit / cap), tanh(y) = 1 - 2 / (e^(2 y) + 1).
__device__ __forceinline__ float capped(const Arguments& a, float logit) {
  const float power = exp2_approx(logit * (2.885390081777927f / a.soft_cap_log2));
  return a.soft_cap_log2 * (1.0f - 2.0f * reciprocal_approx(power + 1.0f));
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

// The arguments, and what every warp finds from them before it works.
struct Work : Arguments {
  int visit;  // what folding, merging and changing over cost with a segment, in stages; see share_out
};

struct Request {
  int index, len, num_queries, first_query;  // len: tokens that the newest query sees, or would without a window
  int first_stage;  // the first that any query sees
  int stages;       // per segment
  int passes;       // over the tokens, for each KV head

  __device__ __forceinline__ void load(const Arguments& a, int request) {
    index = request;
    len = a.seq_lens[request] - SKIP_NEWEST;
    first_query = a.query_start_loc[request];
    num_queries = a.query_start_loc[request + 1] - first_query;
    first_stage = 0;
#if WINDOW
    first_stage = max(len - num_queries + 1 - WINDOW, 0) / STAGE_TOKENS;
#endif
    stages = (len + STAGE_TOKENS - 1) / STAGE_TOKENS - first_stage;
    passes = (num_queries * GROUP + PASS_ROWS - 1) / PASS_ROWS;
    // Others are another launch's, or have nothing to read.
    if (num_queries < a.min_query_len || num_queries > a.max_query_len || len <= SKIP_FIRST) stages = passes = 0;
  }
  __device__ __forceinline__ int segments(const Arguments& a) const { return passes * a.num_kv_heads; }
};

// A CTA's share of the row of segments, in which a segment of n stages has `visit` + n units, the stages last.
struct Share {
  int first, last;  // flat index of its first unit, and of the next CTA's
};

// A place in the row of segments.
struct Cursor {
  Request request;
  int kv_head, pass;
  int begin;    // flat index of the segment's first unit
  int stage_begin, stage_end;  // this CTA's share of the segment

  __device__ __forceinline__ void clip(const Work& a, const Share& share) {
    stage_begin = max(share.first - begin - a.visit, 0);
    stage_end = min(share.last - begin - a.visit, request.stages);
  }
  // To the next segment; false at the end of the CTA's share.
  __device__ __forceinline__ bool next(const Work& a, const Share& share) {
    begin += a.visit + request.stages;
    if (begin + a.visit >= share.last) return false;
    if (++pass == request.passes) {
      pass = 0;
      if (++kv_head == a.num_kv_heads) {
        kv_head = 0;
        do request.load(a, request.index + 1);
        while (request.stages == 0);
      }
    }
    clip(a, share);
    return true;
  }
};

// How units are shared out: evenly. A share has more units than a segment counts for besides its stages, so that none is
// without stages.
struct Shares {
  int ctas, even, left;  // even shares, the first `left` of which have one unit more

  __device__ __forceinline__ Shares(int units, int max_ctas, int least) {
    ctas = min(max_ctas, units ? max(units / least, 1) : 0);
    even = units / max(ctas, 1);
    left = units - even * ctas;
  }
  // The flat index of a CTA's first unit.
  __device__ __forceinline__ int begin(int cta) const { return cta * even + min(cta, left); }
  __device__ __forceinline__ Share of(int cta) const { return {begin(cta), begin(cta + 1)}; }
  // The CTA whose share the unit is in.
  __device__ __forceinline__ int owner(int unit) const {
    const int longer = left * (even + 1);
    return unit < longer ? unit / (even + 1) : left + (unit - longer) / even;
  }
};

// Shares of all requests' stages, and a.visit. Every warp finds them for itself.
__device__ __forceinline__ Shares share_out(Work& a, int lane) {
  int stages = 0, segments = 0;
  for (int r = lane; r < a.num_reqs; r += 32) {
    Request request;
    request.load(a, r);
    stages += request.stages * request.segments(a);
    segments += request.segments(a);
  }
  stages = __reduce_add_sync(FULL_WARP, stages);
  segments = __reduce_add_sync(FULL_WARP, segments);
  // Where shares are small, it is better to have more of them.
  a.visit = min(MAX_VISIT, stages / (TEAMS * (int)gridDim.x));
  return Shares(stages + a.visit * segments, gridDim.x, a.visit + TEAMS);
}

// The cursor's place where a share begins.
__device__ __forceinline__ void find(const Work& a, const Share& share, int lane, Cursor& cursor) {
  int before = 0;
  for (int base = 0;; base += 32) {
    Request request;
    int units = 0;
    if (base + lane < a.num_reqs) {
      request.load(a, base + lane);
      units = (a.visit + request.stages) * request.segments(a);
    }
    int until = units;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      int other = __shfl_up_sync(FULL_WARP, until, step);
      if (lane >= step) until += other;
    }
    u32 beyond = __ballot_sync(FULL_WARP, before + until > share.first);
    if (beyond) {
      int found = __ffs(beyond) - 1;
      int start = before + __shfl_sync(FULL_WARP, until - units, found);
      cursor.request.load(a, base + found);
      const int segment = (share.first - start) / (a.visit + cursor.request.stages);
      cursor.kv_head = segment / cursor.request.passes;
      cursor.pass = segment % cursor.request.passes;
      cursor.begin = start + segment * (a.visit + cursor.request.stages);
      cursor.clip(a, share);
      return;
    }
    before += __shfl_sync(FULL_WARP, until, 31);
  }
}
