// row_uniforms on the CPU: ten rounds of 32-bit multiplications a row, vectorised by the compiler.
#include "../common/philox.h"
#include "row_uniforms.h"

namespace nlhf {
namespace NLHF_LEVEL {

void row_uniforms(const RowUniforms& problem, Part rows, int threads) {
  const RowUniforms p = problem;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows.count() > 4096)
  for (int64_t row = rows.first; row < rows.last; ++row) {
    const uint64_t bits =
        random_bits(p.seed[row * p.seed_stride], p.row_ids[row], p.step[row * p.step_stride], p.stream);
    p.out[row] = open_unit(bits);
  }
}

}  // namespace NLHF_LEVEL
}  // namespace nlhf
