// What one launch that generates metadata reads and writes. Plain structs, as params.h.
#pragma once

#include "params.h"

namespace nsa_fused {

// What one step backend's graph reads; null: not written.
struct GenerateDst {
  int32_t* field[kNumGenerated];
  int64_t table_pitch, table_cols;  // of kPageTable1
  int64_t page_pitch, page_cols;    // of kRealPageTable
};

// Written as it is in each replay.
struct Constant {
  const int32_t* src;  // [size]
  int32_t size;
};

// How sglang's top-k v2 shares rows out: its pool of clusters takes the rows longer than a threshold, the lowest whose
// pool, and that of each threshold above it, would hold no more rows than `most`. Lowest first.
constexpr int kMaxTopkBuckets = 8;
struct TopkBuckets {
  uint32_t threshold[kMaxTopkBuckets], most[kMaxTopkBuckets];
  int32_t size;
};

// A request has rows_per_request rows, or extend_lens[i]. Its cache length is seq_lens[i] + cache_offset;
// the lengths of its rows count up to that, from row_floor where they would begin below it.
template <int kCapacity>
struct GenerateParams {
  const void* seq_lens;          // [bs], int32 or int64
  const void* req_pool_indices;  // [bs], int32 or int64
  const int32_t* extend_lens;    // [bs] or null
  const int32_t* req_to_token;   // [num_slots, token_cols]
  int64_t token_pitch, token_cols, num_slots;
  bool seq_lens_64, req_pool_indices_64;
  int32_t bs, num_dst;
  int32_t rows_per_request, max_rows;
  int32_t cache_offset, row_floor;
  int32_t nsa_index_topk;
  int32_t page_shift;   // log2 of the page size
  int32_t segment_len;  // tokens that DeepGEMM schedules as one
  bool extra_last;      // the SMs with one segment more are the last ones, as from DeepGEMM 0.1.4 on, not the first
  int32_t num_sms;      // that it schedules for
  int32_t table_blocks, table_slices;
  TopkBuckets topk_buckets;  // of kTopkPlan; size 0: there is none
  Constant num_splits, tile_metadata;
  GenerateDst dst[kCapacity];
};

static_assert(sizeof(GenerateParams<kMaxDestinations>) <= 4096, "kernel parameters must fit 4 KiB");

}  // namespace nsa_fused
