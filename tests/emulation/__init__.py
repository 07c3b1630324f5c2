"""The CUDA sources on the CPU: an emulated runtime, and the kernels it is itself tested with."""
