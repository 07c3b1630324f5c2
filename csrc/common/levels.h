// Instruction-set levels of the CPU kernels.
//
// Every <op>_cpu.cpp is compiled once per level with NLHF_LEVEL set to the level's name and defines its kernel inside
// `namespace nlhf::NLHF_LEVEL`; levels.cpp finds the level of this machine, NLHF_DISPATCH calls that level's kernel.
#pragma once

#include <cstdint>

namespace nlhf {

// The part of a problem's rows that one call works on; the problem's pointers and sizes are those of the whole.
struct Part {
  int64_t first, last;
  int64_t count() const { return last - first; }
};

enum class Level { baseline = 0, avx2 = 1, avx512 = 2 };

Level best_level();             // the highest level that was built and that this CPU runs
Level active_level();           // best_level(), unless capped
void cap_level(Level highest);  // for tests and for comparing levels; takes effect with the next call

}  // namespace nlhf

// Declares `op` for every level; `threads` is the number of OpenMP threads to use.
#define NLHF_DECLARE_CPU(op, Problem)                                             \
  namespace baseline { void op(const Problem& problem, Part rows, int threads); } \
  namespace avx2 { void op(const Problem& problem, Part rows, int threads); }     \
  namespace avx512 { void op(const Problem& problem, Part rows, int threads); }

#if defined(NLHF_X86_LEVELS)
#define NLHF_DISPATCH(op, problem, rows, threads)                                  \
  switch (::nlhf::active_level()) {                                                \
    case ::nlhf::Level::avx512: ::nlhf::avx512::op(problem, rows, threads); break; \
    case ::nlhf::Level::avx2: ::nlhf::avx2::op(problem, rows, threads); break;     \
    default: ::nlhf::baseline::op(problem, rows, threads); break;                  \
  }
#else
#define NLHF_DISPATCH(op, problem, rows, threads) ::nlhf::baseline::op(problem, rows, threads)
#endif
