// Names and forms of the metadata tensors.
#pragma once

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

}  // namespace nsa_fused
