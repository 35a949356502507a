// Reads arguments, picks device and stream, launches; the exports and nothing else.
#include <tvm/ffi/function.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "copy_plan.h"
#include "cpu.h"
#include "generate_plan.h"

#ifdef NSA_FUSED_CUDA_ARCHS
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>

#include "copy.cuh"
#include "generate.cuh"
#endif

namespace nsa_fused {
namespace {

constexpr int kUpstreamFields = kSchedule;         // sglang's own signature has no schedule
constexpr int kMultiFields = kUpstreamFields - 1;  // and for several destinations no expanded lengths
constexpr int kMultiDestinations = 3;

#ifdef NSA_FUSED_CUDA_ARCHS
// launch: (cudaStream_t) -> cudaError_t
template <typename Launch>
void on_stream(DLDevice device, const Launch& launch) {
  ffi::CUDADeviceGuard guard(device.device_id);
  TVM_FFI_CHECK_CUDA_ERROR(launch(static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id))));
}
#else
[[noreturn]] void refuse_cuda(const char* name, DLDevice device) {
  TVM_FFI_THROW(RuntimeError) << name << ": on " << to_string(device)
                              << ", but this library was built without CUDA; build it where nvcc is";
  TVM_FFI_UNREACHABLE();
}
#endif

// A plan and the device of its tensors.
struct Copy {
  CopyPlan plan;
  DLDevice device;

  // args: num_fields tensors or None, destination by destination.
  static Copy make(Mode mode, ffi::PackedArgs args, int num_fields, int num_dst) {
    std::vector<View> dst(num_dst * kNumFields);
    Reader read;
    for (int d = 0; d < num_dst; ++d)
      for (int f = 0; f < num_fields; ++f)
        if (is_written(f, mode)) dst[d * kNumFields + f] = read(args[d * num_fields + f], form_of(f), dst_name(f, d, num_dst));
    CopyPlan plan(mode, dst.data(), num_dst);  // before the device is asked for: at least one tensor was given
    return {std::move(plan), read.device()};
  }

  // args: num_fields tensors or None.
  void operator()(ffi::PackedArgs args, int num_fields, const Sizes& sizes) const {
    plan.check(sizes);
    if (sizes.bs == 0) return;
    View src[kNumFields];
    Reader read(device);
    for (int f = 0; f < num_fields; ++f)
      if (is_written(f, plan.mode())) src[f] = read(args[f], form_of(f), src_name(f));

    if (device.device_type == kDLCPU) {
      CopyParams<kMaxDestinations> params;
      if (plan.pack(src, sizes, &params)) copy_cpu(params);
      return;
    }
#ifdef NSA_FUSED_CUDA_ARCHS
    constexpr int kFew = 4;  // a quarter of the parameter bytes, for the usual number of draft steps
    plan.num_dst() <= kFew ? launch<kFew>(src, sizes) : launch<kMaxDestinations>(src, sizes);
#else
    refuse_cuda("cache_seqlens_src", device);
#endif
  }

#ifdef NSA_FUSED_CUDA_ARCHS
 private:
  template <int kCapacity>
  void launch(const View* src, const Sizes& sizes) const {
    CopyParams<kCapacity> params;
    if (plan.pack(src, sizes, &params)) on_stream(device, [&](cudaStream_t stream) { return launch_copy(params, stream); });
  }
#endif
};

// Of a GPU; 1 for the CPU.
int count_sms([[maybe_unused]] DLDevice device) {
  int count = 1;
#ifdef NSA_FUSED_CUDA_ARCHS
  if (device.device_type == kDLCUDA)
    TVM_FFI_CHECK_CUDA_ERROR(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device.device_id));
#endif
  return count;
}

// A plan, the device of its tensors, and what their launch depends on.
struct Generate {
  GeneratePlan plan;
  DLDevice device;
  int64_t live_cols;
  bool wide;
  int num_sms;

  Generate(GeneratePlan made, DLDevice device, int num_sms)
      : plan(std::move(made)), device(device), live_cols(plan.live_cols()), wide(plan.is_wide()), num_sms(num_sms) {}

  void operator()(const Batch& batch) const {
    plan.check(batch);
    if (batch.bs == 0) return;
    if (device.device_type == kDLCPU) {
      GenerateParams<kMaxDestinations> params;
      plan.pack(batch, &params);
      generate_cpu(params);
      return;
    }
#ifdef NSA_FUSED_CUDA_ARCHS
    plan.num_dst() == 1 ? launch<1>(batch) : launch<kMaxDestinations>(batch);
#else
    refuse_cuda("seq_lens", device);
#endif
  }

#ifdef NSA_FUSED_CUDA_ARCHS
 private:
  template <int kCapacity>
  void launch(const Batch& batch) const {
    GenerateParams<kCapacity> params;
    plan.pack(batch, &params);
    on_stream(device, [&](cudaStream_t stream) { return launch_generate(params, wide, live_cols, num_sms, stream); });
  }
#endif
};

