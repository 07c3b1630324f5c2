// Which instruction-set level the CPU kernels run at: the best this machine has, unless capped.
#include "levels.h"

#include <atomic>

namespace nlhf {

Level best_level() {
#if defined(NLHF_X86_LEVELS)
  static const Level best = [] {
    __builtin_cpu_init();
    // What -march=x86-64-v3 and -v4 ask for, as far as the kernels can use it; the CPU features imply the rest.
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
