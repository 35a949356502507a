// The torch form of sglang-nsa-fused's copy: reads arguments, picks device and stream, launches.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <optional>
#include <vector>

#include "../../csrc/params.h"
#include "../../csrc/copy_plan.h"
#include "../../csrc/copy.cuh"

namespace nsa_fused {
namespace {

constexpr int kUpstreamFields = kSchedule;  // sglang's own signature has no schedule
constexpr int kMultiDestinations = 3;

// A tensor or None.
struct Arg {
  Arg(std::nullopt_t) : tensor(nullptr) {}
  Arg(const at::Tensor& t) : tensor(&t) {}
  Arg(const std::optional<at::Tensor>& t) : tensor(t ? &*t : nullptr) {}
  const at::Tensor* tensor;
};
using Args = std::array<Arg, kUpstreamFields>;

// All tensors must be on the device of the first.
View read(const Arg& arg, int f, Name name, std::optional<at::Device>& device) {
  if (!arg.tensor) return {};
  const at::Tensor& t = *arg.tensor;
  TORCH_CHECK_TYPE(t.scalar_type() == at::kInt, to_text(name), ": expected dtype int32, got ",
                   c10::getDtypeNames(t.scalar_type()).first);
  TORCH_CHECK_VALUE(device || t.is_cuda(), to_text(name), ": expected a CUDA tensor, got one on ", t.device());
  if (!device) device = t.device();
  TORCH_CHECK_VALUE(t.device() == *device, to_text(name), ": expected a tensor on ", *device,
                    " as those before it, got one on ", t.device());
  return make_view(form_of(f), name, t.data_ptr<int32_t>(), t.dim(), t.sizes().data(), t.strides().data());
}

void copy(int64_t forward_mode, const Args& src_args, const std::vector<Args>& dst_args, const Sizes& sizes) try {
  const Mode mode = to_mode(forward_mode);
  const int num_dst = dst_args.size();
  std::optional<at::Device> device;
  View dst[kMultiDestinations * kNumFields], src[kNumFields];
  for (int d = 0; d < num_dst; ++d)
    for (int f = 0; f < kUpstreamFields; ++f)
      if (is_written(f, mode)) dst[d * kNumFields + f] = read(dst_args[d][f], f, dst_name(f, d, num_dst), device);
  const CopyPlan plan(mode, dst, num_dst);
  plan.check(sizes);
  if (sizes.bs == 0) return;
  for (int f = 0; f < kUpstreamFields; ++f)
    if (is_written(f, mode)) src[f] = read(src_args[f], f, src_name(f), device);

  CopyParams<kMultiDestinations> params;
  if (!plan.pack(src, sizes, &params)) return;
  const c10::cuda::CUDAGuard guard(*device);
  C10_CUDA_CHECK(launch_copy(params, at::cuda::getCurrentCUDAStream()));
} catch (const BadArgument& bad) {
  TORCH_CHECK_VALUE(false, bad.text);
}

}  // namespace
}  // namespace nsa_fused

using nsa_fused::Args;
using OptionalTensor = std::optional<at::Tensor>;

void fused_metadata_copy_cuda(
    const at::Tensor& cache_seqlens_src, const at::Tensor& cu_seqlens_k_src, const at::Tensor& page_indices_src,
    const at::Tensor& nsa_cache_seqlens_src, const OptionalTensor& seqlens_expanded_src,
    const at::Tensor& nsa_cu_seqlens_k_src, const OptionalTensor& real_page_table_src,
    const OptionalTensor& flashmla_num_splits_src, const OptionalTensor& flashmla_metadata_src,
    const at::Tensor& cache_seqlens_dst, const at::Tensor& cu_seqlens_k_dst, const at::Tensor& page_table_1_dst,
    const at::Tensor& nsa_cache_seqlens_dst, const OptionalTensor& seqlens_expanded_dst,
    const at::Tensor& nsa_cu_seqlens_k_dst, const OptionalTensor& real_page_table_dst,
    const OptionalTensor& flashmla_num_splits_dst, const OptionalTensor& flashmla_metadata_dst,
    int64_t forward_mode, int64_t bs, int64_t max_len, int64_t max_seqlen_k, int64_t seqlens_expanded_size) {
  nsa_fused::copy(
      forward_mode,
      Args{cache_seqlens_src, cu_seqlens_k_src, page_indices_src, nsa_cache_seqlens_src, seqlens_expanded_src,
           nsa_cu_seqlens_k_src, real_page_table_src, flashmla_num_splits_src, flashmla_metadata_src},
      {Args{cache_seqlens_dst, cu_seqlens_k_dst, page_table_1_dst, nsa_cache_seqlens_dst, seqlens_expanded_dst,
            nsa_cu_seqlens_k_dst, real_page_table_dst, flashmla_num_splits_dst, flashmla_metadata_dst}},
      {bs, max_len, max_seqlen_k, seqlens_expanded_size});
}

