// Filters, first part: a histogram over the distance to the row's maximum, and from it the bracket, the few bins that
// contain the thresholds of top-k and top-p. (3)-(5) are equations of ops/mixture_sample/README.md.
//
// A bin contains the elements at one distance from the maximum, to within a 32nd of an octave before the temperature.
// So counts determine masses to within 2.2 % at temperature 1, and the known mass of the whole row bounds them from the
// other side. Distances are taken before the temperature, since a model's logits span the same range at any
// temperature.
#pragma once

#include "mixture_sample_params.cuh"

namespace nlhf {
namespace {

constexpr float kBinsPerOctave = 32.0f;

struct Filters {
  int top_k;     // 0: off
  float top_p;   // 1: off
  float floor;   // min-p's threshold, (5); -inf: off
  __device__ __forceinline__ bool any() const { return top_k > 0 || top_p < 1.0f || floor != -INFINITY; }
};

NLHF_DEVICE Filters filters_of(const MixtureSample& p, int64_t row, float top) {
  const float* settings = p.settings + row * p.settings_stride;
  const float top_k = settings[kTopK];
  Filters filters;
  filters.top_k = top_k >= 1.0f && top_k < static_cast<float>(p.vocabulary) ? static_cast<int>(top_k) : 0;
  filters.top_p = settings[kTopP] < 1.0f ? settings[kTopP] : 1.0f;
  filters.floor = top + std::log(settings[kMinP]);
  return filters;
}

struct Bins {
  float top;
  float per_unit;    // bins per unit of z
  float per_octave;  // bins per factor 2 of e^z

