// What conditional_attention's backward kernels share, and how their work goes from file to file.
#pragma once

#include "attention_launch.cuh"

namespace camtl::cuda::attention {

// The widest blocks whose gradients are stored per head by the kernel that finds dq.
constexpr int kNarrowWidth = 64;

template <class S>
struct Backward {
    Problem problem;
    int tiles;  // of a head
    Rows<const S> q, k, v, dout;
    Rows<S> dq, dk, dv;  // data null: not wanted
    const float* lse;
    float *delta, *mend;  // as lse: sum of P dP, and what makes the sum of P 1 (1 but for the rounding of lse)
    float* partial;       // dS on the diagonal blocks: [B, H, S, w], packed [H, N, w]; null: not stored
};

// Sums of the bias gradient G over a chunk's sequences of a task: [chunks, tasks, S, w], without dropout's factor.
struct Chunks {
    int count, each, tasks;
    float* sums;
};

// The workspace: its parts in this order, each at a multiple of 16 bytes.
struct Plan {
    int64_t delta = 0, mend = 0, partial = 0, sums = 0, bytes = 0;  // where they begin
    bool summed = false, stored = false;  // G is wanted; per head, by the main kernel
    Chunks chunks{};
};

inline Plan plan(const AttentionShape& s, bool bias_gradients, int processors) {
    Plan p;
    const bool packed = s.layout.cu_seqlens != nullptr;
    const int64_t rows = (packed ? s.layout.rows : s.layout.batch * s.length) * s.heads;
    const auto take = [&](int64_t floats) {
        const int64_t begin = p.bytes;
        p.bytes += divide_up(floats * int64_t{sizeof(float)}, 16) * 16;
        return begin;
    };
    p.delta = take(rows);
    p.mend = take(rows);
    p.summed = bias_gradients && s.table != nullptr && s.layout.tasks > 0;
    if (p.summed) {
        p.stored = s.width <= kNarrowWidth;
        p.partial = take(p.stored ? rows * s.width : 0);
        // as many chunks as fill the device, within 32 MB
        const int64_t size = s.layout.tasks * s.length * s.width;
        const int64_t blocks = p.stored ? divide_up(s.length * s.width, kThreads) : divide_up(s.length * s.width, 4096);
        int64_t count = divide_up(4 * int64_t{processors}, blocks > 0 ? blocks : 1);
        const int64_t most = (int64_t{1} << 23) / (size > 0 ? size : 1);
        count = count < most ? count : most;
        count = count < s.layout.batch ? count : s.layout.batch;
        count = count < 1 ? 1 : count;
        const int64_t each = divide_up(s.layout.batch, count);
        p.chunks.count = static_cast<int>(each > 0 ? divide_up(s.layout.batch, each) : 0);
        p.chunks.each = static_cast<int>(each);
        p.chunks.tasks = as_int(s.layout.tasks, kOp, "tasks");
        p.sums = take(p.chunks.count * size);
    }
    return p;
}

// dq, dk, dv and what else the two kernels of longer sequences find, in one; false, and nothing done, where it cannot.
template <class S, int D>
bool backward_of_short(const Backward<S>&, const Launch&);

// The sums of G: from what the main kernel stored, or by products of their own; and from them dtable, dgamma, dbeta.
template <class S, int D>
void sum_wide_bias_gradients(const Backward<S>&, const Chunks&, const Launch&);
void sum_stored_bias_gradients(const Problem&, const float* partial, const Chunks&, const Launch&);
void finish_bias_gradients(const ConditionalAttentionBackward&, const Problem&, const Chunks&, const Launch&);

}  // namespace camtl::cuda::attention
