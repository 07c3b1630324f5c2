// mixture_sample on the GPU. One launch samples the tokens of all rows without filters:
//
//   stream_rows   Blocks share a row's tiles, read each logit once, and store a maximum and a sum per tile, of z and of
//                 each model whose log-probability is requested. The last block of a row to finish adds the sums in
//                 double, chooses the tile, scans it again and writes the row's outputs.
//
// Rows with filters need two more launches, which read z again from the caches; thresholds are not found by sorting:
//
//   count_bins    Compute a histogram over the distance to the maximum; a row's last block finds the few bins that
//                 contain the thresholds of top-k and top-p. Not needed for min-p alone, nor for a small k, for which
//                 the tiles' maxima suffice.
//   gather_rows   Sum the elements above those bins per tile and list the elements in them; a row's last block finds
//                 the exact thresholds in the list, then chooses a tile and scans it as above. If the list overflows
//                 (thousands of equal values), the row itself is searched: slower, as exact.
//
// Counters of finished blocks identify a row's last block. They must be 0 before a call and are 0 after it. A caller
// who passes the same counters to every call saves zeroing them; otherwise they are part of the workspace and zeroed on
// the stream first.
#include "mixture_sample_finish.cuh"

namespace nlhf {
namespace {

struct BlockWork {  // the tiles of one block
  int row;
  int part;
  int first_tile, end_tile;
};

NLHF_DEVICE BlockWork work_of_block(const Plan& plan) {
  const unsigned parts = static_cast<unsigned>(plan.parts);
  const int part = static_cast<int>(blockIdx.x % parts);
  const bool larger = part < plan.larger_parts;
  const int first = part * plan.part_tiles + (larger ? part : plan.larger_parts);
  return {static_cast<int>(blockIdx.x / parts), part, first, first + plan.part_tiles + larger};
}

// Fetch the lines of a step of all models, one a lane: more bytes are then on their way than registers could wait for.
template <Storage kStorage, int kModels>
NLHF_DEVICE void prefetch_step(const Row<kStorage, kModels>& row, int first) {
  constexpr int kBytes = 16 / Slice<kStorage>::kWidth, kLine = 128 / kBytes, kLines = kStep / kLine;
  static_assert(kModels * kLines <= kWarpSize, "a line a lane");
  const int lane = threadIdx.x % kWarpSize, index = first + lane % kLines * kLine;
  const unsigned char* const data = kModels == 2 && lane >= kLines ? row.data[kModels - 1] : row.data[0];
  if (lane < kModels * kLines && index < row.vocabulary()) prefetch(data + int64_t{index} * kBytes);
}

// Compute the sums of the block's tiles, a warp a tile.
template <Pass kPass, int kEx2, Storage kStorage, int kModels>
NLHF_DEVICE void sum_tiles(const Params& params, const Row<kStorage, kModels>& row, const BlockWork& work) {
  const int lane = threadIdx.x % kWarpSize, models = params.p.models;
  float2* const stored = params.tile_sums(work.row, 0);
  const auto store = [&](int series, int tile, int writer, float2 sum) {
    if (lane == writer) stored[int64_t{series} * params.plan.tiles + tile] = sum;
  };
  for (int tile = work.first_tile + threadIdx.x / kWarpSize; tile < work.end_tile; tile += kWarps) {
    LogSum series[kModels + 1];  // the mixture last
    const int end = (tile + 1) * params.tile_elements();
    for (int first = end - params.tile_elements(); first < end && first < row.vocabulary(); first += kStep) {
      if constexpr (kPass == Pass::plain_all_logprobs || kPass == Pass::plain_no_logprobs) {
        const bool has_next = tile + kWarps < work.end_tile;
        const int next_tile = has_next ? (tile + kWarps) * params.tile_elements() : row.vocabulary();
        if (params.lookahead > 1) prefetch_step(row, first + kStep < end ? first + kStep : next_tile);
      }
      float z[kPerLane];
      read_step<kPass>(row, first, z, [&](int m, const float (&values)[kPerLane], float highest) {
        series[m].template add<kEx2>(values, highest);
      });
      series[kModels].template add<kEx2>(z, highest_of(z));
    }
    if constexpr (kPass == Pass::plain_no_logprobs) {
      store(models, tile, 0, sums_over_warp<1>(series + kModels));
    } else if constexpr (kModels < 4) {
      const float2 sum = sums_over_warp<kModels + 1>(series);
      const int own = lane / 8;
      store(own < kModels ? own : models, tile, own < models || own == kModels ? own * 8 : -1, sum);
    } else {
      const float2 sum = sums_over_warp<4>(series);
      const int own = lane / 8;
      store(own, tile, own < models ? own * 8 : -1, sum);
      store(models, tile, 0, sums_over_warp<1>(series + kModels));
    }
  }
}

template <Storage kStorage, int kModels>
__global__ void __launch_bounds__(kThreads, resident_blocks(kModels))
    stream_rows(const __grid_constant__ Params params) {
  __shared__ bool is_last;
  __shared__ double uniform;
  const BlockWork work = work_of_block(params.plan);
  const Row<kStorage, kModels> row = open_row<kStorage, kModels>(params.p, work.row);
  // Every block, since any may be the row's last: after the sums, its loads and its rounds would be waited for.
  if (threadIdx.x == kThreads - kWarpSize) uniform = uniform_of(params.p, work.row);
  if (params.p.filtered) {
    unsigned* bins = params.bins + int64_t{work.row} * kBins;
    for (int i = work.part * kThreads + threadIdx.x; i < kBins; i += params.plan.parts * kThreads) bins[i] = 0;
  }
  // Other combinations are rare: one version of the loop serves them.
  constexpr bool kMayBePlain = kModels <= 2 && kStorage != Storage::mixed;
  const Pass pass = kMayBePlain ? pass_over(row) : Pass::general;
  // Only where three exponentials an element take longer than its bytes.
  constexpr bool kMayShare = kMayBePlain && kModels == 2 && Slice<kStorage>::kPacked;
  constexpr Pass kAll = kMayBePlain ? Pass::plain_all_logprobs : Pass::general;
  constexpr Pass kNone = kMayBePlain ? Pass::plain_no_logprobs : Pass::general;
  if (kMayShare && pass == kAll && params.ex2 < kAllEx2) {
    if (params.ex2 == kLeastEx2) {
      sum_tiles<kAll, kMayShare ? kLeastEx2 : kAllEx2>(params, row, work);
    } else {
      sum_tiles<kAll, kMayShare ? kLeastEx2 + 1 : kAllEx2>(params, row, work);
    }
  } else if (kMayBePlain && pass == kAll) {
    sum_tiles<kAll, kAllEx2>(params, row, work);
  } else if (kMayBePlain && pass == kNone) {
    sum_tiles<kNone, kAllEx2>(params, row, work);
  } else {
    sum_tiles<Pass::general, kAllEx2>(params, row, work);
  }
  if (!streamed_last(params, work.row, &is_last)) return;
  finish_streaming<kStorage, kModels>(params, work.row, uniform);
}

template <Storage kStorage, int kModels>
__global__ void __launch_bounds__(kThreads, resident_blocks(kModels))
    count_bins(const __grid_constant__ Params params) {
  __shared__ unsigned counts[kBins];
  __shared__ bool is_last;
  const BlockWork work = work_of_block(params.plan);
  RowState& state = params.states[work.row];
  if (!(state.search & kSearchHistogram)) return;
  const Row<kStorage, kModels> row = open_row<kStorage, kModels>(params.p, work.row);
  const Bins scale = bins_of(row, state.top);
  for (int i = threadIdx.x; i < kBins; i += kThreads) counts[i] = 0;
  __syncthreads();
  for (int tile = work.first_tile + threadIdx.x / kWarpSize; tile < work.end_tile; tile += kWarps) {
    if (!has_mass(params.tile_sums(work.row, params.p.models)[tile].x, scale.top)) continue;
    const int end = (tile + 1) * params.tile_elements();
    for (int first = end - params.tile_elements(); first < end && first < row.vocabulary(); first += kStep) {
      float z[kPerLane];
      read_step(row, first, z);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (has_mass(z[i], scale.top)) atomicAdd(&counts[scale.of(z[i])], 1u);
      }
    }
  }
  __syncthreads();
  unsigned* bins = params.bins + int64_t{work.row} * kBins;
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    if (counts[i] > 0) atomicAdd(bins + i, counts[i]);
  }
  if (!last_of_row(params.counters + int64_t{work.row} * kCounters + kCounted, params.plan.parts, &is_last)) return;
  find_bracket(filters_of(params.p, work.row, state.top), scale, bins, state);
}