  // Return the bin of z, which grows as z falls. Rounding is to nearest, so bin b reaches from b - 1/2 to b + 1/2; the
  // last one has no end.
  __device__ __forceinline__ int of(float z) const {
    constexpr float kToInteger = 8388608.0f;  // 2^23: the sum's low bits are the rounded integer
    const float distance = std::fmin(__fmul_rn(top - z, per_unit), kBins - 1.0f);
    return __float_as_int(distance + kToInteger) & (kBins - 1);
  }
  // Return a value below which no z is in `bin` or an earlier one: half a bin below the bin's end.
  __device__ __forceinline__ float reach(int bin) const {
    return bin < kBins - 1 ? top - (bin + 1.0f) / per_unit : -INFINITY;
  }
  // Bounds of e^(z - top) within a bin, a little wide for rounding.
  __device__ __forceinline__ double most(int bin) const {
    return 1.0001 * exp2_fast(std::fmin(0.5f - bin, 0.0f) / per_octave);
  }
  __device__ __forceinline__ double least(int bin) const {
    return bin == kBins - 1 ? 0.0 : 0.9999 * exp2_fast((-0.5f - bin) / per_octave);
  }
};

template <typename RowType>
NLHF_DEVICE Bins bins_of(const RowType& row, float top) {
  const float temperature = std::fmin(row.temperature, 1e30f);
  return {top, kBinsPerOctave * kLog2E * temperature, kBinsPerOctave * temperature};
}

// Return whether e^(z - top) is more than 0 in float. An element of mass 0 cannot be sampled, so filters exclude it:
// otherwise thousands of masked logits would become candidates.
NLHF_DEVICE bool has_mass(float z, float top) { return __fmul_rn(z - top, kLog2E) >= kSmallestExponent; }

struct BracketScratch {
  unsigned counts[kWarps];
  double most[kWarps], least[kWarps];
  int top_k_bin, first, last;
  double shares[2];  // bounds of the mass of which top-p is a share
};

// Counts and masses in the bins before a thread's own, and in all bins.
struct BinRun {
  static constexpr int kSize = kBins / kThreads;
  const unsigned* bins;
  unsigned before;
  double most_before, least_before, most_total, least_total;
};

NLHF_DEVICE BinRun read_bins(const unsigned* bins, const Bins& scale, BracketScratch& s) {
  unsigned count = 0, total;
  double most = 0, least = 0;
  for (int i = 0; i < BinRun::kSize; ++i) {
    const int bin = threadIdx.x * BinRun::kSize + i;
    const unsigned own = __ldcg(bins + bin);
    count += own;
    most += own * scale.most(bin);
    least += own * scale.least(bin);
  }
  BinRun run;
  run.bins = bins;
  run.before = block_sum_before(count, s.counts, &total);
  run.most_before = block_sum_before(most, s.most, &run.most_total);
  run.least_before = block_sum_before(least, s.least, &run.least_total);
  return run;
}

// Call visit(bin, elements through it, most and least mass through it) for the thread's bins in order. The mass through
// a bin is bounded by the counts up to it and, through the row's whole mass, by the counts after it.
template <typename Visit>
NLHF_DEVICE void walk_bins(const BinRun& run, const Bins& scale, double total, Visit visit) {
  unsigned through = run.before;
  double most = run.most_before, least = run.least_before;
#pragma unroll 1
  for (int i = 0; i < BinRun::kSize; ++i) {
    const int bin = threadIdx.x * BinRun::kSize + i;
    const unsigned own = __ldcg(run.bins + bin);
    through += own;
    most += own * scale.most(bin);
    least += own * scale.least(bin);
    visit(bin, through, std::fmin(most, total * (1 + 1e-6) - (run.least_total - least)),
          std::fmax(least, total * (1 - 1e-6) - (run.most_total - most)));
  }
}

// Find the bins that contain the thresholds and store them in the row's state. All threads call.
static __device__ __noinline__ void find_bracket(const Filters filters, const Bins scale, const unsigned* bins,
                                                 RowState& state) {
  __shared__ BracketScratch s;
  if (threadIdx.x == 0) {
    s.top_k_bin = kBins;
    s.first = s.last = kBins - 1;
    s.shares[0] = s.shares[1] = 0;
  }
  const double total = state.total;
  const BinRun run = read_bins(bins, scale, s);  // barriers inside
  const unsigned top_k = static_cast<unsigned>(filters.top_k);
  walk_bins(run, scale, total, [&](int bin, unsigned through, double, double) {
    if (top_k > 0 && through >= top_k) atomicMin(&s.top_k_bin, bin);
  });
  __syncthreads();
  const int top_k_bin = s.top_k_bin;  // kBins: off, or fewer elements than k have mass
  if (top_k_bin == kBins) {
    if (threadIdx.x == 0) s.shares[0] = total * (1 - 1e-6), s.shares[1] = total * (1 + 1e-6);
  } else {
    walk_bins(run, scale, total, [&](int bin, unsigned, double most, double least) {
      if (bin == top_k_bin - 1) s.shares[0] = least;
      if (bin == top_k_bin) s.shares[1] = most;
    });
  }
  __syncthreads();
  const double share_least = filters.top_p * s.shares[0], share_most = filters.top_p * s.shares[1];
  if (filters.top_p < 1.0f) {
    walk_bins(run, scale, total, [&](int bin, unsigned, double most, double least) {
      if (most >= share_least) atomicMin(&s.first, bin);
      if (least >= share_most) atomicMin(&s.last, bin);
    });
  }
  __syncthreads();
  const bool top_k_searched = top_k_bin < kBins, top_p_searched = filters.top_p < 1.0f;
  int first = top_p_searched ? (s.first < top_k_bin ? s.first : top_k_bin) : top_k_bin;
  int last = top_k_searched ? top_k_bin : s.last;
  int search = kSearchPending | (top_k_searched ? kSearchTopK : 0) | (top_p_searched ? kSearchTopP : 0);
  const int floor_bin = state.floor == -INFINITY ? kBins : scale.of(state.floor);
  if (!top_k_searched && !top_p_searched) first = last = floor_bin;  // kBins: every element with mass is kept
  if (floor_bin < first) {  // min-p alone decides
    first = last = floor_bin;
    search = kSearchPending;
  }
  __syncthreads();  // all threads have read the state
  walk_bins(run, scale, total, [&](int bin, unsigned through, double, double) {
    if (bin == first - 1) state.above = through;
  });
  if (threadIdx.x == 0) {
    if (first == 0) state.above = 0;
    state.first_bin = first;
    state.last_bin = last;
    state.search = search;
  }
}

}  // namespace
}  // namespace nlhf
