// The page tables: (req_to_token, slots, lengths) -> the live columns of each request's rows.
#pragma once

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "lengths.cuh"

namespace nsa_fused {

constexpr int kTableThreads = 256;
constexpr int kBlocksPerSm = 4;
constexpr int kPagesInFlight = 4;
constexpr int kVectorsPerThread = 2;
constexpr int kTile = kTableThreads * kVectorsPerThread * 4;
constexpr int kLineCols = 32;  // table columns in a 128-byte line

// A tile is staged with one line more than it has columns, and what lies before its first column in 16 bytes.
constexpr int kStaged = (kTile + kLineCols) / 4 + 1;

// Counts over requests of what the tables get; rows unsigned, so that the first request with too many shows.
struct TableCounts {
  int tiles;
  uint32_t rows;
  __device__ friend TableCounts operator+(TableCounts a, TableCounts b) { return {a.tiles + b.tiles, a.rows + b.rows}; }
};

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct PagesShared {
  using Reduce = cub::BlockReduce<uint32_t, kTableThreads>;
  Reduce::TempStorage reduce;
  uint32_t first_row;
};

struct TablesShared {
  using Scan = cub::BlockScan<TableCounts, kTableThreads>;
  Scan::TempStorage scan;
  TableCounts end[kTableThreads];  // of each request of this round
  int slot[kTableThreads];
  int4 staged[kStaged];
};

// Tiles of rows this long, of whatever alignment.
__host__ __device__ constexpr int64_t tiles_of(int64_t cols) { return (cols + kLineCols + kTile - 1) / kTile; }

// A request's row of the pool. Padding may have any slot; else one outside traps, as an index would.
template <int kCapacity>
__device__ __forceinline__ int slot_of(const GenerateParams<kCapacity>& p, int i) {
  const int64_t slot = load_index(p.req_pool_indices, p.req_pool_indices_64, i);
  if (slot >= 0 && slot < p.num_slots) return static_cast<int>(slot);
  check(p.num_slots > 0 && load_index(p.seq_lens, p.seq_lens_64, i) <= 1);
  return 0;
}

template <int kCapacity>
__device__ __forceinline__ int live_cols(const GenerateParams<kCapacity>& p, const Request& r) {
  return static_cast<int>(min(max(static_cast<int64_t>(r.cache_len), int64_t{0}), p.token_cols));
}

// Where no destination has page_table_1: one token of each live page is read, once, and its page number written to the
// request's rows in every destination. Block `item` has every table_slices-th 256 pages of one request.
template <int kCapacity>
__device__ void write_pages(const GenerateParams<kCapacity>& p, int item, PagesShared& shared) {
  const int i = item % p.bs, slice = item / p.bs;  // the blocks that have work at short lengths come first
  const Request r = request(p, i);
  const int cols = live_cols(p, r), shift = p.page_shift;
  const int pages = static_cast<int>((static_cast<int64_t>(cols) + (1 << shift) - 1) >> shift);
  const int begin = slice * kTableThreads, stride = p.table_slices * kTableThreads;
  if (slice && begin >= pages) return;

  uint32_t first_row = i * p.rows_per_request;
  if (p.extend_lens) {
    uint32_t rows = 0;
    for (int other = threadIdx.x; other < i; other += kTableThreads) rows += max(p.extend_lens[other], 0);
    rows = PagesShared::Reduce(shared.reduce).Sum(rows);
    if (threadIdx.x == 0) shared.first_row = rows;
    __syncthreads();
    first_row = shared.first_row;
  }
  check(first_row + r.rows <= static_cast<uint32_t>(p.max_rows));
  const int32_t* src = p.req_to_token + slot_of(p, i) * p.token_pitch;
  for (int page = begin + threadIdx.x; page < pages; page += kPagesInFlight * stride) {
    int32_t number[kPagesInFlight];
#pragma unroll
    for (int k = 0; k < kPagesInFlight; ++k) {
      const int at = page + k * stride;
      if (at < pages) number[k] = src[static_cast<int64_t>(at) << shift] >> shift;  // torch's floor division
    }
    for (int d = 0; d < p.num_dst; ++d) {
      const GenerateDst& dst = p.dst[d];
      if (!dst.field[kRealPageTable]) continue;
      const int end = static_cast<int>(min(static_cast<int64_t>(pages), dst.page_cols));
      int32_t* to = dst.field[kRealPageTable] + dst.page_pitch * first_row;
      for (int row = 0; row < r.rows; ++row, to += dst.page_pitch) {
#pragma unroll
        for (int k = 0; k < kPagesInFlight; ++k)
          if (page + k * stride < end) to[page + k * stride] = number[k];
      }
    }
  }
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
      const int begin = tile.first + kLineCols - 1 - static_cast<int>((reinterpret_cast<uintptr_t>(to) / 4 - 1) % kLineCols);
#pragma unroll
      for (int k = 0; k < kVectorsPerThread; ++k) {
        const int at = (k * kTableThreads + threadIdx.x) * 4;
        store4(to, begin + at, end, shifted(staged, begin - tile.base + at));
      }
    }
    for (int row = 0; row < tile.rows && dst.field[kRealPageTable]; ++row) {
      int32_t* to = dst.field[kRealPageTable] + dst.page_pitch * (tile.first_row + row);
      // Of the tile's own columns, without the line more. An arithmetic shift is torch's floor division.
      const int end = min(tile.first + kTile, tile.cols);
      int page = ((max(tile.first, 0) - 1) >> p.page_shift) + 1 + threadIdx.x;
      for (; page << p.page_shift < end && page < dst.page_cols; page += kTableThreads)
        to[page] = reinterpret_cast<const int32_t*>(staged)[(page << p.page_shift) - tile.base] >> p.page_shift;
    }
  }
}

