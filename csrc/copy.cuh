// Precomputed metadata -> one to sixteen step backends, in one launch.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace nsa_fused {

constexpr int kThreads = kTileCols / 4;
constexpr int kLine = 32;  // elements in a 128-byte line

__device__ __forceinline__ bool is_aligned(const int32_t* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(int4) == 0; }

__device__ __forceinline__ int4 load4(const int32_t* p) {
  return is_aligned(p) ? *reinterpret_cast<const int4*>(p) : make_int4(p[0], p[1], p[2], p[3]);
}

__device__ __forceinline__ void store4(int32_t* p, int4 v) {
  if (is_aligned(p)) {
    *reinterpret_cast<int4*>(p) = v;
  } else {
    p[0] = v.x, p[1] = v.y, p[2] = v.z, p[3] = v.w;
  }
}

// One block per tile of one row of one field: read once, written to every destination.
template <int kCapacity>
__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ CopyParams<kCapacity> p) {
  int f = 0, first_tile = 0;
  while (static_cast<int>(blockIdx.x) >= p.field[f].end_tile) first_tile = p.field[f++].end_tile;
  const CopyField& field = p.field[f];
  const int row = (blockIdx.x - first_tile) / field.tiles_per_row;
  const int tile = (blockIdx.x - first_tile) % field.tiles_per_row;
  const int32_t* src = field.src + row * field.src_pitch;
  const auto dst = [&](int d) { return p.dst[f][d] + row * p.dst_pitch[f][d]; };

  // Tiles begin on a line of the first destination, since a line written in part costs L2 a merge, and one read in
  // part does not. Step backends have equal pitches, so the others mostly stand alike. Tile 0 takes the head as well.
  const int head = (kLine - reinterpret_cast<uintptr_t>(dst(0)) / sizeof(int32_t) % kLine) % kLine;
  const int64_t begin = head + static_cast<int64_t>(tile) * kTileCols;
  const int count = static_cast<int>(min(max(field.cols - begin, int64_t{0}), int64_t{kTileCols}));
  const int thread = threadIdx.x;

  if (thread < count / 4) {
    const int64_t col = begin + thread * 4;
    const int4 value = load4(src + col);
    for (int d = 0; d < field.num_dst; ++d) store4(dst(d) + col, value);
  }
  int64_t col = -1;  // of the head, for the first threads, or of the up to three elements behind the last four
  if (tile == 0 && thread < min(int64_t{head}, field.cols)) col = thread;
  if (thread >= kLine && thread - kLine < count % 4) col = begin + count / 4 * 4 + thread - kLine;
  if (col >= 0) {
    const int32_t value = src[col];
    for (int d = 0; d < field.num_dst; ++d) dst(d)[col] = value;
  }
}

template <int kCapacity>
cudaError_t launch_copy(const CopyParams<kCapacity>& params, cudaStream_t stream) {
  const int tiles = params.field[kNumFields - 1].end_tile;
  void* args[] = {const_cast<CopyParams<kCapacity>*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(copy_kernel<kCapacity>), tiles, kThreads, args, 0, stream);
}

}  // namespace nsa_fused
