// paged_attention.cu: from warps' sums to output rows.
//
// A row's (reference to base 2, total, unnormalized output) meet in two places, the parts of warps in add_up and those of
// CTAs in merge_segment, and every row is normalized once, in write_row. An attention sink counts there, once for a row beside
// its tokens: a further segment with output 0, before total divides and log-sum-exp is written. add_up and merge_segment see
// parts of a row and must not count it. Rows that see no token never come there; clear_rows gives them their sink.
#pragma once

#if SINKS
// Of a query head, to base 2.
__device__ __forceinline__ float sink_of(const Arguments& a, int head) {
  float sink;
  load_numbers<SINK_NUMBERS, 1>(&sink, a.sinks + head * number_bytes(SINK_NUMBERS));
  return sink * 1.4426950408889634f;
}
#endif

// A row of what all warps have kept, unnormalized: number i * 32 + lane in x[i].
__device__ __forceinline__ void add_up(const Shared& shared, int index, int lane, float (&x)[NUMBERS], float& top,
                                       float& total) {
  top = NOTHING;
#pragma unroll
  for (int i = 0; i < TEAMS; i++) top = fmaxf(top, shared.top[i][index]);
  total = 0.0f;
#pragma unroll
  for (int j = 0; j < NUMBERS; j++) x[j] = 0.0f;
#pragma unroll
  for (int i = 0; i < TEAMS; i++) {
    const float weight = exp2_approx(shared.top[i][index] - top);
    float minima = 0.0f;
#pragma unroll
    for (int warp = i * TEAM_WARPS; warp < (i + 1) * TEAM_WARPS; warp++) {
      total = fmaf(shared.total[warp][index], weight, total);
      if constexpr (FP16_PRODUCTS) minima += shared.minima[warp][index];
    }
#pragma unroll
    for (int j = 0; j < NUMBERS; j++) x[j] = fmaf(shared.output[i][index][j * 32 + lane] + minima, weight, x[j]);
  }
}

