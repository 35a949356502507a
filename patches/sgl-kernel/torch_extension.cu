// The in-tree kernel as an extension of its own, for load.py; within sgl-kernel, common_extension.cc registers it.
#include <torch/library.h>

#include "csrc/attention/fused_metadata_copy.cu"

TORCH_LIBRARY(nsa_fused_sgl_kernel, m) {
  m.def("fused_metadata_copy_cuda", &fused_metadata_copy_cuda);
  m.def("fused_metadata_copy_multi_cuda", &fused_metadata_copy_multi_cuda);
}
