// conditional_layer_norm:
//   h = dropout(x + x_bias) + residual,  xhat = (h - mean) * rstd
//   y = xhat * ((1 + gamma[t]) * weight + beta[t]) + bias + bias_shift[t]
#pragma once

#include "camtl/common.h"

namespace camtl {

struct ConditionalLayerNormForward {
    DType dtype;
    Layout layout;
    int64_t features;         // D
    const void* x;            // [rows, D], dtype
    int64_t x_stride;
    const void* residual;     // [rows, D], dtype; or null
    int64_t residual_stride;
    const void* weight;       // [D], acc, as all parameters and tables
    const void* bias;         // [D]
    const void* gamma;        // [tasks, D] or null, together with beta
    const void* beta;
    const void* bias_shift;   // [tasks, D] or null
    const void* x_bias;       // [D] or null
    Dropout dropout;          // element (row, d) is number row * D + d
    double eps;
    void* y;                  // [rows, D], dtype, contiguous; rows of no sequence become 0
    void* mean;               // [rows], acc; 0 in rows of no sequence
    void* rstd;               // [rows], acc; 0 in rows of no sequence
    int threads;
};

struct ConditionalLayerNormBackward {
    DType dtype;
    Layout layout;
    int64_t features;
    const void* dy;           // [rows, D], dtype
    int64_t dy_stride;
    const void* x;            // as in the forward call, from here
    int64_t x_stride;
    const void* residual;
    int64_t residual_stride;
    const void* weight;
    const void* gamma;
    const void* beta;
    const void* x_bias;
    Dropout dropout;
    const void* mean;
    const void* rstd;         // to here
    void* dx;                 // [rows, D], dtype, contiguous; the gradients below may be null: not wanted
    void* dresidual;          // [rows, D], dtype, contiguous
    void* dweight;            // [D], acc
    void* dbias;              // [D]
    void* dgamma;             // [tasks, D]
    void* dbeta;              // [tasks, D]
    void* dbias_shift;        // [tasks, D]
    void* dx_bias;            // [D]
    int threads;
};

namespace cpu {
void conditional_layer_norm_forward(const ConditionalLayerNormForward&);
void conditional_layer_norm_backward(const ConditionalLayerNormBackward&);
}  // namespace cpu

}  // namespace camtl
