// decode_attention on the CPU: pairs of row and key/value head over threads. The cache is read once, in strips of
// kStrip slots that all query heads of the group use while the strip is in the first-level cache.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "../common/half.h"
#include "../common/simd_float.h"
#include "decode_attention.h"

namespace nlhf {
namespace NLHF_LEVEL {
namespace {

constexpr int64_t kStrip = 64;  // slots; a multiple of every level's lanes
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
float widened(float x) { return x; }
float widened(Bf16 x) { return bf16_to_float(x.bits); }
float widened(F16 x) { return f16_to_float(x.bits); }

// Convert rows of n elements to float32, each padded with zeros to whole vectors.
template <typename Element>
void widen(const Element* from, int64_t stride, int64_t rows, int64_t n, float* to) {
  const int64_t width = padded(n);
  for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[r * width + i] = widened(from[r * stride + i]);
    for (int64_t i = n; i < width; ++i) to[r * width + i] = 0;
  }
}

struct Rows {
  const float* data;
  int64_t stride;
  const float* operator[](int64_t index) const { return data + index * stride; }
};

// Return `count` slots of the cache as float32 rows of whole vectors: in place where they have that form, else a copy.
template <typename Element>
Rows slots(const Cache& cache, const Element* first, int64_t count, int64_t n, float* room) {
  widen(first, cache.slot_stride, count, n, room);
  return {room, padded(n)};
}
template <>
Rows slots(const Cache& cache, const float* first, int64_t count, int64_t n, float* room) {
  if (n == padded(n)) return {first, cache.slot_stride};
  widen(first, cache.slot_stride, count, n, room);
  return {room, padded(n)};
}

// Return sums of each lane and the lane `kDistance` away: of b where the lane's number has the bit kDistance, else of
// a.
template <int kDistance>
inline Floats folded(Floats a, Floats b) {
  Mask own{}, other{};
  for (int lane = 0; lane < kLanes; ++lane) {
    const int second = (lane & kDistance) != 0 ? static_cast<int>(kLanes) : 0;
    own[lane] = lane + second;
    other[lane] = (lane ^ kDistance) + second;
  }
#if defined(__clang__)
  Floats sum{};
  for (int lane = 0; lane < kLanes; ++lane) {
    const Floats from = (lane & kDistance) != 0 ? b : a;
    sum[lane] = from[lane] + from[lane ^ kDistance];
  }
  return sum;
#else
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
#endif
}

// Lane i: the sum of all lanes of sums[i].
template <int kFirst = 0, int kStep = 1>
__attribute__((always_inline)) inline Floats sums_of_lanes(const Floats (&sums)[kLanes]) {
  if constexpr (kStep == kLanes) {
    return sums[kFirst];
  } else {
    return folded<kStep>(sums_of_lanes<kFirst, 2 * kStep>(sums), sums_of_lanes<kFirst + kStep, 2 * kStep>(sums));
  }
}

// Return query[h] . keys[i] for H heads and kLanes / H keys, in lane h kLanes / H + i: kLanes independent sums, as one
// chain of multiply-adds would be bound by their latency.
template <int H>
Floats products(const float* query, const Rows& keys, int64_t first, int64_t width) {
  constexpr int kKeys = kLanes / H;
  Floats sums[kLanes];
  for (int h = 0; h < H; ++h) {
    for (int i = 0; i < kKeys; ++i) sums[h * kKeys + i] = load(query + h * width) * load(keys[first + i]);
  }
  for (int64_t d = kLanes; d < width; d += kLanes) {
    Floats q[H];
    for (int h = 0; h < H; ++h) q[h] = load(query + h * width + d);
    for (int i = 0; i < kKeys; ++i) {
      const Floats key = load(keys[first + i] + d);
      for (int h = 0; h < H; ++h) sums[h * kKeys + i] += q[h] * key;
    }
  }
  return sums_of_lanes(sums);
}

// tanh: near 0 a polynomial (Cephes), so that the relative error stays small; elsewhere by exp, exactly +-1 far out.
Floats tanh_of(Floats x) {
  const Floats z = x * x, size = x < 0.0f ? -x : x;
  Floats p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Floats near = p * z * x + x;
  const Floats e = exp_nonpositive(-2.0f * size), far = (1.0f - e) / (1.0f + e);
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

// A query head's running softmax over the cache: README.md (1).
struct Head {
  Floats total;  // by lanes
  float top;
  float factor;  // rescales the sums before this strip to the new maximum
};

// Return the largest lane, by halves: a chain over the lanes would be bound by latency.
float highest_lane(Floats values) {
  float lanes[kLanes];
  store(lanes, values);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
  }
  return lanes[0];
}

// Turn the scores of a strip into weights; slots beyond `count` get weight 0.
void weigh(const DecodeAttention& p, float* scores, int64_t count, Head& head) {
  Floats best = broadcast(-kInfinity);
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats s = load(scores + i) * p.scale;
    if (p.softcap != 0) s = p.softcap * tanh_of(s / p.softcap);
    store(scores + i, s);
  }
  for (int64_t i = count; i < padded(count); ++i) scores[i] = -kInfinity;
  for (int64_t i = 0; i < count; i += kLanes) best = larger(load(scores + i), best);
  const float top = std::max(head.top, highest_lane(best));
  const float base = top == -kInfinity ? 0 : top;  // -inf - -inf is NaN
  Floats sum{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats weight = exp_nonpositive(load(scores + i) - base);
    store(scores + i, weight);
    sum += weight;
  }
  head.factor = top == head.top ? 1 : std::exp(head.top - base);
  head.total = head.total * head.factor + sum;
  head.top = top;
}

// acc[h] = factor[h] acc[h] + sum_i weights[h][i] values[i], for H heads and V vectors that stay in registers.
template <int H, int V>
void accumulate(const float* weights, const Rows& values, int64_t at, int64_t count, const Head* heads, float* acc,
                int64_t width) {
  Floats sums[H][V];
  for (int h = 0; h < H; ++h) {
    for (int v = 0; v < V; ++v) sums[h][v] = load(acc + h * width + at + v * kLanes) * heads[h].factor;
  }
  for (int64_t i = 0; i < count; ++i) {
    const float* row = values[i] + at;
    for (int h = 0; h < H; ++h) {
      for (int v = 0; v < V; ++v) sums[h][v] += load(row + v * kLanes) * weights[h * kStrip + i];
    }
  }
  for (int h = 0; h < H; ++h) {
    for (int v = 0; v < V; ++v) store(acc + h * width + at + v * kLanes, sums[h][v]);
  }
}

template <int H>
void accumulate_heads(const float* weights, const Rows& values, int64_t count, const Head* heads, float* acc,
                      int64_t width) {
  int64_t at = 0;
  for (; at + 4 * kLanes <= width; at += 4 * kLanes) accumulate<H, 4>(weights, values, at, count, heads, acc, width);
  for (; at < width; at += kLanes) accumulate<H, 1>(weights, values, at, count, heads, acc, width);
}

// A thread's memory: queries and sums of the group, its weights in a strip, and a strip of the cache as float32.
struct Scratch {
  Scratch(const DecodeAttention& p)
      : group(p.heads / p.kv_heads), width(padded(p.dim)), value_width(padded(p.value_dim)) {
    const int64_t floats = group * (width + value_width + kStrip) + kStrip * std::max(width, value_width);
    query = static_cast<float*>(std::calloc(floats + kLanes, sizeof(float)));
    heads = static_cast<Head*>(std::calloc(group, sizeof(Head)));
    acc = query + group * width;
    weights = acc + group * value_width;
    room = weights + group * kStrip;
  }
  ~Scratch() {
    std::free(query);
    std::free(heads);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  bool complete() const { return query != nullptr && heads != nullptr; }

  int64_t group, width, value_width;
  float* query;    // (group, width)
  float* acc;      // (group, value_width)
  float* weights;  // (group, kStrip)
  float* room;     // (kStrip, width or value_width)
  Head* heads;     // (group)
};

// Scores of `count` slots, a multiple of kLanes, for all heads.
void score_strip(const Rows& keys, int64_t count, const Scratch& s, float* scores) {
  constexpr int64_t half = kLanes / 2;
  for (int64_t i = 0; i < count; i += kLanes) {
    int64_t g = 0;
    for (; g + 2 <= s.group; g += 2) {
      const float* query = s.query + g * s.width;
      for (int64_t part = 0; part < kLanes; part += half) {
        float both[kLanes];
        store(both, products<2>(query, keys, i + part, s.width));
        std::memcpy(scores + g * kStrip + i + part, both, half * sizeof(float));
        std::memcpy(scores + (g + 1) * kStrip + i + part, both + half, half * sizeof(float));
      }
    }
    if (g < s.group) store(scores + g * kStrip + i, products<1>(s.query + g * s.width, keys, i, s.width));
  }
}

void add_strip(const Rows& values, int64_t count, const Scratch& s) {
  constexpr int together = kVectorBytes == 64 ? 4 : 2;  // heads; with their sums they fit the registers
  int64_t g = 0;
  for (; g + together <= s.group; g += together) {
    accumulate_heads<together>(s.weights + g * kStrip, values, count, s.heads + g, s.acc + g * s.value_width,
                               s.value_width);
  }
  for (; g < s.group; ++g) {
    accumulate_heads<1>(s.weights + g * kStrip, values, count, s.heads + g, s.acc + g * s.value_width, s.value_width);
  }
}

void finish(const DecodeAttention& p, int64_t first_head, int64_t row, const Scratch& s) {
  for (int64_t g = 0; g < s.group; ++g) {
    const Head& head = s.heads[g];
    float factor = 1, total = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) total += head.total[lane];
    if (p.sinks != nullptr) {
      const float sink = p.sinks[first_head + g], top = std::max(head.top, sink);
      const float base = top == -kInfinity ? 0 : top;
      factor = std::exp(head.top - base);
      total = total * factor + std::exp(sink - base);
    }
    factor = total == 0 ? 0 : factor / total;
    float* out = p.out + (row * p.heads + first_head + g) * p.value_dim;
    for (int64_t d = 0; d < p.value_dim; ++d) out[d] = s.acc[g * s.value_width + d] * factor;
  }
}

// README.md (2): the slots that a row reads.
struct Range {
  Range(const DecodeAttention& p, int64_t row) {
    const int64_t end = std::max<int64_t>(p.ends[row], 0), rolled = std::max<int64_t>(end - p.positions, 0);
    const int64_t start = std::max<int64_t>(end - p.window, p.starts == nullptr ? 0 : p.starts[row]);
    first = std::max<int64_t>(std::max<int64_t>(start, 0) - rolled, 0);
    last = end - rolled;
  }
  int64_t first, last;
};

template <typename Element>
void attend(const DecodeAttention& p, int64_t row, int64_t kv_head, const Scratch& s) {
  const int64_t first_head = kv_head * s.group;
  const Element* query = static_cast<const Element*>(p.query) + (row * p.heads + first_head) * p.dim;
  const auto base = [&](const Cache& cache) {
    return static_cast<const Element*>(cache.data) + row * cache.row_stride + kv_head * cache.head_stride;
  };
  const Element *keys = base(p.keys), *values = base(p.values);
  widen(query, p.dim, s.group, p.dim, s.query);
  std::fill_n(s.acc, s.group * s.value_width, 0.0f);
  for (int64_t g = 0; g < s.group; ++g) s.heads[g] = {Floats{}, -kInfinity, 1};
  const Range range(p, row);
  for (int64_t slot = range.first; slot < range.last; slot += kStrip) {
    const int64_t count = std::min(kStrip, range.last - slot), whole = count / kLanes * kLanes;
    const Element* first_key = keys + slot * p.keys.slot_stride;
    if (whole > 0) score_strip(slots(p.keys, first_key, whole, p.dim, s.room), whole, s, s.weights);
    if (whole < count) {  // fewer than a vector's lanes: from a copy, as slots beyond the range must not be read
      widen(first_key + whole * p.keys.slot_stride, p.keys.slot_stride, count - whole, p.dim, s.room);
      score_strip({s.room, s.width}, kLanes, s, s.weights + whole);
    }
    for (int64_t g = 0; g < s.group; ++g) weigh(p, s.weights + g * kStrip, count, s.heads[g]);
    add_strip(slots(p.values, values + slot * p.values.slot_stride, count, p.value_dim, s.room), count, s);
  }
  finish(p, first_head, row, s);
}

template <typename Element>
void attend_all(const DecodeAttention& p, Part rows, int threads) {
  bool out_of_memory = false;
  const int64_t pairs = rows.count() * p.kv_heads;
  // Starting threads takes microseconds, about as long as this many multiply-adds on one thread.
  const bool worth_sharing = rows.count() * p.heads * p.positions * (p.dim + p.value_dim) > (int64_t{1} << 17);
#pragma omp parallel num_threads(threads) if (threads > 1 && pairs > 1 && worth_sharing)
  {
    const Scratch scratch(p);
    if (!scratch.complete()) {
#pragma omp atomic write
      out_of_memory = true;
    }
#pragma omp for schedule(dynamic)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      if (scratch.complete()) attend<Element>(p, rows.first + pair / p.kv_heads, pair % p.kv_heads, scratch);
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace

void decode_attention(const DecodeAttention& problem, Part rows, int threads) {
  switch (problem.dtype) {
    case DType::bf16: return attend_all<Bf16>(problem, rows, threads);
    case DType::f16: return attend_all<F16>(problem, rows, threads);
    default: return attend_all<float>(problem, rows, threads);
  }
}

}  // namespace NLHF_LEVEL
}  // namespace nlhf
