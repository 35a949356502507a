// Reads arguments, picks device and stream, launches; the exports and nothing else.
#include <tvm/ffi/function.h>

#include <memory>
#include <vector>

#include "arguments.h"
#include "copy_plan.h"
#include "cpu.h"

#ifdef NSA_FUSED_CUDA_ARCHS
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>

#include "copy.cuh"
#endif

namespace nsa_fused {
namespace {

constexpr int kUpstreamFields = kSchedule;         // sglang's own signature has no schedule
constexpr int kMultiFields = kUpstreamFields - 1;  // and for several destinations no expanded lengths
constexpr int kMultiDestinations = 3;

void check_count(ffi::PackedArgs args, int expected, const char* function) {
  if (args.size() != expected)
    TVM_FFI_THROW(TypeError) << function << ": expected " << expected << " arguments, got " << args.size();
}

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
        if (is_written(f, mode))
          dst[d * kNumFields + f] = read(args[d * num_fields + f], f, dst_name(f, d, num_dst));
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
      if (is_written(f, plan.mode())) src[f] = read(args[f], f, src_name(f));

    if (device.device_type == kDLCPU) {
      CopyParams<kMaxDestinations> params;
      if (plan.pack(src, sizes, &params)) copy_cpu(params);
      return;
    }
#ifdef NSA_FUSED_CUDA_ARCHS
    constexpr int kFew = 4;  // a quarter of the parameter bytes, for the usual number of draft steps
    plan.num_dst() <= kFew ? launch<kFew>(src, sizes) : launch<kMaxDestinations>(src, sizes);
#else
    TVM_FFI_THROW(RuntimeError) << "cache_seqlens_src: on " << to_string(device)
                                << ", but this library was built without CUDA; build it where nvcc is";
#endif
  }

#ifdef NSA_FUSED_CUDA_ARCHS
 private:
  template <int kCapacity>
  void launch(const View* src, const Sizes& sizes) const {
    CopyParams<kCapacity> params;
    if (!plan.pack(src, sizes, &params)) return;
    ffi::CUDADeviceGuard guard(device.device_id);
    const auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
    TVM_FFI_CHECK_CUDA_ERROR(launch_copy(params, stream));
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
  const Sizes sizes{read_size(args[kSizes], "bs"), max_len, max_len,
                    read_size(args[kSizes + 2], "seqlens_expanded_size")};
  ffi::AnyView full[(1 + kMultiDestinations) * kUpstreamFields];
  for (int set = 0, at = 0; set <= kMultiDestinations; ++set)
    for (int f = 0; f < kUpstreamFields; ++f)
      full[set * kUpstreamFields + f] = f == kSeqlensExpanded ? ffi::AnyView() : args[at++];
  const ffi::PackedArgs dst(full + kUpstreamFields, kMultiDestinations * kUpstreamFields);
  Copy::make(Mode::kDecode, dst, kUpstreamFields, kMultiDestinations)(ffi::PackedArgs(full, kUpstreamFields),
                                                                     kUpstreamFields, sizes);
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

// (forward_mode, 10 tensors or None for each destination) -> a function that copies to them:
// (10 sources or None, bs, max_len, max_seqlen_k, seqlens_expanded_size)
void copy_plan(ffi::PackedArgs args, ffi::Any* result) {
  if (args.size() < 1 || (args.size() - 1) % kNumFields != 0)
    TVM_FFI_THROW(TypeError) << "copy_plan: expected a mode and " << kNumFields << " tensors for each destination, got "
                             << args.size() << " arguments";
  const Mode mode = to_mode(read_size(args[0], "forward_mode"));
  const auto copy = std::make_shared<const Copy>(
      Copy::make(mode, args.Slice(1), kNumFields, (args.size() - 1) / kNumFields));
  const auto replay = [copy](ffi::PackedArgs args, ffi::Any*) {
    check_count(args, kNumFields + 4, "copy");
    const Sizes sizes{read_size(args[kNumFields], "bs"), read_size(args[kNumFields + 1], "max_len"),
                      read_size(args[kNumFields + 2], "max_seqlen_k"),
                      read_size(args[kNumFields + 3], "seqlens_expanded_size")};
    (*copy)(args, kNumFields, sizes);
  };
  *result = ffi::Function::FromPacked(
      [replay](ffi::PackedArgs args, ffi::Any* result) { checked(replay, args, result); });
}

// The GPU architectures compiled in, such as "sm_90 compute_121"; empty without CUDA.
ffi::String cuda_archs() {
#ifdef NSA_FUSED_CUDA_ARCHS
  return NSA_FUSED_CUDA_ARCHS;
#else
  return "";
#endif
}

}  // namespace
}  // namespace nsa_fused

#define NSA_FUSED_EXPORT_PACKED(Name)                                                                             \
  extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_##Name(void*, const TVMFFIAny* args, int32_t num_args,              \
                                                     TVMFFIAny* result) {                                         \
    TVM_FFI_SAFE_CALL_BEGIN();                                                                                    \
    const tvm::ffi::PackedArgs packed(reinterpret_cast<const tvm::ffi::AnyView*>(args), num_args);                \
    nsa_fused::checked(nsa_fused::Name, packed, reinterpret_cast<tvm::ffi::Any*>(result));                        \
    TVM_FFI_SAFE_CALL_END();                                                                                      \
  }

NSA_FUSED_EXPORT_PACKED(fused_metadata_copy)
NSA_FUSED_EXPORT_PACKED(fused_metadata_copy_multi)
NSA_FUSED_EXPORT_PACKED(copy_plan)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_archs, nsa_fused::cuda_archs)
