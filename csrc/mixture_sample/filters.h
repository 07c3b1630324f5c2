// top-k, top-p and min-p of mixture_sample on the CPU, as one threshold on z; equation numbers are the README's.
//
// No sorting: a radix selection over the order-preserving integers of the candidates' bits, with a histogram of their
// mass per digit, in at most four rounds for any values. Candidates are few: for top-k those above the k-th largest
// maximum of groups, for top-p those in a bracket that three vectorised passes have narrowed.
#pragma once

#include <cmath>
#include <cstdint>

#include "tiles.h"

namespace nlhf {
namespace NLHF_LEVEL {

constexpr int64_t kGroups = kBlock;  // a tile's maxima over every 64th element
constexpr int kWideDigit = 11, kNarrowDigit = 8;
constexpr int64_t kBins = int64_t{1} << kWideDigit;

struct Filters {
  int64_t top_k;  // 0: off
  double top_p;   // 1: off
  float min_p;    // 0: off
};

// A row's mixture, and memory for the search.
struct FilteredRow {
  float* z;  // (padded vocabulary), the padding -inf
  int64_t vocabulary;
  const float* tile_tops;  // (tiles)
  float* group_tops;       // (tiles, kGroups); overwritten by the search
  float* candidates;       // (padded vocabulary + kBlock)
  float* masses;           // likewise
  double* bins;            // (kBins)
};

// Return integers in the order of the floats; without a branch, as random signs would be mispredicted.
static inline uint32_t ordered_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits ^ ((0u - (bits >> 31)) | 0x80000000u);
}

// Compute a tile's maxima by groups; return whether it contains a NaN.
static inline bool group_maxima(const float* z, int64_t count, float* group_tops) {
  constexpr int kVectors = kGroups / kLanes;
  Floats best[kVectors];
  Mask nan{};
  for (Floats& lanes : best) lanes = broadcast(-INFINITY);
  for (int64_t i = 0; i < count; i += kGroups) {
    for (int v = 0; v < kVectors; ++v) {
      const Floats x = load(z + i + v * kLanes);
      best[v] = larger(x, best[v]);
      nan |= x != x;
    }
  }
  for (int v = 0; v < kVectors; ++v) store(group_tops + v * kLanes, best[v]);
  return lane_bits(nan) != 0;
}

// The candidates left in a search: their keys, ordered bits, are in [first, first + 2^bits).
struct KeyRange {
  uint32_t first;
  int bits;
};

static inline KeyRange key_range(const float* values, int64_t count) {
  uint32_t smallest = 0xFFFFFFFFu, largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = ordered_bits(values[i]);
    smallest = key < smallest ? key : smallest;
    largest = key > largest ? key : largest;
  }
  return {smallest, largest > smallest ? 32 - __builtin_clz(largest - smallest) : 0};
}

// Sum the masses by digit; without masses each value has mass 1.
static inline void histogram(const float* values, const float* masses, int64_t count, uint32_t first, int shift,
                             int64_t bins, double* sums) {
  for (int64_t bin = 0; bin < bins; ++bin) sums[bin] = 0;
  if (masses == nullptr) {
    for (int64_t i = 0; i < count; ++i) sums[(ordered_bits(values[i]) - first) >> shift] += 1;
  } else {
    for (int64_t i = 0; i < count; ++i) sums[(ordered_bits(values[i]) - first) >> shift] += masses[i];
  }
}

