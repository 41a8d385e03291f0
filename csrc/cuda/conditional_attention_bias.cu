// conditional_attention, backward: the gradients of table, gamma and beta.
//
//   G[b, i, c] = sum over heads of dS[b, h, i, (i / w) w + c]
//   dtable[i, c] = sum_b (1 + gamma_t[c]) G
//   dgamma_t[c] = sum over b of t, i of table[i, c] G    dbeta_t[c] = ... of G
//
// and dtable_t = sum over b of t of G where each task has a table. First G summed per task and chunk of neighbouring
// sequences, each in order (as many chunks as fill the device, within 32 MB): of what queries_kernel stored per head
// (w <= 64: 4 H w bytes per row), or (band_kernel) with dS found anew on the tiles that meet a diagonal block, a block
// per tile with the sums in registers, from q, k, v, dout, lse and delta. Then chunks are added in order. No atomics.
// Flops of the band: 4 (w + 128) Dh per row and head at most; bytes: q, k, v and dout once more, from the second-level
// cache where several tiles need them. bf16, Dh 64, sm_80 and sm_90: 219 and 218 registers, no spills, 72 KB of shared
// memory (8 warps on a multiprocessor). Times: not measured.
#include "attention_gradients.cuh"

namespace camtl::cuda {
namespace attention {
namespace {

// The band's tiles: those of the next head are on their way while one is worked on, where there is room for both.
template <class S, int D>
constexpr int kBandRows = 2 * kOwn + 2 * kPassing<S, D>;
template <class S, int D>
constexpr int kBandStages = sizeof(S) * D > 128 ? 1 : 2;
template <class S, int D>
constexpr int64_t kBandBytes = Tile<S, D>::bytes(kBandStages<S, D> * kBandRows<S, D>);

// Whether position i has a column c: the last block may be cut off by the end.
__device__ __forceinline__ bool has_entry(int i, int c, int width, int end) {
    return i < end && i / width * width + c < end;
}

__device__ __forceinline__ int end_of_chunk(const Problem& p, const Chunks& chunks, int chunk) {
    const int end = (chunk + 1) * chunks.each;
    return end < p.sequences.batch ? end : p.sequences.batch;
}

// Where a task's sums of a chunk begin.
__device__ __forceinline__ int64_t sums_at(const Problem& p, const Chunks& chunks, int chunk, int task) {
    return (int64_t{chunk} * chunks.tasks + task) * p.longest * p.width;
}

// Grid (entries, chunks, tasks).
__global__ void __launch_bounds__(kThreads)
    stored_kernel(const Problem p, const float* __restrict__ partial, const Chunks chunks) {
    const int chunk = static_cast<int>(blockIdx.y), task = static_cast<int>(blockIdx.z);
    const int64_t e = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (e >= int64_t{p.longest} * p.width) {
        return;
    }
    const int i = static_cast<int>(e / p.width), c = static_cast<int>(e % p.width);
    const int64_t step = (p.sequences.cu_seqlens == nullptr ? int64_t{p.longest} : p.sequences.rows) * p.width;
    float sum = 0.0f;
    for (int b = chunk * chunks.each; b < end_of_chunk(p, chunks, chunk); ++b) {
        const Place at(p, b * p.heads);
        if (at.task == task && has_entry(i, c, p.width, at.n)) {
            const float* from = partial + at.first * p.width + e;
#pragma unroll 4
            for (int h = 0; h < p.heads; ++h) {
                sum += from[h * step];
            }
        }
    }
    chunks.sums[sums_at(p, chunks, chunk, task) + e] = sum;
}

// Grid (row tiles * column tiles of a row tile, chunks, tasks).
template <class S, int D>
__global__ void __launch_bounds__(kThreads, 1) band_kernel(const Backward<S> a, const Chunks chunks, int column_tiles) {
    constexpr int kKeys = kPassing<S, D>, N = kKeys / 8;
    const Problem& p = a.problem;
    const int i0 = static_cast<int>(blockIdx.x) / column_tiles * kOwn;
    const int begin = i0 / p.width * p.width;  // where the first row's block does
    const int j0 = (begin / kKeys + static_cast<int>(blockIdx.x) % column_tiles) * kKeys;
    if (i0 >= p.longest || j0 >= p.longest || meet(i0, kOwn, j0, kKeys, p.longest, p.width) == Meeting::kNone) {
        return;
    }
    const int chunk = static_cast<int>(blockIdx.y), task = static_cast<int>(blockIdx.z);
    const Tile<S, D> tiles{reinterpret_cast<S*>(dynamic_shared())};
    float* columns = reinterpret_cast<float*>(dynamic_shared() + kBandBytes<S, D>);
    const int end = end_of_chunk(p, chunks, chunk) * p.heads;
    // the first head from this one on whose sequence is of the task and reaches the tile
    const auto seek = [&](int head) {
        while (head < end) {
            const Place at(p, head);
            if (at.task == task && i0 < at.n && j0 < at.n) {
                return head;
            }
            head = (at.b + 1) * p.heads;
        }
        return end;
    };
    const auto fetch_head = [&](int head, int stage) {
        const Place at(p, head);
        const Tile<S, D> to = tiles.rows(stage * kBandRows<S, D>);
        fetch(to, at.in(a.q), a.q, i0, kOwn, at.n);
        fetch(to.rows(kOwn), at.in(a.dout), a.dout, i0, kOwn, at.n);
        fetch(to.rows(2 * kOwn), at.in(a.k), a.k, j0, kKeys, at.n);
        fetch(to.rows(2 * kOwn + kKeys), at.in(a.v), a.v, j0, kKeys, at.n);
        copies_end();
    };
    fetch_columns<S>(p, task, columns);
    const int lane = lane_of_warp(), first = static_cast<int>(threadIdx.x) / 32 * 16;
    const int row = i0 + first + lane / 4, column = j0 + 2 * (lane % 4);
    const bool idle = meet(i0 + first, 16, j0, kKeys, p.longest, p.width) == Meeting::kNone;
    float G[N][4];
    clear(G);
    int head = seek(chunk * chunks.each * p.heads), stage = 0;
    if (head < end) {
        fetch_head(head, 0);
    }
    while (head < end) {
        const Place at(p, head);
        const int next = seek(head + 1);
        wait_for_copies();
        __syncthreads();
        if (kBandStages<S, D> > 1 && next < end) {
            fetch_head(next, 1 - stage);
        }
        if (!idle) {
            const Tile<S, D> queries = tiles.rows(stage * kBandRows<S, D>), slopes = queries.rows(kOwn);
            const Tile<S, D> keys = slopes.rows(kOwn), values = keys.rows(kKeys);
            const Blocks blocks(row, at.n, p.width);
            const Drops drops(p, at);
            const Known<kKeys> known(p, at, j0);
            float lse[2], delta[2], mend[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const bool there = row + 8 * r < at.n;
                const int64_t i = at.first + row + 8 * r;
                lse[r] = there ? a.lse[i] : kInfinity;
                delta[r] = there ? a.delta[i] : 0.0f;
                mend[r] = there ? a.mend[i] : 1.0f;
            }
            float P[N][4], dP[N][4];
            probabilities<false>(
                p, at, columns, drops, blocks, queries.rows(first), keys, P, row, column,
                meet(i0 + first, 16, j0, kKeys, at.n, p.width), [&](int, int e) { return lse[e / 2]; },
                [&](int n, int e) { return known.has(n, 2 * (lane % 4) + e % 2); });
            clear(dP);
            add_rows_by_rows<false>(dP, slopes.rows(first), values);
            undrop(P, dP);
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float dS = P[n][e] * (dP[n][e] - delta[e / 2]);
                    if constexpr (sizeof(S) == 4) {
                        dS *= mend[e / 2];
                    }
                    G[n][e] += dS;
                }
            }
        }
        if (kBandStages<S, D> == 1 && next < end) {
            __syncthreads();
            fetch_head(next, 0);
        }
        head = next;
        stage = kBandStages<S, D> - 1 - stage;
    }
    const Blocks entries(row, p.longest, p.width);
    float* to = chunks.sums + sums_at(p, chunks, chunk, task);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int j = column + 8 * n + e % 2;
            if (entries.has(e / 2, j)) {
                to[int64_t{row + e / 2 * 8} * p.width + j - entries.low[e / 2]] = G[n][e];
            }
        }
    }
}

