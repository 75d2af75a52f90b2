// Rows of a cache: packed codes with their meta (pages/codes.py), or numbers as they are.
namespace {

constexpr int PLAIN = 16;  // in place of the bits of a code: a row of the model's type

// The number of codes d in [0, D) of a packed row, as fp32.
inline void unpack(const u8* bytes, int bits, float* codes) {
  if (bits == 8) {
    for (int d = 0; d < D; ++d) codes[d] = float(int(bytes[d]));
  } else if (bits == 4) {
    for (int j = 0; j < D / 2; ++j) {
      const int byte = bytes[j];
      codes[j] = float(byte & 15);
      codes[j + D / 2] = float(byte >> 4);
    }
  } else {
    for (int j = 0; j < D / 4; ++j) {
      const int byte = bytes[j];
      codes[j] = float(byte & 3);
      codes[j + D / 4] = float((byte >> 2) & 3);
      codes[j + D / 2] = float((byte >> 4) & 3);
      codes[j + D / 4 * 3] = float(byte >> 6);
    }
  }
}

inline void pack(const u8* codes, int bits, u8* bytes) {
  if (bits == 8) {
    std::memcpy(bytes, codes, D);
  } else if (bits == 4) {
    for (int j = 0; j < D / 2; ++j) bytes[j] = u8(codes[j] | codes[j + D / 2] << 4);
  } else {
    for (int j = 0; j < D / 4; ++j) {
      bytes[j] = u8(codes[j] | codes[j + D / 4] << 2 | codes[j + D / 2] << 4 | codes[j + D / 4 * 3] << 6);
    }
  }
}

inline u8* chunk_of(const Cache& cache, i64 block, int head) {
  return static_cast<u8*>(cache.data) + block * cache.block_stride + head * cache.head_stride;
}

constexpr int META_ROW = 2 * sizeof(u16);  // a row's scale and minimum, both fp16

inline void read_meta(const u8* meta, float& scale, float& minimum) {
  u16 pair[2];
  std::memcpy(pair, meta, META_ROW);
  scale = from_half(pair[0]);
  minimum = from_half(pair[1]);
}

// `count` rows of one side of a chunk from token `offset` on: row = scale * codes + minimum; of plain rows the scale is 1.
inline void read_rows(const Cache& cache, bool value, const u8* chunk, int offset, int count, float* codes, float* scale,
                      float* minimum) {
  const int bits = value ? cache.v_bits : cache.k_bits;
  if (bits == PLAIN) {
    const int row_bytes = D * size_of(cache.type);
    for (int t = 0; t < count; ++t) {
      load_row(chunk + (offset + t) * cache.token_stride + (value ? row_bytes : 0), cache.type, codes + t * D);
      scale[t] = 1.0f;
      minimum[t] = 0.0f;
    }
    return;
  }
  const u8* rows = chunk + (value ? cache.v_codes : cache.k_codes) + offset * (D * bits / 8);
  const u8* meta = chunk + (value ? cache.v_meta : cache.k_meta) + offset * META_ROW;
  for (int t = 0; t < count; ++t) {
    unpack(rows + t * (D * bits / 8), bits, codes + t * D);
    read_meta(meta + t * META_ROW, scale[t], minimum[t]);
  }
}

}  // namespace
