#include "cpu.h"

#include <cstring>

namespace nsa_fused {

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

}  // namespace nsa_fused
