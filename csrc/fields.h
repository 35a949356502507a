// Names and forms of the metadata tensors, and the memory of those that a launch writes.
#pragma once

#include <algorithm>
#include <vector>

#include "checks.h"
#include "params.h"

namespace nsa_fused {

constexpr const char* kDstName[kNumGenerated] = {"cache_seqlens_dst",      "cu_seqlens_k_dst",          "page_table_1_dst",
                                                 "nsa_cache_seqlens_dst",  "seqlens_expanded_dst",      "nsa_cu_seqlens_k_dst",
                                                 "real_page_table_dst",    "flashmla_num_splits_dst",   "flashmla_metadata_dst",
                                                 "paged_mqa_schedule_dst", "paged_mqa_ctx_lens_2d_dst", "topk_v2_plan_dst"};

inline Name dst_name(int f, int d, int num_dst) { return {kDstName[f], num_dst > 1 ? d : -1}; }

constexpr Form form_of(int f) {
  if (f == kPageTable1 || f == kRealPageTable) return Form::kTable;
  return f == kTileMetadata || f == kSchedule || f == kContextLens2d || f == kTopkPlan ? Form::kWhole : Form::kVector;
}

constexpr int first_element(int f) { return f == kCuSeqlensK || f == kNsaCuSeqlensK; }

// What a plan of 1 to 16 destinations writes, each tensor once.
class Written {
 public:
  struct Tensor {
    View view;
    int f, d;              // field and destination
    const int32_t* reach;  // the highest end of this one and of all that begin before it
  };

  explicit Written(size_t num_dst) : num_dst_(static_cast<int>(num_dst)) {
    if (num_dst < 1 || num_dst > kMaxDestinations)
      refuse("destinations: expected 1 to ", kMaxDestinations, ", got ", static_cast<int64_t>(num_dst));
  }

  int num_dst() const { return num_dst_; }
  Name name(int f, int d) const { return dst_name(f, d, num_dst_); }

  // Step backends may share a tensor that would get the same values: it is written once. same_values: (Tensor) -> bool.
  template <typename SameValues>
  void add(const View& view, int f, int d, const SameValues& same_values) {
    const auto shared = [&](const Tensor& earlier) { return earlier.view.same_memory(view) && same_values(earlier); };
    if (std::none_of(tensors_.begin(), tensors_.end(), shared)) tensors_.push_back({view, f, d, nullptr});
  }

  // Sorts by address; to be called once, after the last add; of equal addresses the later one is named.
  void check_apart() {
    std::stable_sort(tensors_.begin(), tensors_.end(),
                     [](const Tensor& a, const Tensor& b) { return a.view.begin() < b.view.begin(); });
    const int32_t* reach = nullptr;
    for (auto w = tensors_.begin(); w != tensors_.end(); ++w) {
      for (auto v = w; v != tensors_.begin() && (--v)->reach > w->view.begin();)
        if (overlap(v->view, w->view))
          refuse(name(w->f, w->d), ": expected memory of its own, but it overlaps ", name(v->f, v->d));
      w->reach = reach = std::max(reach, w->view.end());
    }
  }

  // Whether a source shares an element with a tensor that it may not be. itself: (Tensor) -> bool, where it may.
  template <typename Itself>
  void check_source(const View& src, Name src_name, const Itself& itself) const {
    auto w = std::lower_bound(tensors_.begin(), tensors_.end(), src.end(),
                              [](const Tensor& a, const int32_t* end) { return a.view.begin() < end; });
    while (w != tensors_.begin() && (--w)->reach > src.begin())
      if (!itself(*w) && overlap(src, w->view))
        refuse(src_name, ": expected memory that is not written, but it overlaps ", name(w->f, w->d));
  }

  auto begin() const { return tensors_.begin(); }
  auto end() const { return tensors_.end(); }

 private:
  int num_dst_;
  std::vector<Tensor> tensors_;
};

}  // namespace nsa_fused