// Return the mass of the lane's elements of a tile above the bracket; append those in the bracket to the candidates.
template <typename RowType>
NLHF_DEVICE float gather_tile(const Params& params, const RowType& row, int index, int tile, const Bins& scale,
                              float reach, int first_bin, int last_bin) {
  float mass = 0;
  const int end = (tile + 1) * params.tile_elements();
  for (int first = end - params.tile_elements(); first < end && first < row.vocabulary(); first += kStep) {
    float z[kPerLane];
    read_step(row, first, z);
    float highest = z[0];
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) highest = std::fmax(highest, z[i]);
    if (highest < reach) continue;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (z[i] < reach || !has_mass(z[i], scale.top)) continue;
      const int bin = scale.of(z[i]);
      if (bin < first_bin) {
        mass += exp_below(z[i], scale.top);
      } else if (bin <= last_bin) {
        const unsigned at = atomicAdd(params.counters + int64_t{index} * kCounters + kCandidates, 1u);
        const Candidate candidate{z[i], first + RowType::LaneSlice::offset(i)};
        if (at < static_cast<unsigned>(params.capacity)) {
          params.candidates[int64_t{index} * params.capacity + at] = candidate;
        }
      }
    }
  }
  return mass;
}

// Compute the tiles' kept masses from the row itself, given the threshold: used when the candidates overflowed.
template <typename RowType>
NLHF_DEVICE void sum_kept(const Params& params, const RowType& row, int64_t index, float top, float threshold) {
  constexpr int kRun = 8;
  const int lane = threadIdx.x % kWarpSize;
  for (int tile = threadIdx.x / kWarpSize; tile < params.plan.tiles; tile += kWarps) {
    float mass = 0;
    const int first = tile * params.tile_elements(), end = first + params.tile_elements();
    for (int at = first + lane * kRun; at < end && at < row.vocabulary(); at += kRun * kWarpSize) {
      float z[kRun];
      read_run(row, at, row.vocabulary(), z);
#pragma unroll
      for (int i = 0; i < kRun; ++i) mass += z[i] >= threshold ? exp_below(z[i], top) : 0.0f;
    }
    const double sum = warp_sum(static_cast<double>(mass));
    if (lane == 0) {
      params.kept_mass[index * params.plan.tiles + tile] = sum;
      params.candidate_mass[index * params.plan.tiles + tile] = 0;
    }
  }
}

