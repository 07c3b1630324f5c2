// mirror_descent on the CPU: games over threads; one game's preference matrix stays in the core's cache while all its
// iterations run, which is where the time against a PyTorch loop is won.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#include "../common/simd.h"
#include "../common/vector_math.h"
#include "mirror_descent.h"

namespace nlhf {
namespace NLHF_LEVEL {
namespace {

template <typename Real>
Real maximum(const Real* x, int64_t n) {
  Real best = -std::numeric_limits<Real>::infinity();
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// out = exp(x - top); returns the sum. A row of -inf only has no distribution: it gives NaN, as PyTorch's softmax.
template <typename Real>
Real exponentials(const Real* x, Real top, int64_t n, Real* out) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    out[i] = exp_nonpositive(x[i] - top);
    sum += out[i];
  }
  return sum;
}

// (1 - b) log_policy + b log_reference; an end of the interval must not touch the other side: 0 * -inf is NaN.
template <typename Real>
void mix(const Real* log_policy, const Real* log_reference, Real b, int64_t n, Real* out) {
  if (b == 0 || b == 1) {
    std::memcpy(out, b == 0 ? log_policy : log_reference, n * sizeof(Real));
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = (1 - b) * log_policy[i] + b * log_reference[i];
}

// target += scale * P opponent - top, the matrix row by row: for large games, whose rows are long.
template <typename Real>
void add_expected_by_rows(const Real* preference, const Real* opponent, Real scale, Real top, int64_t n,
                          Real* target) {
  for (int64_t a = 0; a < n; ++a) {
    const Real* row = preference + a * n;
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += row[i] * opponent[i];
    target[a] = (target[a] - top) + scale * sum;
  }
}

// The same from the transposed matrix, whose rows are padded to whole blocks: the sums of a block of actions stay in
// registers while the opponent's actions run past, with no sum across lanes.
constexpr int kBlockVectors = 4;

template <typename Real>
constexpr int64_t block_actions() {
  return kBlockVectors * VectorOf<Real>::lanes;
}

template <typename Real>
void add_expected_by_columns(const Real* transposed, int64_t stride, const Real* opponent, Real scale, Real top,
                             int64_t n, Real* target) {
  for (int64_t first = 0; first < n; first += block_actions<Real>()) {
    Vector<Real> sums[kBlockVectors] = {}, odd[kBlockVectors] = {};  // two sets: one waits on its own multiply-adds
    int64_t b = 0;
    for (; b + 2 <= n; b += 2) {
      const auto* row = reinterpret_cast<const Vector<Real>*>(transposed + b * stride + first);
      const auto* next = reinterpret_cast<const Vector<Real>*>(transposed + (b + 1) * stride + first);
      for (int v = 0; v < kBlockVectors; ++v) {
        sums[v] += row[v] * opponent[b];
        odd[v] += next[v] * opponent[b + 1];
      }
    }
    if (b < n) {
      const auto* row = reinterpret_cast<const Vector<Real>*>(transposed + b * stride + first);
      for (int v = 0; v < kBlockVectors; ++v) sums[v] += row[v] * opponent[b];
    }
    for (int v = 0; v < kBlockVectors; ++v) sums[v] += odd[v];
    const Real* lanes = reinterpret_cast<const Real*>(sums);
    const int64_t count = n - first < block_actions<Real>() ? n - first : block_actions<Real>();
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) target[first + i] = (target[first + i] - top) + scale * lanes[i];
  }
}

// By blocks of 4 x 4 in registers: element by element, this would outweigh the iterations of a short run.
template <typename Real>
void transpose(const Real* matrix, int64_t n, int64_t stride, Real* out) {
  typedef Real Four __attribute__((vector_size(4 * sizeof(Real)), aligned(sizeof(Real)), may_alias));
  const int64_t whole = n / 4 * 4;
  for (int64_t a = 0; a < whole; a += 4) {
    for (int64_t b = 0; b < whole; b += 4) {
      Four rows[4];
      for (int i = 0; i < 4; ++i) rows[i] = *reinterpret_cast<const Four*>(matrix + (a + i) * n + b);
      for (int i = 0; i < 4; ++i) {
        const Four column = {rows[0][i], rows[1][i], rows[2][i], rows[3][i]};
        *reinterpret_cast<Four*>(out + (b + i) * stride + a) = column;
      }
    }
  }
  for (int64_t a = 0; a < n; ++a) {
    for (int64_t b = a < whole ? whole : 0; b < n; ++b) out[b * stride + a] = matrix[a * n + b];
  }
}

// What a thread needs beside the output: two vectors and, for games small enough to gain by it, the transposed matrix.
template <typename Real>
struct Scratch {
  static constexpr int64_t kMaxTransposed = 256;  // 512 KiB in float64: within a core's second-level cache

