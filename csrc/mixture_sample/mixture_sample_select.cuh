// Filters of mixture_sample, second half: the exact thresholds of (3)-(5), by a block, among a row's candidates.
//
// The search goes over the digits of the keys, eight bits at a time from the highest bit in which any two candidates
// differ: at most four passes whatever the values. Weights are integers (1 each for top-k, e^(z - top) in fixed point
// for top-p), so sums do not depend on the order in which threads arrive.
#pragma once

#include "mixture_sample_bins.cuh"

namespace nlhf {
namespace {

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
static_assert(kDigits == kThreads, "a thread a digit");

struct SelectScratch {
  unsigned lowest, highest;
  int chosen;
  unsigned long long weights[kDigits], sums[kWarps], above;
  double masses[kWarps];
};

// Grows with z; equal floats have equal keys, 0 and -0 too.
NLHF_DEVICE unsigned key_of(float z) {
  const unsigned bits = __float_as_uint(z + 0.0f);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}
NLHF_DEVICE float value_of(unsigned key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

// e^(z - top) as a whole number of 2^-bits, at least 1: so wide that a whole row of ones does not overflow.
struct FixedPoint {
  float scale;
  __device__ __forceinline__ unsigned long long of(float mass) const {
    const auto whole = static_cast<unsigned long long>(mass * scale);
    return whole > 0 ? whole : 1;
  }
  __device__ __forceinline__ double mass(unsigned long long fixed) const { return fixed / static_cast<double>(scale); }
};

NLHF_DEVICE FixedPoint fixed_point(int vocabulary) {
  const int bits = 30 + __clz(vocabulary);  // vocabulary <= 2^(32 - clz), and 2^62 is safe
  return {__uint_as_float(static_cast<unsigned>(127 + bits) << 23)};
}

// What is searched: `size` values of z. Here, those that fell in the bracket, in shared memory where there is room.
struct CandidateList {
  static constexpr bool kWhole = false;
  const float* values;
  int stride;
  int size;
  __device__ __forceinline__ float z(int i) const { return values[int64_t{i} * stride]; }
};

// The whole row, for rows with more candidates than there is room for.
template <typename RowType>
struct WholeRow {
  static constexpr bool kWhole = true;
  const RowType& row;
  int size;
  __device__ __forceinline__ float z(int i) const { return read_one(row, i); }
};

struct Searched {
  float top;
  unsigned lowest_key;  // what lies below is left out
  FixedPoint fixed;
  bool by_mass;
  __device__ __forceinline__ bool eligible(float z) const { return is_alive(z, top) && key_of(z) >= lowest_key; }
  __device__ __forceinline__ unsigned long long weight(float z) const {
    return by_mass ? fixed.of(exp_below(z, top)) : 1;
  }
};

// Range of the eligible keys, into the scratch.
template <typename Source>
NLHF_DEVICE void key_range(const Source& source, const Searched& what, SelectScratch& s) {
  if (threadIdx.x == 0) s.lowest = 0xFFFFFFFFu, s.highest = 0;
  __syncthreads();
  unsigned lowest = 0xFFFFFFFFu, highest = 0;
  for (int i = threadIdx.x; i < source.size; i += kThreads) {
    const float z = source.z(i);
    if (!what.eligible(z)) continue;
    const unsigned key = key_of(z);
    lowest = key < lowest ? key : lowest;
    highest = key > highest ? key : highest;
  }
  if (lowest <= highest) {
    atomicMin(&s.lowest, lowest);
    atomicMax(&s.highest, highest);
  }
  __syncthreads();
}

// The smallest eligible value before which the values strictly above sum up to less than `limit`, as a key; false where
// there is none. With weights of 1 and a limit of k it is the k-th largest (3); with masses, the nucleus' end (4).
template <typename Source>
NLHF_DEVICE bool select_key(const Source& source, const Searched& what, unsigned long long limit, SelectScratch& s,
                            unsigned* selected) {
  key_range(source, what, s);
  const unsigned lowest = s.lowest, highest = s.highest;
  if (lowest > highest || limit == 0) return false;
  int bits = 32 - __clz(static_cast<int>(lowest ^ highest));  // low bits still to be found
  unsigned prefix = bits == 32 ? 0 : highest >> bits;
  unsigned long long above = 0;
  while (bits > 0) {
    const int shift = bits > kDigitBits ? bits - kDigitBits : 0;
    s.weights[threadIdx.x] = 0;
    if (threadIdx.x == 0) s.chosen = -1;
    __syncthreads();
    for (int i = threadIdx.x; i < source.size; i += kThreads) {
      const float z = source.z(i);
      const unsigned key = key_of(z);
      if (!what.eligible(z) || (bits < 32 && key >> bits != prefix)) continue;
      atomicAdd(&s.weights[(key >> shift) & ((1u << (bits - shift)) - 1)], what.weight(z));
    }
    __syncthreads();
    const unsigned long long weight = s.weights[kDigits - 1 - threadIdx.x];  // from the largest digit down
    unsigned long long total;
    const unsigned long long before = above + block_sum_before(weight, s.sums, &total);
    const bool reached = weight > 0 && before < limit;
    if (reached) atomicMax(&s.chosen, static_cast<int>(threadIdx.x));
    __syncthreads();
    const int chosen = s.chosen;
    if (chosen == static_cast<int>(threadIdx.x)) s.above = before;
    __syncthreads();
    above = s.above;
    prefix = prefix << (bits - shift) | static_cast<unsigned>(kDigits - 1 - chosen);
    bits = shift;
  }
  *selected = prefix;
  return true;
}

// Mass of the eligible values.
template <typename Source>
NLHF_DEVICE double eligible_mass(const Source& source, const Searched& what, SelectScratch& s) {
  unsigned long long sum = 0;
  for (int i = threadIdx.x; i < source.size; i += kThreads) {
    const float z = source.z(i);
    if (what.eligible(z)) sum += what.fixed.of(exp_below(z, what.top));
  }
  unsigned long long total;
  block_sum_before(sum, s.sums, &total);
  __syncthreads();  // the scratch is free again
  return what.fixed.mass(total);
}

// The value that a row's elements must reach to be kept, (3)-(5). `mass_above` and `count_above` are what is kept for
// sure and not in `source`; false where the threshold is not in `source` after all. All threads call.
// Not inlined: one copy of the search in lists serves all kernels.
template <typename Source>
__device__ __noinline__ bool find_threshold(const Source& source, const RowState& state, const Filters& filters,
                                            int vocabulary, double mass_above, unsigned count_above,
                                            SelectScratch& s, float* threshold) {
  Searched what{state.top, 0, fixed_point(vocabulary), false};
  double share = state.total;
  if (state.search & kSearchTopK) {
    const int limit = filters.top_k - static_cast<int>(count_above);
    if (limit <= 0 || !select_key(source, what, limit, s, &what.lowest_key)) return false;
    __syncthreads();
    share = mass_above + eligible_mass(source, what, s);
  }
  if (state.search & kSearchTopP) {
    what.by_mass = true;
    const double limit = std::ceil((filters.top_p * share - mass_above) * what.fixed.scale);
    // The bracket was an estimate: the share must end inside it, neither above
    if (count_above > 0 && !(limit > 0)) return false;
    // nor below, where there is more below that is alive.
    const bool more_below = !Source::kWhole && !(state.search & kSearchTopK) && state.last_bin < kBins - 1;
    if (more_below && !(eligible_mass(source, what, s) * what.fixed.scale >= limit)) return false;
    // The largest value is always kept, however small the share.
    const auto whole = limit >= 1 ? static_cast<unsigned long long>(limit) : 1ull;
    if (!select_key(source, what, whole, s, &what.lowest_key)) return false;
    __syncthreads();
  }
  *threshold = what.lowest_key == 0 ? state.floor : std::fmax(value_of(what.lowest_key), state.floor);
  return true;
}

}  // namespace
}  // namespace nlhf
