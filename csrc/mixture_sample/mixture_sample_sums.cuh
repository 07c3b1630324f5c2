// Sums of exponentials for mixture_sample: a warp's online sums in float, and a block's choices between sums in double.
#pragma once

#include "../common/cuda_block.cuh"
#include "../common/scalar_exp.h"
#include "mixture_sample_row.cuh"

namespace nlhf {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr float kLog2E = 1.44269504f;
constexpr float kSmallestExponent = -126.0f;  // 2 to anything below is 0 in exp2_fast

// 2^x for x <= 0, one instruction: off by two units in the last place at most, exactly 1 at 0, results below the
// normal floats are 0.
NLHF_DEVICE float exp2_fast(float x) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return x < kSmallestExponent ? 0.0f : std::exp2(x);
#endif
}

// e^(z - top). The product is rounded before ex2, so that every pass gets the same bits.
NLHF_DEVICE float exp_below(float z, float top) { return exp2_fast(__fmul_rn(z - top, kLog2E)); }

// Sum of e^x as e^top * mass. A tile of -inf only has top -inf and mass 0; NaN and +inf end as a mass of NaN. In float,
// which swallows what is 2^-24 of the sum so far: a lane's share of a tile is 64 elements at most, so that one large
// term costs no more than its neighbours in the lane; beyond a tile everything is summed in double.
struct LogSum {
  float top = -INFINITY;
  float mass = 0.0f;

  // -inf - -inf is NaN, so while there is nothing but -inf, subtract 0 instead.
  NLHF_DEVICE float center(float top) { return top == -INFINITY ? 0.0f : top; }

  // One exponential an element and one a call to move the old sum; no branch.
  __device__ __forceinline__ void add(const float (&x)[kPerLane]) {
    float highest = x[0];
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) highest = std::fmax(highest, x[i]);
    highest = std::fmax(highest, top);
    const float subtract = center(highest);
    const float shrink = exp_below(top, subtract);
    float parts[4] = {};  // independent, so that the additions overlap
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) parts[i % 4] += exp_below(x[i], subtract);
    mass = mass * shrink + ((parts[0] + parts[1]) + (parts[2] + parts[3]));
    top = highest;
  }

  // The sum over the warp, in every lane.
  __device__ __forceinline__ float2 over_warp() const {
    const float highest = warp_max(top);
    return {highest, warp_sum(mass * exp_below(top, center(highest)))};
  }
};

// A stored sum's value in units of e^top, in double. NaN stays NaN.
NLHF_DEVICE double mass_below(float2 sum, float top) {
  return sum.y * exp_nonpositive(static_cast<double>(sum.x) - top);
}

// Sum of `value` over the threads before the calling one; `total` over all. One barrier inside; `scratch` (a value a
// warp) may be reused only after a further one.
template <typename T>
NLHF_DEVICE T block_sum_before(T value, T* scratch, T* total) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  T inclusive = value;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T below = __shfl_up_sync(kWholeWarp, inclusive, distance);
    if (lane >= distance) inclusive += below;
  }
  const T exclusive = __shfl_up_sync(kWholeWarp, inclusive, 1);
  if (lane == kWarpSize - 1) scratch[warp] = inclusive;
  __syncthreads();
  T before = 0, all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = all;
    all += scratch[w];
  }
  *total = all;
  return lane == 0 ? before : before + exclusive;
}

// Where a running sum over the block's threads first exceeds a target.
struct Crossing {
  int thread;     // -1: there is no mass at all
  double before;  // the sum over the threads before the calling one
  double target;
  double total;
};

struct CrossingScratch {
  double sums[kWarps];
  int first[kWarps], last[kWarps];
};

// Equation (2) over the threads: the first whose mass lifts the running sum above fraction * total. The sum must grow
// there, so a thread of no mass is never taken; where rounding leaves none, it is the last with any mass.
NLHF_DEVICE Crossing block_crossing(double mass, double fraction, CrossingScratch& scratch) {
  Crossing crossing;
  crossing.before = block_sum_before(mass, scratch.sums, &crossing.total);
  crossing.target = fraction * crossing.total;
  const unsigned with_mass = __ballot_sync(kWholeWarp, mass > 0);
  const unsigned beyond = __ballot_sync(kWholeWarp, mass > 0 && crossing.before + mass > crossing.target);
  const int warp = threadIdx.x / kWarpSize, start = warp * kWarpSize;
  if (threadIdx.x % kWarpSize == 0) {
    scratch.first[warp] = beyond ? start + __ffs(static_cast<int>(beyond)) - 1 : -1;
    scratch.last[warp] = with_mass ? start + 31 - __clz(static_cast<int>(with_mass)) : -1;
  }
  __syncthreads();
  int first = -1, last = -1;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (first < 0) first = scratch.first[w];
    last = scratch.last[w] >= 0 ? scratch.last[w] : last;
  }
  crossing.thread = first >= 0 ? first : last;
  return crossing;
}

}  // namespace
}  // namespace nlhf
