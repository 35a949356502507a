// (seq_lens, req_pool_indices, req_to_token) -> what the captured graphs of one to sixteen step backends read, in one
// launch whose grid depends on captured sizes alone.
#pragma once

#include <cuda_runtime.h>

#include <cub/block/block_scan.cuh>
#include <type_traits>

#include "lengths.cuh"
#include "schedule.cuh"
#include "tables.cuh"
#include "topk_plan.cuh"

namespace nsa_fused {

constexpr int kGenerateThreads = kTableThreads;

// Counts over requests, unsigned as torch's int32 sums wrap.
struct Counts {
  uint32_t rows, cache, nsa;
  __device__ friend Counts operator+(Counts a, Counts b) { return {a.rows + b.rows, a.cache + b.cache, a.nsa + b.nsa}; }
};

using LengthsScan = cub::BlockScan<Counts, kGenerateThreads>;

// Of one block, whichever part it has.
template <bool kWide>
union Shared {
  LengthsScan::TempStorage scan;
  ScheduleShared<kGenerateThreads> schedule;
  TopkPlanShared<kGenerateThreads> topk_plan;
  std::conditional_t<kWide, TablesShared, PagesShared> tables;
};

__device__ __forceinline__ void put(int32_t* dst, int64_t at, int32_t value) {
  if (dst) dst[at] = value;
}

// One block for each destination: everything that has one element for each request or row.
template <int kCapacity>
__device__ void write_lengths(const GenerateParams<kCapacity>& p, const GenerateDst& dst, LengthsScan::TempStorage& shared) {
  Counts before{};  // of the requests that earlier rounds have served
  if (threadIdx.x == 0) {
    put(dst.field[kCuSeqlensK], 0, 0);
    put(dst.field[kNsaCuSeqlensK], 0, 0);
  }
  for (int first = 0; first < p.bs; first += kGenerateThreads) {
    const int i = first + threadIdx.x;
    Request r{};
    Counts mine{}, at, all;
    if (i < p.bs) {
      r = request(p, i);
      mine = {static_cast<uint32_t>(r.rows), static_cast<uint32_t>(r.cache_len), 0};
      for (int row = 0; row < r.rows; ++row) mine.nsa += min(r.len(row), p.nsa_index_topk);
    }
    LengthsScan(shared).ExclusiveScan(mine, at, Counts{}, Add{}, all);
    __syncthreads();
    if (i < p.bs) {
      at = before + at;
      put(dst.field[kCacheSeqlens], i, r.cache_len);
      put(dst.field[kCuSeqlensK], i + 1, at.cache + r.cache_len);
      check(at.rows + r.rows <= p.max_rows);
      for (int row = 0; row < r.rows; ++row) {
        const int64_t n = at.rows + row;
        const int32_t len = r.len(row), nsa_len = min(len, p.nsa_index_topk);
        put(dst.field[kSeqlensExpanded], n, len);
        put(dst.field[kContextLens2d], n, len);
        put(dst.field[kNsaCacheSeqlens], n, nsa_len);
        put(dst.field[kNsaCuSeqlensK], n + 1, at.nsa += nsa_len);
      }
    }
    before = before + all;
  }
}

// One block for each destination, beside the first: it reads the lengths alone.
template <int kCapacity>
__device__ void write_plans(const GenerateParams<kCapacity>& p, const GenerateDst& dst,
                            ScheduleShared<kGenerateThreads>& shared) {
  const auto copy = [](const Constant& from, int32_t* to) {
    for (int i = threadIdx.x; to && i < from.size; i += kGenerateThreads) to[i] = from.src[i];
  };
  copy(p.num_splits, dst.field[kNumSplits]);
  copy(p.tile_metadata, dst.field[kTileMetadata]);
  if (dst.field[kSchedule]) write_schedule(p, dst, shared);
}

// kWide: some destination has page_table_1.
template <int kCapacity, bool kWide>
__global__ void __launch_bounds__(kGenerateThreads, kBlocksPerSm)
    generate_kernel(const __grid_constant__ GenerateParams<kCapacity> p) {
  __shared__ Shared<kWide> shared;
  int block = blockIdx.x;
  if (block < p.num_dst) return write_lengths(p, p.dst[block], shared.scan);
  block -= p.num_dst;
  if (block < p.num_dst) return write_plans(p, p.dst[block], shared.schedule);
  block -= p.num_dst;
  if (p.topk_buckets.size) {
    if (block < p.num_dst) return write_topk_plan(p, p.dst[block], shared.topk_plan);
    block -= p.num_dst;
  }
  if constexpr (kWide) write_tables(p, block, shared.tables);
  else write_pages(p, block, shared.tables);
}

// table_cols: columns that a table may have live, 0 without one.
template <int kCapacity>
cudaError_t launch_generate(GenerateParams<kCapacity>& params, bool wide, int64_t table_cols, int num_sms, cudaStream_t stream) {
  params.table_slices = table_slices_for(params.bs, table_cols, params.page_shift, num_sms);
  params.table_blocks = wide ? table_blocks_for(params.bs, table_cols, num_sms) : params.bs * params.table_slices;
  const unsigned blocks = (params.topk_buckets.size ? 3 : 2) * params.num_dst + params.table_blocks;
  const auto kernel = wide ? generate_kernel<kCapacity, true> : generate_kernel<kCapacity, false>;
  void* args[] = {&params};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, kGenerateThreads, args, 0, stream);
}

}  // namespace nsa_fused
