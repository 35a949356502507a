// The same operations on the CPU: what runs without a GPU, and what the tests run everywhere.
#pragma once

#include "generate_params.h"
#include "params.h"

namespace nsa_fused {

void copy_cpu(const CopyParams<kMaxDestinations>& params);
void generate_cpu(const GenerateParams<kMaxDestinations>& params);

}  // namespace nsa_fused
