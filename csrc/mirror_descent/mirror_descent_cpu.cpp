// mirror_descent on the CPU: games over threads. One game's preference matrix stays in the core's cache during all its
// iterations while the next game's matrix is prefetched; a PyTorch loop reads every matrix from memory each iteration.
//
// Vectors of actions are padded with -inf to whole SIMD vectors: no loop has a remainder, and no maximum and no sum of
// exponentials is changed by the padding.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "../common/simd_double.h"
#include "../common/simd_float.h"
#include "mirror_descent.h"

namespace nlhf {
namespace NLHF_LEVEL {
namespace {

template <typename Real>
constexpr Real kMinusInfinity = -std::numeric_limits<Real>::infinity();

template <typename Real>
constexpr int kWidth = VectorOf<Real>::lanes;

constexpr int kAccumulators = 8;  // independent sums: two multiply-adds start in a cycle, each takes four
constexpr int kLineBytes = 64;    // of the cache

// Actions with their padding: whole vectors, and whole rounds of accumulators.
template <typename Real>
int64_t padded(int64_t actions) {
  constexpr int64_t whole = std::max(kWidth<Real>, kAccumulators);
  return (actions + whole - 1) / whole * whole;
}

// A thread's memory: vectors and, for games small enough to gain by it, the transposed matrix.
template <typename Real>
struct Scratch {
  static constexpr int64_t kMaxTransposed = 256;  // 512 KiB in float64: within a core's second-level cache

