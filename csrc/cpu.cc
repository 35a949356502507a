#include "cpu.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "checks.h"

namespace nsa_fused {
namespace {

int64_t load(const void* values, bool is_64, int i) {
  return is_64 ? static_cast<const int64_t*>(values)[i] : static_cast<const int32_t*>(values)[i];
}

// Sums wrap as torch's int32 sums do.
int32_t add(int32_t a, int32_t b) { return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }

void put(int32_t* dst, int64_t at, int32_t value) {
  if (dst) dst[at] = value;
}

// The request's row of the pool. Padding, of length 0 or 1, may name any slot and takes the first.
int64_t slot_of(const GenerateParams<kMaxDestinations>& p, int i) {
  const int64_t slot = load(p.req_pool_indices, p.req_pool_indices_64, i);
  if (slot >= 0 && slot < p.num_slots) return slot;
  const auto seq_len = static_cast<int32_t>(load(p.seq_lens, p.seq_lens_64, i));
  if (seq_len > 1 || p.num_slots == 0)
    refuse("req_pool_indices: expected 0 to ", p.num_slots - 1, ", got ", slot, " for request ", i, " of length ", seq_len);
  return 0;
}

// row_lens: of all rows. Row by row, each SM's share of segments is handed out as it is reached.
void write_schedule(const std::vector<int32_t>& row_lens, uint32_t segment_len, bool extra_last, uint32_t num_sms,
                    int32_t* schedule) {
  std::vector<uint32_t> segments;
  uint32_t total = 0;
  for (const int32_t len : row_lens) {
    segments.push_back((static_cast<uint32_t>(len) + segment_len - 1) / segment_len);
    total += segments.back();
  }
  const uint32_t more = total % num_sms, plain = num_sms - more;
  uint32_t row = 0, done = 0;  // rows passed, and the segments in them
  for (uint32_t sm = 0; sm <= num_sms; ++sm) {
    const uint32_t extra = extra_last ? sm - std::min(sm, plain) : std::min(sm, more);
    const uint32_t begin = sm * (total / num_sms) + extra;
    while (row < segments.size() && done + segments[row] <= begin) done += segments[row++];
    schedule[2 * sm] = row;
    schedule[2 * sm + 1] = begin - done;
  }
}

// Counts for each threshold on its own, from the highest down.
void write_topk_plan(const std::vector<int32_t>& row_lens, const TopkBuckets& buckets, int32_t* plan) {
  uint32_t threshold = buckets.threshold[buckets.size - 1];
  for (int b = buckets.size - 1; b >= 0; --b) {
    const auto longer = [&](int32_t len) { return static_cast<uint32_t>(len) > buckets.threshold[b]; };
    if (static_cast<uint32_t>(std::count_if(row_lens.begin(), row_lens.end(), longer)) > buckets.most[b]) break;
    threshold = buckets.threshold[b];
  }
  int32_t found = 0;
  for (size_t row = 0; row < row_lens.size(); ++row) {
    if (static_cast<uint32_t>(row_lens[row]) <= threshold) continue;
    ++found;
    plan[2 * found] = static_cast<int32_t>(row);
    plan[2 * found + 1] = row_lens[row];
  }
  plan[0] = static_cast<int32_t>(threshold);
  plan[1] = found;
}

}  // namespace

void copy_cpu(const CopyParams<kMaxDestinations>& params) {
  for (int f = 0; f < kNumFields; ++f) {
    const CopyField& field = params.field[f];
    for (int d = 0; d < field.num_dst; ++d) {
      for (int64_t row = 0; row < field.rows; ++row) {
        // memmove: a source may be its own destination.
        std::memmove(params.dst[f][d] + row * params.dst_pitch[f][d], field.src + row * field.src_pitch,
                     field.cols * sizeof(int32_t));
      }
    }
  }
}

void generate_cpu(const GenerateParams<kMaxDestinations>& p) {
  int64_t all_rows = 0;
  for (int i = 0; i < p.bs; ++i) {  // all checks before the first write
    all_rows += p.extend_lens ? std::max(p.extend_lens[i], 0) : p.rows_per_request;
    slot_of(p, i);
    if (all_rows > p.max_rows) refuse("extend_lens: expected at most the captured ", p.max_rows, " rows, got ", all_rows);
  }
  for (int d = 0; d < p.num_dst; ++d) {
    const GenerateDst& dst = p.dst[d];
    put(dst.field[kCuSeqlensK], 0, 0);
    put(dst.field[kNsaCuSeqlensK], 0, 0);
    int32_t cu = 0, nsa_cu = 0;
    std::vector<int32_t> row_lens;
    for (int i = 0; i < p.bs; ++i) {
      const int rows = p.extend_lens ? std::max(p.extend_lens[i], 0) : p.rows_per_request;
      const auto seq_len = static_cast<int32_t>(load(p.seq_lens, p.seq_lens_64, i));
      const int32_t cache_len = seq_len + p.cache_offset;
      const int32_t* src = p.req_to_token + slot_of(p, i) * p.token_pitch;
      const int64_t cols = std::min<int64_t>(cache_len, p.token_cols);
      put(dst.field[kCacheSeqlens], i, cache_len);
      put(dst.field[kCuSeqlensK], i + 1, cu = add(cu, cache_len));
      for (int row = 0; row < rows; ++row) {
        const int64_t n = row_lens.size();
        const int32_t len = std::max(cache_len - rows + 1 + row, p.row_floor), nsa_len = std::min(len, p.nsa_index_topk);
        row_lens.push_back(len);
        put(dst.field[kSeqlensExpanded], n, len);
        put(dst.field[kContextLens2d], n, len);
        put(dst.field[kNsaCacheSeqlens], n, nsa_len);
        put(dst.field[kNsaCuSeqlensK], n + 1, nsa_cu = add(nsa_cu, nsa_len));
        if (int32_t* table = dst.field[kPageTable1])
          for (int64_t col = 0; col < std::min(cols, dst.table_cols); ++col) table[n * dst.table_pitch + col] = src[col];
        if (int32_t* table = dst.field[kRealPageTable])
          for (int64_t page = 0; page < dst.page_cols && page << p.page_shift < cols; ++page)
            table[n * dst.page_pitch + page] = src[page << p.page_shift] >> p.page_shift;
      }
    }
    if (dst.field[kSchedule]) write_schedule(row_lens, p.segment_len, p.extra_last, p.num_sms, dst.field[kSchedule]);
    if (dst.field[kTopkPlan]) write_topk_plan(row_lens, p.topk_buckets, dst.field[kTopkPlan]);
    if (dst.field[kNumSplits]) std::copy_n(p.num_splits.src, p.num_splits.size, dst.field[kNumSplits]);
    if (dst.field[kTileMetadata]) std::copy_n(p.tile_metadata.src, p.tile_metadata.size, dst.field[kTileMetadata]);
  }
}

}  // namespace nsa_fused
