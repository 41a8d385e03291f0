// conditional_attention, backward, of short sequences in 16 bits: dq, dk and dv of a head in one pass.
//
// A block has all keys of a head, up to 128 (or 256, where Dh <= 64), a warp 16 of them; k and v stay in shared memory,
// dk and dv in registers, and queries pass by in tiles of 32 (or 16). A tile has all it needs for its delta, which the
// warps add up in their order through shared memory, and its dq is finished at once: dS goes to shared memory, from
// where each warp takes the product with k for a part of the columns. Five products of 2 S^2 Dh flops per sequence and
// head. Bytes: q, k, v, dout and the three gradients once, 14 Dh per row and head, and 12 beside; 4 w more where w
// <= 64. That is 5 S / 7 flops a byte: up to S 256 bytes decide, or nearly. mma.sync is expected to trail wgmma on
// Hopper. bf16, Dh 64, sm_80 and sm_90, S 128: 209 and 217 registers, 65 KB of shared memory (8 warps on a
// multiprocessor); S 256: 128 registers, 94 KB (16 warps); no spills. Times: not measured.
#include "attention_gradients.cuh"

namespace camtl::cuda {
namespace attention {
namespace {

// Queries that pass by at a time, of a block of up to `kMost` warps.
template <int D, int kMost>
constexpr int kShortQueries = D > 64 || kMost > 8 ? 16 : 32;

template <class S, int D, int kMost>
__host__ __device__ constexpr int64_t short_bytes(int warps) {
    constexpr int kQueries = kShortQueries<D, kMost>;
    return Tile<S, D>::bytes(2 * 16 * warps + 4 * kQueries) + Tile<S, 16 * kMost>::bytes(kQueries);
}

template <class S, int D, int kMost>
__global__ void __launch_bounds__(32 * kMost, 1) short_kernel(const Backward<S> a) {
    constexpr int kQueries = kShortQueries<D, kMost>, N = kQueries / 8;
    static_assert(short_bytes<S, D, kMost>(kMost) + 8 * 16 * kMost + 4096 <= 99 * 1024,
                  "tiles, columns and the variables below fit a multiprocessor of every architecture");
    __shared__ float parts[2][kMost][kQueries];  // of delta and mass, by warp
    __shared__ float deltas[kQueries];
    __shared__ int begins[16 * kMost];  // of each position's block: kept by threads, they would take registers
    const Problem& p = a.problem;
    zero_tail(p, a.dq, D);
    zero_tail(p, a.dk, D);
    zero_tail(p, a.dv, D);
    const Place at(p, static_cast<int>(blockIdx.x));
    if (at.n == 0) {
        return;
    }
    const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / 32, warp = thread / 32;
    const int lane = lane_of_warp(), first = 16 * warp;
    const Tile<S, D> keys{reinterpret_cast<S*>(dynamic_shared())}, values = keys.rows(16 * warps);
    const Tile<S, D> passing = values.rows(16 * warps);
    const auto queries = [&](int t) { return passing.rows(t % 2 * 2 * kQueries); };
    const auto slopes = [&](int t) { return passing.rows(t % 2 * 2 * kQueries + kQueries); };
    const Tile<S, 16 * kMost> gradients{passing.rows(4 * kQueries).data};  // dS: queries by keys
    float* columns = reinterpret_cast<float*>(dynamic_shared() + short_bytes<S, D, kMost>(warps));
    const S *q = at.in(a.q), *dout = at.in(a.dout);
    const auto fetch_queries = [&](int t) {
        fetch(queries(t), q, a.q, t * kQueries, kQueries, at.n);
        fetch(slopes(t), dout, a.dout, t * kQueries, kQueries, at.n);
        copies_end();
    };
    fetch(keys, at.in(a.k), a.k, 0, 16 * warps, at.n);
    fetch(values, at.in(a.v), a.v, 0, 16 * warps, at.n);
    fetch_queries(0);
    fetch_columns<S>(p, at.task, columns);
    if (thread < 16 * warps) {
        begins[thread] = p.width > 0 ? thread / p.width * p.width : 0;
    }

    const int row = first + lane / 4;
    const bool busy = first < at.n;  // else the warp has no keys, and comes to the barriers only
    const Drops drops(p, at);
    bool known[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int j = row + 8 * r;
        known[r] = j < at.n && (p.mask == nullptr || p.mask[int64_t{at.b} * p.longest + j] != 0);
    }
    float dk[D / 8][4], dv[D / 8][4];
    clear(dk);
    clear(dv);
    const int steps = (at.n + kQueries - 1) / kQueries, depth = (at.n + 15) / 16;
    for (int t = 0; t < steps; ++t) {
        const int i0 = t * kQueries, column = i0 + 2 * (lane % 4);
        const Meeting meeting = meet(first, 16, i0, kQueries, at.n, p.width);
        wait_for_copies();
        __syncthreads();
        if (t + 1 < steps) {
            fetch_queries(t + 1);
        }
        float P[N][4], dP[N][4];
        if (busy) {
            const Blocks blocks(row, at.n, p.width, begins);
            probabilities<true>(
                p, at, columns, drops, blocks, keys.rows(first), queries(t), P, row, column, meeting,
                [&](int n, int e) {
                    const int i = column + 8 * n + e % 2;
                    return i < at.n ? a.lse[at.first + i] : kInfinity;
                },
                [&](int, int e) { return known[e / 2]; });
            if (a.dv.data != nullptr) {
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        dP[n][e] = P[n][e] < 0.0f ? 0.0f : P[n][e];
                    }
                }
                add_sums_by_rows<S>(dv, dP, slopes(t));
            }
            clear(dP);
            add_rows_by_rows<true>(dP, values.rows(first), slopes(t));
            undrop(P, dP);
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    float delta = fmaf(P[n][x], dP[n][x], P[n][x + 2] * dP[n][x + 2]), mass = P[n][x] + P[n][x + 2];
#pragma unroll
                    for (int lanes = 4; lanes < 32; lanes *= 2) {
                        delta += __shfl_xor_sync(0xffffffffu, delta, lanes);
                        mass += __shfl_xor_sync(0xffffffffu, mass, lanes);
                    }
                    if (lane < 4) {
                        parts[0][warp][8 * n + 2 * lane + x] = delta;
                        parts[1][warp][8 * n + 2 * lane + x] = mass;
                    }
                }
            }
        }
        __syncthreads();
        if (thread < kQueries) {
            float delta = 0.0f, mass = 0.0f;
            for (int w = 0; w < depth; ++w) {
                delta += parts[0][w][thread];
                mass += parts[1][w][thread];
            }
            const float mend = mass == 0.0f ? 1.0f : 1.0f / mass;  // 0: no key
            deltas[thread] = delta * mend;
            if (i0 + thread < at.n) {
                a.delta[at.first + i0 + thread] = delta * mend;
                a.mend[at.first + i0 + thread] = mend;
            }
        }
        __syncthreads();
        if (busy) {
            const Blocks blocks(row, at.n, p.width, begins);
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int i = 8 * n + 2 * (lane % 4) + e % 2, r = e / 2;
                    P[n][e] *= dP[n][e] - deltas[i];
                    *gradients.at(i, row + 8 * r) = narrow<S>(P[n][e]);
                    if (meeting != Meeting::kNone && a.partial != nullptr && blocks.has(r, i0 + i)) {
                        a.partial[(at.first + i0 + i) * p.width + row + 8 * r - blocks.low[r]] = P[n][e];
                    }
                }
            }
            if (a.dk.data != nullptr) {
                add_sums_by_rows<S>(dk, P, queries(t));
            }
        }
        __syncthreads();
        if (a.dq.data != nullptr) {
            constexpr int kPairs = D / 16, kUnits = kQueries / 16 * kPairs;
            // in turn, so that no warp has more of them than others
            for (int unit = (warp + t * kUnits) % warps; unit < kUnits; unit += warps) {
                const int top = unit / kPairs * 16, n = unit % kPairs * 16;
                float dq[2][4];
                clear(dq);
                for (int k = 0; k < depth; ++k) {
                    Left<S> left;
                    Right<S> right[2];
                    gradients.rows(top).left(left, 16 * k);
                    keys.template right<false>(right, 16 * k, n);
                    multiply(dq[0], left, right[0]);
                    multiply(dq[1], left, right[1]);
                }
                store_sums(at.in(a.dq) + n, a.dq, dq, p.scale * p.dropout.grow, i0 + top + lane / 4, at.n);
            }
        }
    }
    if (busy && a.dk.data != nullptr) {
        store_sums(at.in(a.dk), a.dk, dk, p.scale * p.dropout.grow, row, at.n);
    }
    if (busy && a.dv.data != nullptr) {
        store_sums(at.in(a.dv), a.dv, dv, p.dropout.grow, row, at.n);
    }
}

}  // namespace

