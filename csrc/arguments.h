// Reads arguments from Python and says what is wrong with them.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/function.h>

#include <optional>
#include <ostream>
#include <string>

#include "params.h"

namespace nsa_fused {

namespace ffi = tvm::ffi;

// A parameter's name; put together only where an error needs it.
struct Name {
  const char* text;
  int index = -1;  // which destination, where there are several

  friend std::ostream& operator<<(std::ostream& os, const Name& name) {
    os << name.text;
    return name.index < 0 ? os : os << name.index;
  }
};

constexpr bool is_table(int f) { return f == kPageTable1 || f == kRealPageTable; }
constexpr bool is_opaque(int f) { return f == kTileMetadata || f == kSchedule; }  // copied whole, whatever its shape

// An int32 tensor as rows of cols elements; a vector is one row.
struct View {
  bool given = false;
  int32_t* data = nullptr;
  int64_t rows = 0, cols = 0, pitch = 0;

  const int32_t* begin() const { return data; }
  const int32_t* end() const { return rows && cols ? data + (rows - 1) * pitch + cols : data; }
  bool same_memory(const View& o) const {
    return data == o.data && rows == o.rows && cols == o.cols && (rows <= 1 || pitch == o.pitch);
  }
};

// Whether two views have an element in common: their rows in order of address, side by side.
inline bool overlap(const View& a, const View& b) {
  if (a.begin() >= b.end() || b.begin() >= a.end()) return false;
  for (int64_t i = 0, j = 0; i < a.rows && j < b.rows;) {
    const int32_t *x = a.data + i * a.pitch, *y = b.data + j * b.pitch;
    if (x < y + b.cols && y < x + a.cols) return true;
    x < y ? ++i : ++j;
  }
  return false;
}

inline std::string to_string(DLDevice device) {
  if (device.device_type == kDLCPU) return "cpu";
  const std::string type = device.device_type == kDLCUDA ? "cuda" : "device type " + std::to_string(device.device_type);
  return type + ":" + std::to_string(device.device_id);
}

inline std::string to_string(ffi::ShapeView shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Reads tensors one after another; all must be on the device of the first.
class Reader {
 public:
  explicit Reader(std::optional<DLDevice> device = std::nullopt) : device_(device) {}

  View operator()(ffi::AnyView arg, int f, Name name) {
    if (arg.type_index() == ffi::TypeIndex::kTVMFFINone) return View{};
    const auto tensor = arg.try_cast<ffi::TensorView>();
    if (!tensor) TVM_FFI_THROW(TypeError) << name << ": expected an int32 tensor, got " << arg.GetTypeKey();
    const ffi::TensorView& t = *tensor;
    if (t.dtype().code != kDLInt || t.dtype().bits != 32 || t.dtype().lanes != 1)
      TVM_FFI_THROW(TypeError) << name << ": expected dtype int32, got " << ffi::DLDataTypeToString(t.dtype());
    check_device(t.device(), name);
    auto* data = reinterpret_cast<int32_t*>(static_cast<char*>(t.data_ptr()) + t.byte_offset());
    if (is_opaque(f)) {
      if (!t.IsContiguous()) TVM_FFI_THROW(ValueError) << name << ": expected a contiguous tensor, got one with gaps";
      return {true, data, 1, t.numel(), t.numel()};
    }
    const int ndim = is_table(f) ? 2 : 1;
    if (t.ndim() != ndim)
      TVM_FFI_THROW(ValueError) << name << ": expected " << ndim << (ndim == 1 ? " dimension" : " dimensions")
                                << ", got shape " << to_string(t.shape());
    const int64_t rows = ndim == 2 ? t.size(0) : 1, cols = t.size(ndim - 1);
    if (cols > 1 && t.stride(ndim - 1) != 1)
      TVM_FFI_THROW(ValueError) << name << ": expected last stride 1, got " << t.stride(ndim - 1);
    return {true, data, rows, cols, rows > 1 ? t.stride(0) : cols};
  }

  DLDevice device() const { return *device_; }

 private:
  void check_device(DLDevice device, Name name) {
    if (!device_) {
      if (device.device_type != kDLCPU && device.device_type != kDLCUDA)
        TVM_FFI_THROW(ValueError) << name << ": expected a CPU or CUDA tensor, got " << to_string(device);
      device_ = device;
    } else if (device.device_type != device_->device_type || device.device_id != device_->device_id) {
      TVM_FFI_THROW(ValueError) << name << ": expected a tensor on " << to_string(*device_)
                                << " as those before it, got one on " << to_string(device);
    }
  }

  std::optional<DLDevice> device_;
};

inline int64_t read_size(ffi::AnyView arg, const char* name) {
  const auto value = arg.try_cast<int64_t>();
  if (!value) TVM_FFI_THROW(TypeError) << name << ": expected an integer, got " << arg.GetTypeKey();
  return *value;
}

inline Mode read_mode(ffi::AnyView arg) {
  const int64_t mode = read_size(arg, "forward_mode");
  if (mode < 0 || mode > 2)
    TVM_FFI_THROW(ValueError) << "forward_mode: expected 0 (decode), 1 (target verify) or 2 (draft extend), got "
                              << mode;
  return static_cast<Mode>(mode);
}

}  // namespace nsa_fused
