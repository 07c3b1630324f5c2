// The engine: fibers, barriers, shared memory with guards and poison, and the host calls. See emulator.h.
#include "emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// The linker's bounds of the __shared__ variables; weak, because a library may have none.
extern unsigned char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024, kGuardBytes = 256;
constexpr unsigned char kPoison = 0xFF;  // all ones is NaN in every floating-point type, and -1 as an integer
constexpr unsigned char kGuard = 0xA5;

// A wait of several threads for each other. `generation` counts completed waits, so that a thread can tell that its own
// is over.
struct Rendezvous {
  SourceLocation location{};
  uint64_t generation = 0;
  int arrived = 0;
  int true_predicates = 0, result_predicates = 0;
  uint64_t values[kWarp], result[kWarp];
};

struct Fiber {
  ucontext_t context;
  unsigned char* stack = nullptr;
  uint3 index;
  bool finished;
  const Rendezvous* waits_for;
  uint64_t waits_since;  // the generation on arrival
  void* sanitizer_stack;
};

struct Engine {
  std::vector<Fiber> fibers;  // reused by later launches for their stacks
  int threads = 0;
  Fiber* running = nullptr;
  ucontext_t scheduler;
  void* scheduler_sanitizer_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  const std::function<void()>* body = nullptr;
  unsigned char* shared = nullptr;
  Rendezvous block;
  std::map<std::pair<int, unsigned>, Rendezvous> warps;  // by warp and mask: disjoint sets of lanes wait separately
  std::string fault, last_fault;
  uint64_t seed = 0;
  int device = 0;
  std::map<const void*, int> shared_limits;  // of kernels that opted in
} engine;

int warp_of(const Fiber& fiber) { return static_cast<int>(&fiber - engine.fibers.data()) / kWarp; }
int lane_of(const Fiber& fiber) { return static_cast<int>(&fiber - engine.fibers.data()) % kWarp; }

std::string describe(const SourceLocation& location) {
  return std::string(location.operation) + " at " + location.file + ":" + std::to_string(location.line);
}

std::string describe(const Fiber& fiber) {
  const std::string name = "thread " + std::to_string(&fiber - engine.fibers.data());
  if (fiber.finished) return name + " has finished";
  return name + (fiber.waits_for ? " waits in " + describe(fiber.waits_for->location) : " runs");
}

void leave_fiber(bool for_good) {
  Fiber* self = engine.running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->sanitizer_stack, engine.scheduler_stack,
                                 engine.scheduler_stack_bytes);
#else
  (void)for_good;
#endif
  swapcontext(&self->context, &engine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->sanitizer_stack, nullptr, nullptr);
#endif
}

void enter_fiber(Fiber& fiber) {
  engine.running = &fiber;
  threadIdx = fiber.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&engine.scheduler_sanitizer_stack, fiber.stack, kStackBytes);
#endif
  swapcontext(&engine.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(engine.scheduler_sanitizer_stack, nullptr, nullptr);
#endif
}

// End the launch with a fault: the scheduler reports it, and no fiber of this block runs again.
[[noreturn]] void fail(const std::string& fault) {
  engine.fault = fault;
  leave_fiber(true);
  std::abort();
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &engine.scheduler_stack, &engine.scheduler_stack_bytes);
#endif
  (*engine.body)();
  engine.running->finished = true;
  leave_fiber(true);
}

void prepare(Fiber& fiber, unsigned thread) {
  if (fiber.stack == nullptr) {
    constexpr int kUntouchedCostsNothing = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, kUntouchedCostsNothing, -1, 0);
    if (stack == MAP_FAILED) std::perror("emulator: stack"), std::abort();
    fiber.stack = static_cast<unsigned char*>(stack);
  }
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStackBytes);  // a fiber that never finished has left its frames' redzones
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  fiber.index = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
  fiber.finished = false;
  fiber.waits_for = nullptr;
  fiber.sanitizer_stack = nullptr;
}

