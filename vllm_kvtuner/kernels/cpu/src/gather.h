// Gather: tokens back from packed pages in model space, as the reference's gather_cache_ref.
namespace {

void gather(const Gather& args) {
  const Layer& layer = *args.layer;
  const Cache& cache = layer.cache;
  const i64 rows = i64(args.num_tokens) * args.num_kv_heads;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (rows > 4)
  for (i64 index = 0; index < rows; ++index) {
    const int token = int(index / args.num_kv_heads), head = int(index % args.num_kv_heads);
    const int* ends = args.cu_seq_lens + 1;
    const int request = int(std::upper_bound(ends, ends + args.num_reqs, token) - ends);
    const i64 position = i64(token) - args.cu_seq_lens[request] + args.seq_starts[request];
    const i64 block = args.block_table[request * args.table_stride + position / cache.block_size];
    const u8* chunk = chunk_of(cache, block, head);
    const int offset = int(position % cache.block_size);
    for (int value = 0; value < 2; ++value) {
      float row[D], scale, minimum;
      read_rows(cache, value, chunk, offset, 1, row, &scale, &minimum);
      for (int d = 0; d < D; ++d) row[d] = row[d] * scale + minimum;
      if (!value) {
        restore_key(layer.transforms, head, position, row);
      } else if (layer.transforms.value_hadamard) {
        hadamard(row);
      }
      void* out = row_at(value ? args.value_out : args.key_out, args.type, token,
                         value ? args.value_stride : args.key_stride);
      store_row(row, args.type, row_at(out, args.type, head, D));
    }
  }
}

}  // namespace
