// A lane's elements of a row's logits: their layout in registers, and their loads.
//
// A warp reads a row in steps of 512 elements, 16 a lane, for every dtype: coalesced 16-byte loads, all issued before
// the first is used. Which lane owns which element depends on the dtypes alone, so that sums are bit for bit the same
// for every alignment of a row.
#pragma once

#include <cuda_fp16.h>

#include "../common/cuda_block.cuh"
#include "mixture_sample.h"

namespace nlhf {
namespace {

constexpr int kPerLane = 16;
constexpr int kStep = kPerLane * kWarpSize;

// The dtype of the logits in memory: one of DType, the same for all models; or `mixed`, each model's own.
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

struct Model {
  const unsigned char* data;  // the row's first element
  DType dtype;
};

// Return the bits of one element; outside the row those of -inf.
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

// Load 16 bytes, of which the first `inside` count, from an address that is a multiple of 2: load the aligned blocks
// that contain any of those and shift them together. The shift is the same for all lanes and chunks of a row.
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

// Return a word of a chunk with -inf for the elements outside the row; the chunk's first `inside` elements are inside.
template <Storage kStorage>
NLHF_DEVICE uint32_t masked(uint32_t word, int j, int inside) {
  if (!Slice<kStorage>::kPacked) return inside > j ? word : kMinusInfinity32;
  const uint32_t outside = kStorage == Storage::bf16 ? kMinusInfinityBf16 : kMinusInfinityF16;
  const uint32_t high = inside > 2 * j + 1 ? word & 0xFFFF0000u : outside << 16;
  return high | (inside > 2 * j ? word & 0xFFFFu : outside);
}

// Begin to fetch the 128 bytes at an address into the second-level cache; no register waits for them.
NLHF_DEVICE void prefetch(const unsigned char* address) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" : : "l"(address));
#else
  static_cast<void>(*static_cast<const volatile unsigned char*>(address));  // a sanitizer sees a wrong address
#endif
}

// Load the lane's chunks of a step that is inside an aligned row.
template <Storage kStorage>
NLHF_DEVICE void load_whole(const unsigned char* data, int first, Slice<kStorage>& slice) {
  using S = Slice<kStorage>;
  constexpr int kBytes = 16 / S::kWidth;  // of an element
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c) {
    const int64_t index = first + slice.offset(c * S::kWidth);
    const uint4 chunk = __ldg(reinterpret_cast<const uint4*>(data + index * kBytes));
    slice.word[4 * c] = chunk.x, slice.word[4 * c + 1] = chunk.y;
    slice.word[4 * c + 2] = chunk.z, slice.word[4 * c + 3] = chunk.w;
  }
}

// Load whole blocks of 16 bytes, also where the row ends within one: allocations are multiples of larger blocks.
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

// Load from a model whose dtype is known at run time only, and convert to float.
NLHF_DEVICE void load_mixed(const Model& model, bool aligned, int first, int vocabulary,
                            Slice<Storage::mixed>& slice) {
  using S = Slice<Storage::mixed>;
  const bool in_chunks = aligned && first + kStep <= vocabulary;
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c) {
    const int index = first + slice.offset(c * S::kWidth);
    uint32_t word[4];
    if (in_chunks && model.dtype == DType::f32) {
      const uint4 chunk = __ldg(reinterpret_cast<const uint4*>(model.data + int64_t{index} * 4));
      word[0] = chunk.x, word[1] = chunk.y, word[2] = chunk.z, word[3] = chunk.w;
    } else if (in_chunks) {
      const uint2 chunk = __ldg(reinterpret_cast<const uint2*>(model.data + int64_t{index} * 2));
      const uint32_t bits[4] = {chunk.x & 0xFFFFu, chunk.x >> 16, chunk.y & 0xFFFFu, chunk.y >> 16};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        word[j] = __float_as_uint(model.dtype == DType::bf16 ? bf16_to_float(bits[j]) : f16_to_float(bits[j]));
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) word[j] = __float_as_uint(load_element<Storage::mixed>(model, index + j, vocabulary));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) slice.word[4 * c + j] = word[j];
  }
}

// Return the larger halves of two pairs; NaN loses against any number.
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

// Return the largest of the lane's elements of a step; NaN loses against any number.
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

}  // namespace
}  // namespace nlhf
