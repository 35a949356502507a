#pragma once

#include <cuda_runtime.h>

namespace cub {

template <typename T, int kThreads>
class BlockReduce {
 public:
  struct TempStorage {
    T values[kThreads];
  };

  explicit BlockReduce(TempStorage& storage) : values_(storage.values) {}

  // Only thread 0 gets the sum.
  T Sum(T mine) {
    values_[threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.x) return static_cast<T>(0xdeadbeef);
    T sum = values_[0];
    for (int i = 1; i < kThreads; ++i) sum = sum + values_[i];
    return sum;
  }

 private:
  T* values_;
};

}  // namespace cub
