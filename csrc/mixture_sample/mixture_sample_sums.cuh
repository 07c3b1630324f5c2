// Sums of exponentials for mixture_sample: a warp's online sums in float, and choices between sums in double.
#pragma once

#include <cfloat>

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

// 2^x for x <= 32 on the FMA units, added to `sum`: ex2 runs on units that start one warp in eight cycles, and a loop
// that waits for them is faster if these do a part. x is n + r with an integer n and |r| <= 1/2: adding 1.5 * 2^23 rounds
// to n and leaves it in the low bits; 2^r is a polynomial (error at most 1.7e-7, exactly 1 at 0); 2^-127 and below are 0.
NLHF_DEVICE float add_exp2_fma(float x, float sum) {
  constexpr float kToInteger = 12582912.0f, kFlush = -127.0f;
#if defined(__CUDACC__)
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(kFlush));  // NaN stays
#else
  x = x < kFlush ? kFlush : x;
#endif
  const float shifted = __fadd_rn(x, kToInteger);
  const float rest = __fadd_rn(x, -__fadd_rn(shifted, -kToInteger));
  float power = __fmaf_rn(rest, 0.00132647145f, 0.00967151299f);
  power = __fmaf_rn(power, rest, 0.0555073395f);
  power = __fmaf_rn(power, rest, 0.240222424f);
  power = __fmaf_rn(power, rest, 0.693147004f);
  power = __fmaf_rn(power, rest, 1.0f);
  return __fmaf_rn(power, __uint_as_float((__float_as_uint(shifted) << 23) + 0x3F800000u), sum);
}

// The unit of a sum of exponentials: e^x is computed as 2^(factor * x - base), one multiply-add before ex2. `base` is
// factor * top, rounded, so a sum is 2^(factor * top - base) times what it is in units of e^top. From 2^29 on, where that
// could overflow, the factor is 1: all values but `top` itself are so far below it that both powers are 0.
struct ExpUnit {
  float factor, base;
  NLHF_DEVICE ExpUnit of(float top) {
    const float factor = std::fabs(top) < 0x1p29f ? kLog2E : 1.0f;
    return {factor, __fmul_rn(factor, top)};
  }
  // Return this unit in units of e^top.
  __device__ __forceinline__ float in_units_of(float top) const {
    const float excess = __fmaf_rn(factor, top, -base);
    constexpr float kLn2 = 0.693147181f, kSmall = 0x1p-12f;  // from here on, the square of the exponent would count
    return std::fabs(excess) < kSmall ? __fmaf_rn(excess, -kLn2, 1.0f) : exp2_fast(-excess);
  }
};

// Return the factor that brings a sum from one base to a larger one. The distance without its sign, since bases of two
// factors may be out of order: those are far apart, and the factor is 0.
NLHF_DEVICE float rescale(float from, float to) { return exp2_fast(-std::fabs(from - to)); }

// Sum of e^x as e^top * mass. A tile of -inf only has top -inf and mass 0; NaN and +inf end as a mass of NaN.
// In float, where terms below 2^-24 of the sum so far are lost: a lane sums at most 64 elements of a tile, so one large
// term can lose only its neighbours in the lane; sums over tiles are in double.
struct LogSum {
  float top = -FLT_MAX;  // not -inf, from which -inf cannot be subtracted
  float base = -FLT_MAX;
  float mass = 0.0f;  // in units of 2^base

  // Add elements x with maximum `highest`: one exponential each and one to rescale the old sum; no branch. Of every
  // eight exponentials, `kEx2` are left to ex2.
  template <int kEx2>
  __device__ __forceinline__ void add(const float (&x)[kPerLane], float highest) {
    top = std::fmax(highest, top);
    const ExpUnit unit = ExpUnit::of(top);
    const float shrink = rescale(base, unit.base);
    base = unit.base;
    float parts[4];  // independent, so that the additions overlap
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float power = __fmaf_rn(unit.factor, x[i], -base);
      if (i % 8 >= kEx2) {
        parts[i % 4] = add_exp2_fma(power, parts[i % 4]);  // kEx2 is at least 4: not the first of its part
      } else {
        parts[i % 4] = i < 4 ? exp2_fast(power) : parts[i % 4] + exp2_fast(power);
      }
    }
    mass = mass * shrink + ((parts[0] + parts[1]) + (parts[2] + parts[3]));
  }
};

// The sums of up to four series over a warp: lane l returns that of series l / 8, of whichever `kSeries` has; with one
// series, every lane returns it. Fewer shuffles than one series after the other.
template <int kSeries>
NLHF_DEVICE float2 sums_over_warp(const LogSum* series) {
  static_assert(kSeries >= 1 && kSeries <= 4, "a lane carries four");
  float top[4], mass[4];
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    top[s] = s < kSeries ? warp_max_ordered(series[s].top) : 0.0f;
    mass[s] = s < kSeries ? series[s].mass * rescale(series[s].base, ExpUnit::of(top[s]).base) : 0.0f;
  }
  const int own = kSeries == 1 ? 0 : threadIdx.x % kWarpSize / 8;
  const float highest = own < 2 ? (own == 0 ? top[0] : top[1]) : (own == 2 ? top[2] : top[3]);
  const float sum = kSeries == 1 ? warp_sum(mass[0]) : warp_sum_of_four(mass);
  return {sum == 0.0f ? -INFINITY : highest, sum * ExpUnit::of(highest).in_units_of(highest)};
}

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
