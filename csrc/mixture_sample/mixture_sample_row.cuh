// One row of mixture_sample's inputs on the GPU: how its logits are loaded and mixed to z, equation (1).
//
// A warp takes a row in steps of 512 elements, 16 a lane, whatever the dtype: 16-byte loads that coalesce, all of them
// issued before the first is used. Which lane owns which element depends on the dtypes alone, so that sums come out the
// same, bit for bit, however a row is aligned. Products and sums are rounded one by one, as the oracle's are, with
// intrinsics that the compiler may not fuse: filters compare values of z, two of which may be equal in one rounding and
// not in another, and every pass over a row must see the same.
#pragma once

#include <cuda_fp16.h>

#include <cfloat>

#include "../common/cuda_block.cuh"
#include "mixture_sample.h"

namespace nlhf {
namespace {

constexpr int kPerLane = 16;
constexpr int kStep = kPerLane * kWarpSize;

// How the logits lie in memory: as `Float` says, the same for all models; or `mixed`, each model's own.
enum class Storage : int { f32 = 0, bf16 = 1, f16 = 2, mixed = 3 };

// A lane's elements of one step, in chunks of neighbours; `mixed` holds them converted to float.
template <Storage kStorage>
struct Slice {
  static constexpr bool kPacked = kStorage == Storage::bf16 || kStorage == Storage::f16;
  static constexpr int kWidth = kPacked ? 8 : 4;
  static constexpr int kChunks = kPerLane / kWidth;
  static constexpr int kWords = kPacked ? kPerLane / 2 : kPerLane;
  uint32_t word[kWords];

  // The lane's i-th element within the step.
  NLHF_DEVICE int offset(int i) {
    const int lane = threadIdx.x % kWarpSize;
    return (i / kWidth * kWarpSize + lane) * kWidth + i % kWidth;
  }
};

NLHF_DEVICE float bf16_to_float(uint32_t bits) { return __uint_as_float(bits << 16); }
NLHF_DEVICE float f16_to_float(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

template <Storage kStorage>
NLHF_DEVICE float element(const Slice<kStorage>& slice, int i) {
  if (!Slice<kStorage>::kPacked) return __uint_as_float(slice.word[i % Slice<kStorage>::kWords]);
  const uint32_t word = slice.word[i / 2];
  if (kStorage == Storage::bf16) return i % 2 ? __uint_as_float(word & 0xFFFF0000u) : bf16_to_float(word);
  return f16_to_float(i % 2 ? word >> 16 : word & 0xFFFFu);
}

// sum + weight * value, the product rounded before the sum. The first model's sum is 0, where fusing changes nothing.
NLHF_DEVICE float add_product(bool is_first, float sum, float weight, float value) {
  return is_first ? __fmaf_rn(weight, value, 0.0f) : __fadd_rn(sum, __fmul_rn(weight, value));
}

struct Model {
  const unsigned char* data;  // the row's first element
  Float dtype;
};

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

  static constexpr int kWanted = 8, kAligned = 16, kGreedy = 30, kDivides = 31;
  __device__ __forceinline__ bool is_used(int m) const { return flags >> m & 1; }  // its weight is not 0: part of z
  __device__ __forceinline__ bool is_wanted(int m) const { return flags >> (kWanted + m) & 1; }  // its log-probability
  // The row starts so that whole chunks may be loaded; kModels asks for the bias.
  __device__ __forceinline__ bool is_aligned(int m) const { return flags >> (kAligned + m) & 1; }
  __device__ __forceinline__ bool is_greedy() const { return flags >> kGreedy & 1; }
  __device__ __forceinline__ bool divides() const { return flags >> kDivides & 1; }

  // Mixed logits over the temperature. Where filters compare values, rounded as a division is (Markstein's theorem: one
  // step from the product with a correctly rounded inverse); elsewhere the product will do.
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
    if (p.filtered && row.temperature != 1.0f) row.flags |= 1u << RowType::kDivides;
  }
  row.flags |= (p.wanted & ((1u << p.models) - 1)) << RowType::kWanted;
#pragma unroll
  for (int m = 0; m < kModels; ++m) {
    row.weights[m] = m < p.models ? settings[kWeights + m] : 0.0f;
    if (row.weights[m] != 0.0f) row.flags |= 1u << m;
    const Logits& logits = p.logits[m];
    const unsigned bytes = logits.dtype == Float::f32 ? 4 : 2;
    row.data[m] = static_cast<const unsigned char*>(logits.data) + index * logits.row_stride * bytes;
    if (is_multiple(row.data[m], Slice<kStorage>::kWidth * bytes)) row.flags |= 1u << (RowType::kAligned + m);
  }
  if (is_multiple(row.bias(), 16)) row.flags |= 1u << (RowType::kAligned + kModels);
  return row;
}

// The bits of one element; of -inf outside the row.
template <typename T>
NLHF_DEVICE uint32_t load_bits(const Model& model, int index, int vocabulary, uint32_t otherwise) {
  return index < vocabulary ? uint32_t{__ldg(reinterpret_cast<const T*>(model.data) + index)} : otherwise;
}

constexpr uint32_t kMinusInfinity32 = 0xFF800000u, kMinusInfinityBf16 = 0xFF80u, kMinusInfinityF16 = 0xFC00u;

template <Storage kStorage>
NLHF_DEVICE float load_element(const Model& model, int index, int vocabulary) {
  const Storage storage = kStorage == Storage::mixed ? static_cast<Storage>(model.dtype) : kStorage;
  if (storage == Storage::f32) {
    return __uint_as_float(load_bits<uint32_t>(model, index, vocabulary, kMinusInfinity32));
  }
  if (storage == Storage::bf16) {
    return bf16_to_float(load_bits<uint16_t>(model, index, vocabulary, kMinusInfinityBf16));
  }
  return f16_to_float(load_bits<uint16_t>(model, index, vocabulary, kMinusInfinityF16));
}

// Element by element: where a chunk would cross the row's end, or where the row's start is not aligned.
template <Storage kStorage>
NLHF_DEVICE void load_elements(const Model& model, int first, int vocabulary, Slice<kStorage>& slice) {
#pragma unroll
  for (int i = 0; i < Slice<kStorage>::kWords; ++i) {
    if (Slice<kStorage>::kPacked) {
      const uint32_t outside = kStorage == Storage::bf16 ? kMinusInfinityBf16 : kMinusInfinityF16;
      const int index = first + slice.offset(2 * i);
      slice.word[i] = load_bits<uint16_t>(model, index, vocabulary, outside) |
                      load_bits<uint16_t>(model, index + 1, vocabulary, outside) << 16;
    } else {
      slice.word[i] = __float_as_uint(load_element<kStorage>(model, first + slice.offset(i), vocabulary));
    }
  }
}

template <Storage kStorage>
NLHF_DEVICE void load_chunks(const Model& model, int first, Slice<kStorage>& slice) {
  using S = Slice<kStorage>;
  const bool narrow = kStorage == Storage::mixed && model.dtype != Float::f32;  // 8 bytes a chunk
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c) {
    const int index = first + slice.offset(c * S::kWidth);
    if (!narrow) {
      const auto* data = reinterpret_cast<const uint4*>(model.data + int64_t{index} * (16 / S::kWidth));
      const uint4 chunk = __ldg(data);
      slice.word[4 * c] = chunk.x, slice.word[4 * c + 1] = chunk.y;
      slice.word[4 * c + 2] = chunk.z, slice.word[4 * c + 3] = chunk.w;
    } else {
      const uint2 chunk = __ldg(reinterpret_cast<const uint2*>(model.data + int64_t{index} * 2));
      const uint32_t bits[4] = {chunk.x & 0xFFFFu, chunk.x >> 16, chunk.y & 0xFFFFu, chunk.y >> 16};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float value = model.dtype == Float::bf16 ? bf16_to_float(bits[j]) : f16_to_float(bits[j]);
        slice.word[(4 * c + j) % S::kWords] = __float_as_uint(value);
      }
    }
  }
}