// Return once all `expected` threads have called.
void wait_for_all(Rendezvous& rendezvous, int expected, const SourceLocation& location) {
  if (rendezvous.arrived == 0) {
    rendezvous.location = location;
  } else if (rendezvous.location.line != location.line || std::strcmp(rendezvous.location.file, location.file) != 0 ||
             std::strcmp(rendezvous.location.operation, location.operation) != 0) {
    fail("threads meet at different places: " + describe(rendezvous.location) + " and " + describe(location));
  }
  Fiber* self = engine.running;
  self->waits_since = rendezvous.generation;
  if (++rendezvous.arrived < expected) {
    self->waits_for = &rendezvous;
    leave_fiber(false);
    self->waits_for = nullptr;
    return;
  }
  std::copy(rendezvous.values, rendezvous.values + kWarp, rendezvous.result);
  rendezvous.result_predicates = std::exchange(rendezvous.true_predicates, 0);
  rendezvous.arrived = 0;
  ++rendezvous.generation;
}

// Describe a deadlock: one waiting thread and the first thread that it waits for.
std::string divergence() {
  std::string waiting, missing;
  const Rendezvous* rendezvous = nullptr;
  for (int i = 0; i < engine.threads && rendezvous == nullptr; ++i) {
    const Fiber& fiber = engine.fibers[i];
    if (fiber.finished) continue;
    rendezvous = fiber.waits_for;
    waiting = describe(fiber) + " where only " + std::to_string(rendezvous->arrived) + " arrived";
  }
  for (int i = 0; i < engine.threads && missing.empty(); ++i) {
    const Fiber& fiber = engine.fibers[i];
    if (fiber.finished || fiber.waits_for != rendezvous) missing = "; " + describe(fiber);
  }
  return "divergent barrier: " + waiting + missing;
}

bool can_run(const Fiber& fiber) {
  return !fiber.finished && (fiber.waits_for == nullptr || fiber.waits_for->generation != fiber.waits_since);
}

// With a seed, random warps pause until no other can continue, so that those run one barrier ahead and expose reuse of
// shared memory without a barrier in between.
void run_block(const std::vector<int>& order, std::mt19937_64& random) {
  engine.block = {};
  engine.warps.clear();
  for (int i = 0; i < engine.threads; ++i) prepare(engine.fibers[i], i);
  constexpr uint64_t kAll = ~uint64_t{0};
  uint64_t warps_that_run = kAll;
  int unfinished = engine.threads;
  while (unfinished > 0) {
    bool progress = false;
    for (const int thread : order) {
      Fiber& fiber = engine.fibers[thread];
      if (!(warps_that_run >> (thread / kWarp) & 1) || !can_run(fiber)) continue;
      enter_fiber(fiber);
      if (!engine.fault.empty()) return;
      progress = true;
      unfinished -= fiber.finished;
    }
    const bool all_ran = warps_that_run == kAll;
    if (!progress && all_ran) {
      engine.fault = divergence();
      return;
    }
    if (engine.seed != 0 && all_ran) warps_that_run = random();
    if (!progress) warps_that_run = kAll;
  }
}

// Dynamic shared memory of exactly the requested size, between guards.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes)
      : bytes_(bytes), memory_(std::aligned_alloc(kGuardBytes, rounded(bytes)), &std::free) {
    std::memset(memory_.get(), kGuard, rounded(bytes));
    ASAN_POISON_MEMORY_REGION(memory_.get(), kGuardBytes);
    ASAN_POISON_MEMORY_REGION(data() + bytes, rounded(bytes) - kGuardBytes - bytes);
  }
  ~SharedMemory() { ASAN_UNPOISON_MEMORY_REGION(memory_.get(), rounded(bytes_)); }
  unsigned char* begin() { return static_cast<unsigned char*>(memory_.get()); }
  unsigned char* data() { return begin() + kGuardBytes; }

  void poison() {
    std::memset(data(), kPoison, bytes_);
    const size_t static_bytes = __stop_emulated_shared - __start_emulated_shared;
    if (static_bytes > 0) std::memset(__start_emulated_shared, kPoison, static_bytes);
  }

  bool guards_intact() {
#if defined(__SANITIZE_ADDRESS__)
    return true;  // poisoned: the sanitizer has already stopped any access
#endif
    const auto intact = [](unsigned char byte) { return byte == kGuard; };
    return std::all_of(begin(), data(), intact) &&
           std::all_of(data() + bytes_, begin() + rounded(bytes_), intact);
  }

 private:
  static size_t rounded(size_t bytes) { return (bytes + 3 * kGuardBytes - 1) / kGuardBytes * kGuardBytes; }
  size_t bytes_;
  std::unique_ptr<void, void (*)(void*)> memory_;
};