// (9 sources, 9 destinations, forward_mode, bs, max_len, max_seqlen_k, seqlens_expanded_size)
void fused_metadata_copy(ffi::PackedArgs args, ffi::Any*) {
  constexpr int kSizes = 2 * kUpstreamFields;
  check_count(args, kSizes + 5, "fused_metadata_copy_cuda");
  const Mode mode = to_mode(read_size(args[kSizes], "forward_mode"));
  const Sizes sizes{read_size(args[kSizes + 1], "bs"), read_size(args[kSizes + 2], "max_len"),
                    read_size(args[kSizes + 3], "max_seqlen_k"), read_size(args[kSizes + 4], "seqlens_expanded_size")};
  Copy::make(mode, args.Slice(kUpstreamFields), kUpstreamFields, 1)(args, kUpstreamFields, sizes);
}

// (8 sources, 3 x 8 destinations, bs, max_len, seqlens_expanded_size): decode, no expanded lengths
void fused_metadata_copy_multi(ffi::PackedArgs args, ffi::Any*) {
  constexpr int kSizes = (1 + kMultiDestinations) * kMultiFields;
  check_count(args, kSizes + 3, "fused_metadata_copy_multi_cuda");
  const int64_t max_len = read_size(args[kSizes + 1], "max_len");
  const Sizes sizes{read_size(args[kSizes], "bs"), max_len, max_len, read_size(args[kSizes + 2], "seqlens_expanded_size")};
  ffi::AnyView full[(1 + kMultiDestinations) * kUpstreamFields];
  for (int set = 0, at = 0; set <= kMultiDestinations; ++set)
    for (int f = 0; f < kUpstreamFields; ++f)
      full[set * kUpstreamFields + f] = f == kSeqlensExpanded ? ffi::AnyView() : args[at++];
  const ffi::PackedArgs dst(full + kUpstreamFields, kMultiDestinations * kUpstreamFields);
  Copy::make(Mode::kDecode, dst, kUpstreamFields, kMultiDestinations)(ffi::PackedArgs(full, kUpstreamFields), kUpstreamFields,
                                                                      sizes);
}

// Runs a packed function, with what is wrong with an argument as Python's error.
template <typename Function>
void checked(const Function& function, ffi::PackedArgs args, ffi::Any* result) {
  try {
    function(args, result);
  } catch (const BadArgument& bad) {
    TVM_FFI_THROW(ValueError) << bad.text;
  }
}

template <typename Function>
ffi::Function to_python(Function function) {
  return ffi::Function::FromPacked([=](ffi::PackedArgs args, ffi::Any* result) { checked(function, args, result); });
}

// (owner, forward_mode, 10 tensors or None for each destination) -> a function that copies to them and holds the owner, any
// object that keeps the tensors alive: (10 sources or None, bs, max_len, max_seqlen_k, seqlens_expanded_size)
void copy_plan(ffi::PackedArgs args, ffi::Any* result) {
  constexpr int kFirst = 2;
  if (args.size() < kFirst || (args.size() - kFirst) % kNumFields != 0)
    TVM_FFI_THROW(TypeError) << "copy_plan: expected an owner, a mode and " << std::to_string(kNumFields)
                             << " tensors for each destination, got " << std::to_string(args.size()) << " arguments";
  const Mode mode = to_mode(read_size(args[1], "forward_mode"));
  const auto copy =
      std::make_shared<const Copy>(Copy::make(mode, args.Slice(kFirst), kNumFields, (args.size() - kFirst) / kNumFields));
  const auto replay = [copy, owner = ffi::Any(args[0])](ffi::PackedArgs args, ffi::Any*) {
    check_count(args, kNumFields + 4, "copy");
    const Sizes sizes{read_size(args[kNumFields], "bs"), read_size(args[kNumFields + 1], "max_len"),
                      read_size(args[kNumFields + 2], "max_seqlen_k"), read_size(args[kNumFields + 3], "seqlens_expanded_size")};
    (*copy)(args, kNumFields, sizes);
  };
  *result = to_python(replay);
}

