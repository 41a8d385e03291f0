// Where and how a CUDA kernel is launched.
#pragma once

#include "camtl/common.h"

namespace camtl::cuda {

struct Launch {
    int device;
    void* stream;          // a cudaStream_t
    DType tables;          // storage type of tables and of their gradients: f32, or that of x
    bool narrow_ids;       // Layout::task_ids points at int32
};

}  // namespace camtl::cuda
