// The destinations of one captured batch size and where their values come from, checked once; the batch, checked at
// each replay. No binding's types.
#pragma once

#include <algorithm>
#include <utility>

#include "checks.h"
#include "fields.h"
#include "generate_params.h"

namespace nsa_fused {

struct GenerateSizes {
  int64_t bs, rows;          // captured
  int64_t num_draft_tokens;  // of target verify and draft extend
  int64_t nsa_index_topk, page_size;
  int64_t segment_len;       // 0: no schedule is written
  bool extra_last;           // of a schedule
  int64_t row_floor;         // of draft extend: the least length of a row
  TopkBuckets topk_buckets;  // size 0: no plan of the top-k is written
};

struct Integers {
  View view;  // columns count elements
  bool is_64 = false;

  View words() const { return {view.given, view.data, 1, view.cols << is_64, view.cols << is_64}; }
};

struct Batch {
  Integers seq_lens, req_pool_indices;
  View extend_lens;
  int64_t bs;
};

class GeneratePlan {
 public:
  struct Destination {
    View field[kNumGenerated];
  };

  GeneratePlan(Mode mode, const GenerateSizes& sizes, const View& req_to_token, const View& num_splits, const View& tile_metadata,
               std::vector<Destination> dst)
      : mode_(mode), sizes_(sizes), req_to_token_(req_to_token), num_splits_(num_splits), tile_metadata_(tile_metadata),
        dst_(std::move(dst)), written_(dst_.size()) {
    check_sizes();
    for (size_t d = 0; d < dst_.size(); ++d)
      for (int f = 0; f < kNumGenerated; ++f)
        if (dst_[d].field[f].given) add(f, d);
    written_.check_apart();
    for (const auto& [source, view] : {std::pair{"req_to_token", &req_to_token_},
                                       {"flashmla_num_splits", &num_splits_},
                                       {"flashmla_metadata", &tile_metadata_}})
      if (view->given) written_.check_source(*view, {source}, [](auto&) { return false; });
  }

  int num_dst() const { return written_.num_dst(); }

  void check(const Batch& batch) const {
    if (batch.bs < 0 || batch.bs > sizes_.bs) refuse("bs: expected 0 to the captured ", sizes_.bs, ", got ", batch.bs);
    check_source(batch.seq_lens, "seq_lens", batch.bs, true);
    check_source(batch.req_pool_indices, "req_pool_indices", batch.bs);
    if (batch.extend_lens.given) {
      if (mode_ != Mode::kDraftExtend) refuse("extend_lens: expected None but in draft extend, got a tensor");
      check_source({batch.extend_lens}, "extend_lens", batch.bs);
    } else if (batch.bs * rows_per_request() > sizes_.rows) {
      refuse("extend_lens: expected an int32 tensor, as ", batch.bs, " requests of ", rows_per_request(),
             " rows are more than the captured ", sizes_.rows, ", got None");
    }
  }

  template <int kCapacity>
  void pack(const Batch& batch, GenerateParams<kCapacity>* p) const {
    *p = {};
    p->seq_lens = batch.seq_lens.view.data;
    p->seq_lens_64 = batch.seq_lens.is_64;
    p->req_pool_indices = batch.req_pool_indices.view.data;
    p->req_pool_indices_64 = batch.req_pool_indices.is_64;
    p->extend_lens = batch.extend_lens.data;
    p->req_to_token = req_to_token_.data;
    p->token_pitch = req_to_token_.pitch;
    p->token_cols = req_to_token_.cols;
    p->num_slots = req_to_token_.rows;
    p->bs = static_cast<int32_t>(batch.bs);
    p->num_dst = num_dst();
    p->rows_per_request = static_cast<int32_t>(rows_per_request());
    p->max_rows = static_cast<int32_t>(sizes_.rows);
    p->cache_offset = mode_ == Mode::kTargetVerify ? p->rows_per_request : 0;
    p->row_floor = mode_ == Mode::kDraftExtend ? static_cast<int32_t>(sizes_.row_floor) : INT32_MIN;
    p->nsa_index_topk = static_cast<int32_t>(sizes_.nsa_index_topk);
    while (int64_t{1} << p->page_shift < sizes_.page_size) ++p->page_shift;
    p->segment_len = static_cast<int32_t>(sizes_.segment_len);
    p->extra_last = sizes_.extra_last;
    p->topk_buckets = sizes_.topk_buckets;
    p->num_splits = {num_splits_.data, static_cast<int32_t>(num_splits_.cols)};
    p->tile_metadata = {tile_metadata_.data, static_cast<int32_t>(tile_metadata_.cols)};
    for (const Written::Tensor& w : written_) {
      GenerateDst& dst = p->dst[w.d];
      dst.field[w.f] = w.view.data;
      if (w.f == kPageTable1) dst.table_pitch = w.view.pitch, dst.table_cols = w.view.cols;
      if (w.f == kRealPageTable) dst.page_pitch = w.view.pitch, dst.page_cols = w.view.cols;
      if (w.f == kSchedule) p->num_sms = static_cast<int32_t>(w.view.cols / 2 - 1);
    }
  }

