// conditional_attention, backward, of sequences of any length (conditional_attention_backward_short.cu has those that a
// block holds): dq, dk and dv, and what the gradients of table, gamma and beta are made of
// (conditional_attention_bias.cu). With P as in the forward pass, dropout's Z 0 or 1 and its factor left to the end:
//
//   dP = Z (dout v^T)    delta_i = sum_j P dP    dS = P (dP - delta)
//   dq = scale dS k      dk = scale dS^T q       dv = (P Z)^T dout
//
// queries_kernel: a block has 64 queries of a head; keys pass by twice, for delta, then for dq and the bias gradient.
// keys_kernel: a block has 64 keys; queries pass by, P and dS are found transposed and stay in registers as left
// operands of the products for dv and dk. No sums across blocks: no atomics, the same bits in every run.
// Nine products of 2 S^2 Dh flops per sequence and head, where a backward pass that is given delta and adds dq up with
// atomics has five: products decide, and mma.sync is expected to trail wgmma on Hopper. Bytes: q, k, v, dout and the
// gradients once from memory, the passing tiles from the second-level cache; 12 per row and head; 4 w more where w
// <= 64. bf16, Dh 64, sm_80 and sm_90: 253 and 240 registers (queries), 215 and 208 (keys), no spills; 54 and 36 KB of
// shared memory; 8 warps on a multiprocessor each. Times: not measured.
#include "attention_gradients.cuh"

namespace camtl::cuda {
namespace attention {
namespace {

template <class S, int D>
constexpr int64_t kQueriesBytes = Tile<S, D>::bytes(2 * kOwn + 2 * kStages<S, D> * kPassing<S, D>);
template <class S, int D>
constexpr int64_t kKeysBytes = Tile<S, D>::bytes(2 * kOwn + 2 * kStages<S, D> * kPassingQueries<S, D>);

template <class S, int D>
__global__ void __launch_bounds__(kThreads, 1) queries_kernel(const Backward<S> a) {
    constexpr int kKeys = kPassing<S, D>, N = kKeys / 8;
    const Problem& p = a.problem;
    zero_tail(p, a.dq, D);
    const int head = static_cast<int>(blockIdx.x) / a.tiles, i0 = static_cast<int>(blockIdx.x) % a.tiles * kOwn;
    const Place at(p, head);
    if (i0 >= at.n) {
        return;
    }
    const Tile<S, D> queries{reinterpret_cast<S*>(dynamic_shared())}, slopes = queries.rows(kOwn);
    const auto keys = [&](int stage) { return queries.rows(2 * kOwn + 2 * kKeys * stage); };
    const auto values = [&](int stage) { return queries.rows(2 * kOwn + 2 * kKeys * stage + kKeys); };
    float* columns = reinterpret_cast<float*>(dynamic_shared() + kQueriesBytes<S, D>);
    const S *k = at.in(a.k), *v = at.in(a.v);
    const int steps = (at.n + kKeys - 1) / kKeys;
    const int walk = a.dq.data != nullptr || a.partial != nullptr ? 2 * steps : steps;
    const auto fetch_keys = [&](int t) {
        const int j0 = (t < steps ? t : t - steps) * kKeys;
        fetch(keys(t % kStages<S, D>), k, a.k, j0, kKeys, at.n);
        fetch(values(t % kStages<S, D>), v, a.v, j0, kKeys, at.n);
        copies_end();
    };
    fetch(queries, at.in(a.q), a.q, i0, kOwn, at.n);
    fetch(slopes, at.in(a.dout), a.dout, i0, kOwn, at.n);
    fetch_keys(0);
    fetch_columns<S>(p, at.task, columns);

    const int lane = lane_of_warp(), first = static_cast<int>(threadIdx.x) / 32 * 16;
    const int row = i0 + first + lane / 4;
    const Blocks blocks(row, at.n, p.width);
    const Drops drops(p, at);
    float lse[2], delta[2] = {0.0f, 0.0f}, mend[2] = {0.0f, 0.0f};  // mend: at first the sum of P
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        lse[r] = row + 8 * r < at.n ? a.lse[at.first + row + 8 * r] : kInfinity;
    }
    float dq[D / 8][4];
    clear(dq);
    for (int t = 0; t < walk; ++t) {
        const int j0 = (t < steps ? t : t - steps) * kKeys, column = j0 + 2 * (lane % 4);
        wait_for_copies();
        __syncthreads();
        if (kStages<S, D> > 1 && t + 1 < walk) {
            fetch_keys(t + 1);
        }
        const Meeting meeting = meet(i0 + first, 16, j0, kKeys, at.n, p.width);
        float P[N][4], dP[N][4];
        const Known<kKeys> known(p, at, j0);
        probabilities<false>(
            p, at, columns, drops, blocks, queries.rows(first), keys(t % kStages<S, D>), P, row, column, meeting,
            [&](int, int e) { return lse[e / 2]; }, [&](int n, int e) { return known.has(n, 2 * (lane % 4) + e % 2); });
        clear(dP);
        add_rows_by_rows<false>(dP, slopes.rows(first), values(t % kStages<S, D>));
        undrop(P, dP);
        if (t < steps) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    delta[e / 2] = fmaf(P[n][e], dP[n][e], delta[e / 2]);
                    mend[e / 2] += P[n][e];
                }
            }
            if (t + 1 == steps) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    mend[r] = sum_of_four(mend[r]);
                    mend[r] = mend[r] == 0.0f ? 1.0f : 1.0f / mend[r];  // 0: no key
                    delta[r] = sum_of_four(delta[r]) * mend[r];
                    if (lane % 4 == 0 && row + 8 * r < at.n) {
                        a.delta[at.first + row + 8 * r] = delta[r];
                        a.mend[at.first + row + 8 * r] = mend[r];
                    }
                }
            }
        } else {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    P[n][e] *= dP[n][e] - delta[e / 2];
                    if constexpr (sizeof(S) == 4) {
                        P[n][e] *= mend[e / 2];
                    }
                    if (meeting != Meeting::kNone && a.partial != nullptr &&
                        blocks.has(e / 2, column + 8 * n + e % 2)) {
                        const int64_t i = at.first + row + e / 2 * 8;
                        a.partial[i * p.width + column + 8 * n + e % 2 - blocks.low[e / 2]] = P[n][e];
                    }
                }
            }
            add_sums_by_rows<S>(dq, P, keys(t % kStages<S, D>));
        }
        if (kStages<S, D> == 1 && t + 1 < walk) {
            __syncthreads();
            fetch_keys(t + 1);
        }
    }
    if (a.dq.data != nullptr) {
        store_sums(at.in(a.dq), a.dq, dq, p.scale * p.dropout.grow, row, at.n);
    }
}

