// The engine of the emulated CUDA runtime: runs the blocks of a launch one after the other on the CPU, each thread of a
// block as a fiber that yields only where it waits for others.
//
// Why not one OS thread per CUDA thread: with fibers every run is repeatable (a seed determines the order of blocks and
// threads), a barrier that some threads never reach is reported instead of hanging, and sanitizers see one thread.
// Not covered: concurrency (a kernel that spins until another block writes spins forever), timing, and inline PTX, as
// sources compile without __CUDACC__.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct dim3;

namespace emulation {

struct Device {
  int multiprocessors;
  int shared_bytes_opt_in;
};

// Device 0 has the limits of an H100. Device 1 has one multiprocessor and 48 KB of shared memory, so that small
// problems already use grid strides and the paths for problems that exceed shared memory.
constexpr Device kDevices[] = {{132, 232448}, {1, 49152}};
constexpr int kDeviceCount = 2;
constexpr int kWarp = 32;

// The operation in which a thread waits, and its place in the sources; threads that wait for each other must agree in
// both.
struct SourceLocation {
  const char* operation;
  const char* file;
  int line;
};

int current_device();
void* dynamic_shared();         // of the running block
bool lane_exists(int lane);     // whether that lane of the calling thread's warp belongs to a running thread
void yield();                   // runs the other threads first
const std::string& last_fault();

// Wait for the whole block; return the number of threads whose predicate is true.
int block_barrier(bool predicate, SourceLocation location);

// Wait for the lanes of `mask`; return the value of each, by lane. Valid until the caller's next wait.
const uint64_t* warp_exchange(unsigned mask, uint64_t value, SourceLocation location);

// Run `body` in every thread of the grid; return false, with last_fault set, if the kernel has a fault.
bool run_grid(const dim3& blocks, const dim3& threads, size_t shared_bytes, const std::function<void()>& body);

}  // namespace emulation
