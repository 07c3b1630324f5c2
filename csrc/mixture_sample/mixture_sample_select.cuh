// Filters, second part: find the exact thresholds of (3)-(5) among a row's candidates, by one block.
//
// A radix selection over the keys, eight bits a pass from the highest bit in which two candidates differ: at most four
// passes for any values. Weights are integers (1 each for top-k, e^(z - top) in fixed point
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

// Return a key that grows with z; equal floats, 0 and -0 among them, have equal keys.
NLHF_DEVICE unsigned key_of(float z) {
  const unsigned bits = __float_as_uint(z + 0.0f);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}
NLHF_DEVICE float value_of(unsigned key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

// e^(z - top) as an integer multiple of 2^-bits, at least 1; `bits` is such that a whole row of ones does not overflow.
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

// A source of `size` values of z to search: those in the bracket, in shared memory where they fit.
struct CandidateList {
  static constexpr bool kWhole = false;
  const float* values;
  int stride;
  int size;
  __device__ __forceinline__ float z(int i) const { return values[int64_t{i} * stride]; }
};

// The same over a whole row, for rows with more candidates than the list can hold.
template <typename RowType>
struct WholeRow {
  static constexpr bool kWhole = true;
  const RowType& row;
  int size;
  __device__ __forceinline__ float z(int i) const { return read_one(row, i); }
};

struct KeySearch {
  float top;
  unsigned lowest_key;  // values below it are excluded
  FixedPoint fixed;
  bool by_mass;
  __device__ __forceinline__ bool eligible(float z) const { return has_mass(z, top) && key_of(z) >= lowest_key; }
  __device__ __forceinline__ unsigned long long weight(float z) const {
    return by_mass ? fixed.of(exp_below(z, top)) : 1;
  }
};

// Compute the range of the eligible keys, into the scratch.
template <typename Source>
NLHF_DEVICE void key_range(const Source& source, const KeySearch& search, SelectScratch& s) {
  if (threadIdx.x == 0) s.lowest = 0xFFFFFFFFu, s.highest = 0;
  __syncthreads();
  unsigned lowest = 0xFFFFFFFFu, highest = 0;
  for (int i = threadIdx.x; i < source.size; i += kThreads) {
    const float z = source.z(i);
    if (!search.eligible(z)) continue;
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

// Select the key of the smallest eligible value such that the values strictly above it sum to less than `limit`; return
// false where there is none. With weights of 1 and a limit of k it is the k-th largest (3); with masses, the end of the
// nucleus (4).
template <typename Source>
NLHF_DEVICE bool select_key(const Source& source, const KeySearch& search, unsigned long long limit, SelectScratch& s,
                            unsigned* selected) {
  key_range(source, search, s);
  const unsigned lowest = s.lowest, highest = s.highest;
  if (lowest > highest || limit == 0) return false;
  int bits = 32 - __clz(static_cast<int>(lowest ^ highest));  // low bits still unknown
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
      if (!search.eligible(z) || (bits < 32 && key >> bits != prefix)) continue;
      atomicAdd(&s.weights[(key >> shift) & ((1u << (bits - shift)) - 1)], search.weight(z));
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

// Return the mass of the eligible values.
template <typename Source>
NLHF_DEVICE double eligible_mass(const Source& source, const KeySearch& search, SelectScratch& s) {
  unsigned long long sum = 0;
  for (int i = threadIdx.x; i < source.size; i += kThreads) {
    const float z = source.z(i);
    if (search.eligible(z)) sum += search.fixed.of(exp_below(z, search.top));
  }
  unsigned long long total;
  block_sum_before(sum, s.sums, &total);
  __syncthreads();  // the scratch is free again
  return search.fixed.mass(total);
}

// find_threshold for at most a candidate a thread, as top-k leaves them: each thread compares its own with all others,
// which gives both its rank and the mass above it. Four barriers instead of five for each digit of each threshold.
template <typename Source>
NLHF_DEVICE bool rank_candidates(const Source& source, const RowState& state, const Filters& filters, int vocabulary,
                                 double mass_above, unsigned count_above, SelectScratch& s, float* threshold) {
  const FixedPoint fixed = fixed_point(vocabulary);
  const int index = threadIdx.x;
  const float own = index < source.size ? source.z(index) : -INFINITY;
  bool kept = has_mass(own, state.top);
  const unsigned long long weight = kept ? fixed.of(exp_below(own, state.top)) : 0;
  s.weights[index] = weight;
  if (index == 0) s.lowest = 0xFFFFFFFFu;
  __syncthreads();
  int rank = 0;
  unsigned long long above = 0;
  for (int i = 0; i < source.size; ++i) {
    if (!(source.z(i) > own)) continue;
    ++rank;
    above += s.weights[i];
  }
  if (state.search & kSearchTopK) kept = kept && rank < filters.top_k - static_cast<int>(count_above);
  unsigned long long total;
  block_sum_before(kept ? weight : 0, s.sums, &total);
  if (total == 0) return false;
  if (state.search & kSearchTopP) {
    const bool below_top_k = state.search & kSearchTopK;
    const double share = below_top_k ? mass_above + fixed.mass(total) : state.total;
    const double limit = std::ceil((filters.top_p * share - mass_above) * fixed.scale);
    // As in find_threshold: the nucleus must end among the candidates.
    if (count_above > 0 && !(limit > 0)) return false;
    if (!below_top_k && state.last_bin < kBins - 1 && !(fixed.mass(total) * fixed.scale >= limit)) return false;
    kept = kept && above < (limit >= 1 ? static_cast<unsigned long long>(limit) : 1ull);
  }
  if (kept) atomicMin(&s.lowest, key_of(own));
  __syncthreads();
  *threshold = std::fmax(value_of(s.lowest), state.floor);
  return true;
}

// Find the value that a row's elements must reach to be kept, (3)-(5). `mass_above` and `count_above` are of the
// elements above the bracket, which are kept and not in `source`. Return false where the threshold turns out not to be
// in `source`. All threads call. Not inlined: all kernels share one copy.
template <typename Source>
__device__ __noinline__ bool find_threshold(const Source& source, const RowState& state, const Filters& filters,
                                            int vocabulary, double mass_above, unsigned count_above,
                                            SelectScratch& s, float* threshold) {
  if (!Source::kWhole && source.size <= kThreads && state.search & (kSearchTopK | kSearchTopP)) {
    return rank_candidates(source, state, filters, vocabulary, mass_above, count_above, s, threshold);
  }
  KeySearch search{state.top, 0, fixed_point(vocabulary), false};
  double share = state.total;
  if (state.search & kSearchTopK) {
    const int limit = filters.top_k - static_cast<int>(count_above);
    if (limit <= 0 || !select_key(source, search, limit, s, &search.lowest_key)) return false;
    __syncthreads();
    share = mass_above + eligible_mass(source, search, s);
  }
  if (state.search & kSearchTopP) {
    search.by_mass = true;
    const double limit = std::ceil((filters.top_p * share - mass_above) * search.fixed.scale);
    // The bracket is an estimate: the nucleus must end inside it, neither above
    if (count_above > 0 && !(limit > 0)) return false;
    // nor below, where more elements with mass lie below.
    const bool more_below = !Source::kWhole && !(state.search & kSearchTopK) && state.last_bin < kBins - 1;
    if (more_below && !(eligible_mass(source, search, s) * search.fixed.scale >= limit)) return false;
    // The largest value is always kept, however small the share.
    const auto whole = limit >= 1 ? static_cast<unsigned long long>(limit) : 1ull;
    if (!select_key(source, search, whole, s, &search.lowest_key)) return false;
    __syncthreads();
  }
  *threshold = search.lowest_key == 0 ? state.floor : std::fmax(value_of(search.lowest_key), state.floor);
  return true;
}

}  // namespace
}  // namespace nlhf
