// The arguments of row_uniforms, in the order of ops/row_uniforms/native.py.
#pragma once

#include "../common/binding.h"
#include "row_uniforms.h"

namespace nlhf {

static RowUniforms read_row_uniforms(Arguments& arguments) {
  RowUniforms p{};
  arguments >> p.seed >> p.seed_stride >> p.row_ids >> p.step >> p.step_stride >> p.stream >> p.rows >> p.out;
  require((p.seed_stride | p.step_stride) >> 1 == 0, "row_uniforms: seed_stride, step_stride: expected 0 or 1");
  require(p.stream < 256, "row_uniforms: stream: expected at most 255");
  require(p.rows >= 0, "row_uniforms: rows: expected at least 0");
  require(p.rows == 0 || (p.seed && p.row_ids && p.step && p.out), "row_uniforms: expected addresses");
  return p;
}

}  // namespace nlhf