// dk and dv, or one of them where registers do not hold both.
template <class S, int D, bool kOfKeys, bool kOfValues>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 4 ? 2 : 1) keys_kernel(const Backward<S> a) {
    constexpr int kQueries = kPassingQueries<S, D>, N = kQueries / 8;
    const Problem& p = a.problem;
    if (kOfKeys) {
        zero_tail(p, a.dk, D);
    }
    if (kOfValues) {
        zero_tail(p, a.dv, D);
    }
    const int head = static_cast<int>(blockIdx.x) / a.tiles, j0 = static_cast<int>(blockIdx.x) % a.tiles * kOwn;
    const Place at(p, head);
    if (j0 >= at.n) {
        return;
    }
    const Tile<S, D> keys{reinterpret_cast<S*>(dynamic_shared())}, values = keys.rows(kOwn);
    const auto queries = [&](int stage) { return keys.rows(2 * kOwn + 2 * kQueries * stage); };
    const auto slopes = [&](int stage) { return keys.rows(2 * kOwn + 2 * kQueries * stage + kQueries); };
    float* columns = reinterpret_cast<float*>(dynamic_shared() + kKeysBytes<S, D>);
    const S *q = at.in(a.q), *dout = at.in(a.dout);
    const int steps = (at.n + kQueries - 1) / kQueries;
    const auto fetch_queries = [&](int t) {
        fetch(queries(t % kStages<S, D>), q, a.q, t * kQueries, kQueries, at.n);
        fetch(slopes(t % kStages<S, D>), dout, a.dout, t * kQueries, kQueries, at.n);
        copies_end();
    };
    fetch(keys, at.in(a.k), a.k, j0, kOwn, at.n);
    fetch(values, at.in(a.v), a.v, j0, kOwn, at.n);
    fetch_queries(0);
    fetch_columns<S>(p, at.task, columns);

    const int lane = lane_of_warp(), first = static_cast<int>(threadIdx.x) / 32 * 16;
    const int row = j0 + first + lane / 4;
    const Blocks blocks(row, at.n, p.width);
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
    for (int t = 0; t < steps; ++t) {
        const int i0 = t * kQueries, column = i0 + 2 * (lane % 4);
        wait_for_copies();
        __syncthreads();
        if (kStages<S, D> > 1 && t + 1 < steps) {
            fetch_queries(t + 1);
        }
        const auto of_query = [&](const float* from, int n, int e, float otherwise) {
            const int i = column + 8 * n + e % 2;
            return i < at.n ? from[at.first + i] : otherwise;
        };
        float P[N][4], dP[N][4];
        probabilities<true>(
            p, at, columns, drops, blocks, keys.rows(first), queries(t % kStages<S, D>), P, row, column,
            meet(j0 + first, 16, i0, kQueries, at.n, p.width),
            [&](int n, int e) { return of_query(a.lse, n, e, kInfinity); }, [&](int, int e) { return known[e / 2]; });
        if constexpr (sizeof(S) == 4) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    P[n][e] *= of_query(a.mend, n, e, 1.0f);
                }
            }
        }
        if (kOfValues && a.dv.data != nullptr) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    dP[n][e] = P[n][e] < 0.0f ? 0.0f : P[n][e];
                }
            }
            add_sums_by_rows<S>(dv, dP, slopes(t % kStages<S, D>));
        }
        if (kOfKeys && a.dk.data != nullptr) {
            clear(dP);
            add_rows_by_rows<true>(dP, values.rows(first), slopes(t % kStages<S, D>));
            undrop(P, dP);
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    P[n][e] *= dP[n][e] - of_query(a.delta, n, e, 0.0f);
                }
            }
            add_sums_by_rows<S>(dk, P, queries(t % kStages<S, D>));
        }
        if (kStages<S, D> == 1 && t + 1 < steps) {
            __syncthreads();
            fetch_queries(t + 1);
        }
    }
    if (kOfKeys && a.dk.data != nullptr) {
        store_sums(at.in(a.dk), a.dk, dk, p.scale * p.dropout.grow, row, at.n);
    }
    if (kOfValues && a.dv.data != nullptr) {
        store_sums(at.in(a.dv), a.dv, dv, p.dropout.grow, row, at.n);
    }
}

}  // namespace
}  // namespace attention

