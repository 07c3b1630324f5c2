// One row of mixture_sample's inputs on the GPU: its settings, and how its logits are mixed to z, equation (1).
//
// z is rounded in one of two ways, the same in all passes over a row:
//   exact    rows with filters, and greedy ones, compare values of z, two of which may be equal in one rounding and not
//            in another. Products and sums are rounded one by one, as the oracle's are, with intrinsics that the
//            compiler may not fuse.
//   folded   rows without filters, sampled at a temperature: the weights include 1 / temperature, and each model adds
//            one fused multiply-add to z.
#pragma once

#include <cfloat>

#include "mixture_sample_slice.cuh"

namespace nlhf {
namespace {

// Return sum + weight * value, the product rounded before the sum. The first model's sum is 0: fusing changes nothing.
NLHF_DEVICE float add_product(bool is_first, float sum, float weight, float value) {
  return is_first ? __fmaf_rn(weight, value, 0.0f) : __fadd_rn(sum, __fmul_rn(weight, value));
}

template <Storage kStorage, int kModels>
struct Row {
  using LaneSlice = Slice<kStorage>;
  const MixtureSample& p;  // kernel parameters are read from there, which costs no registers
  int64_t index;
  const unsigned char* data[kModels];  // each model's first element
  float weights[kModels];
  float temperature;  // 1 where greedy
  float inverse;      // of it
  unsigned flags;     // below; in one register

  __device__ __forceinline__ int vocabulary() const { return static_cast<int>(p.vocabulary); }
  __device__ __forceinline__ Model model(int m) const {
    return {data[m], p.logits[m].dtype};
  }
  __device__ __forceinline__ const float* bias() const { return p.bias + index * p.bias_stride; }

  static constexpr int kRequested = 8, kAligned = 16, kAllAligned = 28, kFolded = 29, kGreedy = 30, kDivides = 31;
  __device__ __forceinline__ bool is_used(int m) const { return flags >> m & 1; }  // its weight is not 0
  // Whether the model's log-probability is requested.
  __device__ __forceinline__ bool is_requested(int m) const { return flags >> (kRequested + m) & 1; }
  // Whether the row's address allows loads of whole chunks; index kModels is the bias.
  __device__ __forceinline__ bool is_aligned(int m) const { return flags >> (kAligned + m) & 1; }
  __device__ __forceinline__ bool all_aligned() const { return flags >> kAllAligned & 1; }  // of the models
  __device__ __forceinline__ bool is_folded() const { return flags >> kFolded & 1; }
  __device__ __forceinline__ bool is_greedy() const { return flags >> kGreedy & 1; }
  __device__ __forceinline__ bool divides() const { return flags >> kDivides & 1; }

  // Divide mixed logits by the temperature, for exact rows. Where filters compare values, rounded as a division is
  // (Markstein's theorem: one step from the product with a correctly rounded inverse); elsewhere the product suffices.
  template <int kCount>
  __device__ __forceinline__ void divide(float (&z)[kCount]) const {
    if (!divides()) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) z[i] = __fmul_rn(z[i], inverse);
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float product = __fmul_rn(z[i], inverse);
      const float remainder = __fmaf_rn(-product, temperature, z[i]);
      z[i] = std::fabs(product) < INFINITY ? __fmaf_rn(remainder, inverse, product) : product;
    }
  }
};

NLHF_DEVICE bool is_multiple(const void* address, unsigned bytes) {
  return reinterpret_cast<std::uintptr_t>(address) % bytes == 0;
}

// Return weight * factor, clamped to normal numbers: overflow would give 0 * inf for a logit of 0, underflow 0 * -inf
// for a masked one.
NLHF_DEVICE float folded_weight(float weight, float factor) {
  const float size = std::fmin(std::fmax(std::fabs(weight) * factor, FLT_MIN), FLT_MAX);
  return std::copysign(size, weight);
}

