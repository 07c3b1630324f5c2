// mixture_sample on the GPU. One launch draws the tokens of all rows that have no filter:
//
//   stream_rows   blocks share a row's tiles, read each logit once, and keep a maximum and a sum a tile, of z and of
//                 each model whose log-probability is wanted. The last block of a row to finish adds the sums up in
//                 double, chooses the tile, walks it again and writes the row.
//
// Rows with filters go through two more, which read z again from the caches; thresholds are never found by sorting:
//
//   count_bins    a histogram over the distance to the maximum; a row's last block finds the few bins in which the
//                 thresholds of top-k and top-p must lie.
//   gather_rows   what lies above those bins is summed up per tile, what lies in them is listed; a row's last block
//                 finds the exact thresholds in the list, then chooses a tile and walks it as above. A list that
//                 overflows (thousands of equal values) is replaced by the row itself: slower, as exact.
//
// The counters that tell a block that it is its row's last are left at 0, as they must be found. A caller who keeps
// them from call to call saves zeroing them; without, they are part of the workspace and zeroed on the stream before.
#include "mixture_sample_finish.cuh"

namespace nlhf {
namespace {

struct Place {  // of a block
  int row;
  int part;
  int first_tile, end_tile;
};

NLHF_DEVICE Place place_of(const Plan& plan) {
  const unsigned parts = static_cast<unsigned>(plan.parts);
  const int part = static_cast<int>(blockIdx.x % parts);
  const int first = part * plan.part_tiles, end = first + plan.part_tiles;
  return {static_cast<int>(blockIdx.x / parts), part, first, end < plan.tiles ? end : plan.tiles};
}

// The sums of the block's tiles, a warp a tile.
template <Pass kPass, Storage kStorage, int kModels>
NLHF_DEVICE void sum_tiles(const Job& job, const Row<kStorage, kModels>& row, const Place& place) {
  constexpr bool kAll = kPass == Pass::plain_all_wanted, kNone = kPass == Pass::plain_none_wanted;
  const int lane = threadIdx.x % kWarpSize;
  for (int tile = place.first_tile + threadIdx.x / kWarpSize; tile < place.end_tile; tile += kWarps) {
    LogSum mixture, models[kModels];
    const int end = (tile + 1) * job.tile_elements();
    for (int first = end - job.tile_elements(); first < end && first < row.vocabulary(); first += kStep) {
      float z[kPerLane];
      read_step<kPass>(row, first, z, [&](int m, const float (&values)[kPerLane], float highest) {
        models[m].add(values, highest);
      });
      mixture.add(z, highest_of(z));
    }
#pragma unroll
    for (int m = 0; m < kModels; ++m) {
      if (kNone || !(kAll || row.is_wanted(m))) continue;
      const float2 sum = models[m].over_warp();
      if (lane == 0) job.tile_sums(place.row, m)[tile] = sum;
    }
    const float2 sum = mixture.over_warp();
    if (lane == 0) job.tile_sums(place.row, job.p.models)[tile] = sum;
  }
}

template <Storage kStorage, int kModels>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) stream_rows(const __grid_constant__ Job job) {
  __shared__ bool is_last;
  const Place place = place_of(job.plan);
  const Row<kStorage, kModels> row = open_row<kStorage, kModels>(job.p, place.row);
  if (job.p.filtered) {
    unsigned* bins = job.bins + int64_t{place.row} * kBins;
    for (int i = place.part * kThreads + threadIdx.x; i < kBins; i += job.plan.parts * kThreads) bins[i] = 0;
  }
  constexpr bool kMayBePlain = kModels <= 2 && kStorage != Storage::mixed;  // the rest is not worth compiling thrice
  const Pass pass = kMayBePlain ? pass_over(row) : Pass::general;
  if (kMayBePlain && pass == Pass::plain_all_wanted) {
    sum_tiles<kMayBePlain ? Pass::plain_all_wanted : Pass::general>(job, row, place);
  } else if (kMayBePlain && pass == Pass::plain_none_wanted) {
    sum_tiles<kMayBePlain ? Pass::plain_none_wanted : Pass::general>(job, row, place);
  } else {
    sum_tiles<Pass::general>(job, row, place);
  }
  if (!last_of_row(job.counters + int64_t{place.row} * kCounters + kStreamed, job.plan.parts, &is_last)) return;
  finish_streaming<kStorage, kModels>(job, place.row);
}

template <Storage kStorage, int kModels>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) count_bins(const __grid_constant__ Job job) {
  __shared__ unsigned counts[kBins];
  __shared__ bool is_last;
  const Place place = place_of(job.plan);
  RowState& state = job.states[place.row];
  if (!(state.search & (kSearchTopK | kSearchTopP))) return;
  const Row<kStorage, kModels> row = open_row<kStorage, kModels>(job.p, place.row);
  const Bins scale = bins_of(row, state.top);
  for (int i = threadIdx.x; i < kBins; i += kThreads) counts[i] = 0;
  __syncthreads();
  for (int tile = place.first_tile + threadIdx.x / kWarpSize; tile < place.end_tile; tile += kWarps) {
    if (!is_alive(job.tile_sums(place.row, job.p.models)[tile].x, scale.top)) continue;
    const int end = (tile + 1) * job.tile_elements();
    for (int first = end - job.tile_elements(); first < end && first < row.vocabulary(); first += kStep) {
      float z[kPerLane];
      read_step(row, first, z);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (is_alive(z[i], scale.top)) atomicAdd(&counts[scale.of(z[i])], 1u);
      }
    }
  }
  __syncthreads();
  unsigned* bins = job.bins + int64_t{place.row} * kBins;
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    if (counts[i] > 0) atomicAdd(bins + i, counts[i]);
  }
  if (!last_of_row(job.counters + int64_t{place.row} * kCounters + kCounted, job.plan.parts, &is_last)) return;
  find_bracket(filters_of(job.p, place.row, state.top), scale, bins, state);
}

