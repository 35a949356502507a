// The lengths of each request and of its rows.
#pragma once

#include <cuda_runtime.h>

#include "generate_params.h"

namespace nsa_fused {

__device__ __forceinline__ int64_t load_index(const void* values, bool is_64, int i) {
  return is_64 ? static_cast<const int64_t*>(values)[i] : static_cast<const int32_t*>(values)[i];
}

// One request's rows: their lengths count up to cache_len.
struct Request {
  int32_t rows, cache_len, floor;
  __device__ int32_t len(int row) const { return max(cache_len - rows + 1 + row, floor); }
};

template <int kCapacity>
__device__ __forceinline__ Request request(const GenerateParams<kCapacity>& p, int i) {
  const auto seq_len = static_cast<int32_t>(load_index(p.seq_lens, p.seq_lens_64, i));
  return {p.extend_lens ? max(p.extend_lens[i], 0) : p.rows_per_request, seq_len + p.cache_offset, p.row_floor};
}

// A row beyond the captured ones would be written to memory that is not the table's: as wrong as an index that
// upstream's own indexing traps on.
__device__ __forceinline__ void check(bool holds) {
  if (!holds) __trap();
}

}  // namespace nsa_fused
