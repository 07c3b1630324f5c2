// mixture_sample on the CPU: one pass over the logits for a maximum and a sum of exponentials per tile and series, then
// one tile of each row again for its token. Equation numbers are those of the op's README.md.
//
// Rows are distributed over threads; where there are fewer rows than threads, the tiles of each row are. A tile's
// numbers are the same on any thread and are combined in the tiles' order, so tokens do not depend on the number of
// threads.
#include "mixture_sample.h"

#include <cmath>
#include <cstdlib>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../common/philox.h"
#include "../common/scalar_exp.h"
#include "filters.h"
#include "tiles.h"

namespace nlhf {
namespace NLHF_LEVEL {
namespace {

// One row's inputs, settings and outputs.
struct RowPlan {
  Source sources[kMaxTerms];
  int terms;             // sources in the mixture: models of non-zero weight, and a bias
  int mixed[kMaxTerms];  // their indices
  float weights[kMaxTerms];
  float temperature;
  uint32_t logprob_mask;  // of the models alone
  bool greedy;
  bool filtered;
  Filters filters;
};

struct Total {
  float top;
  double sum;  // of exp(x - top)
};

// A view into Memory: one row's statistics and, for filters, its z.
struct RowSpace {
  double* sums[kSeries];  // (tiles), relative to the tile's top, later to the row's
  float* tops[kSeries];   // (tiles)
  FilteredRow filtered;
};

bool is_number(double value) { return std::fabs(value) < INFINITY; }

void add_term(RowPlan& plan, int source, float weight) {
  plan.mixed[plan.terms] = source;
  plan.weights[plan.terms++] = weight;
}

RowPlan plan_row(const MixtureSample& p, int64_t row) {
  RowPlan plan{};
  const float* settings = p.settings + row * p.settings_stride;
  plan.greedy = settings[kTemperature] <= 0;
  plan.temperature = plan.greedy ? 1.0f : settings[kTemperature];
  plan.logprob_mask = p.logprob_mask & ((1u << p.models) - 1);
  for (int m = 0; m < p.models; ++m) {
    const Logits& model = p.logits[m];
    const int64_t size = model.dtype == DType::f32 ? 4 : 2;
    plan.sources[m] = {static_cast<const char*>(model.data) + row * model.row_stride * size, model.dtype};
    if (settings[kWeights + m] != 0) add_term(plan, m, settings[kWeights + m]);
  }
  if (p.bias != nullptr) {
    plan.sources[kBias] = {p.bias + row * p.bias_stride, DType::f32};
    add_term(plan, kBias, 1.0f);
  }
  const float top_k = settings[kTopK];
  plan.filters.top_k = top_k >= 1 && top_k < static_cast<float>(p.vocabulary) ? static_cast<int64_t>(top_k) : 0;
  plan.filters.top_p = settings[kTopP] < 1 ? settings[kTopP] : 1.0;
  plan.filters.min_p = settings[kMinP];
  const bool any = plan.filters.top_k > 0 || plan.filters.top_p < 1 || plan.filters.min_p != 0;
  plan.filtered = p.filtered && any && !plan.greedy;  // every filter keeps the likeliest token
  return plan;
}

// Return the model that z equals, or -1: its sums are computed once for both.
int model_equal_to_z(const RowPlan& plan) {
  const bool same = plan.terms == 1 && plan.mixed[0] != kBias && plan.weights[0] == 1 && plan.temperature == 1;
  return same && !plan.filtered ? plan.mixed[0] : -1;
}

// Compute the tile's z, padded with -inf, the places of the terms' logits, and maxima of the terms, then of z. (1)
const float* mixed_tile(const RowPlan& plan, int64_t first, int64_t count, TileScratch& scratch, float* z,
                        const float** inputs, float* maxima) {
  Term terms[kMaxTerms];
  for (int i = 0; i < plan.terms; ++i) {
    const int source = plan.mixed[i];
    inputs[source] = load_tile(plan.sources[source], first, count, scratch.inputs[source]);
    terms[i] = {inputs[source], plan.weights[i]};
  }
  if (const int model = model_equal_to_z(plan); model >= 0) {
    maxima[0] = maxima[1] = maximum(inputs[model], padded(count));
    return inputs[model];
  }
  // Filters compare values, which may be equal in one rounding and not in another: rows with filters divide.
  const bool divide = plan.filtered && plan.temperature != 1;
  if (divide) {
    mix<true>(plan.terms, terms, plan.temperature, padded(count), z, maxima);
  } else {
    mix<false>(plan.terms, terms, plan.temperature, padded(count), z, maxima);
  }
  if (count != padded(count)) {  // the weights changed the padding
    for (int64_t i = count; i < padded(count); ++i) z[i] = -INFINITY;
    maxima[plan.terms] = maximum(z, padded(count));
  }
  return z;
}

// The beginning of the source's next tile, to prefetch; none at the end of a row.
struct Ahead {
  const char* at;
  int64_t bytes;  // of an element; 0: no prefetch
};

Ahead ahead_of(const Source& source, int64_t next, int64_t vocabulary) {
  if (next >= vocabulary) return {nullptr, 0};
  const int64_t bytes = source.dtype == DType::f32 ? 4 : 2;
  return {static_cast<const char*>(source.data) + next * bytes, bytes};
}

// Compute maximum and sum of a tile for every requested model and for z.
void reduce_tile(const RowPlan& plan, int64_t vocabulary, int64_t tile, const RowSpace& space, TileScratch& scratch) {
  const int64_t first = tile * kTile;
  const int64_t count = tile_length(vocabulary, first);
  const float* inputs[kMaxTerms] = {};
  float maxima[kMaxTerms + 1], tops[kMaxModels];
  float* z_at = plan.filtered ? space.filtered.z + first : scratch.z;
  const float* z = mixed_tile(plan, first, count, scratch, z_at, inputs, maxima);
  Ahead ahead_of_z{nullptr, 0};
  for (int i = 0; i < plan.terms; ++i) {
    const int source = plan.mixed[i];
    if (source != kBias) tops[source] = maxima[i];
    if (source == kBias || !(plan.logprob_mask >> source & 1)) {
      ahead_of_z = ahead_of(plan.sources[source], first + kTile, vocabulary);
    }
  }
  for (int m = 0; m < kMaxModels; ++m) {
    if (!(plan.logprob_mask >> m & 1)) continue;
    if (inputs[m] == nullptr) {
      inputs[m] = load_tile(plan.sources[m], first, count, scratch.inputs[m]);
      tops[m] = maximum(inputs[m], padded(count));
    }
    const Ahead ahead = ahead_of(plan.sources[m], first + kTile, vocabulary);
    space.tops[m][tile] = tops[m];
    space.sums[m][tile] = sum_of_exponentials(inputs[m], finite_base(tops[m]), padded(count), ahead.at, ahead.bytes);
  }
  const int model = model_equal_to_z(plan);
  const float top = maxima[plan.terms];
  double sum;
  if (plan.filtered) {  // summed after the filters
    sum = group_maxima(z, padded(count), space.filtered.group_tops + tile * kGroups) ? NAN : 0.0;
  } else if (model >= 0 && (plan.logprob_mask >> model & 1)) {
    sum = space.sums[model][tile];
  } else {
    sum = sum_of_exponentials(z, finite_base(top), padded(count), ahead_of_z.at, ahead_of_z.bytes);
  }
  space.tops[kMixture][tile] = top;
  space.sums[kMixture][tile] = sum;
}

// Return the row's total of one series, and make its tile sums relative to the row's maximum.
Total combine(const float* tops, int64_t tiles, double* sums) {
  Total total{-INFINITY, 0};
  for (int64_t tile = 0; tile < tiles; ++tile) total.top = tops[tile] > total.top ? tops[tile] : total.top;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    sums[tile] *= nlhf::exp_nonpositive(static_cast<double>(tops[tile]) - total.top);
    total.sum += sums[tile];
  }
  return total;
}

// Apply the filters to the whole row's z: dropped elements become -inf, the others are summed by tiles.
void filter_row(const RowPlan& plan, int64_t vocabulary, int64_t tiles, const RowSpace& space) {
  float* tops = space.tops[kMixture];
  double* sums = space.sums[kMixture];
  float top = -INFINITY;
  bool number = true;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    top = tops[tile] > top ? tops[tile] : top;
    number = number && sums[tile] == 0;
  }
  if (!number || !is_number(top)) {
    sums[0] = NAN;  // no distribution
    return;
  }
  const float low = threshold(space.filtered, plan.filters, top);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * kTile;
    const int64_t count = padded(tile_length(vocabulary, first));
    if (tops[tile] >= low) {
      drop_below(low, count, space.filtered.z + first);
      sums[tile] = sum_of_exponentials(space.filtered.z + first, finite_base(tops[tile]), count, nullptr, 0);
    } else {
      tops[tile] = -INFINITY;
    }
  }
}

