// The destinations of one copy, checked once, and the sources and sizes of each replay, checked before it. No binding's
// types: tvm-ffi's and torch's forms share it.
#pragma once

#include "checks.h"
#include "fields.h"
#include "params.h"

namespace nsa_fused {

constexpr const char* kSrcName[kNumFields] = {
    "cache_seqlens_src",    "cu_seqlens_k_src",    "page_indices_src",        "nsa_cache_seqlens_src", "seqlens_expanded_src",
    "nsa_cu_seqlens_k_src", "real_page_table_src", "flashmla_num_splits_src", "flashmla_metadata_src", "paged_mqa_schedule_src"};
inline Name src_name(int f) { return {kSrcName[f]}; }

constexpr bool is_optional(int f) { return f == kRealPageTable || f == kNumSplits || form_of(f) == Form::kWhole; }
constexpr bool is_written(int f, Mode mode) { return f != kSeqlensExpanded || mode != Mode::kDecode; }

struct Sizes {
  int64_t bs, max_len, max_seqlen_k, seqlens_expanded_size;
};

inline Mode to_mode(int64_t mode) {
  if (mode < 0 || mode > 2) refuse("forward_mode: expected 0 (decode), 1 (target verify) or 2 (draft extend), got ", mode);
  return static_cast<Mode>(mode);
}

// Holds addresses, not tensors: whoever makes a plan keeps those alive.
class CopyPlan {
 public:
  // dst: num_dst x kNumFields. What the mode does not write is not looked at.
  CopyPlan(Mode mode, const View* dst, int num_dst) : mode_(mode), written_(num_dst) {
    for (int d = 0; d < num_dst; ++d)
      for (int f = 0; f < kNumFields; ++f)
        if (is_written(f, mode)) add(dst[d * kNumFields + f], f, d);
    written_.check_apart();
  }

  Mode mode() const { return mode_; }
  int num_dst() const { return written_.num_dst(); }

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
      refuse("seqlens_expanded_size: expected a multiple of bs = ", s.bs, " in target verify, got ", s.seqlens_expanded_size);
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
    for (const Written::Tensor& w : written_) {
      const int at = params->field[w.f].num_dst++;
      params->dst[w.f][at] = w.view.data + first_element(w.f);
      params->dst_pitch[w.f][at] = form_of(w.f) == Form::kTable ? w.view.pitch : 0;
    }
    return tiles > 0;
  }

 private:
  Name name(int f, int d) const { return written_.name(f, d); }

  void add(const View& view, int f, int d) {
    if (!view.given && !is_optional(f)) refuse(name(f, d), ": expected an int32 tensor, got None");
    if (d > 0 && view.given != dst_[f][0].given)
      refuse(name(f, d), ": expected ", view.given ? "None" : "a tensor", " as for ", name(f, 0), ", got ",
             view.given ? "a tensor" : "None");
    check_rows_apart(view, name(f, d));
    dst_[f][d] = view;
    if (view.given) written_.add(view, f, d, [f](const Written::Tensor& earlier) { return earlier.f == f; });
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
    check_fits(src, need, form_of(f), src_name(f));
    for (int d = 0; d < num_dst(); ++d) check_fits(dst_[f][d], need, form_of(f), name(f, d));
    // A source may be its own destination (upstream's cache_seqlens is), and nothing else that is written.
    const auto itself = [&](const Written::Tensor& w) {
      return w.f == f && w.view.data == src.data && (need.rows <= 1 || w.view.pitch == src.pitch);
    };
    written_.check_source(src, src_name(f), itself);
  }

  Mode mode_;
  View dst_[kNumFields][kMaxDestinations];
  Written written_;
};

}  // namespace nsa_fused