struct ThresholdScratch {
  static constexpr int kValues = 4096;
  SelectScratch select;
  double masses[kWarps];
  float values[kValues];
};

// Return the row's threshold, by its last block, and complete the tiles' kept masses.
template <Storage kStorage, int kModels>
__device__ __noinline__ float find_exact_threshold(const Params& params, int64_t index) {
  __shared__ ThresholdScratch s;
  const RowState& state = params.states[index];
  const int vocabulary = static_cast<int>(params.p.vocabulary);
  const Filters filters = filters_of(params.p, index, state.top);
  const double* kept = params.kept_mass + index * params.plan.tiles;
  double own_mass = 0, mass_above;
  for (int t = threadIdx.x; t < params.plan.tiles; t += kThreads) own_mass += __ldcg(kept + t);
  block_sum_before(own_mass, s.masses, &mass_above);

  const unsigned count = __ldcg(params.counters + index * kCounters + kCandidates);
  const Candidate* candidates = params.candidates + index * params.capacity;
  CandidateList list{&candidates->z, sizeof(Candidate) / sizeof(float), static_cast<int>(count)};
  if (count <= s.kValues) {
    for (int i = threadIdx.x; i < list.size; i += kThreads) s.values[i] = list.z(i);
    list = {s.values, 1, list.size};
  }
  __syncthreads();
  float threshold;
  const bool fits = count <= static_cast<unsigned>(params.capacity);
  if (fits && find_threshold(list, state, filters, vocabulary, mass_above, state.above, s.select, &threshold)) {
    unsigned long long* candidate_mass = params.candidate_mass + index * params.plan.tiles;
    for (int i = threadIdx.x; i < list.size; i += kThreads) {
      const float z = list.z(i);
      if (!(z >= threshold)) continue;
      const int tile = candidates[i].index / params.tile_elements();
      atomicAdd(candidate_mass + tile, fixed_point(vocabulary).of(exp_below(z, state.top)));
    }
  } else {
    __syncthreads();
    const Row<kStorage, kModels> row = open_row<kStorage, kModels>(params.p, index);
    const WholeRow<Row<kStorage, kModels>> whole{row, vocabulary};
    find_threshold(whole, state, filters, vocabulary, 0.0, 0, s.select, &threshold);
    sum_kept(params, row, index, state.top, threshold);
  }
  __syncthreads();
  return threshold;
}

