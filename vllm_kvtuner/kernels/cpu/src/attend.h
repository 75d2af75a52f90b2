// Attention of each request's newest tokens over cached ones, as paged_attention_ref and window_attention_ref.
//
// Work is cut into parts: SPLIT consecutive tokens of a request in one KV head, for all its queries. A part goes through
// its tokens in tiles and keeps, per query row, the largest logit, the sum of weights and the weighted sum of values.
// Parts are then merged. Codes stay codes in both products: with a row scale * codes + minimum,
//   q . k = scale (q . codes) + minimum sum(q),    sum p v = sum (p scale) codes + sum (p minimum).
namespace {

constexpr int TILE = 32;    // tokens whose rows are unpacked at a time, which stay in the first cache
constexpr int SPLIT = 256;  // tokens of a part
constexpr int STATE = D + 2;  // numbers of a query row's state: weighted sum of values, largest logit, sum of weights

// Cached tokens that a request's queries see some of: [0, head_end) and [begin, end).
struct Seen {
  int num_queries, length, head_end, begin, end;

  int num_tokens() const { return head_end + std::max(0, end - begin); }
};

inline Seen seen_by(const Attend& args, int request) {
  Seen seen;
  seen.num_queries = args.query_start_loc[request + 1] - args.query_start_loc[request];
  seen.length = args.seq_lens[request];
  seen.head_end = 0;
  const int oldest = seen.length - seen.num_queries;  // position of the first query
  if (args.in_window) {
    seen.begin = std::max(0, oldest - args.skip_newest + 1);
    seen.head_end = std::min(seen.begin, args.skip_first);
    seen.end = seen.length;
  } else {
    seen.begin = args.skip_first;
    if (args.sliding_window) seen.begin = std::max(seen.begin, oldest - args.sliding_window + 1);
    seen.end = seen.length - args.skip_newest;
  }
  if (seen.length == 0 || seen.num_queries == 0) seen.head_end = seen.begin = seen.end = 0;
  return seen;
}

inline bool is_visible(const Attend& args, int position, int token) {
  const int distance = position - token;
  if (args.sliding_window && distance >= args.sliding_window) return false;
  if (args.in_window) return distance >= 0 && (distance < args.skip_newest || token < args.skip_first);
  return distance >= args.skip_newest && token >= args.skip_first;
}

// Products of a query with `count` rows, four at a time; there is room for a multiple of four.
inline void products(const float* query, const float* rows, int count, float* sums) {
  for (int t = 0; t < count; t += 4) {
    const float* row = rows + t * D;
    float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int i = 0; i < D; ++i) {
      a += query[i] * row[i];
      b += query[i] * row[D + i];
      c += query[i] * row[2 * D + i];
      d += query[i] * row[3 * D + i];
    }
    sums[t] = a;
    sums[t + 1] = b;
    sums[t + 2] = c;
    sums[t + 3] = d;
  }
}

// sum += weights . rows, likewise.
inline void accumulate(const float* weights, const float* rows, int count, float* sum) {
  for (int t = 0; t < count; t += 4) {
    const float* row = rows + t * D;
    const float a = weights[t], b = weights[t + 1], c = weights[t + 2], d = weights[t + 3];
#pragma omp simd
    for (int i = 0; i < D; ++i) {
      sum[i] += (a * row[i] + b * row[D + i]) + (c * row[2 * D + i] + d * row[3 * D + i]);
    }
  }
}

// Folded queries of a step: per query row D numbers, then their sum, and what the key offset needs.
struct Folded {
  const float* queries;       // [tokens, heads, D], scaled
  const float* sums;          // [tokens, heads]
  const float* coefficients;  // [tokens, heads, rotary_dim]
  const float* constants;     // [tokens, heads], null without a key offset
};

// Logits of one query row for `count` tokens from `token` on, -inf where it does not see them; gives the largest.
inline float logits_of(const Attend& args, const Folded& folded, i64 row, int position, int token, int count,
                       const float* codes, const float* scale, const float* minimum, float* logits) {
  const Transforms& transforms = args.layer->transforms;
  products(folded.queries + row * D, codes, count, logits);
  const float sum = folded.sums[row];
  for (int t = 0; t < count; ++t) logits[t] = logits[t] * scale[t] + minimum[t] * sum;
  if (folded.constants) {
    const int size = transforms.rotary_dim;
    for (int t = 0; t < count; ++t) {
      const float* angles = transforms.table + i64(token + t) * size;
      logits[t] += dot(folded.coefficients + row * size, angles, size) + folded.constants[row];
    }
  }
  if (args.soft_cap > 0) {
    for (int t = 0; t < count; ++t) logits[t] = args.soft_cap * tanh_of(logits[t] / args.soft_cap);
  }
  float largest = -INFINITE;
  for (int t = 0; t < count; ++t) {
    logits[t] = is_visible(args, position, token + t) ? logits[t] : -INFINITE;
    // NaN counts as the largest, so that it is not lost.
    largest = logits[t] <= largest ? largest : logits[t];
  }
  return largest;
}

