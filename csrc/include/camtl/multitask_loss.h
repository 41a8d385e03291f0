// multitask_loss: for each sample its own task's logits, loss and normalised entropy, from one stacked head
// matrix. Task t owns rows [first[t], first[t] + sizes[t]) of it.
#pragma once

#include "camtl/common.h"

namespace camtl {

enum class LossType : int { ce = 0, mse = 1, bce = 2 };

struct MultitaskHeads {
    DType dtype;
    int64_t batch;               // B
    int64_t features;            // D
    int64_t tasks;               // T
    int64_t max_size;            // C_max
    const int64_t* sizes;        // [T]
    const int64_t* loss_types;   // [T], LossType
    const int64_t* task_ids;     // [B]
    const void* x;               // [B, D], dtype
    int64_t x_stride;
    const void* weight;          // [sum of sizes, D], acc, contiguous
    const double* labels;        // [B, label_columns] or null: no loss
    int64_t label_columns;       // 1, or C_max
    int threads;
};

struct MultitaskLossForward {
    MultitaskHeads heads;
    const void* bias;            // [sum of sizes], acc
    void* loss;                  // [T], acc: mean over the task's samples; 0 where it has none, or without labels
    void* logits;                // [B, C_max], dtype; -inf beyond the task's own classes
    void* entropy;               // [B], acc
    void* z;                     // [B, C_max], acc: the logits unrounded, 0 beyond the own classes
};

struct MultitaskLossBackward {
    MultitaskHeads heads;
    const void* z;               // as written by the forward call
    const void* dloss;           // [T], acc; or null: 0
    const void* dlogits;         // [B, C_max], dtype, contiguous; or null. Read in the own classes only
    const void* dentropy;        // [B], acc; or null
    void* dx;                    // [B, D], dtype, contiguous; or null: not wanted
    void* dweight;               // [sum of sizes, D], acc; or null
    void* dbias;                 // [sum of sizes], acc; or null
};

namespace cpu {
void multitask_loss_forward(const MultitaskLossForward&);
void multitask_loss_backward(const MultitaskLossBackward&);
}  // namespace cpu

}  // namespace camtl