  // Whether a table has one column for each token.
  bool is_wide() const {
    return std::any_of(written_.begin(), written_.end(), [](const Written::Tensor& w) { return w.f == kPageTable1; });
  }

  // Columns that a table may have live, 0 without a table.
  int64_t live_cols() const {
    int64_t cols = 0;
    for (const Written::Tensor& w : written_) {
      if (w.f == kPageTable1) cols = std::max(cols, w.view.cols);
      if (w.f == kRealPageTable) cols = std::max(cols, w.view.cols * sizes_.page_size);
    }
    return std::min(cols, req_to_token_.cols);
  }

 private:
  Name name(int f, int d) const { return written_.name(f, d); }
  int64_t rows_per_request() const { return mode_ == Mode::kDecode ? 1 : sizes_.num_draft_tokens; }

  void check_sizes() const {
    const auto at_least = [](const char* name, int64_t value, int64_t least) {
      if (value < least || value > INT32_MAX) refuse(name, ": expected ", least, " to ", INT32_MAX, ", got ", value);
    };
    at_least("bs", sizes_.bs, 0);
    at_least("rows", sizes_.rows, 0);
    at_least("num_draft_tokens", sizes_.num_draft_tokens, mode_ == Mode::kDecode ? 0 : 1);
    at_least("nsa_index_topk", sizes_.nsa_index_topk, 1);
    at_least("segment_len", sizes_.segment_len, 0);
    at_least("row_floor", sizes_.row_floor, INT32_MIN);
    constexpr int64_t kLargestPage = 1 << 20;  // the kernel shifts page numbers in 32 bits
    if (sizes_.page_size < 1 || sizes_.page_size > kLargestPage || sizes_.page_size & (sizes_.page_size - 1))
      refuse("page_size: expected a power of two up to ", kLargestPage, ", got ", sizes_.page_size);
    if (mode_ != Mode::kDraftExtend && sizes_.rows != sizes_.bs * rows_per_request())
      refuse("rows: expected bs * rows per request = ", sizes_.bs * rows_per_request(), ", got ", sizes_.rows);
    if (!req_to_token_.given) refuse("req_to_token: expected an int32 tensor, got None");
    constexpr int64_t kMost = int64_t{1} << 30;  // the kernel counts columns, and lines of all requests, in 32 bits
    if (req_to_token_.cols > kMost || sizes_.bs * (req_to_token_.cols / 32 + 1) > kMost)
      refuse("req_to_token: expected at most ", kMost, " columns, and ", 32 * kMost, " for all requests together, got ",
             req_to_token_.cols, " for each of ", sizes_.bs);
    if (req_to_token_.rows > INT32_MAX) refuse("req_to_token: expected at most ", INT32_MAX, " slots, got ", req_to_token_.rows);
  }

  void add(int f, int d) {
    const View& view = dst_[d].field[f];
    check_rows_apart(view, name(f, d));
    check_fits(view, need(f, d), form_of(f), name(f, d));
    if (f == kSchedule && (view.cols < 4 || view.cols % 2))
      refuse(name(f, d), ": expected [num_sms + 1, 2], got ", view.cols, " elements");
    if (f == kSchedule && schedule_cols_ && view.cols != schedule_cols_)
      refuse(name(f, d), ": expected [", schedule_cols_ / 2, ", 2] as of the destinations before it, got [", view.cols / 2,
             ", 2]");
    if (f == kSchedule) schedule_cols_ = view.cols;
    if (f == kSchedule && sizes_.segment_len == 0)
      refuse("segment_len: expected the tokens of a schedule's segment as ", name(f, d), " is given, got 0");
    if (f == kTopkPlan && sizes_.topk_buckets.size == 0)
      refuse("topk_buckets: expected thresholds as ", name(f, d), " is given, got none");
    // So is what decode has under several names.
    written_.add(view, f, d, [&](const Written::Tensor& earlier) { return same_values(f, earlier.f); });
  }

