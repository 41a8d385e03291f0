// conditional_layer_norm:
//   h = dropout(x + x_bias) + residual,  xhat = (h - mean) * rstd
//   y = xhat * ((1 + gamma[t]) * weight + beta[t]) + bias + bias_shift[t]
#pragma once

#include "camtl/common.h"
#include "camtl/launch.h"

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

// f32, bf16 and f16, with fewer than 2^31 rows and features. Parameters, tables and their gradients are each f32 or of
// x's type, as NormTables says: conversions would be launches of their own. dropout.on_device has the seed; `threads`
// plays no part.
namespace cuda {

struct NormTables {
    // Which of weight, bias, gamma, beta, bias_shift, x_bias (bits 0 to 5), and so their gradients, are of x's type.
    unsigned narrow;
    // Elements from task to task. Those of gradients lie D apart.
    int64_t gamma_stride;
    int64_t beta_stride;
    int64_t bias_shift_stride;
};

void conditional_layer_norm_forward(const ConditionalLayerNormForward&, const NormTables&, const Launch&);
// Bytes of device memory that the backward pass uses meanwhile, 16-byte aligned; 0 if no parameter wants a gradient.
int64_t conditional_layer_norm_backward_workspace(const ConditionalLayerNormBackward&, int device);
void conditional_layer_norm_backward(const ConditionalLayerNormBackward&, const NormTables&, void* workspace,
                                     const Launch&);

}  // namespace cuda

}  // namespace camtl
