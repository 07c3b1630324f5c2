// The instruction-set level of the CPU kernels: the best of this machine, unless capped.
#include "levels.h"

#include <atomic>

namespace nlhf {

Level best_level() {
#if defined(NLHF_X86_LEVELS)
  static const Level best = [] {
    __builtin_cpu_init();
    // The features of -march=x86-64-v3 and -v4 that the kernels can use; they imply the rest.
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v4 ? Level::avx512 : v3 ? Level::avx2 : Level::baseline;
  }();
  return best;
#else
  return Level::baseline;
#endif
}

namespace {
std::atomic<int> cap{static_cast<int>(Level::avx512)};
}

Level active_level() {
  const int highest = cap.load(std::memory_order_relaxed);
  return highest < static_cast<int>(best_level()) ? static_cast<Level>(highest) : best_level();
}

void cap_level(Level highest) { cap.store(static_cast<int>(highest), std::memory_order_relaxed); }

}  // namespace nlhf
