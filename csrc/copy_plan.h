// The destinations of one copy, checked once, and the sources and sizes of each replay, checked before it. No binding's
// types: tvm-ffi's and torch's forms share it.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "params.h"

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

constexpr const char* kSrcName[kNumFields] = {
    "cache_seqlens_src",     "cu_seqlens_k_src",       "page_indices_src",    "nsa_cache_seqlens_src",
    "seqlens_expanded_src",  "nsa_cu_seqlens_k_src",   "real_page_table_src", "flashmla_num_splits_src",
    "flashmla_metadata_src", "paged_mqa_schedule_src"};
constexpr const char* kDstName[kNumFields] = {
    "cache_seqlens_dst",     "cu_seqlens_k_dst",       "page_table_1_dst",    "nsa_cache_seqlens_dst",
    "seqlens_expanded_dst",  "nsa_cu_seqlens_k_dst",   "real_page_table_dst", "flashmla_num_splits_dst",
    "flashmla_metadata_dst", "paged_mqa_schedule_dst"};

inline Name src_name(int f) { return {kSrcName[f]}; }
inline Name dst_name(int f, int d, int num_dst) { return {kDstName[f], num_dst > 1 ? d : -1}; }

constexpr bool is_table(int f) { return f == kPageTable1 || f == kRealPageTable; }
constexpr bool is_opaque(int f) { return f == kTileMetadata || f == kSchedule; }  // copied whole, whatever its shape
constexpr bool is_optional(int f) { return f == kRealPageTable || f == kNumSplits || is_opaque(f); }
constexpr bool is_written(int f, Mode mode) { return f != kSeqlensExpanded || mode != Mode::kDecode; }
constexpr int first_element(int f) { return f == kCuSeqlensK || f == kNsaCuSeqlensK; }

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