// A task's sum over chunks, in order.
__device__ __forceinline__ float over_chunks(const Problem& p, const Chunks& chunks, int task, int64_t e) {
    const int64_t step = sums_at(p, chunks, 1, 0);
    const float* from = chunks.sums + sums_at(p, chunks, 0, task) + e;
    float sum = 0.0f;
#pragma unroll 4
    for (int chunk = 0; chunk < chunks.count; ++chunk) {
        sum += from[chunk * step];
    }
    return sum;
}

// Grid (entries [L, w], tables).
template <class P>
__global__ void __launch_bounds__(kThreads)
    table_gradient_kernel(const Problem p, const Chunks chunks, int64_t entries, P* dtable) {
    const int64_t e = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (e >= entries) {
        return;
    }
    const int64_t i = e / p.width;
    const int c = static_cast<int>(e % p.width);
    float sum = 0.0f;
    if (i < p.longest && has_entry(static_cast<int>(i), c, p.width, p.longest)) {
        if (p.gamma == nullptr) {
            sum = over_chunks(p, chunks, static_cast<int>(blockIdx.y), e);
        } else {
            for (int task = 0; task < chunks.tasks; ++task) {
                const float growth = 1.0f + read_table<P>(p, p.gamma, int64_t{task} * p.width + c);
                sum = fmaf(growth, over_chunks(p, chunks, task, e), sum);
            }
        }
    }
    dtable[blockIdx.y * entries + e] = narrow<P>(sum * p.dropout.grow);
}

constexpr int kColumns = 32, kLanes = 16;