// Go through tokens [begin, end) of a request in one KV head.
inline void attend_tokens(const Attend& args, const Folded& folded, const Seen& seen, int request, int head, int begin,
                          int end, float* states) {
  const Cache& cache = args.layer->cache;
  const int group = args.num_heads / args.num_kv_heads, rows = seen.num_queries * group;
  alignas(64) float codes[TILE * D];
  float scale[TILE], minimum[TILE];
  std::vector<float> all_weights(size_t(rows) * TILE);
  for (int token = begin, count; token < end; token += count) {
    const int offset = token % cache.block_size;
    count = std::min({TILE, end - token, cache.block_size - offset});
    const int padded = (count + 3) / 4 * 4;
    const u8* chunk = chunk_of(cache, args.block_table[request * args.table_stride + token / cache.block_size], head);
    std::fill(codes + count * D, codes + padded * D, 0.0f);
    read_rows(cache, false, chunk, offset, count, codes, scale, minimum);
    for (int row = 0; row < rows; ++row) {
      const int query = row / group;
      const i64 folded_row = i64(args.query_start_loc[request] + query) * args.num_heads + head * group + row % group;
      float* weights = all_weights.data() + row * TILE;
      float* state = states + i64(row) * STATE;
      float largest = logits_of(args, folded, folded_row, seen.length - seen.num_queries + query, token, count, codes,
                                scale, minimum, weights);
      if (largest == -INFINITE) {
        std::fill(weights, weights + padded, 0.0f);
        continue;
      }
      const float before = state[D];
      if (before > largest) largest = before;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int t = 0; t < count; ++t) {
        weights[t] = exp_negative(weights[t] - largest);
        sum += weights[t];
      }
      std::fill(weights + count, weights + padded, 0.0f);
      if (before != largest) {
        const float factor = before == -INFINITE ? 0.0f : exp_negative(before - largest);
        for (int d = 0; d < D; ++d) state[d] *= factor;
        state[D] = largest;
        state[D + 1] *= factor;
      }
      state[D + 1] += sum;
    }
    read_rows(cache, true, chunk, offset, count, codes, scale, minimum);
    for (int row = 0; row < rows; ++row) {
      float* weights = all_weights.data() + row * TILE;
      float* state = states + i64(row) * STATE;
      const float shift = dot(weights, minimum, count);
      for (int t = 0; t < count; ++t) weights[t] *= scale[t];
      accumulate(weights, codes, padded, state);
      for (int d = 0; d < D; ++d) state[d] += shift;
    }
  }
}

struct Part {
  int request, head, begin, end;  // of the tokens that are seen, counted through
  i64 state;                      // where its rows' states begin
};

// Merge a query row's states of a request's parts, undo the value transform and write the row.
inline void finish_row(const Attend& args, i64 token, int head, const float* const* states, int count) {
  float largest = -INFINITE, sum = 0, row[D] = {};
  for (int part = 0; part < count; ++part) {
    if (states[part][D + 1] != 0) largest = states[part][D] <= largest ? largest : states[part][D];
  }
  for (int part = 0; part < count; ++part) {
    const float* state = states[part];
    if (state[D + 1] == 0) continue;
    const float factor = exp_negative(state[D] - largest);
    sum += factor * state[D + 1];
    for (int d = 0; d < D; ++d) row[d] += factor * state[d];
  }
  if (args.sinks && token < args.query_start_loc[args.num_reqs]) {  // as of one more token, whose value is 0
    const float sink = args.sinks[head], both = std::max(largest, sink);
    const float factor = largest == -INFINITE ? 0.0f : exp_negative(largest - both);
    sum = factor * sum + exp_negative(sink - both);
    for (int d = 0; d < D; ++d) row[d] *= factor;
    largest = both;
  }
  float lse = -INFINITE;
  if (sum != 0) {
    lse = largest + std::log(sum);
    for (int d = 0; d < D; ++d) row[d] /= sum;
    if (args.layer->transforms.value_hadamard) hadamard(row);
  }
  void* out = row_at(row_at(args.output, args.output_type, token, args.output_stride), args.output_type, head, D);
  float* old_lse = args.lse ? args.lse + head * args.lse_stride + token : nullptr;
  if (args.in_window) {  // merge with the attention that is there
    if (lse == -INFINITE) return;
    float there[D];
    load_row(out, args.output_type, there);
    // -inf - -inf does not come up; a part of no weight is left out, for it may hold anything.
    const float both = std::max(lse, *old_lse), ours = std::exp(lse - both), theirs = std::exp(*old_lse - both);
    for (int d = 0; d < D; ++d) row[d] = (ours * row[d] + (theirs == 0 ? 0.0f : theirs * there[d])) / (ours + theirs);
  } else if (old_lse) {
    *old_lse = lse;
  }
  store_row(row, args.output_type, out);
}