template <Storage kStorage, int kModels>
NLHF_DEVICE Row<kStorage, kModels> open_row(const MixtureSample& p, int64_t index) {
  using RowType = Row<kStorage, kModels>;
  RowType row{p, index, {}, {}, 1.0f, 1.0f, 0};
  const float* settings = p.settings + index * p.settings_stride;
  if (settings[kTemperature] <= 0.0f) {
    row.flags |= 1u << RowType::kGreedy;
  } else {
    row.temperature = settings[kTemperature];
    row.inverse = 1.0f / row.temperature;
    if (row.inverse > FLT_MAX) row.inverse = FLT_MAX;  // 0 * inf is NaN
    if (!p.filtered) {
      row.flags |= 1u << RowType::kFolded;
    } else if (row.temperature != 1.0f) {
      row.flags |= 1u << RowType::kDivides;
    }
  }
  row.flags |= (p.logprob_mask & ((1u << p.models) - 1)) << RowType::kRequested;
  bool all_aligned = true;
#pragma unroll
  for (int m = 0; m < kModels; ++m) {
    row.weights[m] = m < p.models ? settings[kWeights + m] : 0.0f;
    if (row.weights[m] != 0.0f) {
      row.flags |= 1u << m;
      if (row.is_folded()) row.weights[m] = folded_weight(row.weights[m], row.inverse);
    }
    const Logits& logits = p.logits[m];
    const unsigned bytes = logits.dtype == DType::f32 ? 4 : 2;
    row.data[m] = static_cast<const unsigned char*>(logits.data) + index * logits.row_stride * bytes;
    if (is_multiple(row.data[m], Slice<kStorage>::kWidth * bytes)) {
      row.flags |= 1u << (RowType::kAligned + m);
    } else if (m < p.models) {
      all_aligned = false;
    }
  }
  if (all_aligned) row.flags |= 1u << RowType::kAllAligned;
  if (is_multiple(row.bias(), 16)) row.flags |= 1u << (RowType::kAligned + kModels);
  return row;
}

template <Storage kStorage, int kModels>
NLHF_DEVICE void load_slice(const Row<kStorage, kModels>& row, int m, int first, Slice<kStorage>& slice) {
  if constexpr (kStorage == Storage::mixed) {
    load_mixed(row.model(m), row.is_aligned(m), first, row.vocabulary(), slice);
  } else if (row.is_aligned(m)) {
    load_chunks<true>(row.model(m), first, row.vocabulary(), slice);
  } else {
    load_chunks<false>(row.model(m), first, row.vocabulary(), slice);
  }
}

// Add factor * bias to z; in exact rows the factor is 1, so the product is exact.
template <Storage kStorage>
NLHF_DEVICE void add_bias(const float* bias, bool aligned, float factor, int first, int vocabulary,
                          float (&z)[kPerLane]) {
  using S = Slice<kStorage>;
  if (aligned && first + kStep <= vocabulary) {
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(bias + first + S::offset(i)));
      z[i] = __fmaf_rn(factor, four.x, z[i]), z[i + 1] = __fmaf_rn(factor, four.y, z[i + 1]);
      z[i + 2] = __fmaf_rn(factor, four.z, z[i + 2]), z[i + 3] = __fmaf_rn(factor, four.w, z[i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int index = first + S::offset(i);
      if (index < vocabulary) z[i] = __fmaf_rn(factor, __ldg(bias + index), z[i]);
    }
  }
}

// The version of the loop over a row. Nearly all rows are plain: folded, without a bias, every weight non-zero, and the
// log-probabilities of all models or of none requested. Their loops have no branches on these, so that a logit is
// unpacked once.
enum class Pass { general, z_alone, plain_all_logprobs, plain_no_logprobs };

template <Storage kStorage, int kModels>
NLHF_DEVICE Pass pass_over(const Row<kStorage, kModels>& row) {
  constexpr unsigned kAll = (1u << kModels) - 1;
  const bool plain = row.is_folded() && row.p.bias == nullptr && (row.flags & kAll) == kAll;
  const unsigned requested = row.flags >> Row<kStorage, kModels>::kRequested & kAll;
  if (!plain || (requested != kAll && requested != 0)) return Pass::general;
  return requested ? Pass::plain_all_logprobs : Pass::plain_no_logprobs;
}

