// The arguments of row_uniforms as they come from Python (ops/row_uniforms/native.py), for both bindings.
#pragma once

#include "../common/binding.h"
#include "row_uniforms.h"

namespace nlhf {

static RowUniforms row_uniforms_problem(std::uintptr_t seed, int64_t seed_stride, std::uintptr_t row_ids,
                                        std::uintptr_t step, int64_t step_stride, uint32_t stream, int64_t rows,
                                        std::uintptr_t out) {
  require((seed_stride | step_stride) >> 1 == 0, "row_uniforms: seed_stride, step_stride: expected 0 or 1");
  require(stream < 256, "row_uniforms: stream: expected at most 255");
  require(rows >= 0, "row_uniforms: rows: expected at least 0");
  require(rows == 0 || (seed != 0 && row_ids != 0 && step != 0 && out != 0), "row_uniforms: expected addresses");
  return {reinterpret_cast<const int64_t*>(seed), seed_stride, reinterpret_cast<const int64_t*>(row_ids),
          reinterpret_cast<const int64_t*>(step), step_stride, stream, rows, reinterpret_cast<double*>(out)};
}

}  // namespace nlhf
