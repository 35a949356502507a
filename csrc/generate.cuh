// (seq_lens, req_pool_indices, req_to_token) -> what the captured graphs of one to sixteen step backends read, in one
// launch whose grid depends on captured sizes alone.
#pragma once

#include <cuda_runtime.h>

#include <cub/block/block_scan.cuh>

#include "lengths.cuh"
#include "schedule.cuh"
#include "topk_plan.cuh"

namespace nsa_fused {

constexpr int kGenerateThreads = 256;
constexpr int kBlocksPerSm = 4;
constexpr int kVectorsPerThread = 2;
constexpr int kGenerateTile = kGenerateThreads * kVectorsPerThread * 4;
constexpr int kLineCols = 32;  // table columns in a 128-byte line

// Counts over requests, unsigned as torch's int32 sums wrap.
struct Counts {
  uint32_t rows, cache, nsa;
  __device__ friend Counts operator+(Counts a, Counts b) { return {a.rows + b.rows, a.cache + b.cache, a.nsa + b.nsa}; }
};

// A tile is staged with one line more than it has columns, and what lies before its first column in 16 bytes.
constexpr int kStaged = (kGenerateTile + kLineCols) / 4 + 1;

// Counts over requests of what the tables get; rows unsigned, so that the first request with too many shows.
struct TableCounts {
  int tiles;
  uint32_t rows;
  __device__ friend TableCounts operator+(TableCounts a, TableCounts b) { return {a.tiles + b.tiles, a.rows + b.rows}; }
};

// Of one block, whichever part it has.
union Shared {
  using Scan = cub::BlockScan<Counts, kGenerateThreads>;
  using TableScan = cub::BlockScan<TableCounts, kGenerateThreads>;
  Scan::TempStorage scan;
  ScheduleShared<kGenerateThreads> schedule;
  TopkPlanShared<kGenerateThreads> topk_plan;
  struct {
    TableScan::TempStorage scan;
    TableCounts end[kGenerateThreads];  // of each request of this round
    int slot[kGenerateThreads];
    int4 staged[kStaged];
  } tables;
};

// Tiles of rows this long, of whatever alignment.
__host__ __device__ constexpr int64_t tiles_of(int64_t cols) { return (cols + kLineCols + kGenerateTile - 1) / kGenerateTile; }

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

__device__ __forceinline__ void put(int32_t* dst, int64_t at, int32_t value) {
  if (dst) dst[at] = value;
}

// One block for each destination: everything that has one element for each request or row.
template <int kCapacity>
__device__ void write_lengths(const GenerateParams<kCapacity>& p, const GenerateDst& dst, Shared& shared) {
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
    Shared::Scan(shared.scan).ExclusiveScan(mine, at, Counts{}, Add{}, all);
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
__device__ void write_plans(const GenerateParams<kCapacity>& p, const GenerateDst& dst, Shared& shared) {
  const auto copy = [](const Constant& from, int32_t* to) {
    for (int i = threadIdx.x; to && i < from.size; i += kGenerateThreads) to[i] = from.src[i];
  };
  copy(p.num_splits, dst.field[kNumSplits]);
  copy(p.tile_metadata, dst.field[kTileMetadata]);
  if (dst.field[kSchedule]) write_schedule(p, dst, shared.schedule);
}

// Columns [col, col + 4) of a row that ends at cols; what lies outside is not read.
__device__ __forceinline__ int4 load4(const int32_t* row, int col, int cols) {
  if (col >= 0 && col + 4 <= cols) return *reinterpret_cast<const int4*>(row + col);
  const auto one = [&](int c) { return c >= 0 && c < cols ? row[c] : 0; };
  return make_int4(one(col), one(col + 1), one(col + 2), one(col + 3));
}

__device__ __forceinline__ void store4(int32_t* row, int col, int cols, int4 v) {
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

// One tile of one request's live columns.
struct Tile {
  const int32_t* src;  // the request's row of the pool
  int first_row, rows, cols;
  int first;  // the first column that any row may take: 32 before the tile's own
  int base;   // where the 16 bytes begin that hold it

  __device__ int4 load(int vector) const { return load4(src, base + vector * 4, cols); }
};

// From shared memory each row takes what begins and ends on lines of its own: a line written in part costs L2 a merge,
// and rows lie at any multiple of four bytes.
template <int kCapacity>
__device__ __forceinline__ void write_tile(const GenerateParams<kCapacity>& p, const Tile& tile, const int4* staged) {
  for (int d = 0; d < p.num_dst; ++d) {
    const GenerateDst& dst = p.dst[d];
    for (int row = 0; row < tile.rows && dst.field[kPageTable1]; ++row) {
      int32_t* to = dst.field[kPageTable1] + dst.table_pitch * (tile.first_row + row);
      const int end = static_cast<int>(min(static_cast<int64_t>(tile.cols), dst.table_cols));
      const int begin =
          tile.first + kLineCols - 1 - static_cast<int>((reinterpret_cast<uintptr_t>(to) / 4 - 1) % kLineCols);
#pragma unroll
      for (int k = 0; k < kVectorsPerThread; ++k) {
        const int at = (k * kGenerateThreads + threadIdx.x) * 4;
        store4(to, begin + at, end, shifted(staged, begin - tile.base + at));
      }
    }
    for (int row = 0; row < tile.rows && dst.field[kRealPageTable]; ++row) {
      int32_t* to = dst.field[kRealPageTable] + dst.page_pitch * (tile.first_row + row);
      // Of the tile's own columns, without the line more. An arithmetic shift is torch's floor division.
      const int end = min(tile.first + kGenerateTile, tile.cols);
      int page = ((max(tile.first, 0) - 1) >> p.page_shift) + 1 + threadIdx.x;
      for (; page << p.page_shift < end && page < dst.page_cols; page += kGenerateThreads)
        to[page] = reinterpret_cast<const int32_t*>(staged)[(page << p.page_shift) - tile.base] >> p.page_shift;
    }
  }
}

// The live tiles of all requests, one after another, dealt out to the blocks: each is read once and written to the
// request's rows in every destination, and blocks that run together write side by side, however the lengths differ.
template <int kCapacity>
__device__ void write_tables(const GenerateParams<kCapacity>& p, int item, Shared& shared) {
  auto& mine = shared.tables;
  int len_offset = p.dst[0].len_offset;  // tables, which destinations may share, hold the longest
  for (int d = 1; d < p.num_dst; ++d) len_offset = max(len_offset, p.dst[d].len_offset);
  const auto live_cols = [&](const Request& r) {
    return static_cast<int>(min(max(static_cast<int64_t>(r.cache_len), int64_t{0}), p.token_cols));
  };

  TableCounts before{};  // of the requests that earlier rounds have served
  for (int first = 0; first < p.bs; first += kGenerateThreads) {
    const int i = first + threadIdx.x;
    TableCounts count{}, end, all;
    if (i < p.bs) {
      const Request r = request(p, len_offset, i);
      const int cols = live_cols(r);
      count = {cols && r.rows ? static_cast<int>(tiles_of(cols)) : 0, static_cast<uint32_t>(r.rows)};
      const int64_t slot = load_index(p.req_pool_indices, p.req_pool_indices_64, i);
      check(slot >= 0 && slot < p.num_slots);
      mine.slot[threadIdx.x] = static_cast<int>(slot);
    }
    Shared::TableScan(mine.scan).InclusiveScan(count, end, Add{}, all);
    end = before + end;
    mine.end[threadIdx.x] = end;
    check(i >= p.bs || end.rows <= static_cast<uint32_t>(p.max_rows));
    __syncthreads();

    const auto locate = [&](int item) {
      int low = 0, high = min(kGenerateThreads, p.bs - first) - 1;  // the first request that ends behind this item
      while (low < high) {
        const int middle = (low + high) / 2;
        if (mine.end[middle].tiles > item) high = middle;
        else low = middle + 1;
      }
      const TableCounts begin = low ? mine.end[low - 1] : before;
      Tile tile;
      tile.src = p.req_to_token + mine.slot[low] * p.token_pitch;
      tile.first_row = static_cast<int>(begin.rows);
      tile.rows = static_cast<int>(mine.end[low].rows - begin.rows);
      tile.cols = live_cols(request(p, len_offset, first + low));
      tile.first = (item - begin.tiles) * kGenerateTile - kLineCols;
      tile.base = tile.first - static_cast<int>((reinterpret_cast<uintptr_t>(tile.src) / 4 + tile.first) % 4);
      return tile;
    };
    constexpr int kRest = kStaged % kGenerateThreads;
    int4 next[kVectorsPerThread], rest;
    const auto load = [&](const Tile& tile) {
#pragma unroll
      for (int k = 0; k < kVectorsPerThread; ++k) next[k] = tile.load(k * kGenerateThreads + threadIdx.x);
      if (threadIdx.x < kRest) rest = tile.load(kVectorsPerThread * kGenerateThreads + threadIdx.x);
    };
    const int end_item = before.tiles + all.tiles;
    Tile tile;
    if (item < end_item) load(tile = locate(item));
    while (item < end_item) {
#pragma unroll
      for (int k = 0; k < kVectorsPerThread; ++k) mine.staged[k * kGenerateThreads + threadIdx.x] = next[k];
      if (threadIdx.x < kRest) mine.staged[kVectorsPerThread * kGenerateThreads + threadIdx.x] = rest;
      __syncthreads();
      const Tile now = tile;
      item += p.table_blocks;
      if (item < end_item) load(tile = locate(item));  // on its way while this one is written
      write_tile(p, now, mine.staged);
      __syncthreads();
    }
    before = before + all;
  }
}

template <int kCapacity>
__global__ void __launch_bounds__(kGenerateThreads, kBlocksPerSm)
    generate_kernel(const __grid_constant__ GenerateParams<kCapacity> p) {
  __shared__ Shared shared;
  int block = blockIdx.x;
  if (block < p.num_dst) return write_lengths(p, p.dst[block], shared);
  block -= p.num_dst;
  if (block < p.num_dst) return write_plans(p, p.dst[block], shared);
  block -= p.num_dst;
  if (p.topk_buckets.size) {
    if (block < p.num_dst) return write_topk_plan(p, p.dst[block], shared.topk_plan);
    block -= p.num_dst;
  }
  write_tables(p, block, shared);
}

// How many blocks share the tables: what the GPU holds at once, and no more than there can be tiles.
inline int table_blocks_for(int bs, int64_t cols, int num_sms) {
  const int64_t tiles = cols ? bs * tiles_of(cols) : 0;
  const int64_t held = static_cast<int64_t>(num_sms) * kBlocksPerSm;
  return static_cast<int>(tiles < held ? tiles : held);
}

template <int kCapacity>
cudaError_t launch_generate(const GenerateParams<kCapacity>& params, cudaStream_t stream) {
  const unsigned blocks = (params.topk_buckets.size ? 3 : 2) * params.num_dst + params.table_blocks;
  void* args[] = {const_cast<GenerateParams<kCapacity>*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(generate_kernel<kCapacity>), blocks, kGenerateThreads, args, 0,
                          stream);
}

}  // namespace nsa_fused
