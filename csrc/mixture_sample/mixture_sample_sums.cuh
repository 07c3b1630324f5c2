// Sums of exponentials for mixture_sample: a warp's online sums in float, and choices between sums in double.
#pragma once

#include "../common/cuda_block.cuh"
#include "mixture_sample_row.cuh"

namespace nlhf {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr float kLog2E = 1.44269504f;
constexpr float kSmallestExponent = -126.0f;  // 2 to anything below is 0 in exp2_fast

// 2^x for x <= 0 in one instruction: error at most 2 ulp, exactly 1 at 0, and 0 for results below the normal floats.
NLHF_DEVICE float exp2_fast(float x) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return x < kSmallestExponent ? 0.0f : std::exp2(x);
#endif
}

// e^(z - top). The product is rounded before ex2, so that every pass computes the same bits.
NLHF_DEVICE float exp_below(float z, float top) { return exp2_fast(__fmul_rn(z - top, kLog2E)); }

// Sum of e^x as e^top * mass. A tile of -inf only has top -inf and mass 0; NaN and +inf end as a mass of NaN.
// In float, where terms below 2^-24 of the sum so far are lost: a lane sums at most 64 elements of a tile, so one large
// term can lose only its neighbours in the lane; sums over tiles are in double.
struct LogSum {
  float top = -INFINITY;
  float mass = 0.0f;

  // -inf - -inf is NaN, so subtract 0 while the maximum is -inf.
  NLHF_DEVICE float center(float top) { return top == -INFINITY ? 0.0f : top; }

  // Add elements x with maximum `highest`: one exponential each and one to rescale the old sum; no branch.
  __device__ __forceinline__ void add(const float (&x)[kPerLane], float highest) {
    highest = std::fmax(highest, top);
    const float subtract = center(highest);
    const float shrink = exp_below(top, subtract);
    float parts[4] = {};  // independent, so that the additions overlap
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) parts[i % 4] += exp_below(x[i], subtract);
    mass = mass * shrink + ((parts[0] + parts[1]) + (parts[2] + parts[3]));
    top = highest;
  }

  // Return the sum over the warp, in every lane.
  __device__ __forceinline__ float2 over_warp() const {
    const float highest = warp_max(top);
    return {highest, warp_sum(mass * exp_below(top, center(highest)))};
  }
};

// Return a stored sum's mass in units of e^top; NaN stays NaN.
NLHF_DEVICE float mass_below(float2 sum, float top) { return sum.y * exp_below(sum.x, top); }

// Sums over the lanes of a warp: before the calling one, and of all.
template <typename T>
struct WarpSums {
  T before, all;
};

template <typename T>
NLHF_DEVICE WarpSums<T> warp_sums(T value) {
  const int lane = threadIdx.x % kWarpSize;
  T inclusive = value;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T below = __shfl_up_sync(kWholeWarp, inclusive, distance);
    if (lane >= distance) inclusive += below;
  }
  const T exclusive = __shfl_up_sync(kWholeWarp, inclusive, 1);
  return {lane == 0 ? T(0) : exclusive, __shfl_sync(kWholeWarp, inclusive, kWarpSize - 1)};
}

// Return the sum of `value` over the threads before the calling one, and in `total` that over all. One barrier inside;
// `scratch` (a value a warp) may be reused only after a further one.
template <typename T>
NLHF_DEVICE T block_sum_before(T value, T* scratch, T* total) {
  const int warp = threadIdx.x / kWarpSize;
  const WarpSums<T> own = warp_sums(value);
  if (threadIdx.x % kWarpSize == 0) scratch[warp] = own.all;
  __syncthreads();
  T before = 0, all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = all;
    all += scratch[w];
  }
  *total = all;
  return before + own.before;
}

// Equation (2) over the lanes of a warp: the first lane whose mass raises the running sum above the target. A lane
// without mass is never chosen.
struct Crossing {
  int first;  // -1: no running sum exceeds the target
  int last;   // the last with any mass, chosen where rounding leaves no sum above the target; -1: no mass
};

NLHF_DEVICE Crossing warp_crossing(double before, double mass, double target) {
  const unsigned with_mass = __ballot_sync(kWholeWarp, mass > 0);
  const unsigned beyond = __ballot_sync(kWholeWarp, mass > 0 && before + mass > target);
  return {__ffs(static_cast<int>(beyond)) - 1, with_mass ? 31 - __clz(static_cast<int>(with_mass)) : -1};
}

}  // namespace
}  // namespace nlhf
