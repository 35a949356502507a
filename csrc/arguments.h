// Reads arguments from Python through tvm-ffi, and says what is wrong with them.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/function.h>

#include <optional>
#include <string>
#include <tuple>

#include "generate_plan.h"

namespace nsa_fused {

namespace ffi = tvm::ffi;

inline std::string to_string(DLDevice device) {
  if (device.device_type == kDLCPU) return "cpu";
  const std::string type = device.device_type == kDLCUDA ? "cuda" : "device type " + std::to_string(device.device_type);
  return type + ":" + std::to_string(device.device_id);
}

// Reads tensors one after another; all must be on the device of the first.
class Reader {
 public:
  explicit Reader(std::optional<DLDevice> device = std::nullopt) : device_(device) {}

  // An int32 tensor.
  View operator()(ffi::AnyView arg, Form form, Name name) {
    if (arg.type_index() == ffi::TypeIndex::kTVMFFINone) return View{};
    const ffi::TensorView tensor = to_tensor(arg, name, "an int32 tensor");
    if (!is_int(tensor, 32)) refuse_dtype(tensor, name, "int32");
    return view(tensor, form, name);
  }

  // A vector of int32 or int64, and which of the two; its columns count elements.
  std::pair<View, bool> integers(ffi::AnyView arg, Name name) {
    const ffi::TensorView tensor = to_tensor(arg, name, "an int32 or int64 tensor");
    if (!is_int(tensor, 32) && !is_int(tensor, 64)) refuse_dtype(tensor, name, "int32 or int64");
    return {view(tensor, Form::kVector, name), is_int(tensor, 64)};
  }

  DLDevice device() const { return *device_; }

 private:
  static ffi::TensorView to_tensor(ffi::AnyView arg, Name name, const char* expected) {
    const auto tensor = arg.try_cast<ffi::TensorView>();
    if (!tensor) TVM_FFI_THROW(TypeError) << to_text(name) << ": expected " << expected << ", got " << arg.GetTypeKey();
    return *tensor;
  }

  static bool is_int(const ffi::TensorView& t, int bits) {
    return t.dtype().code == kDLInt && t.dtype().bits == bits && t.dtype().lanes == 1;
  }

  [[noreturn]] static void refuse_dtype(const ffi::TensorView& t, Name name, const char* expected) {
    TVM_FFI_THROW(TypeError) << to_text(name) << ": expected dtype " << expected << ", got "
                             << ffi::DLDataTypeToString(t.dtype());
    TVM_FFI_UNREACHABLE();
  }

  View view(const ffi::TensorView& t, Form form, Name name) {
    check_device(t.device(), name);
    auto* data = reinterpret_cast<int32_t*>(static_cast<char*>(t.data_ptr()) + t.byte_offset());
    return make_view(form, name, data, t.ndim(), t.shape().data(), t.strides().data());
  }

  void check_device(DLDevice device, Name name) {
    if (!device_) {
      if (device.device_type != kDLCPU && device.device_type != kDLCUDA)
        refuse(name, ": expected a CPU or CUDA tensor, got one on ", to_string(device));
      device_ = device;
    } else if (device.device_type != device_->device_type || device.device_id != device_->device_id) {
      refuse(name, ": expected a tensor on ", to_string(*device_), " as those before it, got one on ", to_string(device));
    }
  }

  std::optional<DLDevice> device_;
};

// threshold and most for each bucket, lowest first
inline TopkBuckets read_topk_buckets(ffi::AnyView arg) {
  const auto values = arg.try_cast<ffi::Array<int64_t>>();
  if (!values) TVM_FFI_THROW(TypeError) << "topk_buckets: expected a tuple of integers, got " << arg.GetTypeKey();
  const auto size = static_cast<int64_t>(values->size());
  if (size % 2 || size > 2 * kMaxTopkBuckets)
    refuse("topk_buckets: expected two integers for each of at most ", kMaxTopkBuckets, ", got ", size);
  TopkBuckets buckets{};
  int64_t last = -1;
  for (int64_t b = 0; b < size / 2; ++b, ++buckets.size) {
    const int64_t threshold = (*values)[2 * b], most = (*values)[2 * b + 1];
    if (threshold <= last || threshold > INT32_MAX || most < 0 || most > INT32_MAX)
      refuse("topk_buckets: expected rising thresholds and counts of rows up to ", INT32_MAX, ", got ", threshold, " and ", most);
    buckets.threshold[b] = static_cast<uint32_t>(last = threshold);
    buckets.most[b] = static_cast<uint32_t>(most);
  }
  return buckets;
}

inline int64_t read_size(ffi::AnyView arg, const char* name) {
  const auto value = arg.try_cast<int64_t>();
  if (!value) TVM_FFI_THROW(TypeError) << to_text(name) << ": expected an integer, got " << arg.GetTypeKey();
  return *value;
}

inline void check_count(ffi::PackedArgs args, int expected, const char* function) {
  if (args.size() != expected)
    TVM_FFI_THROW(TypeError) << function << ": expected " << std::to_string(expected) << " arguments, got "
                             << std::to_string(args.size());
}

// args: num_draft_tokens, nsa_index_topk, page_size, segment_len, extra_last, row_floor
inline GenerateSizes read_sizes(ffi::PackedArgs args) {
  GenerateSizes sizes{};
  sizes.num_draft_tokens = read_size(args[0], "num_draft_tokens");
  sizes.nsa_index_topk = read_size(args[1], "nsa_index_topk");
  sizes.page_size = read_size(args[2], "page_size");
  sizes.segment_len = read_size(args[3], "segment_len");
  sizes.extra_last = read_size(args[4], "extra_last") != 0;
  sizes.row_floor = read_size(args[5], "row_floor");
  return sizes;
}

// args: seq_lens, req_pool_indices, extend_lens or None, bs
inline Batch read_batch(ffi::PackedArgs args, Reader& read) {
  Batch batch;
  std::tie(batch.seq_lens.view, batch.seq_lens.is_64) = read.integers(args[0], {"seq_lens"});
  std::tie(batch.req_pool_indices.view, batch.req_pool_indices.is_64) = read.integers(args[1], {"req_pool_indices"});
  batch.extend_lens = read(args[2], Form::kVector, {"extend_lens"});
  batch.bs = read_size(args[3], "bs");
  return batch;
}

}  // namespace nsa_fused