  explicit Scratch(int64_t actions)
      : stride(actions > kMaxTransposed ? 0 : (actions + block_actions<Real>() - 1) / block_actions<Real>() *
                                                  block_actions<Real>()),
        opponent(static_cast<Real*>(std::calloc(2 * actions + actions * stride, sizeof(Real)))),
        mixture(opponent + actions),
        transposed(mixture + actions) {}
  ~Scratch() { std::free(opponent); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  int64_t stride;  // 0: the matrix is read as it stands
  Real* opponent;
  Real* mixture;
  Real* transposed;  // (actions, stride), the padding zero for ever
};

// All iterations of one game. log_policy is normalised at the end only, as a constant of the row changes no softmax;
// but a maximum that is known anyway is taken off, or the constant grows towards 1 / (2 tau) and costs digits.
template <typename Real>
void solve_game(const MirrorDescent<Real>& p, int64_t game, const Scratch<Real>& scratch) {
  const int64_t n = p.actions;
  const Real* preference = p.preference + game * n * n;
  const Real* log_reference = p.log_reference + game * n;
  const Real tau = p.tau[game * p.tau_stride];
  Real *log_policy = p.out + game * n, *opponent = scratch.opponent, *mixture = scratch.mixture;
  const bool by_columns = scratch.stride > 0 && p.iterations > 2;  // fewer do not repay the transposition
  if (by_columns) transpose(preference, n, scratch.stride, scratch.transposed);
  std::memcpy(log_policy, p.log_policy + game * n, n * sizeof(Real));
  for (int64_t k = 0; k < p.iterations; ++k) {
    const Real step = p.step_sizes[k];
    mix(log_policy, log_reference, step * tau, n, mixture);
    const Real* played = p.opponent == Opponent::mixture  ? mixture
                         : p.opponent == Opponent::policy ? log_policy
                                                          : p.log_opponent + game * n;
    const Real top = maximum(played, n);
    const Real sum = exponentials(played, top, n, opponent);
    if (by_columns) {
      add_expected_by_columns(scratch.transposed, scratch.stride, opponent, step / sum, top, n, mixture);
    } else {
      add_expected_by_rows(preference, opponent, step / sum, top, n, mixture);
    }
    Real* next = mixture;
    mixture = log_policy;
    log_policy = next;
  }
  const Real top = maximum(log_policy, n);
  const Real normaliser = top + std::log(exponentials(log_policy, top, n, opponent));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) p.out[game * n + i] = log_policy[i] - normaliser;
}

template <typename Real>
void solve(const MirrorDescent<Real>& problem, int threads) {
  const MirrorDescent<Real> p = problem;
  bool out_of_memory = false;
  // Waking threads takes microseconds: about what this many multiply-adds take on one.
  const bool worth_sharing = p.games * p.actions * p.actions * (p.iterations + 1) > (int64_t{1} << 16);
#pragma omp parallel num_threads(threads) if (threads > 1 && p.games > 1 && worth_sharing)
  {
    const Scratch<Real> scratch(p.actions);
    if (scratch.opponent == nullptr) {
#pragma omp atomic write
      out_of_memory = true;
    }
#pragma omp for schedule(static)
    for (int64_t game = 0; game < p.games; ++game) {
      if (scratch.opponent != nullptr) solve_game(p, game, scratch);
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace

void mirror_descent_f32(const MirrorDescent<float>& problem, int threads) { solve(problem, threads); }
void mirror_descent_f64(const MirrorDescent<double>& problem, int threads) { solve(problem, threads); }

}  // namespace NLHF_LEVEL
}  // namespace nlhf
