// What both operations check of their arguments. No binding's types: tvm-ffi's and torch's forms share it.
#pragma once

#include <cstdint>
#include <string>

namespace nsa_fused {

// A parameter's name; put together only where an error needs it.
struct Name {
  const char* text;
  int index = -1;  // which destination, where there are several
};

inline std::string to_text(const std::string& text) { return text; }
inline std::string to_text(int64_t number) { return std::to_string(number); }
inline std::string to_text(Name name) { return name.text + (name.index < 0 ? "" : std::to_string(name.index)); }

// What is wrong with an argument; bindings turn it into Python's ValueError.
struct BadArgument {
  std::string text;
};

// No streams: they crash on numbers where a process holds two C++ runtimes.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  throw BadArgument{(to_text(parts) + ...)};
}

enum class Form { kVector, kTable, kWhole };  // kWhole: copied as it lies, whatever its shape

// A tensor as rows of cols 4-byte words; a vector is one row.
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

inline View make_view(Form form, Name name, int32_t* data, int ndim, const int64_t* shape, const int64_t* strides) {
  if (form == Form::kWhole) {
    int64_t numel = 1;
    for (int i = ndim - 1; i >= 0; numel *= shape[i--])
      if (shape[i] > 1 && strides[i] != numel) refuse(name, ": expected a contiguous tensor, got one with gaps");
    return {true, data, 1, numel, numel};
  }
  const int expected = form == Form::kTable ? 2 : 1;
  if (ndim != expected) refuse(name, ": expected ", expected, expected == 1 ? " dimension" : " dimensions", ", got ", ndim);
  const int64_t rows = ndim == 2 ? shape[0] : 1, cols = shape[ndim - 1];
  if (cols > 1 && strides[ndim - 1] != 1) refuse(name, ": expected last stride 1, got ", strides[ndim - 1]);
  return {true, data, rows, cols, rows > 1 ? strides[0] : cols};
}

inline void check_rows_apart(const View& view, Name name) {
  if (view.rows > 1 && view.pitch < view.cols)
    refuse(name, ": expected rows apart, got a row stride of ", view.pitch, " for ", view.cols, " columns");
}

inline void check_fits(const View& view, const View& need, Form form, Name name) {
  if (view.rows >= need.rows && view.cols >= need.cols) return;
  const auto shape = [form](const View& v) {
    const std::string cols = std::to_string(v.cols);
    return form == Form::kTable ? "[" + std::to_string(v.rows) + ", " + cols + "]" : "[" + cols + "]";
  };
  refuse(name, ": expected a shape of at least ", shape(need), ", got ", shape(view));
}

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

}  // namespace nsa_fused
