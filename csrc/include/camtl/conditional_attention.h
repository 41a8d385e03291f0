// conditional_attention, per sequence b and head h:
//   score[i, j] = scale * q_i . k_j + M_t[i, j],  P = softmax(score),  out_i = sum_j dropout(P)[i, j] v_j
//   M_t[i, j] = (1 + gamma[t, c]) * table[i, c] + beta[t, c], c = j mod w, if i / w == j / w; else 0
#pragma once

#include "camtl/common.h"
#include "camtl/launch.h"

namespace camtl {

// [.., H, Dh] with unit stride along Dh: strides in elements of sequence (0 when packed), position and head.
struct AttentionTensor {
    const void* data = nullptr;
    int64_t sequence = 0;
    int64_t position = 0;
    int64_t head = 0;
};

struct AttentionShape {
    DType dtype;
    Layout layout;             // padded: rows_per_sequence = S; packed: rows = N
    int64_t heads;             // H
    int64_t head_size;         // Dh
    int64_t length;            // S: the padded length, or the longest packed one; numbers the dropout's elements
    const void* table;         // [L, w] acc; [tasks, L, w] if table_per_task; null: plain attention
    bool table_per_task;
    int64_t table_rows;        // L
    int64_t width;             // w
    const void* gamma;         // [tasks, w] acc, null if table_per_task
    const void* beta;
    const uint8_t* mask;       // [B, S], not 0 = this key may be attended to; null: all. Padded form only
    double scale;
    Dropout dropout;           // (b, h, i, j) is number ((b * H + h) * S + i) * S + j
    int threads;
};

struct ConditionalAttentionForward {
    AttentionShape shape;
    AttentionTensor q, k, v;
    void* out;                 // [B, S, H, Dh] or [N, H, Dh], dtype, contiguous; rows of no sequence become 0
    void* lse;                 // log-sum-exp of each row's scores, acc: [B, H, S], or [H, N] when packed;
                               // +inf where all keys are hidden, and in rows of no sequence
};

struct ConditionalAttentionBackward {
    AttentionShape shape;
    AttentionTensor q, k, v;
    AttentionTensor dout;
    const void* lse;           // as written by the forward call
    AttentionTensor dq, dk, dv;  // dtype, written: data is not const here; null: not wanted. Rows of no sequence
                                 // become 0
    void* dtable;              // shape of table, acc; or null: not wanted
    void* dgamma;              // [tasks, w], acc; or null
    void* dbeta;               // [tasks, w], acc; or null
};

namespace cpu {
void conditional_attention_forward(const ConditionalAttentionForward&);
void conditional_attention_backward(const ConditionalAttentionBackward&);
}  // namespace cpu

// f32, bf16 and f16; Dh 32, 64 or 128. Tables and their gradients are contiguous and of type launch.tables, not acc:
// a conversion would be one more launch. lse is in base 2. `threads` plays no part; sequences longer than `length` are
// cut off.
namespace cuda {
void conditional_attention_forward(const ConditionalAttentionForward&, const Launch&);
// Bytes of device memory that conditional_attention_backward uses meanwhile, 16-byte aligned. `bias_gradients`: that of
// the table, of gamma or of beta is wanted.
int64_t conditional_attention_backward_workspace(const AttentionShape&, bool bias_gradients, int device);
void conditional_attention_backward(const ConditionalAttentionBackward&, void* workspace, const Launch&);
}  // namespace cuda

}  // namespace camtl