// A normalized row to the output, and its log-sum-exp; 0 and its sink, or -inf, if it has seen nothing.
__device__ __forceinline__ void write_row(const Arguments& a, const Cursor& cursor, int row, float (&x)[NUMBERS],
                                          float top, float total, int lane) {
  const Request& request = cursor.request;
  int query, member;
  if (!row_of(request, cursor.pass, row, query, member)) return;
#if SINKS
  const float sink = sink_of(a, cursor.kv_head * GROUP + member), counted = fmaxf(top, sink);
  const float weight = exp2_approx(top - counted);
  total = fmaf(total, weight, exp2_approx(sink - counted));
  top = counted;
#pragma unroll
  for (int i = 0; i < NUMBERS; i++) x[i] *= weight;
#endif
#if WRITE_LSE
  // From base 2.
  if (lane == 0)
    a.output_lse[(u64)(cursor.kv_head * GROUP + member) * a.num_tokens + request.first_query + query] =
        total > 0.0f ? (top + log2f(total)) * 0.6931471805599453f : MASKED;
#endif
#if SKIP_NEWEST || SKIP_FIRST
  if (total == 0.0f) total = 1.0f;
#endif
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

// A whole segment's sums to the output, or those of a part to where they are merged, of one round's rows. Only a CTA's first
// segment and its last can be parts.
__device__ __forceinline__ void end_rows(const Arguments& a, Shared& shared, const Cursor& cursor, bool whole, int cta,
                                         int round, int warp, int lane) {
  const int place = cursor.stage_begin > 0 ? 0 : 1, slot = 2 * cta + place;
  for (int index = warp; index < ROUND_ROWS; index += NUM_WARPS) {
    const int row = round * ROUND_ROWS + index;
    float x[NUMBERS], top, total;
    add_up(shared, index, lane, x, top, total);
    if (whole) {
      write_row(a, cursor, row, x, top, total, lane);
      continue;
    }
    float* part = a.partial + ((u64)slot * PASS_ROWS + row) * HEAD_SIZE + lane * NUMBERS;
    if constexpr (NUMBERS % 4 == 0) {
#pragma unroll
      for (int i = 0; i < NUMBERS; i += 4) *(float4*)(part + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    } else {
#pragma unroll
      for (int i = 0; i < NUMBERS; i++) part[i] = x[i];
    }
    if (lane == 0) a.partial_state[slot * PASS_ROWS + row] = make_float2(top, total);
  }
}

// All parts of a segment to the output, in the order of the CTAs that left them, BATCH of them loaded at once.
template <int BATCH>
__device__ __forceinline__ void merge_parts(const Arguments& a, const Cursor& cursor, int first, int last, int warp, int lane) {
  for (int row = warp; row < PASS_ROWS; row += NUM_WARPS) {
    float top = NOTHING, total = 0.0f;
    float x[NUMBERS] = {};
    // A part is the second of its CTA only in the CTA where the segment begins.
    auto slot_of = [&](int part) { return (u64)(2 * part + (part == first ? 1 : 0)) * PASS_ROWS + row; };
    static_assert(32 % BATCH == 0, "a warp holds the states of 32 parts");
    float parts[BATCH][NUMBERS];
    auto load = [&](int begin) {
#pragma unroll
      for (int j = 0; j < BATCH; j++) {
        const float* part = a.partial + slot_of(min(begin + j, last)) * HEAD_SIZE + lane * NUMBERS;
        if constexpr (NUMBERS % 4 == 0) {
#pragma unroll
          for (int i = 0; i < NUMBERS; i += 4) {
            const float4 four = __ldcg((const float4*)(part + i));
            parts[j][i] = four.x, parts[j][i + 1] = four.y, parts[j][i + 2] = four.z, parts[j][i + 3] = four.w;
          }
        } else {
#pragma unroll
          for (int i = 0; i < NUMBERS; i++) parts[j][i] = __ldcg(part + i);
        }
      }
    };
    for (int base = first; base <= last; base += 32) {
      const bool present = base + lane <= last;
      const float2 state = present ? __ldcg(&a.partial_state[slot_of(base + lane)]) : make_float2(NOTHING, 0.0f);
      load(base);
      const float newer = fmaxf(top, warp_max(state.x));
      const float decay = exp2_approx(top - newer);
      const float weight = present ? exp2_approx(state.x - newer) : 0.0f;
      top = newer;
      total = fmaf(total, decay, warp_sum(state.y * weight));
#pragma unroll
      for (int i = 0; i < NUMBERS; i++) x[i] *= decay;
      for (int begin = base; begin < min(base + 32, last + 1); begin += BATCH) {
        if (begin > base) load(begin);
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
          const float factor = __shfl_sync(FULL_WARP, weight, (begin - base + j) % 32);
#pragma unroll
          for (int i = 0; i < NUMBERS; i++) x[i] = fmaf(parts[j][i], begin + j <= last ? factor : 0.0f, x[i]);
        }
      }
    }
    write_row(a, cursor, row, x, top, total, lane);
  }
}

// The same by the CTA that arrives last. Most segments that are shared have two parts.
__device__ __forceinline__ void merge_segment(const Arguments& a, const Cursor& cursor, int first, int last, int warp,
                                              int lane) {
  constexpr int FEW = 2;
  // Large CTAs have registers for all parts of a lone request's segment.
  constexpr int MANY = NUMBERS > 4 ? 8 : NUM_WARPS <= 4 ? 16 : 32;
  if (last - first < FEW)
    merge_parts<FEW>(a, cursor, first, last, warp, lane);
  else
    merge_parts<MANY>(a, cursor, first, last, warp, lane);
}

// Announces a CTA's part, and merges the segment if all its other parts are there. Where the part ends and not at the CTA's end,
// which is no faster.
__device__ __forceinline__ void announce_part(const Work& a, Shared& shared, const Cursor& cursor,
                                              const Shares& shares, int warp, int lane) {
  const Request& request = cursor.request;
  if (warp == 0) {
    int* arrivals = a.arrivals + request.index * a.max_segments + cursor.kv_head * request.passes + cursor.pass;
    // Releases what all threads wrote before the barrier, and acquires what the others released.
    int arrived = 0;
    if (lane == 0) arrived = arrive(arrivals);
    // While it is on its way.
    const int first = shares.owner(cursor.begin + a.visit);
    const int last = shares.owner(cursor.begin + a.visit + request.stages - 1);
    if (lane == 0) {
      shared.parts.first = first;
      shared.parts.last = last;
      shared.parts.complete = arrived == last - first;
      if (arrived == last - first) *arrivals = 0;
    }
  }
  __syncthreads();
  const Parts& parts = shared.parts;
  if (parts.complete) merge_segment(a, cursor, parts.first, parts.last, warp, lane);
}

// The log-sum-exp of a token that sees nothing: its sinks if it is a request's.
__device__ __forceinline__ void clear_lse(const Arguments& a, int token, bool of_request, int thread) {
#if WRITE_LSE
  for (int i = thread; i < a.num_kv_heads * GROUP; i += NUM_WARPS * 32) {
    float lse = MASKED;
#if SINKS
    if (of_request) lse = sink_of(a, i) * 0.6931471805599453f;
#endif
    a.output_lse[(u64)i * a.num_tokens + token] = lse;
  }
#endif
}

// Whether clear_rows has anything to do.
__device__ __forceinline__ bool must_clear(const Arguments& a) {
  bool found = a.query_start_loc[a.num_reqs] + (int)blockIdx.x < a.num_tokens;
  for (int r = blockIdx.x; r < a.num_reqs; r += gridDim.x) found |= a.seq_lens[r] <= SKIP_NEWEST + SKIP_FIRST;
  return found;
}

// Rows that no segment writes: tokens beyond the last query, and queries of requests that see no cached tokens.
__device__ __forceinline__ void clear_rows(const Arguments& a, int thread) {
  const int row_size = a.num_kv_heads * GROUP * HEAD_SIZE;
  const int used = a.query_start_loc[a.num_reqs];
  for (int token = used + blockIdx.x; token < a.num_tokens; token += gridDim.x) {
    for (int i = thread; i < row_size; i += NUM_WARPS * 32) a.output[token * a.output_stride + i] = 0;
    clear_lse(a, token, false, thread);
  }
  for (int r = blockIdx.x; r < a.num_reqs; r += gridDim.x) {
    if (a.seq_lens[r] > SKIP_NEWEST + SKIP_FIRST) continue;
    for (int token = a.query_start_loc[r]; token < a.query_start_loc[r + 1]; token++) {
      for (int i = thread; i < row_size; i += NUM_WARPS * 32) a.output[token * a.output_stride + i] = 0;
      clear_lse(a, token, true, thread);
    }
  }
}
