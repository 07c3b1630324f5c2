// The end of a row of mixture_sample, by the last of its blocks: from the tiles' sums to a tile, from the tile to the
// token, and the outputs.
//
// What it costs is a chain of waits, so the chain is short. One load of the whole block brings the sums of all series
// into shared memory; one warp chooses the tile while others add up a normaliser each; then a warp for each step of the
// tile walks it, with z in registers, and the warp in whose step the token lies writes the row. Between these there is
// a barrier of the block each, and one more where a tile has several steps; nothing else is waited for.
#pragma once

#include "../common/philox.h"
#include "mixture_sample_select.cuh"

namespace nlhf {
namespace {

constexpr int kStagedTiles = 2 * kThreads;  // of a series; rows of more tiles are read where they lie

// A series' sums, a tile each, for a warp whose lanes own runs of neighbouring tiles. In shared memory each run is
// followed by a gap, so that the lanes' reads fall into different banks.
struct TileSums {
  const float2* values;
  int run;  // tiles a lane
  bool staged;
  // Of a tile in the calling lane's run.
  __device__ __forceinline__ float2 operator()(int tile) const {
    return staged ? values[tile + threadIdx.x % kWarpSize] : __ldcg(values + tile);
  }
  __device__ __forceinline__ float2 of_any(int tile) const {
    return staged ? values[tile + tile / run] : __ldcg(values + tile);
  }
};
using StagedSums = float2[kStagedTiles + kWarpSize];

struct FinishScratch {
  Normaliser normalisers[kMaxModels + 1];  // of the models, and of z over the support at [models]
  double uniform;
  int tile;         // chosen; negative: Ending
  double fraction;  // how far into the tile's mass the uniform points
  float row_top;    // the largest z
  double step_mass[kMaxTileSteps];
};

enum Ending : int { kBroken = -1, kPending = -2 };  // of rows without a tile: no distribution, or filters to apply first

NLHF_DEVICE double uniform_of(const MixtureSample& p, int64_t row) {
  if (p.uniforms != nullptr) return p.uniforms[row];
  return open_unit(random_bits(p.seed[row * p.seed_stride], p.row_ids[row], p.step[row * p.step_stride], p.stream));
}

// How a row's token is drawn: with weight e^(z - top) where z reaches `threshold`; or, greedy, as the first of the
// largest, which is the same walk with weight 1 there and a uniform of 0.
struct Draw {
  float top;
  float threshold;
  bool greedy;
  __device__ __forceinline__ float weight(float z) const {
    if (greedy) return z == top ? 1.0f : 0.0f;
    return z >= threshold ? exp_below(z, top) : 0.0f;
  }
};

// The lane's run of tiles.
struct TileRun {
  int first, end;
};
NLHF_DEVICE TileRun run_of(int tiles, int run) {
  const int first = static_cast<int>(threadIdx.x % kWarpSize) * run;
  return {first, first + run < tiles ? first + run : tiles};
}
NLHF_DEVICE int tiles_a_lane(int tiles) { return (tiles + kWarpSize - 1) / kWarpSize; }

// The sum of a series over its tiles, by one warp.
NLHF_DEVICE void normalise(const TileSums& sums, int tiles, Normaliser& result) {
  const TileRun run = run_of(tiles, sums.run);
  float top = -INFINITY;
  for (int t = run.first; t < run.end; ++t) top = std::fmax(top, sums(t).x);
  top = warp_max(top);
  double mass = 0;
  for (int t = run.first; t < run.end; ++t) mass += mass_below(sums(t), top);
  mass = warp_sum(mass);
  if (threadIdx.x % kWarpSize == 0) result = {std::log(mass), top};  // NaN where the series is no distribution
}

// Chooses a tile, equation (2) over tiles, by one warp with mass_of(tile) as their masses; returns the sum of all.
// `tile` is the tile, kBroken where there is no mass, and `fraction` how far into its mass the uniform points.
template <typename MassOf>
NLHF_DEVICE double choose_tile(int tiles, int a_lane, double uniform, MassOf mass_of, int& tile, double& fraction) {
  const TileRun run = run_of(tiles, a_lane);
  double mass = 0;
  for (int t = run.first; t < run.end; ++t) mass += mass_of(t);
  const WarpSums<double> sums = warp_sums(mass);
  const double target = uniform * sums.all;
  const Crossing crossing = warp_crossing(sums.before, mass, target);
  const int chosen = crossing.first >= 0 ? crossing.first : crossing.last;
  const int lane = threadIdx.x % kWarpSize;
  if (chosen < 0 && lane == 0) tile = kBroken;
  if (chosen == lane) {
    double running = sums.before;
    for (int t = run.first; t < run.end; ++t) {
      const double own = mass_of(t);
      if (!(own > 0)) continue;  // where rounding leaves none beyond the target, the last that has mass
      tile = t;
      fraction = (target - running) / own;
      running += own;
      if (running > target) break;
    }
  }
  return sums.all;
}

// Writes a row's outputs, by one thread. `ok` false: the row is no distribution.
template <Storage kStorage, int kModels>
NLHF_DEVICE void write_row(const Row<kStorage, kModels>& row, bool ok, int token, float z, const Draw& draw,
                           const Normaliser* normalisers) {
  const MixtureSample& p = row.p;
  bool all_numbers = true;
#pragma unroll
  for (int m = 0; m <= kModels; ++m) {
    if (m > p.models || !(p.wanted >> m & 1)) continue;
    double logprob = NAN;
    if (ok && m < p.models) {
      const float logit = load_element<kStorage>(row.model(m < kModels ? m : 0), token, row.vocabulary());
      logprob = (logit - normalisers[m].top) - normalisers[m].log_mass;
    } else if (ok) {
      logprob = draw.greedy ? 0.0 : (z - normalisers[m].top) - normalisers[m].log_mass;
    }
    p.logprobs[m * p.rows + row.index] = static_cast<float>(logprob);
    all_numbers &= logprob == logprob;
  }
  p.tokens[row.index] = ok ? token : 0;
  p.ok[row.index] = ok && all_numbers;
}

// Walks the chosen tile, a warp a step of it, and writes the row. All threads of the block call, after a barrier.
template <Storage kStorage, int kModels>
NLHF_DEVICE void draw_in_tile(const Job& job, const Row<kStorage, kModels>& row, const Draw& draw, FinishScratch& s) {
  using S = Slice<kStorage>;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, steps = job.plan.tile_steps;
  const int first = (s.tile * steps + warp) * kStep;
  float z[kPerLane];
  double mass[S::kChunks];
  WarpSums<double> chunks[S::kChunks];
  double own = 0;
  if (warp < steps) {
    read_step(row, first, z);
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      mass[c] = 0;
#pragma unroll
      for (int i = 0; i < S::kWidth; ++i) mass[c] += draw.weight(z[c * S::kWidth + i]);
      chunks[c] = warp_sums(mass[c]);
      own += chunks[c].all;
    }
  }
  // In units of what this walk sums up to, which differs by rounding from the tile's stored sum.
  double before = 0, all = own;
  int chosen = 0;
  if (steps > 1) {
    if (warp < steps && lane == 0) s.step_mass[warp] = own;
    __syncthreads();
    all = 0;
    for (int w = 0; w < steps; ++w) all += s.step_mass[w];
  }
  const double target = std::fmax(s.fraction, 0.0) * all;
  if (steps > 1) {
    double running = 0;
    for (int w = 0; w < steps; ++w) {
      if (!(s.step_mass[w] > 0)) continue;  // as in choose_tile
      chosen = w;
      before = running;
      running += s.step_mass[w];
      if (running > target) break;
    }
  }
  if (warp != chosen) return;
  int chunk = -1, owner = 0, last_chunk = 0, last_owner = 0;
  double chunk_before = before, found_before = before;
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c) {
    const Crossing crossing = warp_crossing(chunk_before + chunks[c].before, mass[c], target);
    if (chunk < 0 && crossing.first >= 0) chunk = c, owner = crossing.first, found_before = chunk_before;
    if (crossing.last >= 0) last_chunk = c, last_owner = crossing.last;
    chunk_before += chunks[c].all;
  }
  if (chunk < 0) chunk = last_chunk, owner = last_owner;
  if (lane != owner) return;
  int token = first + S::offset(0);
  float z_of_token = z[0];
  bool found = false;
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c) {
    if (c != chunk) continue;
    double running = found_before + chunks[c].before;
#pragma unroll
    for (int i = 0; i < S::kWidth; ++i) {
      const float weight = draw.weight(z[c * S::kWidth + i]);
      running += weight;
      if (found || !(weight > 0)) continue;
      token = first + S::offset(c * S::kWidth + i);
      z_of_token = z[c * S::kWidth + i];
      found = running > target;
    }
  }
  write_row(row, true, token, z_of_token, draw, s.normalisers);
}

