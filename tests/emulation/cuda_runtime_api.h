// The host API alone, for sources that the host compiler takes; emulated, there is one header for both.
#pragma once

#include "cuda_runtime.h"