std::vector<int> shuffled(int count, std::mt19937_64& random) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (engine.seed != 0) std::shuffle(order.begin(), order.end(), random);
  return order;
}

}  // namespace

int current_device() { return engine.device; }
void* dynamic_shared() { return engine.shared; }
void yield() { leave_fiber(false); }
const std::string& last_fault() { return engine.last_fault; }

bool lane_exists(int lane) {
  const int thread = warp_of(*engine.running) * kWarp + lane;
  return thread < engine.threads && !engine.fibers[thread].finished;
}

int block_barrier(bool predicate, SourceLocation location) {
  engine.block.true_predicates += predicate;
  wait_for_all(engine.block, engine.threads, location);
  return engine.block.result_predicates;
}

const uint64_t* warp_exchange(unsigned mask, uint64_t value, SourceLocation location) {
  const Fiber& self = *engine.running;
  if (!(mask >> lane_of(self) & 1)) fail(describe(location) + ": " + describe(self) + " but is not in the mask");
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) && !lane_exists(lane)) {
      const std::string missing = " waits for lane " + std::to_string(lane) + ", which has finished";
      fail("divergent warp: " + describe(location) + missing);
    }
  }
  Rendezvous& rendezvous = engine.warps[{warp_of(self), mask}];
  rendezvous.values[lane_of(self)] = value;
  wait_for_all(rendezvous, __builtin_popcount(mask), location);
  return rendezvous.result;
}

bool run_grid(const dim3& blocks, const dim3& threads, size_t shared_bytes, const std::function<void()>& body) {
  gridDim = blocks;
  blockDim = threads;
  engine.threads = static_cast<int>(threads.x * threads.y * threads.z);
  if (engine.fibers.size() < static_cast<size_t>(engine.threads)) engine.fibers.resize(engine.threads);
  engine.body = &body;
  engine.fault.clear();
  SharedMemory shared(shared_bytes);
  engine.shared = shared.data();
  std::mt19937_64 random(engine.seed);
  for (const int block : shuffled(static_cast<int>(blocks.x * blocks.y * blocks.z), random)) {
    const unsigned index = static_cast<unsigned>(block);
    blockIdx = {index % blocks.x, index / blocks.x % blocks.y, index / (blocks.x * blocks.y)};
    shared.poison();
    run_block(shuffled(engine.threads, random), random);
    if (engine.fault.empty() && !shared.guards_intact()) engine.fault = "written outside dynamic shared memory";
    if (!engine.fault.empty()) {
      engine.last_fault = "block " + std::to_string(block) + ": " + engine.fault;
      return false;
    }
  }
  return true;
}

cudaError_t set_dynamic_shared_limit(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > kDevices[engine.device].shared_bytes_opt_in) return cudaErrorInvalidValue;
  engine.shared_limits[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, const dim3& blocks, const dim3& threads, size_t shared_bytes,
                   const std::function<void()>& body) {
  constexpr int kWithoutOptIn = 48 * 1024;
  const auto opted_in = engine.shared_limits.find(kernel);
  const int limit = opted_in == engine.shared_limits.end() ? kWithoutOptIn : std::max(opted_in->second, kWithoutOptIn);
  const uint64_t block_size = uint64_t{threads.x} * threads.y * threads.z;
  if (shared_bytes > static_cast<size_t>(limit)) return cudaErrorInvalidValue;
  if (block_size == 0 || block_size > 1024) return cudaErrorInvalidConfiguration;
  if (uint64_t{blocks.x} * blocks.y * blocks.z == 0) return cudaErrorInvalidConfiguration;
  return run_grid(blocks, threads, shared_bytes, body) ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulation

// ---------------------------------------------------------------------------------------------------- host calls
using emulation::engine;

cudaError_t cudaGetDevice(int* device) {
  *device = engine.device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= emulation::kDeviceCount) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 * 1024; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = emulation::kDevices[device].multiprocessors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulation::kDevices[device].shared_bytes_opt_in;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }  // every call returns its own error

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memmove(target, source, bytes);
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchFailure: return engine.last_fault.c_str();
  }
  return "unknown error";
}

// ------------------------------------------------------------------------------------------- switches for tests
extern "C" {
void emulation_set_device(int device) { engine.device = device; }
void emulation_set_seed(uint64_t seed) { engine.seed = seed; }  // 0: blocks and threads in their natural order
const char* emulation_last_fault() { return engine.last_fault.c_str(); }
}