// Brings the sums of z and of the wanted models' tiles into shared memory; a barrier must follow.
template <int kModels>
NLHF_DEVICE void stage_sums(const Job& job, int64_t index, int run, StagedSums (&staged)[kModels + 1]) {
  constexpr int kRounds = kStagedTiles / kThreads;
  float2 own[kModels + 1][kRounds];  // all on their way before the first is stored
#pragma unroll
  for (int series = 0; series <= kModels; ++series) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int tile = round * kThreads + threadIdx.x;
      own[series][round] = {0, 0};
      if (series > job.p.models || tile >= job.plan.tiles) continue;
      if (series == job.p.models || job.p.wanted >> series & 1) {
        own[series][round] = __ldcg(job.tile_sums(index, series) + tile);
      }
    }
  }
#pragma unroll
  for (int series = 0; series <= kModels; ++series) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int tile = round * kThreads + threadIdx.x;
      if (tile < job.plan.tiles) staged[series][tile + tile / run] = own[series][round];
    }
  }
}

// Chooses the row's tile from the sums of z, by one warp; or finds that the row is broken, or has filters to apply, and
// then leaves what they need in its state.
template <typename RowType>
NLHF_DEVICE void choose_from_sums(const Job& job, const RowType& row, const TileSums& sums, FinishScratch& s) {
  const MixtureSample& p = row.p;
  const TileRun run = run_of(job.plan.tiles, sums.run);
  const bool greedy = row.is_greedy();
  float top = -INFINITY;
  bool broken = false;
  for (int t = run.first; t < run.end; ++t) {
    const float2 sum = sums(t);
    top = std::fmax(top, sum.x);
    broken |= sum.y != sum.y;
  }
  top = warp_max(top);
  Filters filters{0, 1.0f, -INFINITY};
  if (p.filtered) filters = filters_of(p, row.index, top);
  // No finite maximum, a NaN somewhere, or a min_p beyond 1, which keeps nothing.
  broken |= !(std::fabs(top) < INFINITY) || !(top >= filters.floor);
  const int lane = threadIdx.x % kWarpSize;
  if (__any_sync(kWholeWarp, broken)) {
    if (lane == 0) s.tile = kBroken;
    if (lane == 0 && p.filtered) job.states[row.index].search = 0;
    return;
  }
  const double total = choose_tile(job.plan.tiles, sums.run, greedy ? 0.0 : s.uniform, [&](int t) {
    const float2 sum = sums(t);
    if (greedy) return static_cast<double>(sum.x == top);
    return static_cast<double>(mass_below(sum, top));
  }, s.tile, s.fraction);
  __syncwarp();  // the chosen tile is written
  if (lane != 0) return;
  s.row_top = top;
  if (!p.filtered) return;
  RowState& state = job.states[row.index];
  state.search = 0;
  if (greedy || !filters.any()) return;
  const bool searched = filters.top_k > 0 || filters.top_p < 1.0f;
  state.search = kSearchPending | (searched ? kSearchTopK | kSearchTopP : 0);
  state.total = total;
  state.top = top;
  state.floor = filters.floor;
  state.first_bin = state.last_bin = bins_of(row, top).of(filters.floor);
  state.above = 0;
  s.tile = kPending;
}

