// mixture_sample: one token a row from softmax((sum_m w_m z_m + bias) / temperature), with log-probabilities.
//
// The contract, the same for every backend, is nlhf_kernels/ops/mixture_sample/README.md; the oracle is oracle.py.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/levels.h"

namespace nlhf {

constexpr int kMaxModels = 4;

struct Logits {
  const void* data;  // (rows, vocabulary), the columns contiguous
  DType dtype;
  int64_t row_stride;  // in elements; may exceed the vocabulary
};

// A row's settings, packed as float32: four numbers, then one weight a model.
enum Setting : int { kTemperature = 0, kTopK = 1, kTopP = 2, kMinP = 3, kWeights = 4 };

struct MixtureSample {
  int models;
  Logits logits[kMaxModels];
  const float* settings;    // (rows or 1, 4 + models)
  int64_t settings_stride;  // 0: one set for all rows
  bool filtered;            // false: no row has a filter, whatever the settings say
  const float* bias;        // null, (vocabulary) or (rows, vocabulary); added before the temperature
  int64_t bias_stride;      // 0: one for all rows
  const double* uniforms;   // (rows), in [0, 1]; null: computed from (seed, row id, step, stream)
  const int64_t* seed;
  int64_t seed_stride;
  const int64_t* row_ids;
  const int64_t* step;
  int64_t step_stride;
  uint32_t stream;
  int64_t rows;
  int64_t vocabulary;
  uint32_t logprob_mask;  // bit m: compute the log-probability under model m; bit `models`: under the mixture
  int64_t* tokens;   // (rows)
  float* logprobs;   // (models + 1, rows), written where logprob_mask has the bit
  bool* ok;          // (rows)
};

NLHF_DECLARE_CPU(mixture_sample, MixtureSample)

// Return the bytes of device memory that a launch needs beside its outputs.
int64_t mixture_sample_workspace(int64_t rows, int64_t vocabulary, int models, bool filtered);
// Return the bytes of the counters that calls on one stream may share: zeroed once, every call leaves them at 0.
int64_t mixture_sample_counters(int64_t rows);

// How rows are divided on a GPU: into tiles of `tile_steps` steps of 512 elements, of which a block takes `part_tiles`.
struct MixtureSamplePlan {
  int tile_steps;  // 1 to 4
  int part_tiles;
  int ex2;      // of every eight exponentials, those that the special-function units compute: 8, 7 or 6
  int arrival;  // how a row's blocks meet: 1 by a counter in memory, 2 as a cluster (at most 8 blocks, sm_90 and newer)
  int lookahead;  // 1, or 2: a warp's next step is fetched into the second-level cache while it computes one
};

// Write the default plan for the current device. Return a cudaError_t, as the functions below do.
int mixture_sample_plan(int64_t rows, int64_t vocabulary, MixtureSamplePlan* plan);
// Return the number of blocks that share a row.
int64_t mixture_sample_parts(int64_t vocabulary, MixtureSamplePlan plan);
// With `counters` null they are part of the workspace and zeroed first.
int mixture_sample_cuda(const MixtureSample& problem, MixtureSamplePlan plan, void* workspace, void* counters,
                        void* cuda_stream);
// Read the logits of two models of one dtype as mixture_sample does, and write the maximum of each row, model and part
// to `out` (rows, 2, parts): the least time of the sampler's launch, for benchmarks.
int mixture_sample_floor_cuda(const MixtureSample& problem, MixtureSamplePlan plan, float* out, void* cuda_stream);

}  // namespace nlhf
