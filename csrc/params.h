// What one launch reads and writes. Plain structs: no torch, no Python, no CUDA.
#pragma once

#include <cstdint>

namespace nsa_fused {

constexpr int kMaxDestinations = 16;
constexpr int kTileCols = 1024;  // what one block copies: 16 bytes for each of its threads

enum class Mode { kDecode = 0, kTargetVerify = 1, kDraftExtend = 2 };

// The metadata tensors, in the order of sglang's fused_metadata_copy_cuda; all int32. n is bs in decode and
// seqlens_expanded_size otherwise. The schedule is not in sglang's signature: it lets deep_gemm's result ride along.
enum Field {
  kCacheSeqlens,     // [bs]
  kCuSeqlensK,       // [bs + 1], element 0 is never copied
  kPageTable1,       // [rows, cols], one column per token
  kNsaCacheSeqlens,  // [n]
  kSeqlensExpanded,  // [seqlens_expanded_size], not in decode
  kNsaCuSeqlensK,    // [n + 1], element 0 is never copied
  kRealPageTable,    // [rows, ceil(cols / page_size)], optional
  kNumSplits,        // [n + 1], FlashMLA, optional
  kTileMetadata,     // [num_sm_parts, 8], FlashMLA, optional
  kSchedule,         // [num_sms + 1, 2], DeepGEMM paged MQA logits, optional
  kNumFields,
  kContextLens2d = kNumFields,  // [n, 1], as DeepGEMM takes lengths; generated, never copied
  kTopkPlan,                    // [n + 1, 2], of sglang's top-k v2; generated, never copied
  kNumGenerated
};

// A block of rows that goes from one source to num_dst destinations. Only tables have more than one row.
struct CopyField {
  const int32_t* src;  // [rows, cols]
  int64_t src_pitch;   // in elements, as all pitches
  int64_t cols;
  int32_t rows;
  int32_t num_dst;
  int32_t tiles_per_row;
  int32_t end_tile;  // one past this field's last tile; the fields' tiles follow each other
};

template <int kCapacity>
struct CopyParams {
  CopyField field[kNumFields];
  int32_t* dst[kNumFields][kCapacity];       // [rows, cols] each
  int64_t dst_pitch[kNumFields][kCapacity];  // of tables; 0 elsewhere
};

static_assert(sizeof(CopyParams<kMaxDestinations>) <= 4096, "kernel parameters must fit 4 KiB");

}  // namespace nsa_fused