struct Sample {
  int64_t token;
  float z;
};

// Sample by (2), or take the first of the largest if the row is greedy.
Sample draw(const RowPlan& plan, double uniform, int64_t vocabulary, int64_t tiles, const RowSpace& space,
           const Total& total, TileScratch& scratch) {
  const float* tops = space.tops[kMixture];
  const double *sums = space.sums[kMixture], target = uniform * total.sum;
  double passed = 0, residual = INFINITY;  // infinite where rounding leaves no tile: then the last token with mass
  int64_t tile = 0;
  if (plan.greedy) {
    while (tile + 1 < tiles && tops[tile] != total.top) ++tile;
  } else {
    for (int64_t t = 0; t < tiles; ++t) {
      if (!(sums[t] > 0)) continue;
      tile = t;
      if (passed + sums[t] > target) {
        residual = (target - passed) / nlhf::exp_nonpositive(static_cast<double>(tops[t]) - total.top);
        break;
      }
      passed += sums[t];
    }
  }
  const int64_t first = tile * kTile;
  const int64_t count = tile_length(vocabulary, first);
  const float* inputs[kMaxTerms] = {};
  float maxima[kMaxTerms + 1];
  const float* z = plan.filtered ? space.filtered.z + first
                                 : mixed_tile(plan, first, count, scratch, scratch.z, inputs, maxima);
  int64_t at = 0;
  if (plan.greedy) {
    while (at + 1 < count && z[at] != total.top) ++at;
  } else {
    at = walk(z, finite_base(tops[tile]), padded(count), residual, scratch.exponentials);
  }
  return {first + at, z[at]};
}

