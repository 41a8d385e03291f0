// film: y = (1 + gamma[t]) * x + beta[t], t the task of the row's sequence.
#pragma once

#include "camtl/common.h"
#include "camtl/launch.h"

namespace camtl {

struct FilmForward {
    DType dtype;
    Layout layout;
    int64_t features;     // D
    const void* x;        // [rows, D], dtype
    int64_t x_stride;     // elements from row to row
    const void* gamma;    // [tasks, D], acc
    const void* beta;     // [tasks, D], acc
    void* y;              // [rows, D], dtype, contiguous; rows of no sequence become 0
    int threads;
};

struct FilmBackward {
    DType dtype;
    Layout layout;
    int64_t features;
    const void* dy;       // [rows, D], dtype
    int64_t dy_stride;
    const void* x;        // [rows, D], dtype; may be null where dgamma is
    int64_t x_stride;
    const void* gamma;    // [tasks, D], acc
    void* dx;             // [rows, D], dtype, contiguous; or null: not wanted
    void* dgamma;         // [tasks, D], acc; or null
    void* dbeta;          // [tasks, D], acc; or null
    int threads;
};

namespace cpu {
void film_forward(const FilmForward&);
void film_backward(const FilmBackward&);
}  // namespace cpu

// f32, bf16 and f16, with fewer than 2^31 rows and features. Tables and their gradients are of type launch.tables, not
// acc: a conversion would be one more launch. `threads` plays no part.
namespace cuda {

struct FilmTables {
    int64_t gamma_stride;  // elements from task to task; those of gradients lie D apart
    int64_t beta_stride;
};

void film_forward(const FilmForward&, const FilmTables&, const Launch&);
// Bytes of device memory that film_backward uses meanwhile, 16-byte aligned; 0 if no table wants a gradient.
int64_t film_backward_workspace(const FilmBackward&, int device);
void film_backward(const FilmBackward&, const FilmTables&, void* workspace, const Launch&);
}  // namespace cuda

}  // namespace camtl