inline View make_view(int f, Name name, int32_t* data, int ndim, const int64_t* shape, const int64_t* strides) {
  if (is_opaque(f)) {
    int64_t numel = 1;
    for (int i = ndim - 1; i >= 0; numel *= shape[i--])
      if (shape[i] > 1 && strides[i] != numel) refuse(name, ": expected a contiguous tensor, got one with gaps");
    return {true, data, 1, numel, numel};
  }
  const int expected = is_table(f) ? 2 : 1;
  if (ndim != expected) refuse(name, ": expected ", expected, expected == 1 ? " dimension" : " dimensions", ", got ", ndim);
  const int64_t rows = ndim == 2 ? shape[0] : 1, cols = shape[ndim - 1];
  if (cols > 1 && strides[ndim - 1] != 1) refuse(name, ": expected last stride 1, got ", strides[ndim - 1]);
  return {true, data, rows, cols, rows > 1 ? strides[0] : cols};
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

struct Sizes {
  int64_t bs, max_len, max_seqlen_k, seqlens_expanded_size;
};

inline Mode to_mode(int64_t mode) {
  if (mode < 0 || mode > 2)
    refuse("forward_mode: expected 0 (decode), 1 (target verify) or 2 (draft extend), got ", mode);
  return static_cast<Mode>(mode);
}

// Holds addresses, not tensors: whoever makes a plan keeps those alive.
class CopyPlan {
 public:
  // dst: num_dst x kNumFields. What the mode does not write is not looked at.
  CopyPlan(Mode mode, const View* dst, int num_dst) : mode_(mode), num_dst_(num_dst) {
    if (num_dst < 1 || num_dst > kMaxDestinations)
      refuse("destinations: expected 1 to ", kMaxDestinations, ", got ", num_dst);
    for (int d = 0; d < num_dst; ++d)
      for (int f = 0; f < kNumFields; ++f)
        if (is_written(f, mode)) add(dst[d * kNumFields + f], f, d);
    check_apart();
  }

  Mode mode() const { return mode_; }
  int num_dst() const { return num_dst_; }

  void check(const Sizes& s) const {
    const bool decode = mode_ == Mode::kDecode;
    const auto not_negative = [](const char* name, int64_t value) {
      if (value < 0) refuse(name, ": expected 0 or more, got ", value);
    };
    not_negative("bs", s.bs);
    not_negative(decode ? "max_len" : "max_seqlen_k", decode ? s.max_len : s.max_seqlen_k);
    not_negative("seqlens_expanded_size", s.seqlens_expanded_size);
    if (decode && s.seqlens_expanded_size != s.bs)
      refuse("seqlens_expanded_size: expected bs = ", s.bs, " in decode, got ", s.seqlens_expanded_size);
    if (mode_ == Mode::kTargetVerify && s.bs > 0 && s.seqlens_expanded_size % s.bs != 0)
      refuse("seqlens_expanded_size: expected a multiple of bs = ", s.bs, " in target verify, got ",
             s.seqlens_expanded_size);
  }

  // src: kNumFields; sizes: checked, bs not 0. False: nothing to copy.
  template <int kCapacity>
  bool pack(const View* src, const Sizes& sizes, CopyParams<kCapacity>* params) const {
    int64_t tiles = 0;
    for (int f = 0; f < kNumFields; ++f) {
      CopyField& field = params->field[f];
      field = CopyField{};
      if (src[f].given || dst_[f][0].given) {
        const View need = extent(f, src[f], sizes, src[kPageTable1]);
        check_pair(f, src[f], need);
        const int first = first_element(f);
        field.src = src[f].data + first;
        field.src_pitch = src[f].pitch;
        field.cols = need.cols - first;
        field.rows = static_cast<int32_t>(need.rows);
        field.tiles_per_row = static_cast<int32_t>((field.cols + kTileCols - 1) / kTileCols);
        tiles += need.rows * field.tiles_per_row;
        if (tiles > INT32_MAX) refuse(src_name(f), ": expected less than ", INT32_MAX, " tiles, got ", tiles);
      }
      field.end_tile = static_cast<int32_t>(tiles);
    }
    for (const Written& w : written_) {
      const int at = params->field[w.f].num_dst++;
      params->dst[w.f][at] = w.view.data + first_element(w.f);
      params->dst_pitch[w.f][at] = is_table(w.f) ? w.view.pitch : 0;
    }
    return tiles > 0;
  }

 private:
  struct Written {
    View view;
    int f, d;
    const int32_t* reach;  // the highest end of this one and of all that begin before it
  };

  Name name(int f, int d) const { return dst_name(f, d, num_dst_); }

  void add(const View& view, int f, int d) {
    if (!view.given && !is_optional(f)) refuse(name(f, d), ": expected an int32 tensor, got None");
    if (d > 0 && view.given != dst_[f][0].given)
      refuse(name(f, d), ": expected ", view.given ? "None" : "a tensor", " as for ", name(f, 0), ", got ",
             view.given ? "a tensor" : "None");
    if (view.rows > 1 && view.pitch < view.cols)
      refuse(name(f, d), ": expected rows apart, got a row stride of ", view.pitch, " for ", view.cols, " columns");
    dst_[f][d] = view;
    // Step backends may share a tensor, as upstream's cache_seqlens up to 0.5.13: it is written once.
    const auto same = [&](const View& earlier) { return earlier.same_memory(view); };
    if (view.given && std::none_of(dst_[f], dst_[f] + d, same)) written_.push_back({view, f, d, nullptr});
  }

  void check_apart() {
    std::sort(written_.begin(), written_.end(),
              [](const Written& a, const Written& b) { return a.view.begin() < b.view.begin(); });
    const int32_t* reach = nullptr;
    for (auto w = written_.begin(); w != written_.end(); ++w) {
      for (auto v = w; v != written_.begin() && (--v)->reach > w->view.begin();)
        if (overlap(v->view, w->view))
          refuse(name(w->f, w->d), ": expected memory of its own, but it overlaps ", name(v->f, v->d));
      w->reach = reach = std::max(reach, w->view.end());
    }
  }

  // The shape that moves; element 0 of cumulative lengths counts.
  View extent(int f, const View& src, const Sizes& s, const View& page_indices) const {
    const bool decode = mode_ == Mode::kDecode;
    const int64_t n = decode ? s.bs : s.seqlens_expanded_size;
    const int64_t rows = mode_ == Mode::kDraftExtend ? std::min(page_indices.rows, n) : n;
    switch (f) {
      case kCacheSeqlens: return {true, nullptr, 1, s.bs};
      case kCuSeqlensK: return {true, nullptr, 1, s.bs + 1};
      case kPageTable1: return {true, nullptr, rows, decode ? s.max_len : s.max_seqlen_k};
      case kNsaCacheSeqlens:
      case kSeqlensExpanded: return {true, nullptr, 1, n};
      case kNsaCuSeqlensK:
      case kNumSplits: return {true, nullptr, 1, n + 1};
      case kRealPageTable: return {true, nullptr, rows, src.cols};
      default: return {true, nullptr, 1, src.cols};
    }
  }

  void check_pair(int f, const View& src, const View& need) const {
    if (!src.given) refuse(src_name(f), ": expected an int32 tensor as its destination is given, got None");
    if (!dst_[f][0].given) refuse(Name{kDstName[f]}, ": expected an int32 tensor as its source is given, got None");
    check_fits(src, need, f, src_name(f));
    for (int d = 0; d < num_dst_; ++d) check_fits(dst_[f][d], need, f, name(f, d));
    // A source may be its own destination (upstream's cache_seqlens is), and nothing else that is written.
    auto w = std::lower_bound(written_.begin(), written_.end(), src.end(),
                              [](const Written& a, const int32_t* end) { return a.view.begin() < end; });
    while (w != written_.begin() && (--w)->reach > src.begin()) {
      const bool itself = w->f == f && w->view.data == src.data && (need.rows <= 1 || w->view.pitch == src.pitch);
      if (!itself && overlap(src, w->view))
        refuse(src_name(f), ": expected memory that is not written, but it overlaps ", name(w->f, w->d));
    }
  }

  static void check_fits(const View& view, const View& need, int f, Name name) {
    if (view.rows >= need.rows && view.cols >= need.cols) return;
    const auto shape = [f](const View& v) {
      const std::string cols = std::to_string(v.cols);
      return is_table(f) ? "[" + std::to_string(v.rows) + ", " + cols + "]" : "[" + cols + "]";
    };
    refuse(name, ": expected a shape of at least ", shape(need), ", got ", shape(view));
  }

  Mode mode_;
  int num_dst_;
  View dst_[kNumFields][kMaxDestinations];
  std::vector<Written> written_;  // by address, each tensor once
};

}  // namespace nsa_fused