template <class S, int D>
bool backward_of_short(const Backward<S>& a, const Launch& where) {
    const Problem& p = a.problem;
    const int warps = static_cast<int>(divide_up(p.longest, 16));
    const dim3 grid(static_cast<unsigned>(p.sequences.batch) * static_cast<unsigned>(p.heads));
    const dim3 block(32 * static_cast<unsigned>(warps));
    if (warps <= 8) {
        launch_with(short_bytes<S, D, 8>(warps) + column_bytes(p), short_kernel<S, D, 8>, grid, block, where, a);
        return true;
    }
    if constexpr (D <= 64) {
        if (warps <= 16) {
            launch_with(short_bytes<S, D, 16>(warps) + column_bytes(p), short_kernel<S, D, 16>, grid, block, where, a);
            return true;
        }
    }
    return false;
}

#define CAMTL_SHORT(S)                                                         \
    template bool backward_of_short<S, 32>(const Backward<S>&, const Launch&); \
    template bool backward_of_short<S, 64>(const Backward<S>&, const Launch&); \
    template bool backward_of_short<S, 128>(const Backward<S>&, const Launch&)
CAMTL_SHORT(bf16);
CAMTL_SHORT(f16);
#undef CAMTL_SHORT

}  // namespace attention
}  // namespace camtl::cuda
