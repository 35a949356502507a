#pragma once

#include <cuda_runtime.h>

namespace cub {

template <typename T, int kThreads>
class BlockScan {
 public:
  struct TempStorage {
    T values[kThreads];
  };

  explicit BlockScan(TempStorage& storage) : values_(storage.values) {}

  template <typename Op>
  void ExclusiveScan(T mine, T& before, T init, Op op, T& all) {
    scan(mine, op, all);
    before = init;
    for (unsigned i = 0; i < threadIdx.x; ++i) before = op(before, values_[i]);
  }

  template <typename Op>
  void InclusiveScan(T mine, T& to_here, Op op, T& all) {
    scan(mine, op, all);
    to_here = values_[0];
    for (unsigned i = 1; i <= threadIdx.x; ++i) to_here = op(to_here, values_[i]);
  }

  void ExclusiveSum(T mine, T& before, T& all) {
    ExclusiveScan(mine, before, T{}, [](T a, T b) { return a + b; }, all);
  }

 private:
  // The storage is free again after the next __syncthreads, as CUB's is.
  template <typename Op>
  void scan(T mine, Op op, T& all) {
    values_[threadIdx.x] = mine;
    __syncthreads();
    all = values_[0];
    for (int i = 1; i < kThreads; ++i) all = op(all, values_[i]);
  }

  T* values_;
};

}  // namespace cub