// Compute z of the lane's elements of a step, equation (1); -inf outside the row. A model of weight 0 is skipped, as
// 0 * -inf is NaN. Except in Pass::z_alone, call visit(m, values, their maximum) for each model whose log-probability
// is requested.
template <Pass kPass, Storage kStorage, int kModels, typename Visit>
NLHF_DEVICE void read_step(const Row<kStorage, kModels>& row, int first, float (&z)[kPerLane], Visit visit) {
  constexpr bool kPlain = kPass == Pass::plain_all_logprobs || kPass == Pass::plain_no_logprobs;
  const bool folded = kPlain || row.is_folded();
  const auto is_used = [&](int m) { return kPlain || row.is_used(m); };
  const auto is_visited = [&](int m) {
    return kPass == Pass::plain_all_logprobs || (kPass == Pass::general && row.is_requested(m));
  };
  // Four 16-byte loads are issued before the first is used: of both models, or of one where it has four itself.
  constexpr bool kTogether = Slice<kStorage>::kPacked && kModels <= 2;
  Slice<kStorage> slices[kTogether ? kModels : 1];
  if (kTogether && row.all_aligned() && first + kStep <= row.vocabulary()) {  // one branch for all of nearly every step
#pragma unroll
    for (int m = 0; m < kModels; ++m) {
      if (kTogether && (is_used(m) || is_visited(m))) load_whole(row.data[m], first, slices[kTogether ? m : 0]);
    }
  } else {
#pragma unroll
    for (int m = 0; kTogether && m < kModels; ++m) {
      if (is_used(m) || is_visited(m)) load_slice(row, m, first, slices[m]);
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) z[i] = 0.0f;
#pragma unroll
  for (int m = 0; m < kModels; ++m) {
    if (!is_used(m) && !is_visited(m)) continue;
    Slice<kStorage>& slice = slices[kTogether ? m : 0];
    if (!kTogether) load_slice(row, m, first, slice);
    float values[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[i] = element(slice, i);
    if (is_used(m)) {
      if (folded) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) z[i] = __fmaf_rn(row.weights[m], values[i], m == 0 ? 0.0f : z[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) z[i] = add_product(m == 0, z[i], row.weights[m], values[i]);
      }
    }
    if (is_visited(m)) visit(m, values, highest_of(slice, values));
  }
  if (!kPlain && row.p.bias != nullptr) {
    const float factor = folded ? row.inverse : 1.0f;
    add_bias<kStorage>(row.bias(), row.is_aligned(kModels), factor, first, row.vocabulary(), z);
  }
  if (!folded) row.divide(z);
  if (first + kStep > row.vocabulary()) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (first + Slice<kStorage>::offset(i) >= row.vocabulary()) z[i] = -INFINITY;
    }
  }
}

// The same for passes that need only z.
template <Storage kStorage, int kModels>
NLHF_DEVICE void read_step(const Row<kStorage, kModels>& row, int first, float (&z)[kPerLane]) {
  read_step<Pass::z_alone>(row, first, z, [](int, const float (&)[kPerLane], float) {});
}

// Compute z of kCount neighbours of an exact row from `first` on, bit for bit as read_step does; -inf from `end` on.
template <int kCount, Storage kStorage, int kModels>
NLHF_DEVICE void read_run(const Row<kStorage, kModels>& row, int first, int end, float (&z)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) z[i] = 0.0f;
#pragma unroll
  for (int m = 0; m < kModels; ++m) {
    if (!row.is_used(m)) continue;
    float values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = load_element<kStorage>(row.model(m), first + i, end);
#pragma unroll
    for (int i = 0; i < kCount; ++i) z[i] = add_product(m == 0, z[i], row.weights[m], values[i]);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (row.p.bias != nullptr && first + i < end) z[i] += __ldg(row.bias() + first + i);
  }
  row.divide(z);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (first + i >= end) z[i] = -INFINITY;
  }
}

template <Storage kStorage, int kModels>
NLHF_DEVICE float read_one(const Row<kStorage, kModels>& row, int index) {
  float z[1];
  read_run(row, index, row.vocabulary(), z);
  return z[0];
}

}  // namespace
}  // namespace nlhf