// The live tiles of all requests, one after another, dealt out to the blocks: each is read once and written to the
// request's rows in every destination, and blocks that run together write side by side, however the lengths differ.
template <int kCapacity>
__device__ void write_tables(const GenerateParams<kCapacity>& p, int item, TablesShared& mine) {
  TableCounts before{};  // of the requests that earlier rounds have served
  for (int first = 0; first < p.bs; first += kTableThreads) {
    const int i = first + threadIdx.x;
    TableCounts count{}, end, all;
    if (i < p.bs) {
      const Request r = request(p, i);
      const int cols = live_cols(p, r);
      count = {cols && r.rows ? static_cast<int>(tiles_of(cols)) : 0, static_cast<uint32_t>(r.rows)};
      mine.slot[threadIdx.x] = slot_of(p, i);
    }
    TablesShared::Scan(mine.scan).InclusiveScan(count, end, Add{}, all);
    end = before + end;
    mine.end[threadIdx.x] = end;
    check(i >= p.bs || end.rows <= static_cast<uint32_t>(p.max_rows));
    __syncthreads();

    const auto locate = [&](int item) {
      int low = 0, high = min(kTableThreads, p.bs - first) - 1;  // the first request that ends behind this item
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
      tile.cols = live_cols(p, request(p, first + low));
      tile.first = (item - begin.tiles) * kTile - kLineCols;
      tile.base = tile.first - static_cast<int>((reinterpret_cast<uintptr_t>(tile.src) / 4 + tile.first) % 4);
      return tile;
    };
    constexpr int kRest = kStaged % kTableThreads;
    int4 next[kVectorsPerThread], rest;
    const auto load = [&](const Tile& tile) {
#pragma unroll
      for (int k = 0; k < kVectorsPerThread; ++k) next[k] = tile.load(k * kTableThreads + threadIdx.x);
      if (threadIdx.x < kRest) rest = tile.load(kVectorsPerThread * kTableThreads + threadIdx.x);
    };
    const int end_item = before.tiles + all.tiles;
    Tile tile;
    if (item < end_item) load(tile = locate(item));
    while (item < end_item) {
#pragma unroll
      for (int k = 0; k < kVectorsPerThread; ++k) mine.staged[k * kTableThreads + threadIdx.x] = next[k];
      if (threadIdx.x < kRest) mine.staged[kVectorsPerThread * kTableThreads + threadIdx.x] = rest;
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

// How many blocks share the tables: what the GPU holds at once, and no more than there can be tiles.
inline int table_blocks_for(int bs, int64_t cols, int num_sms) {
  const int64_t tiles = cols ? bs * tiles_of(cols) : 0;
  const int64_t held = static_cast<int64_t>(num_sms) * kBlocksPerSm;
  return static_cast<int>(tiles < held ? tiles : held);
}

// The same where only pages are written: how many blocks share one request's, at least one.
inline int table_slices_for(int bs, int64_t cols, int page_shift, int num_sms) {
  const int64_t pages = (cols + (int64_t{1} << page_shift) - 1) >> page_shift;
  const int64_t most = (pages + kTableThreads - 1) / kTableThreads;
  const int64_t held = static_cast<int64_t>(num_sms) * kBlocksPerSm / bs;
  return static_cast<int>(most < held ? most : held < 1 ? 1 : held);
}

}  // namespace nsa_fused
