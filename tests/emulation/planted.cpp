// Kernels that test the emulator: known faults that it must report, and collectives with known results.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../../csrc/common/cuda_block.cuh"
#include "../../csrc/common/cuda_launch.cuh"

namespace {

using nlhf::kWholeWarp;

__global__ void barrier_in_branch(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void barriers_in_two_branches(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void shuffle_after_return(int* out) {
  if (threadIdx.x == 7) return;
  out[threadIdx.x] = __shfl_xor_sync(kWholeWarp, 1, 1);
}

__global__ void write_past_dynamic_shared(int* out) {
  float* shared = nlhf::dynamic_shared<float>();
  shared[threadIdx.x] = 1.0f;
  out[threadIdx.x] = 1;
}

// Lane i reads the value of lane i + 1, which without the barrier is not yet written and still poison.
__global__ void neighbour(float* from_static, float* from_dynamic, bool with_barrier) {
  __shared__ float fixed[64];
  float* dynamic = nlhf::dynamic_shared<float>();
  fixed[threadIdx.x] = dynamic[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (with_barrier) __syncthreads();
  from_static[threadIdx.x] = fixed[(threadIdx.x + 1) % 64];
  from_dynamic[threadIdx.x] = dynamic[(threadIdx.x + 1) % 64];
}

// Each result is a deviation from CUDA's documentation, so all must be 0.
__global__ void collectives(double* deviation) {
  const int thread = threadIdx.x, lane = thread % 32;
  double* mine = deviation + thread * 12;
  mine[0] = __shfl_sync(kWholeWarp, lane, 5) - 5;
  mine[1] = __shfl_up_sync(kWholeWarp, lane, 3) - (lane < 3 ? lane : lane - 3);
  mine[2] = __shfl_down_sync(kWholeWarp, 1.0 * lane, 3, 8) - (lane % 8 < 5 ? lane + 3 : lane);
  mine[3] = __ballot_sync(kWholeWarp, lane % 2) - 0xAAAAAAAAu;
  mine[4] = __any_sync(kWholeWarp, lane == 9) - 1 + __all_sync(kWholeWarp, lane != 9);
  mine[5] = __syncthreads_count(lane < 4) - 4 * static_cast<int>(blockDim.x) / 32;
  if (lane < 16) {  // halves of a warp wait separately
    mine[6] = __shfl_xor_sync(0x0000FFFFu, lane, 1) - (lane ^ 1);
  } else {
    mine[6] = __shfl_xor_sync(0xFFFF0000u, lane, 2) - (lane ^ 2);
  }
  mine[7] = nlhf::warp_sum(1.0f * lane) - 496;
  mine[8] = nlhf::warp_max<8>(lane * 1.0) - (lane / 8 * 8 + 7);
  const double four[4] = {1.0 * lane, 2.0 * lane, 3.0 * lane, 4.0 * lane};
  mine[9] = nlhf::warp_sum_of_four(four) - 496.0 * (lane / 8 + 1);
  __shared__ double scratch[2][32];
  mine[10] = nlhf::block_sum(1.0 * thread, scratch[0]) - blockDim.x * (blockDim.x - 1) / 2.0;
  mine[11] = nlhf::block_max(1.0 * thread, scratch[1]) - (blockDim.x - 1);
}

// The last block to arrive, whichever it is, reads the sum over all blocks.
__global__ void last_block_finishes(int* sum, unsigned* arrived, int* total, int* last) {
  if (threadIdx.x != 0) return;
  atomicAdd(sum, static_cast<int>(blockIdx.x));
  __threadfence();
  if (atomicAdd(arrived, 1u) + 1 < gridDim.x) return;
  *total = *sum;
  *last = static_cast<int>(blockIdx.x);
}

template <typename... Parameters>
int run(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared,
        const std::common_type_t<Parameters>&... arguments) {
  return nlhf::launch(kernel, {blocks, threads, shared}, nullptr, arguments...);
}

}  // namespace

extern "C" {

int planted_barrier_in_branch(int* out) { return run(barrier_in_branch, 2, 64, 0, out); }
int planted_barriers_in_two_branches(int* out) { return run(barriers_in_two_branches, 2, 64, 0, out); }
int planted_shuffle_after_return(int* out) { return run(shuffle_after_return, 1, 32, 0, out); }
int planted_write_past_shared(int* out, size_t bytes) { return run(write_past_dynamic_shared, 1, 64, bytes, out); }
int planted_neighbour(float* from_static, float* from_dynamic, bool with_barrier) {
  return run(neighbour, 1, 64, 64 * sizeof(float), from_static, from_dynamic, with_barrier);
}
int planted_collectives(double* deviation, int threads) { return run(collectives, 1, threads, 0, deviation); }
int planted_last_block(int* sum, unsigned* arrived, int* total, int* last, int blocks) {
  return run(last_block_finishes, blocks, 32, 0, sum, arrived, total, last);
}
float planted_bfloat16(float value) { return __bfloat162float(__float2bfloat16(value)); }
float planted_half(float value) { return __half2float(__float2half(value)); }

}  // extern "C"
