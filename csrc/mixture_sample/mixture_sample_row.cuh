// One row of mixture_sample's inputs on the GPU: how its logits are loaded and mixed to z, equation (1).
//
// A warp takes a row in steps of 512 elements, 16 a lane, whatever the dtype: 16-byte loads that coalesce, all of them
// issued before the first is used. Which lane owns which element depends on the dtypes alone, so that sums come out the
// same, bit for bit, however a row is aligned.
//
// z comes in one of two roundings, the row's for all passes over it:
//   exact    rows with filters, and greedy ones, compare values of z, two of which may be equal in one rounding and not
//            in another. Products and sums are rounded one by one, as the oracle's are, with intrinsics that the
//            compiler may not fuse.
//   folded   rows that are only drawn from: the temperature is in the weights, and z a fused multiply-add a model.
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

// 16 bytes from an address that is a multiple of 2, of which the first `inside` count: of the aligned blocks that hold
// any of those, shifted together. How far to shift is the row's, the same for all its lanes and chunks.
NLHF_DEVICE uint4 load_across(const unsigned char* address, int inside) {
  const int skew = static_cast<int>(reinterpret_cast<std::uintptr_t>(address) % 16);
  const auto* blocks = reinterpret_cast<const uint4*>(address - skew);
  const uint4 low = __ldg(blocks), high = __ldg(blocks + (skew + inside > 16));
  uint32_t word[5];
  switch (skew / 4) {
    case 0: word[0] = low.x, word[1] = low.y, word[2] = low.z, word[3] = low.w, word[4] = high.x; break;
    case 1: word[0] = low.y, word[1] = low.z, word[2] = low.w, word[3] = high.x, word[4] = high.y; break;
    case 2: word[0] = low.z, word[1] = low.w, word[2] = high.x, word[3] = high.y, word[4] = high.z; break;
    default: word[0] = low.w, word[1] = high.x, word[2] = high.y, word[3] = high.z, word[4] = high.w; break;
  }
  const unsigned bits = skew % 4 * 8;
  return {__funnelshift_r(word[0], word[1], bits), __funnelshift_r(word[1], word[2], bits),
          __funnelshift_r(word[2], word[3], bits), __funnelshift_r(word[3], word[4], bits)};
}

// A word of a chunk, with -inf for what lies outside the row; `inside` elements of the chunk lie in it.
template <Storage kStorage>
NLHF_DEVICE uint32_t masked(uint32_t word, int j, int inside) {
  if (!Slice<kStorage>::kPacked) return inside > j ? word : kMinusInfinity32;
  const uint32_t outside = kStorage == Storage::bf16 ? kMinusInfinityBf16 : kMinusInfinityF16;
  const uint32_t high = inside > 2 * j + 1 ? word & 0xFFFF0000u : outside << 16;
  return high | (inside > 2 * j ? word & 0xFFFFu : outside);
}

// Whole blocks of 16 bytes, also where the row ends within one: memory is handed out in larger blocks than that.
template <bool kAligned, Storage kStorage>
NLHF_DEVICE void load_chunks(const Model& model, int first, int vocabulary, Slice<kStorage>& slice) {
  using S = Slice<kStorage>;
  constexpr int kBytes = 16 / S::kWidth;  // of an element
  const bool whole = first + kStep <= vocabulary;
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c) {
    const int index = first + slice.offset(c * S::kWidth), inside = vocabulary - index;
    const unsigned char* data = model.data + int64_t{index} * kBytes;
    uint4 chunk{};
    if (whole || inside > 0) {
      chunk = kAligned ? __ldg(reinterpret_cast<const uint4*>(data)) : load_across(data, whole ? 16 : inside * kBytes);
    }
    slice.word[4 * c] = chunk.x, slice.word[4 * c + 1] = chunk.y;
    slice.word[4 * c + 2] = chunk.z, slice.word[4 * c + 3] = chunk.w;
    if (whole) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) slice.word[4 * c + j] = masked<kStorage>(slice.word[4 * c + j], j, inside);
  }
}

// Of a model whose dtype is known at run time only, converted to float.
NLHF_DEVICE void load_mixed(const Model& model, bool aligned, int first, int vocabulary,
                            Slice<Storage::mixed>& slice) {
  using S = Slice<Storage::mixed>;
  const bool in_chunks = aligned && first + kStep <= vocabulary;
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c) {
    const int index = first + slice.offset(c * S::kWidth);
    uint32_t word[4];
    if (in_chunks && model.dtype == Float::f32) {
      const uint4 chunk = __ldg(reinterpret_cast<const uint4*>(model.data + int64_t{index} * 4));
      word[0] = chunk.x, word[1] = chunk.y, word[2] = chunk.z, word[3] = chunk.w;
    } else if (in_chunks) {
      const uint2 chunk = __ldg(reinterpret_cast<const uint2*>(model.data + int64_t{index} * 2));
      const uint32_t bits[4] = {chunk.x & 0xFFFFu, chunk.x >> 16, chunk.y & 0xFFFFu, chunk.y >> 16};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        word[j] = __float_as_uint(model.dtype == Float::bf16 ? bf16_to_float(bits[j]) : f16_to_float(bits[j]));
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) word[j] = __float_as_uint(load_element<Storage::mixed>(model, index + j, vocabulary));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) slice.word[4 * c + j] = word[j];
  }
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

// Of two pairs of halves, the larger of each; NaN loses against any number.
template <Storage kStorage>
NLHF_DEVICE uint32_t larger_halves(uint32_t a, uint32_t b) {
  uint32_t larger = 0;
#if defined(__CUDACC__)
  if constexpr (kStorage == Storage::bf16) {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  } else {
    asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  }
#else
  for (unsigned half = 0; half < 32; half += 16) {
    const uint32_t bits_a = a >> half & 0xFFFFu, bits_b = b >> half & 0xFFFFu;
    const float x = kStorage == Storage::bf16 ? bf16_to_float(bits_a) : f16_to_float(bits_a);
    const float y = kStorage == Storage::bf16 ? bf16_to_float(bits_b) : f16_to_float(bits_b);
    larger |= (std::fmax(x, y) == x ? bits_a : bits_b) << half;
  }
#endif
  return larger;
}

// The largest of the lane's elements of a step; NaN loses against any number.
NLHF_DEVICE float highest_of(const float (&values)[kPerLane]) {
  float highest = values[0];
#pragma unroll
  for (int i = 1; i < kPerLane; ++i) highest = std::fmax(highest, values[i]);
  return highest;
}

// The same, halves two at a time.
template <Storage kStorage>
NLHF_DEVICE float highest_of(const Slice<kStorage>& slice, const float (&values)[kPerLane]) {
  if constexpr (Slice<kStorage>::kPacked) {
    uint32_t best = slice.word[0];
#pragma unroll
    for (int i = 1; i < Slice<kStorage>::kWords; ++i) {
      best = larger_halves<kStorage>(best, slice.word[i]);
    }
    Slice<kStorage> pair;
    pair.word[0] = best;
    return std::fmax(element(pair, 0), element(pair, 1));
  } else {
    return highest_of(values);
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
