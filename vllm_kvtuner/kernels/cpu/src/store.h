// Store: transform, quantize, pack and scatter new tokens, as the reference's reshape_and_cache_ref.
namespace {

// A row's range: scale and minimum as the page has them, and the scale's inverse.
struct Range {
  float scale, minimum, inverse;

  float code(float number, int levels) const {
    const float code = std::floor((number - minimum) * inverse + 0.5f);
    return code < 0 ? 0.0f : code > levels ? float(levels) : code;
  }
};

inline Range range_of(float low, float high, const float* factors) {
  Range range;
  const float scale = (high - low) * factors[0], minimum = low + (high - low) * factors[1];
  range.scale = from_half(to_half(scale > FP16_MAX ? FP16_MAX : scale));
  range.minimum = from_half(to_half(minimum > FP16_MAX ? FP16_MAX : minimum < -FP16_MAX ? -FP16_MAX : minimum));
  range.inverse = range.scale > 0 ? 1.0f / range.scale : 0.0f;
  return range;
}

// A row's meta: of a range, or of a row with NaN, which is read back as NaN, as the model made it.
inline void write_meta(const Range* range, u8* meta) {
  const u16 halves[2] = {range ? to_half(range->scale) : u16(0x7e00), range ? to_half(range->minimum) : u16(0x7e00)};
  std::memcpy(meta, halves, META_ROW);
}

// The nearest codes, in the first range of least squared error.
inline Range quantize_nearest(const Rounding& rounding, const float* row, float low, float high, u8* codes) {
  Range best = range_of(low, high, rounding.ranges);
  float least = INFINITE;
  for (int index = 0; rounding.num_ranges > 1 && index < rounding.num_ranges; ++index) {
    const Range range = range_of(low, high, rounding.ranges + 2 * index);
    float error = 0;
#pragma omp simd reduction(+ : error)
    for (int d = 0; d < D; ++d) {
      const float apart = row[d] - (range.code(row[d], rounding.levels) * range.scale + range.minimum);
      error += apart * apart;
    }
    if (error < least) {
      least = error;
      best = range;
    }
  }
  for (int d = 0; d < D; ++d) codes[d] = u8(int(best.code(row[d], rounding.levels)));
  return best;
}

constexpr int MAX_RANGES = 3;

// Codes by round feedback (pages/feedback.py): from the last channel to the first, each takes up the errors of those
// before it. Ranges are tried side by side, for a channel waits for the one before it.
inline Range quantize_with_feedback(const Rounding& rounding, int head, const float* row, float low, float high,
                                    u8* codes) {
  const float* weights = rounding.weights + head * D;
  const float* columns = rounding.columns + i64(head) * D * D;
  const int count = rounding.num_ranges;
  Range ranges[MAX_RANGES];
  float aims[MAX_RANGES][D], costs[MAX_RANGES] = {};
  u8 tried[MAX_RANGES][D];
  for (int k = 0; k < count; ++k) {
    ranges[k] = range_of(low, high, rounding.ranges + 2 * k);
    std::memcpy(aims[k], row, sizeof aims[k]);
  }
  for (int j = D - 1; j >= 0; --j) {
    const float* column = columns + j * D;
    for (int k = 0; k < count; ++k) {
      const float aim = aims[k][j], code = ranges[k].code(aim, rounding.levels);
      const float number = code * ranges[k].scale + ranges[k].minimum, error = row[j] - number;
      costs[k] += weights[j] * (aim - number) * (aim - number);
      tried[k][j] = u8(int(code));
      float* before = aims[k];
#pragma omp simd
      for (int i = 0; i < j; ++i) before[i] += column[i] * error;
    }
  }
  int best = 0;
  for (int k = 1; k < count; ++k) best = costs[k] < costs[best] ? k : best;
  std::memcpy(codes, tried[best], D);
  return ranges[best];
}

// Quantize a transformed row and write its codes and its meta.
inline void write_row(const Rounding& rounding, int head, float* row, u8* bytes, u8* meta) {
  if (rounding.columns) {
    for (int d = 0; d < D; ++d) row[d] = row[d] > FP16_MAX ? FP16_MAX : row[d] < -FP16_MAX ? -FP16_MAX : row[d];
  }
  float low = INFINITE, high = -INFINITE;
  int numbers = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : numbers)
  for (int d = 0; d < D; ++d) {
    low = row[d] < low ? row[d] : low;
    high = row[d] > high ? row[d] : high;
    numbers += row[d] == row[d];
  }
  u8 codes[D] = {};
  Range range;
  const bool whole = numbers == D;
  if (whole) {
    range = rounding.columns ? quantize_with_feedback(rounding, head, row, low, high, codes)
                             : quantize_nearest(rounding, row, low, high, codes);
  }
  pack(codes, rounding.bits, bytes);
  write_meta(whole ? &range : nullptr, meta);
}

void store(const Store& args) {
  const Layer& layer = *args.layer;
  const Cache& cache = layer.cache;
  const i64 rows = i64(args.num_slots) * args.num_kv_heads;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (rows > 4)
  for (i64 index = 0; index < rows; ++index) {
    const i64 token = index / args.num_kv_heads;
    const int head = int(index % args.num_kv_heads);
    const void* key = row_at(args.key, args.type, token, args.key_stride);
    const void* value = row_at(args.value, args.type, token, args.value_stride);
    key = row_at(key, args.type, head, D);
    value = row_at(value, args.type, head, D);
    if (const i64 slot = args.slots[token]; slot >= 0) {
      u8* chunk = chunk_of(cache, slot / cache.block_size, head);
      const i64 offset = slot % cache.block_size;
      float row[D];
      load_row(key, args.type, row);
      transform_key(layer.transforms, head, layer.transforms.offset ? args.positions[token] : 0, row);
      write_row(layer.key, head, row, chunk + cache.k_codes + offset * (D * cache.k_bits / 8),
                chunk + cache.k_meta + offset * META_ROW);
      load_row(value, args.type, row);
      if (layer.transforms.value_hadamard) hadamard(row);
      write_row(layer.value, head, row, chunk + cache.v_codes + offset * (D * cache.v_bits / 8),
                chunk + cache.v_meta + offset * META_ROW);
    }
    const i64 slot = args.window_slots ? args.window_slots[token] : -1;
    if (slot >= 0) {
      const Cache& window = args.window;
      u8* row = chunk_of(window, slot / window.block_size, head) + slot % window.block_size * window.token_stride;
      const int bytes = D * size_of(args.type);
      std::memcpy(row, key, bytes);
      std::memcpy(row + bytes, value, bytes);
    }
  }
}

}  // namespace