// Mass of the lane's elements of a tile that are kept for sure; those in the bracket join the row's candidates.
template <typename RowType>
NLHF_DEVICE float gather_tile(const Job& job, const RowType& row, int index, int tile, const Bins& scale, float reach,
                              int first_bin, int last_bin) {
  float mass = 0;
  const int end = (tile + 1) * job.tile_elements();
  for (int first = end - job.tile_elements(); first < end && first < row.vocabulary(); first += kStep) {
    float z[kPerLane];
    read_step(row, first, z);
    float highest = z[0];
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) highest = std::fmax(highest, z[i]);
    if (highest < reach) continue;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (z[i] < reach || !is_alive(z[i], scale.top)) continue;
      const int bin = scale.of(z[i]);
      if (bin < first_bin) {
        mass += exp_below(z[i], scale.top);
      } else if (bin <= last_bin) {
        const unsigned at = atomicAdd(job.counters + int64_t{index} * kCounters + kCandidates, 1u);
        const Candidate candidate{z[i], first + RowType::LaneSlice::offset(i)};
        if (at < static_cast<unsigned>(job.capacity)) job.candidates[int64_t{index} * job.capacity + at] = candidate;
      }
    }
  }
  return mass;
}

// The masses that tiles keep once the threshold is known, from the row itself: the way when candidates overflowed.
template <typename RowType>
NLHF_DEVICE void sum_kept(const Job& job, const RowType& row, int64_t index, float top, float threshold) {
  constexpr int kRun = 8;
  const int lane = threadIdx.x % kWarpSize;
  for (int tile = threadIdx.x / kWarpSize; tile < job.plan.tiles; tile += kWarps) {
    float mass = 0;
    const int first = tile * job.tile_elements(), end = first + job.tile_elements();
    for (int at = first + lane * kRun; at < end && at < row.vocabulary(); at += kRun * kWarpSize) {
      float z[kRun];
      read_run(row, at, row.vocabulary(), z);
#pragma unroll
      for (int i = 0; i < kRun; ++i) mass += z[i] >= threshold ? exp_below(z[i], top) : 0.0f;
    }
    const double sum = warp_sum(static_cast<double>(mass));
    if (lane == 0) {
      job.kept[index * job.plan.tiles + tile] = sum;
      job.kept_candidates[index * job.plan.tiles + tile] = 0;
    }
  }
}

struct ThresholdScratch {
  static constexpr int kValues = 4096;
  SelectScratch select;
  double kept[kWarps];
  float values[kValues];
};

