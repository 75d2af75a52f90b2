// Key and value transforms of pages/transforms.py.
namespace {

// The orthonormal (block) Hadamard transform of a row, in place; its own inverse.
inline void hadamard(float* row) {
  constexpr int SIZE = D & -D;
  for (int begin = 0; begin < D; begin += SIZE) {
    for (int half = 1; half < SIZE; half *= 2) {
      for (int group = begin; group < begin + SIZE; group += 2 * half) {
        for (int i = group; i < group + half; ++i) {
          const float first = row[i], second = row[i + half];
          row[i] = first + second;
          row[i + half] = first - second;
        }
      }
    }
  }
  const float factor = 1.0f / std::sqrt(float(SIZE));
  for (int d = 0; d < D; ++d) row[d] *= factor;
}

struct Pair {
  int first, second;
};

inline Pair rotary_pair(const Transforms& transforms, int index) {
  return transforms.is_neox ? Pair{index, index + transforms.rotary_dim / 2} : Pair{2 * index, 2 * index + 1};
}

// Add `sign` times R_t m, the key offset at a position, to a row of a KV head.
inline void add_offset(const Transforms& transforms, int head, i64 position, float sign, float* row) {
  const float* offset = transforms.offset + head * D;
  const float* cosines = transforms.table + position * transforms.rotary_dim;
  const float* sines = cosines + transforms.rotary_dim / 2;
  for (int i = 0; i < transforms.rotary_dim / 2; ++i) {
    const Pair at = rotary_pair(transforms, i);
    row[at.first] += sign * (offset[at.first] * cosines[i] - offset[at.second] * sines[i]);
    row[at.second] += sign * (offset[at.second] * cosines[i] + offset[at.first] * sines[i]);
  }
  for (int d = transforms.rotary_dim; d < D; ++d) row[d] += sign * offset[d];
}

inline void transform_key(const Transforms& transforms, int head, i64 position, float* row) {
  if (transforms.offset) add_offset(transforms, head, position, -1.0f, row);
  if (transforms.equalization) {
    for (int d = 0; d < D; ++d) row[d] /= transforms.equalization[head * D + d];
  }
  if (transforms.key_hadamard) hadamard(row);
}

inline void restore_key(const Transforms& transforms, int head, i64 position, float* row) {
  if (transforms.key_hadamard) hadamard(row);
  if (transforms.equalization) {
    for (int d = 0; d < D; ++d) row[d] *= transforms.equalization[head * D + d];
  }
  if (transforms.offset) add_offset(transforms, head, position, 1.0f, row);
}

inline void fold_query(const Transforms& transforms, int head, float* row) {
  if (transforms.equalization) {
    for (int d = 0; d < D; ++d) row[d] *= transforms.equalization[head * D + d];
  }
  if (transforms.key_hadamard) hadamard(row);
}

// What a query's logits get from the key offset: coefficients . (cosines, sines of a position) + the number returned.
//
// q . R_t m is the sum over pairs of (q_a m_a + q_b m_b) cos + (q_b m_a - q_a m_b) sin, and of q_d m_d over dimensions
// that are not rotated.
inline float offset_coefficients(const Transforms& transforms, int head, const float* query, float* coefficients) {
  const float* offset = transforms.offset + head * D;
  const int half = transforms.rotary_dim / 2;
  for (int i = 0; i < half; ++i) {
    const Pair at = rotary_pair(transforms, i);
    coefficients[i] = query[at.first] * offset[at.first] + query[at.second] * offset[at.second];
    coefficients[half + i] = query[at.second] * offset[at.first] - query[at.first] * offset[at.second];
  }
  return dot(query + transforms.rotary_dim, offset + transforms.rotary_dim, D - transforms.rotary_dim);
}

}  // namespace
