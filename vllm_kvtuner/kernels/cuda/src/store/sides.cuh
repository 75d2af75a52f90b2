// Stores both sides of a layer that rounds with feedback on one of them at least. Of the CTAs that share a layer's tokens,
// the first feedback_ctas round with feedback, those behind them store the other side, if there is one.
#pragma once

static_assert(SHARED_BYTES == FeedbackMemory<constant_max(K_RANGES, V_RANGES)>::BYTES, "shared memory");

// What CTA `cta` of `ctas` stores.
//   memory: SHARED_BYTES of the CTA's shared memory.
__device__ __forceinline__ void store_sides(const StoreArguments& a, u32 cta, u32 ctas, u8* memory) {
  if (K_RANGES && V_RANGES || cta < a.feedback_ctas) {
    const int of_head = (a.num_slots + FEEDBACK_ROWS - 1) / FEEDBACK_ROWS;
    const int key_groups = K_RANGES ? of_head * NUM_KV_HEADS : 0;
    const int groups = key_groups + (V_RANGES ? of_head * NUM_KV_HEADS : 0);
    // Neighbouring groups, of one head but for a few.
    const int begin = (int)((u64)groups * cta / a.feedback_ctas);
    const int end = (int)((u64)groups * (cta + 1) / a.feedback_ctas);
    if constexpr (K_RANGES > 0) {
      const FeedbackTables tables = {a.key_ranges, a.key_triangles, a.key_fragments};
      store_groups<true, K_BITS, K_RANGES, KEY_HADAMARD>(a, tables, begin, min(end, key_groups), of_head, memory);
    }
    if constexpr (V_RANGES > 0) {
      const FeedbackTables tables = {a.value_ranges, a.value_triangles, a.value_fragments};
      store_groups<false, V_BITS, V_RANGES, VALUE_HADAMARD>(a, tables, max(begin, key_groups) - key_groups,
                                                            end - key_groups, of_head, memory);
    }
    return;
  }
  if constexpr (!K_RANGES || !V_RANGES) {
    __shared__ Range ranges[NUM_WARPS][MAX_ROWS][RANGE_STEPS];
    constexpr bool KEYS = !K_RANGES;
    constexpr int LANES = KEYS ? K_LANES : V_LANES;
    const int thread = threadIdx.x, warp = __shfl_sync(FULL_WARP, thread / 32, 0), lane = thread % 32;
    const int tiles = tiles_of(a.num_slots, LANES);
    store_tiles<KEYS ? K_BITS : V_BITS, LANES, KEYS ? KEY_HADAMARD : VALUE_HADAMARD>(
        a, (cta - a.feedback_ctas) * NUM_WARPS + warp, (ctas - a.feedback_ctas) * NUM_WARPS, tiles,
        KEYS ? tiles : 0, ranges[warp], lane);
  }
}
