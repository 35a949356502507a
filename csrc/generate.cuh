// (seq_lens, req_pool_indices, req_to_token) -> what the captured graphs of one to sixteen step backends read, in one
// launch whose grid depends on captured sizes alone.
#pragma once

#include <cuda_runtime.h>

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "generate_params.h"
#include "schedule.cuh"

namespace nsa_fused {

constexpr int kGenerateThreads = 256;
constexpr int kVectorsPerThread = 2;
constexpr int kGenerateTile = kGenerateThreads * kVectorsPerThread * 4;
constexpr int kLineCols = 32;  // table columns in a 128-byte line

// Counts over requests, unsigned as torch's int32 sums wrap.
struct Counts {
  uint32_t rows, cache, nsa;
  __device__ friend Counts operator+(Counts a, Counts b) { return {a.rows + b.rows, a.cache + b.cache, a.nsa + b.nsa}; }
};

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

__device__ __forceinline__ void put(int32_t* dst, int64_t at, int32_t value) {
  if (dst) dst[at] = value;
}

// A row beyond the captured ones would be written to memory that is not the table's: as wrong as an index that
// upstream's own indexing traps on.
__device__ __forceinline__ void check(bool holds) {
  if (!holds) __trap();
}

// One block for each destination: everything that has one element for each request or row.
template <int kCapacity>
__device__ void write_lengths(const GenerateParams<kCapacity>& p, const GenerateDst& dst) {
  using Scan = cub::BlockScan<Counts, kGenerateThreads>;
  __shared__ typename Scan::TempStorage temp;
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
      r = request(p, dst.len_offset, i);
      mine = {static_cast<uint32_t>(r.rows), static_cast<uint32_t>(r.cache_len), 0};
      for (int row = 0; row < r.rows; ++row) mine.nsa += min(r.len(row), p.nsa_index_topk);
    }
    Scan(temp).ExclusiveScan(mine, at, Counts{}, Add{}, all);
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
__device__ void write_plans(const GenerateParams<kCapacity>& p, const GenerateDst& dst) {
  const auto copy = [](const Constant& from, int32_t* to) {
    for (int i = threadIdx.x; to && i < from.size; i += kGenerateThreads) to[i] = from.src[i];
  };
  copy(p.num_splits, dst.field[kNumSplits]);
  copy(p.tile_metadata, dst.field[kTileMetadata]);
  if (dst.field[kSchedule]) write_schedule<kGenerateThreads>(p, dst);
}

// Columns [col, col + 4) of a row that ends at cols; what lies outside is not read.
__device__ __forceinline__ int4 load4(const int32_t* row, int64_t col, int64_t cols) {
  if (col >= 0 && col + 4 <= cols) return *reinterpret_cast<const int4*>(row + col);
  const auto one = [&](int64_t c) { return c >= 0 && c < cols ? row[c] : 0; };
  return make_int4(one(col), one(col + 1), one(col + 2), one(col + 3));
}

__device__ __forceinline__ void store4(int32_t* row, int64_t col, int64_t cols, int4 v) {
  if (col >= 0 && col + 4 <= cols) {
    *reinterpret_cast<int4*>(row + col) = v;
    return;
  }
  const int32_t value[] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (col + i >= 0 && col + i < cols) row[col + i] = value[i];
}

// Elements [at, at + 4) of 16-byte vectors in shared memory.
__device__ __forceinline__ int4 shifted(const int4* vectors, int at) {
  const int4 a = vectors[at / 4], b = vectors[at / 4 + 1];
  switch (at % 4) {  // the same for all threads
    case 0: return a;
    case 1: return make_int4(a.y, a.z, a.w, b.x);
    case 2: return make_int4(a.z, a.w, b.x, b.y);
    default: return make_int4(a.w, b.x, b.y, b.z);
  }
}

// Every p.splits-th tile of one request's live columns: read once, written to its rows in every destination.
template <int kCapacity>
__device__ void write_tables(const GenerateParams<kCapacity>& p, int i, int split) {
  int64_t first_row = static_cast<int64_t>(i) * p.rows_per_request;
  if (p.extend_lens) {
    using Reduce = cub::BlockReduce<int, kGenerateThreads>;
    __shared__ typename Reduce::TempStorage temp;
    __shared__ int sum;
    int rows = 0;
    for (int j = threadIdx.x; j < i; j += kGenerateThreads) rows += max(p.extend_lens[j], 0);
    rows = Reduce(temp).Sum(rows);
    if (threadIdx.x == 0) sum = rows;
    __syncthreads();
    first_row = sum;
  }
  int len_offset = p.dst[0].len_offset;  // tables, which destinations may share, hold the longest
  for (int d = 1; d < p.num_dst; ++d) len_offset = max(len_offset, p.dst[d].len_offset);
  const Request r = request(p, len_offset, i);
  check(first_row + r.rows <= p.max_rows);
  const int64_t slot = load_index(p.req_pool_indices, p.req_pool_indices_64, i);
  check(slot >= 0 && slot < p.num_slots);
  const int32_t* src = p.req_to_token + slot * p.token_pitch;
  const int64_t cols = min(static_cast<int64_t>(r.cache_len), p.token_cols);

  // A tile is staged once, with one line more than it has columns, and each row takes from it what begins and ends on
  // lines of its own: a line written in part costs L2 a merge, and rows lie at any multiple of four bytes.
  constexpr int kVectors = (kGenerateTile + kLineCols) / 4 + 1;
  __shared__ int4 staged[kVectors];
  const auto line_begin = [](const int32_t* row) {  // where the last line before the row's first begins, -32 to -1
    return -1 - static_cast<int>((reinterpret_cast<uintptr_t>(row) / 4 - 1) % kLineCols);
  };
  for (int64_t tile = split; tile * kGenerateTile - kLineCols < cols; tile += p.splits) {
    const int64_t first = tile * kGenerateTile - kLineCols;  // the first column that any row may take
    const int64_t base = first - (reinterpret_cast<uintptr_t>(src) / 4 + first) % 4;  // where its 16 bytes begin
    for (int v = threadIdx.x; v < kVectors; v += kGenerateThreads) staged[v] = load4(src, base + v * 4, cols);
    __syncthreads();
    for (int d = 0; d < p.num_dst; ++d) {
      const GenerateDst& dst = p.dst[d];
      for (int row = 0; row < r.rows && dst.field[kPageTable1]; ++row) {
        int32_t* to = dst.field[kPageTable1] + (first_row + row) * dst.table_pitch;
        const int64_t begin = tile * kGenerateTile + line_begin(to), end = min(cols, dst.table_cols);
#pragma unroll
        for (int k = 0; k < kVectorsPerThread; ++k) {
          const int at = (k * kGenerateThreads + threadIdx.x) * 4;
          store4(to, begin + at, end, shifted(staged, static_cast<int>(begin - base) + at));
        }
      }
      for (int row = 0; row < r.rows && dst.field[kRealPageTable]; ++row) {
        int32_t* to = dst.field[kRealPageTable] + (first_row + row) * dst.page_pitch;
        // Of the tile's own columns, without the line more. An arithmetic shift is torch's floor division.
        const int64_t own_end = min(first + kGenerateTile, cols);
        int64_t page = ((max(first, int64_t{0}) - 1) >> p.page_shift) + 1 + threadIdx.x;
        for (; page << p.page_shift < own_end && page < dst.page_cols; page += kGenerateThreads)
          to[page] = reinterpret_cast<const int32_t*>(staged)[(page << p.page_shift) - base] >> p.page_shift;
      }
    }
    __syncthreads();
  }
}

template <int kCapacity>
__global__ void __launch_bounds__(kGenerateThreads) generate_kernel(const __grid_constant__ GenerateParams<kCapacity> p) {
  int block = blockIdx.x;
  if (block < p.num_dst) return write_lengths(p, p.dst[block]);
  block -= p.num_dst;
  if (block < p.num_dst) return write_plans(p, p.dst[block]);
  block -= p.num_dst;
  write_tables(p, block / p.splits, block % p.splits);
}

// How many blocks share a request's columns: enough to fill the GPU, and no more than there are tiles.
inline int splits_for(int bs, int64_t cols, int num_sms) {
  constexpr int kBlocksPerSm = 2048 / kGenerateThreads;
  const int64_t tiles = (cols + kLineCols + kGenerateTile - 1) / kGenerateTile;
  const int64_t wanted = (static_cast<int64_t>(num_sms) * kBlocksPerSm + bs - 1) / bs;
  return static_cast<int>(tiles < wanted ? tiles : wanted);
}

template <int kCapacity>
cudaError_t launch_generate(const GenerateParams<kCapacity>& params, cudaStream_t stream) {
  const unsigned blocks = 2 * params.num_dst + static_cast<unsigned>(params.bs) * params.splits;
  void* args[] = {const_cast<GenerateParams<kCapacity>*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(generate_kernel<kCapacity>), blocks, kGenerateThreads, args, 0,
                          stream);
}

}  // namespace nsa_fused
