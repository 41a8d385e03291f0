// bias_gelu: y = gelu(x + bias), gelu(a) = a * (1 + erf(a / sqrt 2)) / 2.
#pragma once

#include "camtl/common.h"

namespace camtl {

struct BiasGeluForward {
    DType dtype;
    int64_t rows;
    int64_t features;     // D
    const void* x;        // [rows, D], dtype
    int64_t x_stride;
    const void* bias;     // [D], acc
    void* y;              // [rows, D], dtype, contiguous
    int threads;
};

struct BiasGeluBackward {
    DType dtype;
    int64_t rows;
    int64_t features;
    const void* dy;       // [rows, D], dtype
    int64_t dy_stride;
    const void* x;        // [rows, D], dtype
    int64_t x_stride;
    const void* bias;     // [D], acc
    void* dx;             // [rows, D], dtype, contiguous; or null: not wanted
    void* dbias;          // [D], acc; or null
    int threads;
};

namespace cpu {
void bias_gelu_forward(const BiasGeluForward&);
void bias_gelu_backward(const BiasGeluBackward&);
}  // namespace cpu

}  // namespace camtl