int64_t conditional_attention_backward_workspace(const AttentionShape& shape, bool bias_gradients, int device) {
    return attention::plan(shape, bias_gradients, multiprocessors(device, attention::kOp)).bytes;
}

void conditional_attention_backward(const ConditionalAttentionBackward& a, void* workspace, const Launch& where) {
    using namespace attention;
    const AttentionShape& s = a.shape;
    const Problem p = problem_of(s, where);
    const bool bias = a.dtable != nullptr || a.dgamma != nullptr || a.dbeta != nullptr;
    const Plan plan = attention::plan(s, bias, multiprocessors(where.device, kOp));
    const auto part = [&](int64_t begin) {
        return reinterpret_cast<float*>(static_cast<unsigned char*>(workspace) + begin);
    };
    Chunks chunks = plan.chunks;
    chunks.sums = part(plan.sums);
    with_kind(s, where, [&](auto storage, auto size) {
        using S = decltype(storage);
        constexpr int D = decltype(size)::value;
        const int64_t tiles = divide_up(s.length, kOwn), blocks = s.layout.batch * s.heads * tiles;
        if (blocks == 0) {
            return;
        }
        const Backward<S> b{p,
                            static_cast<int>(tiles),
                            rows_of<const S>(a.q),
                            rows_of<const S>(a.k),
                            rows_of<const S>(a.v),
                            rows_of<const S>(a.dout),
                            rows_of<S>(a.dq),
                            rows_of<S>(a.dk),
                            rows_of<S>(a.dv),
                            static_cast<const float*>(a.lse),
                            part(plan.delta),
                            part(plan.mend),
                            plan.stored ? part(plan.partial) : nullptr};
        bool done = false;
        if constexpr (sizeof(S) == 2) {
            done = backward_of_short<S, D>(b, where);
        }
        if (!done) {
            const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
            launch_with(kQueriesBytes<S, D> + column_bytes(p), queries_kernel<S, D>, grid, block, where, b);
            const int64_t bytes = kKeysBytes<S, D> + column_bytes(p);
            if constexpr (sizeof(S) * D > 256) {
                if (a.dk.data != nullptr) {
                    launch_with(bytes, keys_kernel<S, D, true, false>, grid, block, where, b);
                }
                if (a.dv.data != nullptr) {
                    launch_with(bytes, keys_kernel<S, D, false, true>, grid, block, where, b);
                }
            } else if (a.dk.data != nullptr || a.dv.data != nullptr) {
                launch_with(bytes, keys_kernel<S, D, true, true>, grid, block, where, b);
            }
        }
        if (plan.summed && !plan.stored) {
            sum_wide_bias_gradients<S, D>(b, chunks, where);
        }
    });
    if (plan.summed) {
        if (plan.stored) {
            sum_stored_bias_gradients(p, part(plan.partial), chunks, where);
        }
        finish_bias_gradients(a, p, chunks, where);
    }
}

}  // namespace camtl::cuda