// Return the lowest candidate such that the mass of strictly larger ones, with `above` included, is below `target`;
// `otherwise` if no candidate has mass. Values and masses are compacted in place.
static inline float lowest_kept(float* values, float* masses, int64_t count, double above, double target,
                                float otherwise, double* bins) {
  KeyRange range = key_range(values, count);
  while (range.bits > 0 && count > 1) {
    const int digit_bits = count > 4 * kBins ? kWideDigit : kNarrowDigit;
    const int width = digit_bits < range.bits ? digit_bits : range.bits;
    const int shift = range.bits - width;
    histogram(values, masses, count, range.first, shift, int64_t{1} << width, bins);
    int64_t digit = -1;
    double before = above;
    for (int64_t bin = (int64_t{1} << width) - 1; bin >= 0 && above < target; --bin) {
      if (!(bins[bin] > 0)) continue;
      digit = bin;
      before = above;
      above += bins[bin];
    }
    if (digit < 0) return otherwise;
    above = before;
    int64_t survivors = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool here = (ordered_bits(values[i]) - range.first) >> shift == static_cast<uint32_t>(digit);
      values[survivors] = values[i];
      if (masses != nullptr) masses[survivors] = masses[i];
      survivors += here;
    }
    count = survivors;
    range = {range.first + (static_cast<uint32_t>(digit) << shift), shift};
  }
  return count > 0 ? values[0] : otherwise;
}

// Collect the values in [low, high), in no particular order, and return their number. Tiles below `low` are skipped.
static inline int64_t collect(const FilteredRow& row, float low, float high) {
  const Floats lows = broadcast(low), highs = broadcast(high);
  int64_t count = 0;
  for (int64_t first = 0, tile = 0; first < row.vocabulary; first += kTile, ++tile) {
    if (row.tile_tops[tile] < low) continue;
    const int64_t end = first + padded(tile_length(row.vocabulary, first));
    for (int64_t block = first; block < end; block += kBlock) {
      uint64_t bits = 0;  // of a whole block: one branch a vector would be mispredicted too often
      for (int64_t i = 0; i < kBlock; i += kLanes) {
        const Floats z = load(row.z + block + i);
        const uint32_t inside = lane_bits((z >= lows) & (z < highs));
#if defined(__AVX512F__)
        store(row.candidates + count, (Floats)_mm512_maskz_compress_ps(static_cast<__mmask16>(inside), (__m512)z));
        count += __builtin_popcount(inside);
#else
        bits |= static_cast<uint64_t>(inside) << i;
#endif
      }
      for (; bits != 0; bits &= bits - 1) row.candidates[count++] = row.z[block + __builtin_ctzll(bits)];
    }
  }
  return count;
}

// Store exp(candidate - top) of each candidate and return their sum.
static inline double weigh_candidates(const FilteredRow& row, int64_t count, float top) {
  const Floats tops = broadcast(top);
  double total = 0;
  for (int64_t i = 0; i < count; i += kLanes) store(row.masses + i, exp_nonpositive(load(row.candidates + i) - tops));
  for (int64_t i = 0; i < count; ++i) total += row.masses[i];
  return total;
}

// (3): return the k-th largest value. The k-th largest maximum of groups is a lower bound, as k groups have such a
// value.
static inline float kth_largest(const FilteredRow& row, int64_t k) {
  const int64_t groups = tiles_of(row.vocabulary) * kGroups;
  const double target = static_cast<double>(k);
  float low = -INFINITY;
  if (k <= groups) low = lowest_kept(row.group_tops, nullptr, groups, 0, target, low, row.bins);
  const int64_t count = collect(row, low, INFINITY);
  return lowest_kept(row.candidates, nullptr, count, 0, target, low, row.bins);
}

// top-p's threshold lies in [low, high), and the values from `high` on have the mass `above`, less than the target.
struct Bracket {
  float low, high;
  double above;
};

constexpr int kPivots = 4, kPasses = 3;  // at most 1/343 of the bracket's width is left

