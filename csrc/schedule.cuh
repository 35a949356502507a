// DeepGEMM's paged-MQA schedule from the lengths of the rows.
#pragma once

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "lengths.cuh"

namespace nsa_fused {

struct Segments {
  uint32_t rows, segments;
  __device__ friend Segments operator+(Segments a, Segments b) { return {a.rows + b.rows, a.segments + b.segments}; }
};

template <int kThreads>
struct ScheduleShared {
  using Reduce = cub::BlockReduce<uint32_t, kThreads>;
  using Scan = cub::BlockScan<Segments, kThreads>;
  union {
    typename Reduce::TempStorage reduce;
    typename Scan::TempStorage scan;
  };
  uint32_t total;
  Segments begins[kThreads];  // what lies before each request of this round
};

// Divides the segments of all rows evenly over the SMs, in order: schedule[sm] = (row, segment in it) where SM sm
// begins, and (number of rows, 0) where there is nothing left. Unsigned throughout, as DeepGEMM's.
template <int kThreads, int kCapacity>
__device__ void write_schedule(const GenerateParams<kCapacity>& p, const GenerateDst& dst, ScheduleShared<kThreads>& shared) {
  const auto segments = [&](const Request& r, int row) {
    return (static_cast<uint32_t>(r.len(row)) + p.segment_len - 1) / p.segment_len;
  };
  const auto count = [&](int i) {
    const Request r = request(p, i);
    Segments sum{static_cast<uint32_t>(r.rows), 0};
    for (int row = 0; row < r.rows; ++row) sum.segments += segments(r, row);
    return sum;
  };

  uint32_t mine = 0;
  for (int i = threadIdx.x; i < p.bs; i += kThreads) mine += count(i).segments;
  using Shared = ScheduleShared<kThreads>;
  mine = typename Shared::Reduce(shared.reduce).Sum(mine);
  if (threadIdx.x == 0) shared.total = mine;
  __syncthreads();
  const Segments* begins = shared.begins;
  const uint32_t total = shared.total, each = total / p.num_sms, more = total % p.num_sms;
  const uint32_t plain = p.extra_last ? p.num_sms - more : 0;  // SMs before those with one segment more
  const auto first_segment = [&](uint32_t sm) { return sm * each + (sm > plain ? min(sm - plain, more) : 0); };
  auto* schedule = reinterpret_cast<uint32_t*>(dst.field[kSchedule]);  // [num_sms + 1, 2]

  Segments before{};
  for (int first = 0; first < p.bs; first += kThreads) {
    const int i = first + threadIdx.x;
    Segments at, round;
    typename Shared::Scan(shared.scan).ExclusiveSum(i < p.bs ? count(i) : Segments{}, at, round);
    shared.begins[threadIdx.x] = before + at;
    __syncthreads();
    for (uint32_t sm = threadIdx.x; sm <= p.num_sms; sm += kThreads) {
      const uint32_t segment = first_segment(sm);
      if (segment < before.segments || segment >= before.segments + round.segments) continue;
      int low = 0, high = min(kThreads, p.bs - first);  // the last request that begins at or before this segment
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (begins[middle].segments <= segment ? low : high) = middle;
      }
      const Request r = request(p, first + low);
      uint32_t left = segment - begins[low].segments;
      int row = 0;
      for (; left >= segments(r, row); ++row) left -= segments(r, row);
      schedule[2 * sm] = begins[low].rows + row;
      schedule[2 * sm + 1] = left;
    }
    before = before + round;
    __syncthreads();
  }
  for (uint32_t sm = threadIdx.x; sm <= p.num_sms; sm += kThreads) {
    if (first_segment(sm) < total) continue;
    schedule[2 * sm] = before.rows;
    schedule[2 * sm + 1] = 0;
  }
}

}  // namespace nsa_fused