// The row's threshold, by its last block; afterwards the tiles' kept masses are complete.
template <Storage kStorage, int kModels>
__device__ __noinline__ float settle_threshold(const Job& job, int64_t index) {
  __shared__ ThresholdScratch s;
  const RowState& state = job.states[index];
  const int vocabulary = static_cast<int>(job.p.vocabulary);
  const Filters filters = filters_of(job.p, index, state.top);
  const double* kept = job.kept + index * job.plan.tiles;
  double sure = 0, mass_above;
  for (int t = threadIdx.x; t < job.plan.tiles; t += kThreads) sure += __ldcg(kept + t);
  block_sum_before(sure, s.kept, &mass_above);

  const unsigned count = __ldcg(job.counters + index * kCounters + kCandidates);
  const Candidate* candidates = job.candidates + index * job.capacity;
  CandidateList list{&candidates->z, sizeof(Candidate) / sizeof(float), static_cast<int>(count)};
  if (count <= s.kValues) {
    for (int i = threadIdx.x; i < list.size; i += kThreads) s.values[i] = list.z(i);
    list = {s.values, 1, list.size};
  }
  __syncthreads();
  float threshold;
  const bool fits = count <= static_cast<unsigned>(job.capacity);
  if (fits && find_threshold(list, state, filters, vocabulary, mass_above, state.above, s.select, &threshold)) {
    unsigned long long* kept_candidates = job.kept_candidates + index * job.plan.tiles;
    for (int i = threadIdx.x; i < list.size; i += kThreads) {
      const float z = list.z(i);
      if (!(z >= threshold)) continue;
      const int tile = candidates[i].index / job.tile_elements();
      atomicAdd(kept_candidates + tile, fixed_point(vocabulary).of(exp_below(z, state.top)));
    }
  } else {
    __syncthreads();
    const Row<kStorage, kModels> row = open_row<kStorage, kModels>(job.p, index);
    const WholeRow<Row<kStorage, kModels>> whole{row, vocabulary};
    find_threshold(whole, state, filters, vocabulary, 0.0, 0, s.select, &threshold);
    sum_kept(job, row, index, state.top, threshold);
  }
  __syncthreads();
  return threshold;
}

// The draw from what is kept, by the row's last block.
template <Storage kStorage, int kModels>
__device__ __noinline__ void finish_filtered(const Job& job, int64_t index) {
  __shared__ FinishScratch s;
  const RowState& state = job.states[index];
  const float threshold = settle_threshold<kStorage, kModels>(job, index);  // ends with a barrier
  const Draw draw{state.top, threshold, false};
  if (threadIdx.x < kWarpSize) {
    const double* kept = job.kept + index * job.plan.tiles;
    const unsigned long long* kept_candidates = job.kept_candidates + index * job.plan.tiles;
    const FixedPoint fixed = fixed_point(static_cast<int>(job.p.vocabulary));
    const double uniform = uniform_of(job.p, index);
    const double total = choose_tile(job.plan.tiles, tiles_a_lane(job.plan.tiles), uniform, [&](int t) {
      return __ldcg(kept + t) + fixed.mass(__ldcg(kept_candidates + t));
    }, s.tile, s.fraction);
    if (threadIdx.x == 0) s.normalisers[job.p.models] = {std::log(total), state.top};
  }
  if (threadIdx.x < static_cast<unsigned>(job.p.models)) s.normalisers[threadIdx.x] = state.normalisers[threadIdx.x];
  __syncthreads();
  const Row<kStorage, kModels> row = open_row<kStorage, kModels>(job.p, index);
  if (threadIdx.x == 0) job.counters[index * kCounters + kCandidates] = 0;
  if (s.tile >= 0) {
    draw_in_tile(job, row, draw, s);
  } else if (threadIdx.x == 0) {
    write_row(row, false, 0, 0.0f, draw, s.normalisers);
  }
}