void attend(const Attend& args) {
  const Transforms& transforms = args.layer->transforms;
  const int group = args.num_heads / args.num_kv_heads, tokens = args.query_start_loc[args.num_reqs];
  const i64 rows = i64(tokens) * args.num_heads;
  const bool has_offset = transforms.offset;
  const int rotary = has_offset ? transforms.rotary_dim : 0;
  std::vector<Seen> seen(args.num_reqs);
  std::vector<Part> parts;
  std::vector<int> first_part(args.num_reqs + 1);
  std::vector<int> request_of(tokens);
  i64 num_states = 0;
  for (int request = 0; request < args.num_reqs; ++request) {
    seen[request] = seen_by(args, request);
    first_part[request] = int(parts.size());
    const int count = seen[request].num_tokens();
    for (int begin = 0; begin < count; begin += SPLIT) {
      for (int head = 0; head < args.num_kv_heads; ++head) {
        parts.push_back({request, head, begin, std::min(begin + SPLIT, count), num_states});
        num_states += i64(seen[request].num_queries) * group;
      }
    }
    for (int i = args.query_start_loc[request]; i < args.query_start_loc[request + 1]; ++i) request_of[i] = request;
  }
  first_part[args.num_reqs] = int(parts.size());
  std::vector<float> queries(rows * D), sums(rows), coefficients(rows * rotary), constants(rows);
  std::vector<float> states(num_states * STATE);
  const Folded folded{queries.data(), sums.data(), coefficients.data(), has_offset ? constants.data() : nullptr};

#pragma omp parallel num_threads(args.threads)
  {
#pragma omp for schedule(static)
    for (i64 row = 0; row < rows; ++row) {
      const int head = int(row % args.num_heads);
      float* query = queries.data() + row * D;
      const void* given = row_at(args.query, args.type, row / args.num_heads, args.query_stride);
      load_row(row_at(given, args.type, head, D), args.type, query);
      for (int d = 0; d < D; ++d) query[d] *= args.scale;
      if (has_offset) {
        constants[row] = offset_coefficients(transforms, head / group, query, coefficients.data() + row * rotary);
      }
      fold_query(transforms, head / group, query);
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int d = 0; d < D; ++d) sum += query[d];
      sums[row] = sum;
    }
#pragma omp for schedule(dynamic)
    for (size_t index = 0; index < parts.size(); ++index) {
      const Part& part = parts[index];
      const Seen& its = seen[part.request];
      float* state = states.data() + part.state * STATE;
      for (int row = 0; row < its.num_queries * group; ++row) state[row * STATE + D] = -INFINITE;
      if (part.begin < its.head_end) {
        const int end = std::min(part.end, its.head_end);
        attend_tokens(args, folded, its, part.request, part.head, part.begin, end, state);
      }
      if (part.end > its.head_end) {
        const int shift = its.begin - its.head_end, begin = std::max(part.begin, its.head_end);
        attend_tokens(args, folded, its, part.request, part.head, begin + shift, part.end + shift, state);
      }
    }
#pragma omp for schedule(static)
    for (i64 row = 0; row < rows; ++row) {
      const i64 token = row / args.num_heads;
      const int head = int(row % args.num_heads), request = request_of[token];
      const i64 within = (token - args.query_start_loc[request]) * group + head % group;
      std::vector<const float*> its_states;
      for (int part = first_part[request] + head / group; part < first_part[request + 1]; part += args.num_kv_heads) {
        its_states.push_back(states.data() + (parts[part].state + within) * STATE);
      }
      finish_row(args, token, head, its_states.data(), int(its_states.size()));
    }
#pragma omp for schedule(static)
    for (i64 row = rows; row < i64(args.in_window ? 0 : args.num_tokens) * args.num_heads; ++row) {
      finish_row(args, row / args.num_heads, int(row % args.num_heads), nullptr, 0);
    }
  }
}

}  // namespace