// (owner, forward_mode, bs, rows, num_draft_tokens, nsa_index_topk, page_size, segment_len, extra_last, row_floor,
// topk_buckets: threshold and most for each, req_to_token, num_splits or None, tile_metadata or None, and 12 tensors or None
// for each destination) -> a function that generates them and holds the owner, as copy_plan's:
// (seq_lens, req_pool_indices, extend_lens or None, bs)
void generate_plan(ffi::PackedArgs args, ffi::Any* result) {
  constexpr int kFirst = 14, kEach = kNumGenerated;
  if (args.size() < kFirst || (args.size() - kFirst) % kEach != 0)
    TVM_FFI_THROW(TypeError) << "generate_plan: expected " << std::to_string(kFirst) << " arguments and " << std::to_string(kEach)
                             << " for each destination, got " << std::to_string(args.size());
  const Mode mode = to_mode(read_size(args[1], "forward_mode"));
  GenerateSizes sizes = read_sizes(args.Slice(4));
  sizes.bs = read_size(args[2], "bs");
  sizes.rows = read_size(args[3], "rows");
  sizes.topk_buckets = read_topk_buckets(args[10]);
  Reader read;
  const View req_to_token = read(args[11], Form::kTable, {"req_to_token"});
  const View num_splits = read(args[12], Form::kVector, {"flashmla_num_splits"});
  const View tile_metadata = read(args[13], Form::kWhole, {"flashmla_metadata"});
  const int num_dst = (args.size() - kFirst) / kEach;
  std::vector<GeneratePlan::Destination> dst(num_dst);
  for (int d = 0; d < num_dst; ++d) {
    const ffi::PackedArgs of = args.Slice(kFirst + d * kEach);
    for (int f = 0; f < kNumGenerated; ++f) dst[d].field[f] = read(of[f], form_of(f), dst_name(f, d, num_dst));
  }
  GeneratePlan plan(mode, sizes, req_to_token, num_splits, tile_metadata, std::move(dst));
  const auto generate = std::make_shared<const Generate>(std::move(plan), read.device(), count_sms(read.device()));
  const auto replay = [generate, owner = ffi::Any(args[0])](ffi::PackedArgs args, ffi::Any*) {
    check_count(args, 4, "generate");
    Reader read(generate->device);
    (*generate)(read_batch(args, read));
  };
  *result = to_python(replay);
}

// (owner, req_to_token, num_draft_tokens, nsa_index_topk, page_size, segment_len, extra_last, row_floor, num_sms) -> a
// function that generates a draft extend's metadata and holds the owner, as copy_plan's: (seq_lens, req_pool_indices,
// extend_lens or None, bs, workspace, rows, cols). The tensors lie one after another in the workspace: schedule
// [num_sms + 1, 2] if segment_len is not 0, page_table_1 [rows, cols], real_page_table [rows, pages], cache_seqlens [bs],
// cu_seqlens_k [bs + 1], seqlens_expanded [rows], nsa_cache_seqlens [rows], nsa_cu_seqlens_k [rows + 1].
void draft_extend_plan(ffi::PackedArgs args, ffi::Any* result) {
  check_count(args, 9, "draft_extend_plan");
  Reader read;
  const View req_to_token = read(args[1], Form::kTable, {"req_to_token"});
  const GenerateSizes sizes = read_sizes(args.Slice(2));
  const int64_t num_sms = read_size(args[8], "num_sms");
  check_workspace_size("num_sms", num_sms);
  GeneratePlan(Mode::kDraftExtend, sizes, req_to_token, {}, {}, std::vector<GeneratePlan::Destination>(1));  // checks the sizes
  const auto replay = [=, device = read.device(), gpu_sms = count_sms(read.device()), owner = ffi::Any(args[0])](
                          ffi::PackedArgs args, ffi::Any*) {
    check_count(args, 7, "draft_extend");
    Reader read(device);
    const Batch batch = read_batch(args, read);
    const View workspace = read(args[4], Form::kVector, {"workspace"});
    GenerateSizes now = sizes;
    now.bs = batch.bs;
    now.rows = read_size(args[5], "rows");
    auto dst = split_workspace(workspace, now, read_size(args[6], "cols"), num_sms);
    GeneratePlan plan(Mode::kDraftExtend, now, req_to_token, {}, {}, std::move(dst));
    if (!batch.extend_lens.given && now.rows > batch.bs * now.num_draft_tokens)
      refuse("rows: expected bs * num_draft_tokens = ", batch.bs * now.num_draft_tokens, " without extend_lens, got ", now.rows);
    Generate(std::move(plan), device, gpu_sms)(batch);
  };
  *result = to_python(replay);
}

// The GPU architectures compiled in, such as "sm_90 compute_80"; empty without CUDA.
ffi::String cuda_archs() {
#ifdef NSA_FUSED_CUDA_ARCHS
  return NSA_FUSED_CUDA_ARCHS;
#else
  return "";
#endif
}

}  // namespace
}  // namespace nsa_fused

#define NSA_FUSED_EXPORT_PACKED(Name)                                                                                     \
  extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_##Name(void*, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) { \
    TVM_FFI_SAFE_CALL_BEGIN();                                                                                            \
    const tvm::ffi::PackedArgs packed(reinterpret_cast<const tvm::ffi::AnyView*>(args), num_args);                        \
    nsa_fused::checked(nsa_fused::Name, packed, reinterpret_cast<tvm::ffi::Any*>(result));                                \
    TVM_FFI_SAFE_CALL_END();                                                                                              \
  }

NSA_FUSED_EXPORT_PACKED(fused_metadata_copy)
NSA_FUSED_EXPORT_PACKED(fused_metadata_copy_multi)
NSA_FUSED_EXPORT_PACKED(copy_plan)
NSA_FUSED_EXPORT_PACKED(generate_plan)
NSA_FUSED_EXPORT_PACKED(draft_extend_plan)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_archs, nsa_fused::cuda_archs)