  explicit Scratch(int64_t actions) : stride(padded<Real>(actions)) {
    const bool transposes = actions <= kMaxTransposed;
    const size_t bytes = stride * (6 + (transposes ? stride : 0)) * sizeof(Real);
    memory = static_cast<Real*>(operator new(bytes, std::align_val_t(kLineBytes), std::nothrow));
    if (memory == nullptr) return;
    std::memset(memory, 0, bytes);
    Real** const vectors[] = {&log_policy, &log_reference, &log_opponent, &mixture, &opponent, &expected};
    Real* next = memory;
    for (Real** vector : vectors) *vector = std::exchange(next, next + stride);
    if (transposes) transposed = next;
  }
  ~Scratch() { operator delete(memory, std::align_val_t(kLineBytes)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  const int64_t stride;
  Real *memory, *log_policy, *log_reference, *log_opponent, *mixture, *opponent, *expected;
  Real* transposed = nullptr;  // (stride, stride), the padding always zero; null: the matrix is read in place
};

template <typename Real>
void load_padded(const Real* from, int64_t actions, Real* to) {
  std::copy(from, from + actions, to);
  std::fill(to + actions, to + padded<Real>(actions), kMinusInfinity<Real>);
}

// Return the largest lane, in every lane.
template <typename Real>
Vector<Real> maximum_over_lanes(Vector<Real> values) {
  return over_lanes<Real>(values, [](Vector<Real> x, Vector<Real> y) { return larger(x, y); });
}

// Return the largest value that is not NaN, in every lane; -inf where there is none.
template <typename Real>
Vector<Real> maximum(const Real* x, int64_t stride) {
  Vector<Real> best = broadcast(kMinusInfinity<Real>);
  for (int64_t i = 0; i < stride; i += kWidth<Real>) best = larger(load(x + i), best);
  return maximum_over_lanes<Real>(best);
}

// Store exp(x - top) in `out` and return the sum, in every lane. A row of -inf only has no distribution and gives NaN,
// as in PyTorch's softmax.
template <typename Real>
Vector<Real> exponentials(const Real* x, Vector<Real> top, int64_t stride, Real* out) {
  Vector<Real> sum = {};
  for (int64_t i = 0; i < stride; i += kWidth<Real>) {
    const Vector<Real> value = exp_nonpositive(load(x + i) - top);
    store(out + i, value);
    sum += value;
  }
  return over_lanes<Real>(sum, [](Vector<Real> x, Vector<Real> y) { return x + y; });
}

// End a step, log_policy = mixture - top + scale * expected, and begin the next one with its mixture,
// (1 - b) log_policy + b log_reference. Return the mixture's maximum, in every lane. At b = 0 and b = 1 one side is not
// read, as 0 * -inf is NaN; outside [0, 1] the mixture of the padding would be NaN and is set to -inf.
template <typename Real>
Vector<Real> advance(const Scratch<Real>& s, int64_t n, Vector<Real> top, Vector<Real> scale, Real b) {
  // Two chains of maxima, as one is bound by the latency of comparisons.
  Vector<Real> best = broadcast(kMinusInfinity<Real>), other_best = best;
  for (int64_t i = 0; i < s.stride; i += kWidth<Real>) {
    const Vector<Real> log_policy = (load(s.mixture + i) - top) + scale * load(s.expected + i);
    const Vector<Real> log_reference = load(s.log_reference + i);
    const Vector<Real> mixture = b == 0   ? log_policy
                                 : b == 1 ? log_reference
                                          : (1 - b) * log_policy + b * log_reference;
    store(s.log_policy + i, log_policy);
    store(s.mixture + i, mixture);
    const Vector<Real> updated = larger(mixture, best);
    best = other_best;
    other_best = updated;
  }
  if (!(b >= 0 && b <= 1)) std::fill(s.mixture + n, s.mixture + s.stride, kMinusInfinity<Real>);
  return maximum_over_lanes<Real>(larger(best, other_best));
}

// Prefetches a range of memory, one cache line at a time between other work: all at once, the requests would fill the
// queue and later loads would wait. Lines that are never prefetched are read when they are needed.
class Prefetch {
 public:
  Prefetch() = default;

  template <typename Real>
  Prefetch(const Real* from, const Real* to)
      : next_(reinterpret_cast<const char*>(from)), end_(reinterpret_cast<const char*>(to)) {}

  void line() {
    if (next_ >= end_) return;
    __builtin_prefetch(next_, 0, 2);  // into the second-level cache, as the first is full
    next_ += kLineBytes;
  }

  void all() {
    while (next_ < end_) line();
  }

 private:
  const char *next_ = nullptr, *end_ = nullptr;
};

// Return the prefetches of iteration k: its share of the next game's matrix.
template <typename Real>
Prefetch share_of_next_game(const MirrorDescent<Real>& p, int64_t game, int64_t k) {
  if (game + 1 == p.games) return {};
  const int64_t row = (game + 1) * p.actions, size = p.actions * p.actions;
  if (k == 0) {
    Prefetch(p.log_policy + row, p.log_policy + row + p.actions).all();
    Prefetch(p.log_reference + row, p.log_reference + row + p.actions).all();
  }
  const Real* matrix = p.preference + row * p.actions;
  return {matrix + size * k / p.iterations, matrix + size * (k + 1) / p.iterations};
}

// expected = P opponent, the matrix row by row: for large games, whose rows are long.
template <typename Real>
void expect_by_rows(const Real* preference, const Real* opponent, int64_t n, Real* expected) {
  int64_t a = 0;
  for (; a + 4 <= n; a += 4) {
    const Real* row = preference + a * n;
    Real sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;  // four chains, as one is bound by the latency of multiply-adds
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
    for (int64_t i = 0; i < n; ++i) {
      sum0 += row[i] * opponent[i];
      sum1 += row[n + i] * opponent[i];
      sum2 += row[2 * n + i] * opponent[i];
      sum3 += row[3 * n + i] * opponent[i];
    }
    const Real sums[] = {sum0, sum1, sum2, sum3};
    std::copy(sums, sums + 4, expected + a);
  }
  for (; a < n; ++a) {
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += preference[a * n + i] * opponent[i];
    expected[a] = sum;
  }
}

// The same for kVectors vectors of actions from the transposed matrix: their sums stay in registers while the
// opponent's actions run past, with no sum across lanes.
template <int kVectors, typename Real>
void expect_block(const Real* transposed, int64_t stride, const Real* opponent, int64_t n, Real* expected,
                  Prefetch& ahead) {
  constexpr int kSets = kAccumulators / kVectors;
  Vector<Real> sums[kSets][kVectors] = {};
  for (int64_t b = 0; b < n; b += kSets) {
    ahead.line();
    for (int set = 0; set < kSets; ++set) {
      const Real* row = transposed + (b + set) * stride;
      for (int v = 0; v < kVectors; ++v) sums[set][v] += load(row + v * kWidth<Real>) * opponent[b + set];
    }
  }
  for (int half = kSets / 2; half > 0; half /= 2) {
    for (int set = 0; set < half; ++set) {
      for (int v = 0; v < kVectors; ++v) sums[set][v] += sums[set + half][v];
    }
  }
  for (int v = 0; v < kVectors; ++v) store(expected + v * kWidth<Real>, sums[0][v]);
}

template <typename Real>
void expect_by_columns(const Scratch<Real>& s, int64_t n, Prefetch& ahead) {
  int64_t first = 0;
  const auto blocks_of = [&](auto vectors) {
    constexpr int64_t kActions = vectors * kWidth<Real>;
    for (; first + kActions <= s.stride; first += kActions) {
      expect_block<vectors>(s.transposed + first, s.stride, s.opponent, n, s.expected + first, ahead);
    }
  };
  blocks_of(std::integral_constant<int, 8>());
  blocks_of(std::integral_constant<int, 4>());
  blocks_of(std::integral_constant<int, 2>());
  blocks_of(std::integral_constant<int, 1>());
}

// Exchange blocks of `distance` lanes, the upper ones of x for the lower ones of y; return x or, for `second`, y.
template <int distance, bool second, typename Values, int... lane>
Values half_exchanged(Values x, Values y, std::integer_sequence<int, lane...>) {
  if constexpr (second) {
    return Values{(lane & distance ? y[lane] : x[lane | distance])...};
  } else {
    return Values{(lane & distance ? y[lane & ~distance] : x[lane])...};
  }
}

// Transpose a square block in registers: exchange halves, then quarters within them, and so on.
template <typename Real, int distance = kWidth<Real> / 2>
void transpose_block(Vector<Real>* rows) {
  if constexpr (distance > 0) {
    constexpr auto lanes = std::make_integer_sequence<int, kWidth<Real>>();
    for (int i = 0; i < kWidth<Real>; ++i) {
      if (i & distance) continue;
      const Vector<Real> x = rows[i], y = rows[i + distance];
      rows[i] = half_exchanged<distance, false>(x, y, lanes);
      rows[i + distance] = half_exchanged<distance, true>(x, y, lanes);
    }
    transpose_block<Real, distance / 2>(rows);
  }
}

// Transpose by blocks: element by element it would take longer than the iterations of a short run. The last blocks
// overlap those before them.
template <typename Real>
void transpose(const Real* matrix, int64_t n, int64_t stride, Real* out) {
  constexpr int64_t width = kWidth<Real>;
  if (n < width) {
    for (int64_t a = 0; a < n; ++a) {
      for (int64_t b = 0; b < n; ++b) out[b * stride + a] = matrix[a * n + b];
    }
    return;
  }
  for (int64_t row = 0; row < n; row += width) {
    for (int64_t column = 0; column < n; column += width) {
      const int64_t a = std::min(row, n - width), b = std::min(column, n - width);
      Vector<Real> block[width];
      for (int64_t i = 0; i < width; ++i) block[i] = load(matrix + (a + i) * n + b);
      transpose_block<Real>(block);
      for (int64_t i = 0; i < width; ++i) store(out + (b + i) * stride + a, block[i]);
    }
  }
}

// Run all iterations of one game. log_policy is normalised at the end only, as a constant added to a row changes no
// softmax; but the known maximum is subtracted in each iteration, or the constant grows towards 1 / (2 tau) and costs
// digits.
template <typename Real>
void solve_game(const MirrorDescent<Real>& p, int64_t game, const Scratch<Real>& s) {
  const int64_t n = p.actions;
  const Real* preference = p.preference + game * n * n;
  const Real tau = p.tau[game * p.tau_stride];
  const bool by_columns = s.transposed != nullptr && p.iterations > 2;  // fewer do not repay it
  if (by_columns) transpose(preference, n, s.stride, s.transposed);
  load_padded(p.log_reference + game * n, n, s.log_reference);
  if (p.opponent == Opponent::fixed) load_padded(p.log_opponent + game * n, n, s.log_opponent);
  const Real* opponent_logits = p.opponent == Opponent::mixture  ? s.mixture
                       : p.opponent == Opponent::policy ? s.log_policy
                                                        : s.log_opponent;

  load_padded(p.log_policy + game * n, n, s.mixture);  // as after a step that changed nothing
  std::fill(s.expected, s.expected + s.stride, Real(0));
  Vector<Real> top = {}, scale = {};
  for (int64_t k = 0; k < p.iterations; ++k) {
    const Real step = p.step_sizes[k];
    top = advance(s, n, top, scale, step * tau);
    const Vector<Real> opponent_top = opponent_logits == s.mixture ? top : maximum(opponent_logits, s.stride);
    scale = step / exponentials(opponent_logits, opponent_top, s.stride, s.opponent);
    if (by_columns) {
      Prefetch ahead = share_of_next_game(p, game, k);
      expect_by_columns(s, n, ahead);
    } else {
      expect_by_rows(preference, s.opponent, n, s.expected);
    }
  }
  top = advance(s, n, top, scale, Real(0));
  const Vector<Real> sum = exponentials(s.log_policy, top, s.stride, s.opponent);
  const Real normaliser = top[0] + std::log(sum[0]);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) p.out[game * n + i] = s.log_policy[i] - normaliser;
}

template <typename Real>
void solve(const MirrorDescent<Real>& problem, Part games, int threads) {
  const MirrorDescent<Real> p = problem;
  bool out_of_memory = false;
  // Starting threads takes microseconds, about as long as this many multiply-adds on one thread.
  const bool worth_sharing = games.count() * p.actions * p.actions * (p.iterations + 1) > (int64_t{1} << 16);
#pragma omp parallel num_threads(threads) if (threads > 1 && games.count() > 1 && worth_sharing)
  {
    const Scratch<Real> scratch(p.actions);
    if (scratch.memory == nullptr) {
#pragma omp atomic write
      out_of_memory = true;
    }
#pragma omp for schedule(static)
    for (int64_t game = games.first; game < games.last; ++game) {
      if (scratch.memory != nullptr) solve_game(p, game, scratch);
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace

void mirror_descent_f32(const MirrorDescent<float>& problem, Part games, int threads) {
  solve(problem, games, threads);
}
void mirror_descent_f64(const MirrorDescent<double>& problem, Part games, int threads) {
  solve(problem, games, threads);
}

}  // namespace NLHF_LEVEL
}  // namespace nlhf
