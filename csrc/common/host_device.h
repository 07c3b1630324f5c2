// One spelling for functions that live on the host, on the device, or on both.
//
// Everything is `static`: the same header is compiled into objects of different instruction sets, and a function
// with external linkage would be merged by the linker into whichever copy it met first, AVX-512 code on a machine
// that has none.
#pragma once

#if defined(__CUDACC__)
#define NLHF_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define NLHF_HOST_DEVICE static inline
#endif