// Compute the mass of the values from each pivot on, then of all from `low` on. The first pass stores the masses.
template <bool kFirst>
static void masses_above(const FilteredRow& row, const float* pivots, float low, float top, double* sums) {
  constexpr int kLinks = 8;
  const int64_t end = padded(row.vocabulary);
  const Floats lows = broadcast(low), tops = broadcast(top);
  Floats bounds[kPivots];
  double lanes[kPivots + 1][kLanes] = {};
  for (int j = 0; j < kPivots; ++j) bounds[j] = broadcast(pivots[j]);
  for (int64_t first = 0; first < end; first += kLinks * kLanes) {
    const int64_t stop = end < first + kLinks * kLanes ? end : first + kLinks * kLanes;
    Floats partial[kPivots + 1] = {};
    for (int64_t i = first; i < stop; i += kLanes) {
      const Floats z = load(row.z + i);
      Floats mass;
      if (kFirst) {
        mass = where(z >= lows, exp_nonpositive(z - tops));
        store(row.masses + i, mass);
        partial[kPivots] += mass;
      } else {
        mass = load(row.masses + i);
      }
      for (int j = 0; j < kPivots; ++j) partial[j] += where(z >= bounds[j], mass);
    }
    for (int j = 0; j < kPivots + kFirst; ++j) add_lanes(partial[j], lanes[j]);
  }
  for (int j = 0; j < kPivots + kFirst; ++j) sums[j] = sum_of_lanes(lanes[j]);
}

static inline double nonzero(double target) { return target > 0 ? target : 1e-300; }  // the maximum is always kept

// (4) on all values from `low` on, however many. Values so small that a whole row of them has less than (1 - p) of the
// mass, which is at least 1, are dropped in any case; this bounds the bracket from below.
static inline float smallest_of_nucleus(const FilteredRow& row, double top_p, float low, float top) {
  const double depth = std::log((1 - top_p) / static_cast<double>(row.vocabulary)) - 0.01;
  const float cut = top + static_cast<float>(depth);
  Bracket bracket{low > cut ? low : cut, INFINITY, 0};
  double sums[kPivots + 1], target = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    float pivots[kPivots];
    const float width = (bracket.high < top ? bracket.high : top) - bracket.low;
    for (int j = 0; j < kPivots; ++j) pivots[j] = bracket.low + width * static_cast<float>(j + 1) / (kPivots + 1);
    if (pass == 0) {
      masses_above<true>(row, pivots, low, top, sums);
      target = nonzero(top_p * sums[kPivots]);
    } else {
      masses_above<false>(row, pivots, low, top, sums);
    }
    int j = kPivots - 1;
    for (; j >= 0 && sums[j] < target; --j) bracket.high = pivots[j], bracket.above = sums[j];
    if (j >= 0) bracket.low = pivots[j];
  }
  const int64_t count = collect(row, bracket.low, bracket.high);
  weigh_candidates(row, count, top);
  return lowest_kept(row.candidates, row.masses, count, bracket.above, target, bracket.low, row.bins);
}

// Return the smallest z that all filters keep; `top` is the largest z, a number.
static inline float threshold(const FilteredRow& row, const Filters& filters, float top) {
  float low = -INFINITY;
  if (filters.top_k > 0) low = kth_largest(row, filters.top_k);
  if (filters.top_p < 1 && filters.top_k > 0 && filters.top_k <= kTile) {  // few candidates: no bracket is needed
    const int64_t count = collect(row, low, INFINITY);
    const double target = nonzero(filters.top_p * weigh_candidates(row, count, top));
    low = lowest_kept(row.candidates, row.masses, count, 0, target, low, row.bins);
  } else if (filters.top_p < 1) {
    low = smallest_of_nucleus(row, filters.top_p, low, top);
  }
  if (filters.min_p != 0) {
    const float least = top + std::log(filters.min_p);  // (5); NaN keeps nothing
    low = low > least ? low : least;
  }
  return low;
}

// Set values below the threshold to -inf.
static inline void drop_below(float low, int64_t count, float* z) {
  const Floats lows = broadcast(low), dropped = broadcast(-INFINITY);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats x = load(z + i);
    store(z + i, x >= lows ? x : dropped);
  }
}

}  // namespace NLHF_LEVEL
}  // namespace nlhf
