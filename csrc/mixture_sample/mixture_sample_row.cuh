// One row of mixture_sample's inputs on the GPU: its settings, and how its logits are mixed to z, equation (1).
//
// z comes in one of two roundings, the row's for all passes over it:
//   exact    rows with filters, and greedy ones, compare values of z, two of which may be equal in one rounding and not
//            in another. Products and sums are rounded one by one, as the oracle's are, with intrinsics that the
//            compiler may not fuse.
//   folded   rows that are only drawn from: the temperature is in the weights, and z a fused multiply-add a model.
#pragma once

#include <cfloat>

#include "mixture_sample_slice.cuh"

namespace nlhf {
namespace {

// sum + weight * value, the product rounded before the sum. The first model's sum is 0, where fusing changes nothing.
NLHF_DEVICE float add_product(bool is_first, float sum, float weight, float value) {
  return is_first ? __fmaf_rn(weight, value, 0.0f) : __fadd_rn(sum, __fmul_rn(weight, value));
}

template <Storage kStorage, int kModels>
struct Row {
  using LaneSlice = Slice<kStorage>;
  const MixtureSample& p;  // what follows from the launch is read there, where it costs no registers
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

  static constexpr int kWanted = 8, kAligned = 16, kFolded = 29, kGreedy = 30, kDivides = 31;
  __device__ __forceinline__ bool is_used(int m) const { return flags >> m & 1; }  // its weight is not 0: part of z
  __device__ __forceinline__ bool is_wanted(int m) const { return flags >> (kWanted + m) & 1; }  // its log-probability
  // The row starts so that whole chunks may be loaded; kModels asks for the bias.
  __device__ __forceinline__ bool is_aligned(int m) const { return flags >> (kAligned + m) & 1; }
  __device__ __forceinline__ bool is_folded() const { return flags >> kFolded & 1; }
  __device__ __forceinline__ bool is_greedy() const { return flags >> kGreedy & 1; }
  __device__ __forceinline__ bool divides() const { return flags >> kDivides & 1; }

  // Mixed logits over the temperature, for exact rows. Where filters compare values, rounded as a division is
  // (Markstein's theorem: one step from the product with a correctly rounded inverse); elsewhere the product will do.
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

// weight * factor as a normal number: an overflow would make 0 * inf of a logit of 0, an underflow 0 * -inf of a mask.
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
  row.flags |= (p.wanted & ((1u << p.models) - 1)) << RowType::kWanted;
#pragma unroll
  for (int m = 0; m < kModels; ++m) {
    row.weights[m] = m < p.models ? settings[kWeights + m] : 0.0f;
    if (row.weights[m] != 0.0f) {
      row.flags |= 1u << m;
      if (row.is_folded()) row.weights[m] = folded_weight(row.weights[m], row.inverse);
    }
    const Logits& logits = p.logits[m];
    const unsigned bytes = logits.dtype == Float::f32 ? 4 : 2;
    row.data[m] = static_cast<const unsigned char*>(logits.data) + index * logits.row_stride * bytes;
    if (is_multiple(row.data[m], Slice<kStorage>::kWidth * bytes)) row.flags |= 1u << (RowType::kAligned + m);
  }
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

// z + factor * bias; the factor is 1 in exact rows, where the product changes nothing.
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

// What a pass does with a row. Nearly all rows are plain: folded, without a bias, every model part of z, and of the
// models' log-probabilities all or none wanted; for these nothing is asked in the loop, so that a logit is unpacked once.
enum class Pass { general, z_alone, plain_all_wanted, plain_none_wanted };

template <Storage kStorage, int kModels>
NLHF_DEVICE Pass pass_over(const Row<kStorage, kModels>& row) {
  constexpr unsigned kAll = (1u << kModels) - 1;
  const bool plain = row.is_folded() && row.p.bias == nullptr && (row.flags & kAll) == kAll;
  const unsigned wanted = row.flags >> Row<kStorage, kModels>::kWanted & kAll;
  if (!plain || (wanted != kAll && wanted != 0)) return Pass::general;
  return wanted ? Pass::plain_all_wanted : Pass::plain_none_wanted;
}

// z of the lane's elements of a step, equation (1); -inf outside the row. A model of weight 0 takes no part: 0 * -inf
// is NaN. visit(m, values, largest of them) sees each model whose log-probability is wanted, but in Pass::z_alone.
template <Pass kPass, Storage kStorage, int kModels, typename Visit>
NLHF_DEVICE void read_step(const Row<kStorage, kModels>& row, int first, float (&z)[kPerLane], Visit visit) {
  constexpr bool kPlain = kPass == Pass::plain_all_wanted || kPass == Pass::plain_none_wanted;
  const bool folded = kPlain || row.is_folded();
  const auto is_used = [&](int m) { return kPlain || row.is_used(m); };
  const auto is_visited = [&](int m) {
    return kPass == Pass::plain_all_wanted || (kPass == Pass::general && row.is_wanted(m));
  };
  // Four 16-byte loads on their way before the first is used: of both models, or of one at a time where that is enough.
  constexpr bool kTogether = Slice<kStorage>::kPacked && kModels <= 2;
  Slice<kStorage> slices[kTogether ? kModels : 1];
#pragma unroll
  for (int m = 0; kTogether && m < kModels; ++m) {
    if (is_used(m) || is_visited(m)) load_slice(row, m, first, slices[m]);
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

// The same for passes that need nothing but z.
template <Storage kStorage, int kModels>
NLHF_DEVICE void read_step(const Row<kStorage, kModels>& row, int first, float (&z)[kPerLane]) {
  read_step<Pass::z_alone>(row, first, z, [](int, const float (&)[kPerLane], float) {});
}

// z of kCount neighbours of an exact row from `first` on, bit for bit as read_step computes it; -inf from `end` on.
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
