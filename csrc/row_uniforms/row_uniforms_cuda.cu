// row_uniforms on the GPU: one thread a row, ten rounds of Philox in registers.
#include "../common/cuda_launch.cuh"
#include "../common/philox.h"
#include "row_uniforms.h"

namespace nlhf {
namespace {

constexpr int kMaxThreads = 1024;

__global__ void __launch_bounds__(kMaxThreads) fill_uniforms(const RowUniforms p) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  const uint64_t bits = random_bits(p.seed[row * p.seed_stride], p.row_ids[row], p.step[row * p.step_stride], p.stream);
  p.out[row] = open_unit(bits);
}

}  // namespace

int row_uniforms_cuda(const RowUniforms& problem, int threads, void* cuda_stream) {
  if (problem.rows == 0) return cudaSuccess;  // a grid of no blocks is an error to CUDA
  if (threads < 32 || threads > kMaxThreads || threads % 32 != 0) return cudaErrorInvalidValue;
  const int64_t blocks = (problem.rows + threads - 1) / threads;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const LaunchShape shape{static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0};
  return launch(fill_uniforms, shape, cuda_stream, problem);
}

}  // namespace nlhf
