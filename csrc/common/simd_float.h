// Arithmetic on whole vectors of float32, in registers: loads, maxima, exp, masks. Include in files that are compiled
// per level only.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace nlhf {
namespace NLHF_LEVEL {
using Floats = Vector<float>;
using Words = Vector<uint32_t>;
using Mask = Vector<int32_t>;  // a lane is all ones or all zeros, as comparisons give it

constexpr int64_t kLanes = VectorOf<float>::lanes;

// Return the value unchanged, but keep the compiler from fusing a product with a later sum: the product is rounded.
static inline Floats rounded(Floats value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__SSE2__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
  return value;
}

static inline float largest_lane(Floats values) {
  float lanes[kLanes], best = -__builtin_inff();
  store(lanes, values);
  for (const float lane : lanes) best = lane > best ? lane : best;
  return best;
}

// Bit i: lane i of the mask is set.
static inline uint32_t lane_bits(Mask mask) {
#if defined(__AVX512DQ__)
  return static_cast<uint32_t>(_mm512_movepi32_mask((__m512i)mask));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(mask[lane] & 1) << lane;
  return bits;
#endif
}

static inline Floats where(Mask mask, Floats values) { return mask ? values : Floats{}; }  // 0 elsewhere

// exp(x) = scale * (1 + tail) for arguments at most 0 and not below kExpFlush. See scalar_exp.h for the idea; here the
// polynomial is the minimax one of degree 6 with p(0) = p'(0) = 1 (relative error 3e-9) and `magic` includes the
// exponent's bias.
struct ExpParts {
  Floats tail, scale;
};

constexpr float kExpFlush = -87.0f;

static inline ExpParts exp_parts(Floats x) {
  constexpr float magic = 0x1.8p23f + 127.0f;
  const Floats shifted = x * 0x1.715476p0f + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Floats p = r * 0x1.6a23d0p-10f + 0x1.123a20p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  return {p * r, (Floats)((Words)shifted << 23)};
}

// exp of arguments at most 0, to 1 ulp; 0 below -87, NaN for NaN. Results that overflow below -87 are
// replaced at the end; clamping the argument first would cost more.
static inline Floats exp_nonpositive(Floats x) {
  const ExpParts parts = exp_parts(x);
  return x < kExpFlush ? Floats{} : (parts.tail + 1.0f) * parts.scale;
}

// exp(x) - 1 of arguments at most 0, to 2 ulp, without cancellation near 0.
static inline Floats expm1_nonpositive(Floats x) {
  const ExpParts parts = exp_parts(x);
  return x < kExpFlush ? broadcast(-1.0f) : parts.tail * parts.scale + (parts.scale - 1.0f);
}

// Add each lane to one of kLanes sums in double.
static inline void add_lanes(Floats values, double* sums) {
  float lanes[kLanes];
  store(lanes, values);
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] += lanes[lane];
}

static inline double sum_of_lanes(const double* sums) {
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
  return total;
}

}  // namespace NLHF_LEVEL
}  // namespace nlhf