template <Storage kStorage, int kModels>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) gather_rows(const __grid_constant__ Job job) {
  __shared__ bool is_last;
  const Place place = place_of(job.plan);
  const RowState& state = job.states[place.row];
  if (state.search == 0) return;
  const Row<kStorage, kModels> row = open_row<kStorage, kModels>(job.p, place.row);
  const Bins scale = bins_of(row, state.top);
  const int first_bin = state.first_bin, last_bin = state.last_bin;
  const float reach = scale.reach(last_bin);
  for (int tile = place.first_tile + threadIdx.x / kWarpSize; tile < place.end_tile; tile += kWarps) {
    float mass = 0;
    if (job.tile_sums(place.row, job.p.models)[tile].x >= reach) {
      mass = gather_tile(job, row, place.row, tile, scale, reach, first_bin, last_bin);
    }
    const double sum = warp_sum(static_cast<double>(mass));
    if (threadIdx.x % kWarpSize == 0) {
      job.kept[int64_t{place.row} * job.plan.tiles + tile] = sum;
      job.kept_candidates[int64_t{place.row} * job.plan.tiles + tile] = 0;
    }
  }
  if (!last_of_row(job.counters + int64_t{place.row} * kCounters + kGathered, job.plan.parts, &is_last)) return;
  finish_filtered<kStorage, kModels>(job, place.row);
}

// ---------------------------------------------------------------------------------------------------- launching

template <Storage kStorage, int kModels>
cudaError_t launch_kernels(const Job& job, void* cuda_stream) {
  const LaunchShape shape{static_cast<unsigned>(job.p.rows * job.plan.parts), kThreads, 0};
  cudaError_t error = launch(stream_rows<kStorage, kModels>, shape, cuda_stream, job);
  if (error != cudaSuccess || !job.p.filtered) return error;
  constexpr int kAtLeastTwo = kModels < 2 ? 2 : kModels;  // one model gains nothing from kernels of its own here
  error = launch(count_bins<kStorage, kAtLeastTwo>, shape, cuda_stream, job);
  if (error != cudaSuccess) return error;
  return launch(gather_rows<kStorage, kAtLeastTwo>, shape, cuda_stream, job);
}

template <Storage kStorage>
cudaError_t launch_for_models(const Job& job, void* cuda_stream) {
  if constexpr (kStorage != Storage::mixed) {
    if (job.p.models == 1) return launch_kernels<kStorage, 1>(job, cuda_stream);
  }
  if (job.p.models <= 2) return launch_kernels<kStorage, 2>(job, cuda_stream);
  return launch_kernels<kStorage, kMaxModels>(job, cuda_stream);
}

cudaError_t launch_for_storage(const Job& job, void* cuda_stream) {
  const Float first = job.p.logits[0].dtype;
  for (int m = 1; m < job.p.models; ++m) {
    if (job.p.logits[m].dtype != first) return launch_for_models<Storage::mixed>(job, cuda_stream);
  }
  if (first == Float::f32) return launch_for_models<Storage::f32>(job, cuda_stream);
  if (first == Float::bf16) return launch_for_models<Storage::bf16>(job, cuda_stream);
  return launch_for_models<Storage::f16>(job, cuda_stream);
}

}  // namespace

int64_t mixture_sample_workspace(int64_t rows, int64_t vocabulary, int models, bool filtered) {
  Job job{};
  return lay_out(job, rows, vocabulary, models, filtered, steps_of(vocabulary), nullptr);  // as many tiles as can be
}

int64_t mixture_sample_counters(int64_t rows) { return rows * kCounters * static_cast<int64_t>(sizeof(unsigned)); }

int mixture_sample_cuda(const MixtureSample& problem, void* workspace, void* counters, void* cuda_stream) {
  if (problem.rows == 0) return cudaSuccess;
  DeviceLimits limits;
  cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  if (problem.vocabulary > kMaxVocabulary || problem.models < 1 || problem.models > kMaxModels) {
    return cudaErrorInvalidValue;
  }
  Job job{};
  job.p = problem;
  job.plan = make_plan(problem.rows, problem.vocabulary, limits.multiprocessors);
  if (problem.rows * job.plan.parts > INT32_MAX) return cudaErrorInvalidValue;
  lay_out(job, problem.rows, problem.vocabulary, problem.models, problem.filtered, job.plan.tiles, workspace);
  if (counters != nullptr) {
    job.counters = static_cast<unsigned*>(counters);
  } else if (problem.filtered || job.plan.parts > 1) {
    const size_t bytes = mixture_sample_counters(problem.rows);
    error = cudaMemsetAsync(job.counters, 0, bytes, static_cast<cudaStream_t>(cuda_stream));
    if (error != cudaSuccess) return error;
  }
  return launch_for_storage(job, cuda_stream);
}

}  // namespace nlhf
