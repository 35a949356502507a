// The plan of sglang's top-k v2 from the lengths of the rows: [0] the threshold and how many rows are longer, then each of
// those with its length.
#pragma once

#include <cub/block/block_scan.cuh>

#include "lengths.cuh"

namespace nsa_fused {

struct LongRows {
  uint32_t rows, longer;
  __device__ friend LongRows operator+(LongRows a, LongRows b) { return {a.rows + b.rows, a.longer + b.longer}; }
};

template <int kThreads>
struct TopkPlanShared {
  using Scan = cub::BlockScan<LongRows, kThreads>;
  typename Scan::TempStorage scan;
  uint32_t longer[kMaxTopkBuckets];  // rows longer than each threshold
};

// One block for each destination. Rows in order, where upstream's come as its threads do.
template <int kThreads, int kCapacity>
__device__ void write_topk_plan(const GenerateParams<kCapacity>& p, const GenerateDst& dst, TopkPlanShared<kThreads>& shared) {
  if (!dst.field[kTopkPlan]) return;
  const TopkBuckets& buckets = p.topk_buckets;
  if (threadIdx.x < kMaxTopkBuckets) shared.longer[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < p.bs; i += kThreads) {
    const Request r = request(p, i);
    for (int row = 0; row < r.rows; ++row)
      for (int b = 0; b < buckets.size && buckets.threshold[b] < static_cast<uint32_t>(r.len(row)); ++b)
        atomicAdd(&shared.longer[b], 1u);
  }
  __syncthreads();
  uint32_t threshold = buckets.threshold[buckets.size - 1];
  for (int b = buckets.size - 1; b >= 0 && shared.longer[b] <= buckets.most[b]; --b) threshold = buckets.threshold[b];

  auto* plan = reinterpret_cast<uint32_t*>(dst.field[kTopkPlan]);  // [rows + 1, 2]
  LongRows before{};                                               // of the requests that earlier rounds have served
  for (int first = 0; first < p.bs; first += kThreads) {
    const int i = first + threadIdx.x;
    Request r{};
    LongRows mine{}, at, all;
    if (i < p.bs) {
      r = request(p, i);
      mine.rows = r.rows;
      for (int row = 0; row < r.rows; ++row) mine.longer += static_cast<uint32_t>(r.len(row)) > threshold;
    }
    typename TopkPlanShared<kThreads>::Scan(shared.scan).ExclusiveSum(mine, at, all);
    __syncthreads();
    at = before + at;
    check(at.rows + r.rows <= p.max_rows && at.longer + mine.longer <= p.max_rows);
    for (int row = 0; row < r.rows; ++row) {
      const auto len = static_cast<uint32_t>(r.len(row));
      if (len <= threshold) continue;
      plan[2 * ++at.longer] = at.rows + row;
      plan[2 * at.longer + 1] = len;
    }
    before = before + all;
  }
  if (threadIdx.x == 0) {
    plan[0] = threshold;
    plan[1] = before.longer;
  }
}

}  // namespace nsa_fused