double row_uniform(const MixtureSample& p, int64_t row) {
  if (p.uniforms != nullptr) return p.uniforms[row];
  return open_unit(random_bits(p.seed[row * p.seed_stride], p.row_ids[row], p.step[row * p.step_stride], p.stream));
}

// Finish a row whose tiles are all reduced: filters, token, log-probabilities.
void finish_row(const MixtureSample& p, const RowPlan& plan, int64_t row, const RowSpace& space, TileScratch& scratch) {
  const int64_t tiles = tiles_of(p.vocabulary);
  if (plan.filtered) filter_row(plan, p.vocabulary, tiles, space);
  const Total mixture = combine(space.tops[kMixture], tiles, space.sums[kMixture]);
  const bool distribution = is_number(mixture.top) && is_number(mixture.sum) && mixture.sum > 0;
  Sample sample{0, NAN};
  if (distribution) sample = draw(plan, row_uniform(p, row), p.vocabulary, tiles, space, mixture, scratch);
  bool ok = distribution;
  for (int m = 0; m <= p.models; ++m) {
    if (!(p.logprob_mask >> m & 1)) continue;
    double logprob = NAN;
    if (distribution && m == p.models) {
      logprob = plan.greedy ? 0.0 : static_cast<double>(sample.z) - mixture.top - std::log(mixture.sum);
    } else if (distribution) {
      const Total total = combine(space.tops[m], tiles, space.sums[m]);
      logprob = static_cast<double>(element(plan.sources[m], sample.token)) - total.top - std::log(total.sum);
    }
    p.logprobs[m * p.rows + row] = static_cast<float>(logprob);
    ok = ok && logprob == logprob;
  }
  p.tokens[row] = sample.token;
  p.ok[row] = ok;
}