// Sample from the kept elements, by the row's last block.
template <Storage kStorage, int kModels>
__device__ __noinline__ void finish_filtered(const Params& params, int64_t index) {
  __shared__ FinishScratch s;
  const RowState& state = params.states[index];
  const float threshold = find_exact_threshold<kStorage, kModels>(params, index);  // ends with a barrier
  const Draw draw{state.top, threshold, false};
  if (threadIdx.x < kWarpSize) {
    const double* kept = params.kept_mass + index * params.plan.tiles;
    const unsigned long long* candidate_mass = params.candidate_mass + index * params.plan.tiles;
    const FixedPoint fixed = fixed_point(static_cast<int>(params.p.vocabulary));
    const double uniform = uniform_of(params.p, index);
    const double total = choose_tile(params.plan.tiles, tiles_a_lane(params.plan.tiles), uniform, [&](int t) {
      return __ldcg(kept + t) + fixed.mass(__ldcg(candidate_mass + t));
    }, s.tile, s.fraction);
    if (threadIdx.x == 0) s.normalisers[params.p.models] = {std::log(total), state.top};
  }
  if (threadIdx.x < static_cast<unsigned>(params.p.models)) s.normalisers[threadIdx.x] = state.normalisers[threadIdx.x];
  __syncthreads();
  const Row<kStorage, kModels> row = open_row<kStorage, kModels>(params.p, index);
  if (threadIdx.x == 0) params.counters[index * kCounters + kCandidates] = 0;
  if (s.tile >= 0) {
    draw_in_tile(params, row, draw, s);
  } else if (threadIdx.x == 0) {
    write_row(row, false, 0, 0.0f, draw, s.normalisers);
  }
}

template <Storage kStorage, int kModels>
__global__ void __launch_bounds__(kThreads, resident_blocks(kModels))
    gather_rows(const __grid_constant__ Params params) {
  __shared__ bool is_last;
  const BlockWork work = work_of_block(params.plan);
  const RowState& state = params.states[work.row];
  if (state.search == 0) return;
  const Row<kStorage, kModels> row = open_row<kStorage, kModels>(params.p, work.row);
  const Bins scale = bins_of(row, state.top);
  const int first_bin = state.first_bin, last_bin = state.last_bin;
  const float reach = scale.reach(last_bin);
  for (int tile = work.first_tile + threadIdx.x / kWarpSize; tile < work.end_tile; tile += kWarps) {
    float mass = 0;
    if (params.tile_sums(work.row, params.p.models)[tile].x >= reach) {
      mass = gather_tile(params, row, work.row, tile, scale, reach, first_bin, last_bin);
    }
    const double sum = warp_sum(static_cast<double>(mass));
    if (threadIdx.x % kWarpSize == 0) {
      params.kept_mass[int64_t{work.row} * params.plan.tiles + tile] = sum;
      params.candidate_mass[int64_t{work.row} * params.plan.tiles + tile] = 0;
    }
  }
  if (!last_of_row(params.counters + int64_t{work.row} * kCounters + kGathered, params.plan.parts, &is_last)) return;
  finish_filtered<kStorage, kModels>(params, work.row);
}

