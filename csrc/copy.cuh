// Precomputed metadata -> one to sixteen step backends, in one launch.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace nsa_fused {

constexpr int kThreads = 256;

// Reads a span once and writes it to every destination; all threads of the block, each with kPerThread loads in flight.
template <typename Vec, int kPerThread>
__device__ __forceinline__ void copy_span(const int32_t* src, int32_t* const* dst, const int64_t* dst_pitch,
                                          int num_dst, int64_t row, int64_t col, int count) {
  Vec value[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int at = threadIdx.x + i * kThreads;
    if (at < count) value[i] = reinterpret_cast<const Vec*>(src)[at];
  }
  for (int d = 0; d < num_dst; ++d) {
    Vec* out = reinterpret_cast<Vec*>(dst[d] + row * dst_pitch[d] + col);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int at = threadIdx.x + i * kThreads;
      if (at < count) out[at] = value[i];
    }
  }
}

// One block per tile of kTileCols columns of one row of one field.
template <int kCapacity>
__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ CopyParams<kCapacity> p) {
  int f = 0, first_tile = 0;
  while (static_cast<int>(blockIdx.x) >= p.field[f].end_tile) first_tile = p.field[f++].end_tile;
  const CopyField& field = p.field[f];
  const int tile = blockIdx.x - first_tile;
  const int64_t row = tile / field.tiles_per_row;
  const int64_t col = static_cast<int64_t>(tile % field.tiles_per_row) * kTileCols;
  const int count = static_cast<int>(min(field.cols - col, static_cast<int64_t>(kTileCols)));
  const int32_t* src = field.src + row * field.src_pitch + col;

  // Pitches are multiples of 4 bytes only, so rows differ: 16-byte accesses where this row of the source and of every
  // destination stand alike, with up to three 4-byte ones at either edge.
  const auto address = reinterpret_cast<uintptr_t>(src);
  uintptr_t apart = 0;
  for (int d = 0; d < field.num_dst; ++d)
    apart |= address ^ reinterpret_cast<uintptr_t>(p.dst[f][d] + row * p.dst_pitch[f][d] + col);
  if (apart % 16 == 0) {
    const int head = min(count, static_cast<int>((16 - address % 16) % 16 / 4));
    const int vectors = (count - head) / 4;
    const int tail = head + vectors * 4;
    copy_span<int4, kTileCols / 4 / kThreads>(src + head, p.dst[f], p.dst_pitch[f], field.num_dst, row, col + head,
                                              vectors);
    if (head) copy_span<int32_t, 1>(src, p.dst[f], p.dst_pitch[f], field.num_dst, row, col, head);
    if (tail < count)
      copy_span<int32_t, 1>(src + tail, p.dst[f], p.dst_pitch[f], field.num_dst, row, col + tail, count - tail);
  } else {
    copy_span<int32_t, kTileCols / kThreads>(src, p.dst[f], p.dst_pitch[f], field.num_dst, row, col, count);
  }
}

template <int kCapacity>
cudaError_t launch_copy(const CopyParams<kCapacity>& params, cudaStream_t stream) {
  const int tiles = params.field[kNumFields - 1].end_tile;
  void* args[] = {const_cast<CopyParams<kCapacity>*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(copy_kernel<kCapacity>), tiles, kThreads, args, 0, stream);
}

}  // namespace nsa_fused
