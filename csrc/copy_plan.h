// The destinations of one copy, checked once, and the sizes and sources of each replay, checked before it.
#pragma once

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "params.h"

namespace nsa_fused {

constexpr const char* kSrcName[kNumFields] = {
    "cache_seqlens_src",     "cu_seqlens_k_src",       "page_indices_src",    "nsa_cache_seqlens_src",
    "seqlens_expanded_src",  "nsa_cu_seqlens_k_src",   "real_page_table_src", "flashmla_num_splits_src",
    "flashmla_metadata_src", "paged_mqa_schedule_src"};
constexpr const char* kDstName[kNumFields] = {
    "cache_seqlens_dst",     "cu_seqlens_k_dst",       "page_table_1_dst",    "nsa_cache_seqlens_dst",
    "seqlens_expanded_dst",  "nsa_cu_seqlens_k_dst",   "real_page_table_dst", "flashmla_num_splits_dst",
    "flashmla_metadata_dst", "paged_mqa_schedule_dst"};

constexpr bool is_optional(int f) { return f == kRealPageTable || f == kNumSplits || is_opaque(f); }
constexpr int first_element(int f) { return f == kCuSeqlensK || f == kNsaCuSeqlensK; }
constexpr bool is_written(int f, Mode mode) { return f != kSeqlensExpanded || mode != Mode::kDecode; }

struct Sizes {
  int64_t bs, max_len, max_seqlen_k, seqlens_expanded_size;
};

inline void check_sizes(Mode mode, const Sizes& s) {
  const bool decode = mode == Mode::kDecode;
  const auto check = [](const char* name, int64_t value) {
    if (value < 0) TVM_FFI_THROW(ValueError) << name << ": expected 0 or more, got " << value;
  };
  check("bs", s.bs);
  check(decode ? "max_len" : "max_seqlen_k", decode ? s.max_len : s.max_seqlen_k);
  check("seqlens_expanded_size", s.seqlens_expanded_size);
  if (decode && s.seqlens_expanded_size != s.bs)
    TVM_FFI_THROW(ValueError) << "seqlens_expanded_size: expected bs = " << s.bs << " in decode, got "
                              << s.seqlens_expanded_size;
  if (mode == Mode::kTargetVerify && s.bs > 0 && s.seqlens_expanded_size % s.bs != 0)
    TVM_FFI_THROW(ValueError) << "seqlens_expanded_size: expected a multiple of bs = " << s.bs
                              << " in target verify, got " << s.seqlens_expanded_size;
}

// Holds addresses, not tensors: whoever makes a plan keeps those alive.
class CopyPlan {
 public:
  // args: num_fields tensors or None, destination by destination.
  CopyPlan(Mode mode, ffi::PackedArgs args, int num_fields, int num_dst) : mode_(mode), num_dst_(num_dst) {
    if (num_dst < 1 || num_dst > kMaxDestinations)
      TVM_FFI_THROW(ValueError) << "destinations: expected 1 to " << kMaxDestinations << ", got " << num_dst;
    Reader read;
    for (int d = 0; d < num_dst; ++d)
      for (int f = 0; f < num_fields; ++f)
        if (is_written(f, mode)) add(read(args[d * num_fields + f], f, dst_name(f, d)), f, d);
    device_ = read.device();
    check_apart();
  }

  DLDevice device() const { return device_; }
  int num_dst() const { return num_dst_; }

  // args: num_fields tensors or None. False: nothing to copy.
  template <int kCapacity>
  bool pack(ffi::PackedArgs args, int num_fields, const Sizes& sizes, CopyParams<kCapacity>* params) const {
    check_sizes(mode_, sizes);
    if (sizes.bs == 0) return false;
    View src[kNumFields];
    Reader read(device_);
    for (int f = 0; f < num_fields; ++f)
      if (is_written(f, mode_)) src[f] = read(args[f], f, Name{kSrcName[f]});

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
        if (tiles > INT32_MAX) TVM_FFI_THROW(ValueError) << kSrcName[f] << ": too large for one launch";
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

  Name dst_name(int f, int d) const { return {kDstName[f], num_dst_ > 1 ? d : -1}; }

  void add(const View& view, int f, int d) {
    if (!view.given && !is_optional(f))
      TVM_FFI_THROW(ValueError) << dst_name(f, d) << ": expected an int32 tensor, got None";
    if (d > 0 && view.given != dst_[f][0].given)
      TVM_FFI_THROW(ValueError) << dst_name(f, d) << ": expected " << (view.given ? "None" : "a tensor") << " as for "
                                << dst_name(f, 0) << ", got " << (view.given ? "a tensor" : "None");
    if (view.rows > 1 && view.pitch < view.cols)
      TVM_FFI_THROW(ValueError) << dst_name(f, d) << ": expected rows apart, got a row stride of " << view.pitch
                                << " for " << view.cols << " columns";
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
          TVM_FFI_THROW(ValueError) << dst_name(w->f, w->d) << ": expected memory of its own, but it overlaps "
                                    << dst_name(v->f, v->d);
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
    if (!src.given)
      TVM_FFI_THROW(ValueError) << kSrcName[f] << ": expected an int32 tensor as its destination is given, got None";
    if (!dst_[f][0].given)
      TVM_FFI_THROW(ValueError) << kDstName[f] << ": expected an int32 tensor as its source is given, got None";
    check_fits(src, need, f, Name{kSrcName[f]});
    for (int d = 0; d < num_dst_; ++d) check_fits(dst_[f][d], need, f, dst_name(f, d));
    // A source may be its own destination (upstream's cache_seqlens is), and nothing else that is written.
    auto w = std::lower_bound(written_.begin(), written_.end(), src.end(),
                              [](const Written& a, const int32_t* end) { return a.view.begin() < end; });
    while (w != written_.begin() && (--w)->reach > src.begin()) {
      const bool itself = w->f == f && w->view.data == src.data && (need.rows <= 1 || w->view.pitch == src.pitch);
      if (!itself && overlap(src, w->view))
        TVM_FFI_THROW(ValueError) << kSrcName[f] << ": expected memory that is not written, but it overlaps "
                                  << dst_name(w->f, w->d);
    }
  }

  static void check_fits(const View& view, const View& need, int f, Name name) {
    if (view.rows >= need.rows && view.cols >= need.cols) return;
    const auto shape = [f](const View& v) {
      const std::string cols = std::to_string(v.cols);
      return is_table(f) ? "[" + std::to_string(v.rows) + ", " + cols + "]" : "[" + cols + "]";
    };
    TVM_FFI_THROW(ValueError) << name << ": expected a shape of at least " << shape(need) << ", got " << shape(view);
  }

  Mode mode_;
  int num_dst_;
  DLDevice device_;
  View dst_[kNumFields][kMaxDestinations];
  std::vector<Written> written_;  // by address, each tensor once
};

}  // namespace nsa_fused