// ---------------------------------------------------------------------------------------------------- the floor

template <Storage kStorage>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    read_rows(const __grid_constant__ Params params, float* out) {
  constexpr int kModels = 2;
  __shared__ float scratch[kModels][kWarps];
  const BlockWork work = work_of_block(params.plan);
  const Row<kStorage, kModels> row = open_row<kStorage, kModels>(params.p, work.row);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float highest[kModels] = {-INFINITY, -INFINITY};
  for (int tile = work.first_tile + warp; tile < work.end_tile; tile += kWarps) {
    const int end = (tile + 1) * params.tile_elements();
    for (int first = end - params.tile_elements(); first < end && first < row.vocabulary(); first += kStep) {
      Slice<kStorage> slices[kModels];
#pragma unroll
      for (int m = 0; m < kModels; ++m) load_slice(row, m, first, slices[m]);
#pragma unroll
      for (int m = 0; m < kModels; ++m) {
        float values[kPerLane];
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) values[i] = element(slices[m], i);
        highest[m] = std::fmax(highest[m], highest_of(slices[m], values));
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kModels; ++m) {
    highest[m] = warp_max(highest[m]);
    if (lane == 0) scratch[m][warp] = highest[m];
  }
  __syncthreads();
  if (threadIdx.x >= kModels) return;
  float top = -INFINITY;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) top = std::fmax(top, scratch[threadIdx.x][w]);
  out[(int64_t{work.row} * kModels + threadIdx.x) * params.plan.parts + work.part] = top;
}

// ---------------------------------------------------------------------------------------------------- launching

// Check what a kernel's grid and indices depend on, and divide the rows.
cudaError_t prepare(const MixtureSample& problem, MixtureSamplePlan plan, Params& params) {
  const bool valid = plan.tile_steps >= 1 && plan.tile_steps <= kMaxTileSteps && plan.part_tiles >= 1 &&
                     plan.ex2 >= kLeastEx2 && plan.ex2 <= kAllEx2 && plan.arrival >= kByCounter &&
                     plan.arrival <= kByCluster && plan.lookahead >= 1 && plan.lookahead <= 2 && problem.vocabulary <= kMaxVocabulary && problem.models >= 1 &&
                     problem.models <= kMaxModels;
  if (!valid) return cudaErrorInvalidValue;
  params.p = problem;
  params.plan = divide_row(problem.vocabulary, plan.tile_steps, plan.part_tiles);
  params.ex2 = plan.ex2;
  params.arrival = plan.arrival;
  params.lookahead = plan.lookahead;
  if (plan.arrival == kByCluster && params.plan.parts > kLargestCluster) return cudaErrorInvalidValue;
  return problem.rows * params.plan.parts > INT32_MAX ? cudaErrorInvalidValue : cudaSuccess;
}

template <Storage kStorage, int kModels>
cudaError_t launch_kernels(const Params& params, void* cuda_stream) {
  LaunchShape shape{static_cast<unsigned>(params.p.rows * params.plan.parts), kThreads, 0};
  if (params.arrival == kByCluster) shape.cluster = static_cast<unsigned>(params.plan.parts);
  cudaError_t error = launch(stream_rows<kStorage, kModels>, shape, cuda_stream, params);
  shape.cluster = 1;
  if (error != cudaSuccess || !params.p.filtered) return error;
  constexpr int kAtLeastTwo = kModels < 2 ? 2 : kModels;  // one model gains nothing from its own instantiation here
  error = launch(count_bins<kStorage, kAtLeastTwo>, shape, cuda_stream, params);
  if (error != cudaSuccess) return error;
  return launch(gather_rows<kStorage, kAtLeastTwo>, shape, cuda_stream, params);
}