// Decode, to three step backends.
void fused_metadata_copy_multi_cuda(
    const at::Tensor& cache_seqlens_src, const at::Tensor& cu_seqlens_k_src, const at::Tensor& page_indices_src,
    const at::Tensor& nsa_cache_seqlens_src, const at::Tensor& nsa_cu_seqlens_k_src,
    const OptionalTensor& real_page_table_src, const OptionalTensor& flashmla_num_splits_src,
    const OptionalTensor& flashmla_metadata_src,
    const at::Tensor& cache_seqlens_dst0, const at::Tensor& cu_seqlens_k_dst0, const at::Tensor& page_table_1_dst0,
    const at::Tensor& nsa_cache_seqlens_dst0, const at::Tensor& nsa_cu_seqlens_k_dst0,
    const OptionalTensor& real_page_table_dst0, const OptionalTensor& flashmla_num_splits_dst0,
    const OptionalTensor& flashmla_metadata_dst0,
    const at::Tensor& cache_seqlens_dst1, const at::Tensor& cu_seqlens_k_dst1, const at::Tensor& page_table_1_dst1,
    const at::Tensor& nsa_cache_seqlens_dst1, const at::Tensor& nsa_cu_seqlens_k_dst1,
    const OptionalTensor& real_page_table_dst1, const OptionalTensor& flashmla_num_splits_dst1,
    const OptionalTensor& flashmla_metadata_dst1,
    const at::Tensor& cache_seqlens_dst2, const at::Tensor& cu_seqlens_k_dst2, const at::Tensor& page_table_1_dst2,
    const at::Tensor& nsa_cache_seqlens_dst2, const at::Tensor& nsa_cu_seqlens_k_dst2,
    const OptionalTensor& real_page_table_dst2, const OptionalTensor& flashmla_num_splits_dst2,
    const OptionalTensor& flashmla_metadata_dst2,
    int64_t bs, int64_t max_len, int64_t seqlens_expanded_size) {
  nsa_fused::copy(
      /*forward_mode=*/0,
      Args{cache_seqlens_src, cu_seqlens_k_src, page_indices_src, nsa_cache_seqlens_src, std::nullopt,
           nsa_cu_seqlens_k_src, real_page_table_src, flashmla_num_splits_src, flashmla_metadata_src},
      {Args{cache_seqlens_dst0, cu_seqlens_k_dst0, page_table_1_dst0, nsa_cache_seqlens_dst0, std::nullopt,
            nsa_cu_seqlens_k_dst0, real_page_table_dst0, flashmla_num_splits_dst0, flashmla_metadata_dst0},
       Args{cache_seqlens_dst1, cu_seqlens_k_dst1, page_table_1_dst1, nsa_cache_seqlens_dst1, std::nullopt,
            nsa_cu_seqlens_k_dst1, real_page_table_dst1, flashmla_num_splits_dst1, flashmla_metadata_dst1},
       Args{cache_seqlens_dst2, cu_seqlens_k_dst2, page_table_1_dst2, nsa_cache_seqlens_dst2, std::nullopt,
            nsa_cu_seqlens_k_dst2, real_page_table_dst2, flashmla_num_splits_dst2, flashmla_metadata_dst2}},
      {bs, max_len, max_len, seqlens_expanded_size});
}
