// conditional_attention, forward: out = dropout(softmax(scale * q k^T + M_t + mask)) v per sequence and head.
//
// A block has 64 queries of a head, a warp 16 of them; keys and values pass by in tiles, the next one on its way while
// one is used. Scores, bias, maxima and sums (of the softmax, corrected from tile to tile) stay in registers: nothing
// of size S x S leaves the chip. A task's gamma and beta lie in shared memory, the table comes from the first-level
// cache. Blocks of a head run side by side: its keys come from memory once, then from the second-level cache.
// Bytes: q, k, v and out once, 4 per row and head for the log-sum-exp. Flops: 4 S^2 Dh per sequence and head. That is
// S/2 flops a byte in 16 bits, so up to S 256 bytes decide on an H200 (some 180 flops a byte) and an A100 (some 150),
// as they do without a bias. Above, products do, and mma.sync is expected to trail wgmma on Hopper. bf16, Dh 64, sm_80
// and sm_90: 168 registers, no spills, 45 KB of shared memory (12 warps on a multiprocessor); float32: 207 and 200 (8
// warps). Times: not measured.
#include "attention_launch.cuh"

namespace camtl::cuda {
namespace attention {
namespace {

template <class S>
struct Forward {
    Problem problem;
    int tiles;  // of a head
    Rows<const S> q, k, v;
    Rows<S> out;
    float* lse;
};

template <class S, int D>
constexpr int64_t kForwardBytes = Tile<S, D>::bytes(kOwn + 2 * kStages<S, D> * kPassing<S, D>);

template <class S, int D>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 4 ? 2 : 3) attend_kernel(const Forward<S> a) {
    constexpr int kKeys = kPassing<S, D>, N = kKeys / 8;
    const Problem& p = a.problem;
    zero_tail(p, a.out, D);
    for (int64_t r = p.sequences.stop() + int64_t{blockIdx.x}; r < p.sequences.rows; r += gridDim.x) {
        for (int h = static_cast<int>(threadIdx.x); h < p.heads; h += kThreads) {
            a.lse[int64_t{h} * p.sequences.rows + r] = kInfinity;
        }
    }
    const int head = static_cast<int>(blockIdx.x) / a.tiles, i0 = static_cast<int>(blockIdx.x) % a.tiles * kOwn;
    const Place at(p, head);
    if (i0 >= at.n) {
        return;
    }
    const Tile<S, D> queries{reinterpret_cast<S*>(dynamic_shared())};
    const auto keys = [&](int stage) { return queries.rows(kOwn + 2 * kKeys * stage); };
    const auto values = [&](int stage) { return queries.rows(kOwn + 2 * kKeys * stage + kKeys); };
    float* columns = reinterpret_cast<float*>(dynamic_shared() + kForwardBytes<S, D>);
    const S *q = at.in(a.q), *k = at.in(a.k), *v = at.in(a.v);
    const auto fetch_keys = [&](int t) {
        fetch(keys(t % kStages<S, D>), k, a.k, t * kKeys, kKeys, at.n);
        fetch(values(t % kStages<S, D>), v, a.v, t * kKeys, kKeys, at.n);
        copies_end();
    };
    fetch(queries, q, a.q, i0, kOwn, at.n);
    fetch_keys(0);
    fetch_columns<S>(p, at.task, columns);

    const int lane = lane_of_warp(), first = static_cast<int>(threadIdx.x) / 32 * 16;  // of the warp's rows
    const int row = i0 + first + lane / 4;
    const Blocks blocks(row, at.n, p.width);
    float largest[2] = {-kInfinity, -kInfinity}, total[2] = {0.0f, 0.0f};
    float out[D / 8][4];
    clear(out);
    const int steps = (at.n + kKeys - 1) / kKeys;
    for (int t = 0; t < steps; ++t) {
        const int j0 = t * kKeys, column = j0 + 2 * (lane % 4);
        wait_for_copies();
        __syncthreads();
        if (kStages<S, D> > 1 && t + 1 < steps) {
            fetch_keys(t + 1);
        }
        float s[N][4];
        clear(s);
        add_rows_by_rows<false>(s, queries.rows(first), keys(t % kStages<S, D>));
        add_bias<false, S>(p, at, columns, blocks, s, row, column, meet(i0 + first, 16, j0, kKeys, at.n, p.width));
        const Known<kKeys> known(p, at, j0);
        float high[2] = {largest[0], largest[1]};
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                s[n][e] = known.has(n, 2 * (lane % 4) + e % 2) ? s[n][e] : -kInfinity;
                high[e / 2] = s[n][e] > high[e / 2] ? s[n][e] : high[e / 2];
            }
        }
        const Drops drops(p, at);  // here: kept from tile to tile, it would take registers
        float base[2], fade[2], sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            high[r] = fmaxf(high[r], __shfl_xor_sync(0xffffffffu, high[r], 1));
            high[r] = fmaxf(high[r], __shfl_xor_sync(0xffffffffu, high[r], 2));
            base[r] = high[r] == -kInfinity ? 0.0f : high[r];  // no key so far
            fade[r] = exp2f(largest[r] - base[r]);
            largest[r] = high[r];
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const unsigned kept = drops.on ? drops.kept<false>(row, column + 8 * n) : 15u;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float share = exp2f(s[n][e] - base[e / 2]);
                sum[e / 2] += share;
                s[n][e] = (kept >> e & 1) != 0 ? share : 0.0f;
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            total[r] = fmaf(total[r], fade[r], sum[r]);
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                out[n][e] *= fade[e / 2];
            }
        }
        add_sums_by_rows<S>(out, s, values(t % kStages<S, D>));
        if (kStages<S, D> == 1 && t + 1 < steps) {
            __syncthreads();
            fetch_keys(t + 1);
        }
    }
    float grow[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        total[r] = sum_of_four(total[r]);
        grow[r] = total[r] == 0.0f ? 0.0f : p.dropout.grow / total[r];
        if (lane % 4 == 0 && row + 8 * r < at.n) {
            a.lse[at.first + row + 8 * r] = total[r] == 0.0f ? kInfinity : largest[r] + log2f(total[r]);
        }
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            out[n][e] = grow[e / 2] == 0.0f ? 0.0f : out[n][e] * grow[e / 2];
        }
    }
    store_sums(at.in(a.out), a.out, out, 1.0f, row, at.n);
}

}  // namespace
}  // namespace attention

void conditional_attention_forward(const ConditionalAttentionForward& a, const Launch& where) {
    using namespace attention;
    const AttentionShape& s = a.shape;
    const Problem p = problem_of(s, where);
    with_kind(s, where, [&](auto storage, auto size) {
        using S = decltype(storage);
        constexpr int D = decltype(size)::value;
        const int64_t tiles = divide_up(s.length, kOwn), blocks = s.layout.batch * s.heads * tiles;
        if (blocks == 0) {
            return;
        }
        const bool packed = s.layout.cu_seqlens != nullptr;
        const AttentionTensor out{a.out, packed ? 0 : s.length * s.heads * D, s.heads * D, D};
        const Forward<S> f{p,
                           static_cast<int>(tiles),
                           rows_of<const S>(a.q),
                           rows_of<const S>(a.k),
                           rows_of<const S>(a.v),
                           rows_of<S>(out),
                           static_cast<float*>(a.lse)};
        launch_with(kForwardBytes<S, D> + column_bytes(p), attend_kernel<S, D>, dim3(static_cast<unsigned>(blocks)),
                    dim3(kThreads), where, f);
    });
}

}  // namespace camtl::cuda