// After the last of a row's sums: its token, or, where filters need further passes, its state for them.
template <Storage kStorage, int kModels>
__device__ __noinline__ void finish_streaming(const Job& job, int64_t index) {
  __shared__ StagedSums staged_sums[kModels + 1];
  __shared__ FinishScratch s;
  const MixtureSample& p = job.p;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, tiles = job.plan.tiles;
  const int a_lane = tiles_a_lane(tiles);
  const bool staged = tiles <= kStagedTiles;
  const auto sums_of = [&](int series) {
    return TileSums{staged ? staged_sums[series] : job.tile_sums(index, series), a_lane, staged};
  };
  if (staged) stage_sums<kModels>(job, index, a_lane, staged_sums);
  if (warp == kWarps - 1 && lane == 0) s.uniform = uniform_of(p, index);
  const Row<kStorage, kModels> row = open_row<kStorage, kModels>(p, index);
  __syncthreads();
  const int series = warp - 1;
  if (warp == 0) {
    choose_from_sums(job, row, sums_of(p.models), s);
  } else if (series <= p.models && p.wanted >> series & 1) {
    normalise(sums_of(series), tiles, s.normalisers[series]);
  }
  __syncthreads();
  Draw draw{s.row_top, -INFINITY, row.is_greedy()};
  if (s.tile == kPending) {
    if (threadIdx.x == 0) {
      for (int m = 0; m < kMaxModels; ++m) job.states[index].normalisers[m] = s.normalisers[m];
    }
  } else if (s.tile == kBroken) {
    if (threadIdx.x == 0) write_row(row, false, 0, 0.0f, draw, s.normalisers);
  } else {
    // Within the tile in units of its own maximum, for small tiles to keep their digits.
    if (!draw.greedy) draw.top = sums_of(p.models).of_any(s.tile).x;
    draw_in_tile(job, row, draw, s);
  }
}

}  // namespace
}  // namespace nlhf
