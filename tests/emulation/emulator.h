// The engine under the emulated CUDA runtime: runs the blocks of a launch one after the other on the CPU, each thread
// of a block as a fiber that gives way only where it waits for others.
//
// Why not one OS thread per CUDA thread: fibers make every run repeatable (the order of blocks and threads is drawn
// from a seed), a barrier that some threads never reach is found instead of hanging, and sanitizers see one thread.
// What it cannot show: real concurrency, so a kernel that spins until another block writes will spin forever; timing;
// inline PTX. Sources that compile here do so without __CUDACC__.
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

// Device 0 is roomy like an H100. Device 1 has one multiprocessor and nothing beyond 48 KB of shared memory, so that
// small problems already reach grid strides and the paths taken when shared memory does not suffice.
constexpr Device kDevices[] = {{132, 232448}, {1, 49152}};
constexpr int kDeviceCount = 2;
constexpr int kWarp = 32;

// Where and as what a thread waits; threads that meet must agree in it.
struct Place {
  const char* operation;
  const char* file;
  int line;
};

int current_device();
void* dynamic_shared();         // of the running block
bool lane_exists(int lane);     // whether that lane of the calling thread's warp belongs to a running thread
void yield();                   // lets the other threads run first
const std::string& last_fault();

// Waits for the whole block; returns how many threads came with a true predicate.
int block_barrier(bool predicate, Place place);

// Waits for the lanes of `mask`; returns what each of them brought, by lane. Valid until the caller's next wait.
const uint64_t* warp_exchange(unsigned mask, uint64_t value, Place place);

// Runs every thread of the grid through `body`; false (and last_fault) when the kernel misbehaved.
bool run_grid(const dim3& blocks, const dim3& threads, size_t shared_bytes, const std::function<void()>& body);

}  // namespace emulation