template <Storage kStorage>
cudaError_t launch_for_models(const Params& params, void* cuda_stream) {
  if constexpr (kStorage != Storage::mixed) {
    if (params.p.models == 1) return launch_kernels<kStorage, 1>(params, cuda_stream);
  }
  if (params.p.models <= 2) return launch_kernels<kStorage, 2>(params, cuda_stream);
  return launch_kernels<kStorage, kMaxModels>(params, cuda_stream);
}

cudaError_t launch_for_storage(const Params& params, void* cuda_stream) {
  const DType first = params.p.logits[0].dtype;
  for (int m = 1; m < params.p.models; ++m) {
    if (params.p.logits[m].dtype != first) return launch_for_models<Storage::mixed>(params, cuda_stream);
  }
  if (first == DType::f32) return launch_for_models<Storage::f32>(params, cuda_stream);
  if (first == DType::bf16) return launch_for_models<Storage::bf16>(params, cuda_stream);
  return launch_for_models<Storage::f16>(params, cuda_stream);
}

}  // namespace

int64_t mixture_sample_workspace(int64_t rows, int64_t vocabulary, int models, bool filtered) {
  Params params{};
  const int64_t most_tiles = steps_of(vocabulary);  // of any plan
  return lay_out(params, rows, vocabulary, models, filtered, most_tiles, nullptr);
}

int64_t mixture_sample_counters(int64_t rows) { return rows * kCounters * static_cast<int64_t>(sizeof(unsigned)); }

int mixture_sample_plan(int64_t rows, int64_t vocabulary, MixtureSamplePlan* plan) {
  DeviceLimits limits;
  const cudaError_t error = device_limits(&limits);
  if (error == cudaSuccess) *plan = default_plan(rows, vocabulary, limits.multiprocessors);
  return error;
}

int64_t mixture_sample_parts(int64_t vocabulary, MixtureSamplePlan plan) {
  return divide_row(vocabulary, plan.tile_steps, plan.part_tiles).parts;
}

int mixture_sample_floor_cuda(const MixtureSample& problem, MixtureSamplePlan plan, float* out, void* cuda_stream) {
  if (problem.rows == 0) return cudaSuccess;
  Params params{};
  const cudaError_t error = prepare(problem, plan, params);
  if (error != cudaSuccess) return error;
  const DType dtype = problem.logits[0].dtype;
  if (problem.models != 2 || problem.logits[1].dtype != dtype) return cudaErrorInvalidValue;
  const LaunchShape shape{static_cast<unsigned>(problem.rows * params.plan.parts), kThreads, 0};
  if (dtype == DType::f32) return launch(read_rows<Storage::f32>, shape, cuda_stream, params, out);
  if (dtype == DType::bf16) return launch(read_rows<Storage::bf16>, shape, cuda_stream, params, out);
  return launch(read_rows<Storage::f16>, shape, cuda_stream, params, out);
}

int mixture_sample_cuda(const MixtureSample& problem, MixtureSamplePlan plan, void* workspace, void* counters,
                        void* cuda_stream) {
  if (problem.rows == 0) return cudaSuccess;
  Params params{};
  cudaError_t error = prepare(problem, plan, params);
  if (error != cudaSuccess) return error;
  lay_out(params, problem.rows, problem.vocabulary, problem.models, problem.filtered, params.plan.tiles, workspace);
  if (counters != nullptr) {
    params.counters = static_cast<unsigned*>(counters);
  } else if (problem.filtered || params.plan.parts > 1) {
    const size_t bytes = mixture_sample_counters(problem.rows);
    error = cudaMemsetAsync(params.counters, 0, bytes, static_cast<cudaStream_t>(cuda_stream));
    if (error != cudaSuccess) return error;
  }
  return launch_for_storage(params, cuda_stream);
}

}  // namespace nlhf