// Grid (columns, tasks), block (kColumns, kLanes): the sums over rows, in double.
template <class P>
__global__ void __launch_bounds__(kColumns* kLanes)
    column_gradients_kernel(const Problem p, const Chunks chunks, P* dgamma, P* dbeta) {
    __shared__ double parts[2][kLanes][kColumns];
    const int column = static_cast<int>(threadIdx.x), lane = static_cast<int>(threadIdx.y);
    const int c = static_cast<int>(blockIdx.x) * kColumns + column, task = static_cast<int>(blockIdx.y);
    double product = 0.0, plain = 0.0;
    for (int i = lane; c < p.width && i < p.longest; i += kLanes) {
        if (has_entry(i, c, p.width, p.longest)) {
            const int64_t e = int64_t{i} * p.width + c;
            const double G = over_chunks(p, chunks, task, e);
            product += G * read_table<P>(p, p.table, e);
            plain += G;
        }
    }
    parts[0][lane][column] = product;
    parts[1][lane][column] = plain;
    for (int half = kLanes / 2; half > 0; half /= 2) {
        __syncthreads();
        if (lane < half) {
            parts[0][lane][column] += parts[0][lane + half][column];
            parts[1][lane][column] += parts[1][lane + half][column];
        }
    }
    if (lane == 0 && c < p.width) {
        const int64_t to = int64_t{task} * p.width + c;
        if (dgamma != nullptr) {
            dgamma[to] = narrow<P>(static_cast<float>(parts[0][0][column]) * p.dropout.grow);
        }
        if (dbeta != nullptr) {
            dbeta[to] = narrow<P>(static_cast<float>(parts[1][0][column]) * p.dropout.grow);
        }
    }
}

dim3 grid_of(int64_t x, const Chunks& chunks) {
    if (chunks.tasks > 65535) {
        throw std::invalid_argument("conditional_attention (cuda): more than 65535 tasks");
    }
    return dim3(static_cast<unsigned>(x), static_cast<unsigned>(chunks.count), static_cast<unsigned>(chunks.tasks));
}

}  // namespace

template <class S, int D>
void sum_wide_bias_gradients(const Backward<S>& a, const Chunks& chunks, const Launch& where) {
    const Problem& p = a.problem;
    constexpr int kKeys = kPassing<S, D>;
    int most = 0;  // column tiles that a row tile's blocks meet
    for (int i = 0; i < p.longest; i += kOwn) {
        const int begin = i / p.width * p.width, last = (i + kOwn - 1) / p.width * p.width + p.width;
        const int end = last < p.longest ? last : p.longest, count = (end + kKeys - 1) / kKeys - begin / kKeys;
        most = count > most ? count : most;
    }
    launch_with(kBandBytes<S, D> + column_bytes(p), band_kernel<S, D>,
                grid_of(divide_up(p.longest, kOwn) * most, chunks), dim3(kThreads), where, a, chunks, most);
}

#define CAMTL_BAND(S)                                                                               \
    template void sum_wide_bias_gradients<S, 32>(const Backward<S>&, const Chunks&, const Launch&); \
    template void sum_wide_bias_gradients<S, 64>(const Backward<S>&, const Chunks&, const Launch&); \
    template void sum_wide_bias_gradients<S, 128>(const Backward<S>&, const Chunks&, const Launch&)
CAMTL_BAND(float);
CAMTL_BAND(bf16);
CAMTL_BAND(f16);
#undef CAMTL_BAND

void sum_stored_bias_gradients(const Problem& p, const float* partial, const Chunks& chunks, const Launch& where) {
    if (chunks.count > 0 && p.longest > 0) {
        launch(kOp, stored_kernel, grid_of(divide_up(int64_t{p.longest} * p.width, kThreads), chunks), dim3(kThreads),
               where, p, partial, chunks);
    }
}

void finish_bias_gradients(const ConditionalAttentionBackward& a, const Problem& p, const Chunks& chunks,
                           const Launch& where) {
    const auto run = [&](auto kind) {
        using P = decltype(kind);
        const int64_t entries = a.shape.table_rows * a.shape.width;
        const unsigned tasks = static_cast<unsigned>(chunks.tasks), tables = a.shape.table_per_task ? tasks : 1;
        if (a.dtable != nullptr) {
            launch(kOp, table_gradient_kernel<P>, dim3(static_cast<unsigned>(divide_up(entries, kThreads)), tables),
                   dim3(kThreads), where, p, chunks, entries, static_cast<P*>(a.dtable));
        }
        if (a.dgamma != nullptr || a.dbeta != nullptr) {
            launch(kOp, column_gradients_kernel<P>, dim3(static_cast<unsigned>(divide_up(p.width, kColumns)), tasks),
                   dim3(kColumns, kLanes), where, p, chunks, static_cast<P*>(a.dgamma), static_cast<P*>(a.dbeta));
        }
    };
    where.tables == DType::f32 ? run(float{}) : where.tables == DType::bf16 ? run(bf16{}) : run(f16{});
}

}  // namespace attention
}  // namespace camtl::cuda
