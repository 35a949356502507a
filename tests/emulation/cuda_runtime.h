// As much of CUDA as our kernels use, on the host: blocks run one after another, the threads of a block are fibers that run
// in turn from one __syncthreads to the next, upwards and then downwards, so that a missing one shows.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // of the one block that runs

struct alignas(16) int4 {
  int x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

template <typename A, typename B>
constexpr auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
constexpr auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

namespace emulation {

struct Index {
  unsigned x;
};

struct Fiber {
  static constexpr size_t kStack = 64 << 10;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf left;  // where it goes on; swapcontext would make a system call each time
  bool begun = false, done;
};

struct Block {
  jmp_buf scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept from one block to the next
  unsigned running = 0;
  bool trapped = false;
  void (*call)(const void* kernel, void* params);  // casts both to what they are
  const void* kernel;
  void* params;
};

inline Block block;
inline Index thread_index, block_index;

inline void leave() {
  if (!_setjmp(block.fibers[block.running]->left)) _longjmp(block.scheduler, 1);
}

inline void end() {
  block.fibers[block.running]->done = true;
  leave();
}

inline void enter() {
  for (;;) {
    block.call(block.kernel, block.params);
    end();
  }
}

inline void resume(Fiber& fiber) {
  if (_setjmp(block.scheduler)) return;
  if (fiber.begun) _longjmp(fiber.left, 1);
  fiber.begun = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack = {fiber.stack.get(), 0, Fiber::kStack};
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

// Throws std::runtime_error where a thread traps.
inline void run(const void* kernel, unsigned blocks, unsigned threads, void* params) {
  block.kernel = kernel, block.params = params, block.trapped = false;
  while (block.fibers.size() < threads) block.fibers.push_back(std::make_unique<Fiber>());
  for (block_index.x = 0; block_index.x < blocks; ++block_index.x) {
    for (unsigned i = 0; i < threads; ++i) block.fibers[i]->done = false;
    bool any = true;
    for (bool up = block_index.x % 2 == 0; any; up = !up) {
      any = false;
      for (unsigned i = 0; i < threads; ++i) {
        block.running = thread_index.x = up ? i : threads - 1 - i;
        Fiber& fiber = *block.fibers[block.running];
        if (fiber.done) continue;
        resume(fiber);
        if (block.trapped) {
          block.fibers.clear();  // each is somewhere in the kernel
          throw std::runtime_error("a thread trapped");
        }
        any = true;
      }
    }
  }
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index

inline void __syncthreads() { emulation::leave(); }

inline void __trap() {
  emulation::block.trapped = true;
  emulation::end();
}

inline uint32_t atomicAdd(uint32_t* at, uint32_t value) {
  const uint32_t before = *at;
  *at += value;
  return before;
}

using cudaError_t = int;
using cudaStream_t = void*;

inline cudaError_t cudaLaunchKernel(const void* kernel, unsigned blocks, unsigned threads, void** args, size_t, cudaStream_t) {
  emulation::run(kernel, blocks, threads, args[0]);
  return 0;
}