  View need(int f, int d) const {
    const int64_t n = sizes_.rows;
    switch (f) {
      case kCacheSeqlens: return {true, nullptr, 1, sizes_.bs};
      case kCuSeqlensK: return {true, nullptr, 1, sizes_.bs + 1};
      case kPageTable1:
      case kRealPageTable: return {true, nullptr, n, 0};
      case kNsaCuSeqlensK: return {true, nullptr, 1, n + 1};
      case kNumSplits: return whole(num_splits_, f, d);
      case kTileMetadata: return whole(tile_metadata_, f, d);
      case kSchedule: return {true, nullptr, 1, 0};
      case kTopkPlan: return {true, nullptr, 1, 2 * (n + 1)};
      default: return {true, nullptr, 1, n};
    }
  }

  View whole(const View& source, int f, int d) const {
    if (!source.given) refuse(name(f, d), ": expected None as its source is None, got a tensor");
    return {true, nullptr, 1, source.cols};
  }

  bool same_values(int f, int g) const {
    const auto is_len = [this](int field) {
      return field == kSeqlensExpanded || field == kContextLens2d || (field == kCacheSeqlens && mode_ == Mode::kDecode);
    };
    return f == g || (is_len(f) && is_len(g));
  }

  void check_source(const Integers& source, const char* name, int64_t bs, bool may_be_captured = false) const {
    if (!source.view.given) refuse(name, ": expected a tensor, got None");
    if (source.view.cols < bs) refuse(name, ": expected at least bs = ", bs, " elements, got ", source.view.cols);
    // The graph runner's seq_lens is the captured cache_seqlens itself up to sglang 0.5.13: the same values.
    const auto itself = [&](const Written::Tensor& w) {
      return may_be_captured && w.f == kCacheSeqlens && w.view.data == source.view.data && !source.is_64 &&
             mode_ != Mode::kTargetVerify && source.view.data != nullptr;
    };
    written_.check_source(source.words(), {name}, itself);
  }

  Mode mode_;
  GenerateSizes sizes_;
  View req_to_token_, num_splits_, tile_metadata_;
  std::vector<Destination> dst_;
  int64_t schedule_cols_ = 0;
  Written written_;
};

// So that no product of two is beyond 64 bits.
inline void check_workspace_size(const char* name, int64_t value) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (value < 1 || value > kMost) refuse(name, ": expected 1 to ", kMost, ", got ", value);
}

// A draft extend's tensors in its workspace, see draft_extend_plan.
inline std::vector<GeneratePlan::Destination> split_workspace(const View& workspace, const GenerateSizes& sizes, int64_t cols,
                                                              int64_t num_sms) {
  const int64_t bs = sizes.bs, rows = sizes.rows;
  check_workspace_size("rows", rows);
  check_workspace_size("cols", cols);
  check_workspace_size("bs", bs);
  std::vector<GeneratePlan::Destination> dst(1);
  int64_t used = 0;
  const auto place = [&](int f, int64_t rows, int64_t cols) {
    dst[0].field[f] = {true, workspace.data + used, rows, cols, cols};
    used += rows * cols;
  };
  if (sizes.segment_len) place(kSchedule, 1, 2 * (num_sms + 1));
  place(kPageTable1, rows, cols);
  place(kRealPageTable, rows, (cols + sizes.page_size - 1) / sizes.page_size);
  place(kCacheSeqlens, 1, bs);
  place(kCuSeqlensK, 1, bs + 1);
  place(kSeqlensExpanded, 1, rows);
  place(kNsaCacheSeqlens, 1, rows);
  place(kNsaCuSeqlensK, 1, rows + 1);
  if (!workspace.given) refuse("workspace: expected an int32 tensor, got None");
  if (workspace.cols != used) refuse("workspace: expected ", used, " elements for these sizes, got ", workspace.cols);
  return dst;
}

}  // namespace nsa_fused
