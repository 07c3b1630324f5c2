// row_uniforms: out[r] = the uniform in (0, 1) of (seed, row id, step, stream). See common/philox.h.
#pragma once

#include <cstdint>

#include "../common/levels.h"

namespace nlhf {

struct RowUniforms {
  const int64_t* seed;
  int64_t seed_stride;     // 0: one seed for all rows
  const int64_t* row_ids;  // (rows), contiguous
  const int64_t* step;
  int64_t step_stride;  // 0: one step for all rows
  uint32_t stream;
  int64_t rows;
  double* out;  // (rows), contiguous
};

NLHF_DECLARE_CPU(row_uniforms, RowUniforms)

// `threads` of a block: a multiple of 32, at most 1024. Return a cudaError_t.
int row_uniforms_cuda(const RowUniforms& problem, int threads, void* cuda_stream);

}  // namespace nlhf
