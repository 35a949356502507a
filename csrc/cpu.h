// The same operations on the CPU: what runs without a GPU, and what the tests run everywhere.
#pragma once

#include "params.h"

namespace nsa_fused {

void copy_cpu(const CopyParams<kMaxDestinations>& params);

}  // namespace nsa_fused