template <Storage kStorage, int kModels>
NLHF_DEVICE void load_slice(const Row<kStorage, kModels>& row, int m, int first, Slice<kStorage>& slice) {
  if (row.is_aligned(m) && first + kStep <= row.vocabulary()) {
    load_chunks(row.model(m), first, slice);
  } else {
    load_elements(row.model(m), first, row.vocabulary(), slice);
  }
}

template <Storage kStorage>
NLHF_DEVICE void add_bias(const float* bias, bool aligned, int first, int vocabulary, float (&z)[kPerLane]) {
  using S = Slice<kStorage>;
  if (aligned && first + kStep <= vocabulary) {
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(bias + first + S::offset(i)));
      z[i] += four.x, z[i + 1] += four.y, z[i + 2] += four.z, z[i + 3] += four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int index = first + S::offset(i);
      if (index < vocabulary) z[i] += __ldg(bias + index);
    }
  }
}

// z of the lane's elements of a step, equation (1); -inf outside the row. A model of weight 0 takes no part: 0 * -inf
// is NaN. With kWithWanted, visit(m, values) sees the elements of each model whose log-probability is wanted.
template <bool kWithWanted, Storage kStorage, int kModels, typename Visit>
NLHF_DEVICE void read_step(const Row<kStorage, kModels>& row, int first, float (&z)[kPerLane], Visit visit) {
  // Four 16-byte loads on their way before the first is used: of both models, or of one at a time where that is enough.
  constexpr bool kTogether = Slice<kStorage>::kPacked && kModels <= 2;
  Slice<kStorage> slices[kTogether ? kModels : 1];
#pragma unroll
  for (int m = 0; kTogether && m < kModels; ++m) {
    if (row.is_used(m) || (kWithWanted && row.is_wanted(m))) load_slice(row, m, first, slices[m]);
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) z[i] = 0.0f;
#pragma unroll
  for (int m = 0; m < kModels; ++m) {
    if (!row.is_used(m) && !(kWithWanted && row.is_wanted(m))) continue;
    Slice<kStorage>& slice = slices[kTogether ? m : 0];
    if (!kTogether) load_slice(row, m, first, slice);
    float values[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[i] = element(slice, i);
    if (row.is_used(m)) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) z[i] = add_product(m == 0, z[i], row.weights[m], values[i]);
    }
    if (kWithWanted && row.is_wanted(m)) visit(m, values);
  }
  if (row.p.bias != nullptr) add_bias<kStorage>(row.bias(), row.is_aligned(kModels), first, row.vocabulary(), z);
  row.divide(z);
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
  read_step<false>(row, first, z, [](int, const float (&)[kPerLane]) {});
}

// z of kCount neighbours from `first` on, bit for bit as read_step computes it; -inf from `end` on.
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
