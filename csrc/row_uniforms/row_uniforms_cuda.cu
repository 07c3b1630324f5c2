// row_uniforms on the GPU: one thread a row, ten rounds of Philox in registers.
#include "../common/cuda_launch.cuh"
#include "../common/philox.h"
#include "row_uniforms.h"

namespace nlhf {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) fill_uniforms(const RowUniforms p) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= p.rows) return;
  const uint64_t bits = random_bits(p.seed[row * p.seed_stride], p.row_ids[row], p.step[row * p.step_stride], p.stream);
  p.out[row] = open_unit(bits);
}

}  // namespace

int row_uniforms_cuda(const RowUniforms& problem, void* cuda_stream) {
  if (problem.rows == 0) return cudaSuccess;  // a grid of no blocks is an error to CUDA
  const auto blocks = static_cast<unsigned>((problem.rows + kThreads - 1) / kThreads);
  return launch(fill_uniforms, {blocks, kThreads, 0}, cuda_stream, problem);
}

}  // namespace nlhf
