// In place of cpu.cc: what the bindings call for CPU tensors runs the kernels.
#include "copy.cuh"
#include "cpu.h"
#include "generate.cuh"

namespace nsa_fused {
namespace {

constexpr int kSms = 1;  // few blocks for the tables, so that each has several tiles

template <typename Params>
void call(const void* kernel, void* params) {
  reinterpret_cast<void (*)(Params)>(const_cast<void*>(kernel))(*static_cast<const Params*>(params));
}

int64_t live_cols(const GenerateParams<kMaxDestinations>& p, bool* wide) {
  int64_t cols = 0;
  for (int d = 0; d < p.num_dst; ++d) {
    if (p.dst[d].field[kPageTable1]) cols = max(cols, p.dst[d].table_cols), *wide = true;
    if (p.dst[d].field[kRealPageTable]) cols = max(cols, p.dst[d].page_cols << p.page_shift);
  }
  return min(cols, p.token_cols);
}

}  // namespace

void copy_cpu(const CopyParams<kMaxDestinations>& params) {
  emulation::block.call = call<CopyParams<kMaxDestinations>>;
  launch_copy(params, nullptr);
}

void generate_cpu(const GenerateParams<kMaxDestinations>& given) {
  GenerateParams<kMaxDestinations> params = given;
  bool wide = false;
  const int64_t cols = live_cols(params, &wide);
  emulation::block.call = call<GenerateParams<kMaxDestinations>>;
  launch_generate(params, wide, cols, kSms, nullptr);
}

}  // namespace nsa_fused