// All memory of a call, in one allocation: `workers` tile scratches and `spaces` row spaces.
class Memory {
 public:
  Memory(int64_t vocabulary, bool filtered, int workers, int spaces)
      : vocabulary_(vocabulary), filtered_(filtered), tiles_(tiles_of(vocabulary)), workers_(workers) {
    tile_bytes_ = aligned(sizeof(TileScratch));
    row_bytes_ = aligned(tiles_ * kSeries * (sizeof(double) + sizeof(float)));
    if (filtered) row_bytes_ += aligned(kBins * sizeof(double) + filtered_floats() * sizeof(float));
    bytes_ = static_cast<char*>(std::aligned_alloc(kAlignment, workers * tile_bytes_ + spaces * row_bytes_));
    if (bytes_ == nullptr) throw std::bad_alloc();
  }
  ~Memory() { std::free(bytes_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  TileScratch& scratch(int worker) const { return *reinterpret_cast<TileScratch*>(bytes_ + worker * tile_bytes_); }

  RowSpace space(int index) const {
    RowSpace space{};
    char* at = bytes_ + workers_ * tile_bytes_ + index * row_bytes_;
    double* doubles = reinterpret_cast<double*>(at);
    float* floats = reinterpret_cast<float*>(doubles + kSeries * tiles_);
    for (int series = 0; series < kSeries; ++series) {
      space.sums[series] = doubles + series * tiles_;
      space.tops[series] = floats + series * tiles_;
    }
    if (filtered_) {
      at += aligned(tiles_ * kSeries * (sizeof(double) + sizeof(float)));
      double* bins = reinterpret_cast<double*>(at);
      float* row = reinterpret_cast<float*>(bins + kBins);
      const int64_t length = row_floats();
      space.filtered = {row,          vocabulary_,      space.tops[kMixture], row + 3 * length,
                        row + length, row + 2 * length, bins};
    }
    return space;
  }

 private:
  static constexpr int64_t kAlignment = 64;
  static int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
  int64_t row_floats() const { return padded(vocabulary_) + kBlock; }
  int64_t filtered_floats() const { return 3 * row_floats() + tiles_ * kGroups; }

  int64_t vocabulary_;
  bool filtered_;
  int64_t tiles_;
  int workers_;
  int64_t tile_bytes_ = 0, row_bytes_ = 0;
  char* bytes_ = nullptr;
};

int this_thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

void sample_rows(const MixtureSample& p, Part rows, int threads) {
  const int64_t tiles = tiles_of(p.vocabulary);
  const Memory memory(p.vocabulary, p.filtered, threads, threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t row = rows.first; row < rows.last; ++row) {
    const RowPlan plan = plan_row(p, row);
    const RowSpace space = memory.space(this_thread());
    TileScratch& scratch = memory.scratch(this_thread());
    for (int64_t tile = 0; tile < tiles; ++tile) reduce_tile(plan, p.vocabulary, tile, space, scratch);
    finish_row(p, plan, row, space, scratch);
  }
}

void sample_by_tiles(const MixtureSample& p, Part rows, int threads) {
  const int64_t tiles = tiles_of(p.vocabulary);
  const Memory memory(p.vocabulary, p.filtered, threads, 1);
  const RowSpace space = memory.space(0);
  for (int64_t row = rows.first; row < rows.last; ++row) {
    const RowPlan plan = plan_row(p, row);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      reduce_tile(plan, p.vocabulary, tile, space, memory.scratch(this_thread()));
    }
    finish_row(p, plan, row, space, memory.scratch(0));
  }
}

}  // namespace

void mixture_sample(const MixtureSample& problem, Part rows, int threads) {
  constexpr int64_t kWorthAThread = 32768;  // elements; starting threads takes about as long as reducing these
  if (threads < 1 || rows.count() * problem.vocabulary < kWorthAThread) threads = 1;
  if (rows.count() >= threads) return sample_rows(problem, rows, threads);
  sample_by_tiles(problem, rows, threads);
}

}  // namespace NLHF_LEVEL
}  // namespace nlhf
