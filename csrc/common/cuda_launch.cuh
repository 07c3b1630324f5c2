// The host side of every CUDA operation: device limits and kernel launches.
//
// Launches go through cudaLaunchKernel and cudaLaunchKernelEx instead of <<<>>>, so that the same sources also compile as plain C++ against
// the emulated runtime in tests/emulation.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace nlhf {

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // the maximum of a block's dynamic shared memory, opt-in included
};

// Return limits of the current device. A query costs about a microsecond an attribute, so results are cached per
// device.
static inline cudaError_t device_limits(DeviceLimits* limits) {
  constexpr int kCachedDevices = 64;
  static std::atomic<uint64_t> cache[kCachedDevices];  // both numbers in one word, written atomically; 0: not cached
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  uint64_t packed = device < kCachedDevices ? cache[device].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    int multiprocessors = 0, shared_bytes = 0;
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    packed = (static_cast<uint64_t>(multiprocessors) << 32) | static_cast<uint32_t>(shared_bytes);
    if (device < kCachedDevices) cache[device].store(packed, std::memory_order_relaxed);
  }
  *limits = {static_cast<int>(packed >> 32), static_cast<int>(packed & 0xFFFFFFFFu)};
  return cudaSuccess;
}

// Return the number of blocks for `items` that a kernel walks in strides of gridDim.x: at most as many as can be
// resident at once (32 a multiprocessor), because items of one launch cost the same and a further wave would only add
// its start-up time.
static inline unsigned strided_grid(int64_t items, const DeviceLimits& limits) {
  const int64_t resident = int64_t{32} * limits.multiprocessors;
  return static_cast<unsigned>(items < resident ? items : resident);
}

struct LaunchShape {
  dim3 blocks;
  dim3 threads;
  size_t shared_bytes;  // dynamic shared memory of one block
  unsigned cluster = 1;  // blocks that form a cluster, on sm_90 and newer
};

// Launch on the current device. `arguments` are converted to the kernel's own parameter types, as in a call.
template <typename... Parameters>
static cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* cuda_stream,
                          const std::common_type_t<Parameters>&... arguments) {
  constexpr size_t kSharedWithoutOptIn = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > kSharedWithoutOptIn) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shape.shared_bytes));
  }
  if (error == cudaSuccess && shape.cluster == 1) {
    void* addresses[sizeof...(Parameters) + 1] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    error = cudaLaunchKernel(kernel, shape.blocks, shape.threads, addresses, shape.shared_bytes,
                             static_cast<cudaStream_t>(cuda_stream));
  } else if (error == cudaSuccess) {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = shape.cluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = shape.blocks, config.blockDim = shape.threads, config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(cuda_stream), config.attrs = &cluster, config.numAttrs = 1;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (error != cudaSuccess) cudaGetLastError();  // clear the error, or the next call would report it again
  return error;
}

}  // namespace nlhf
