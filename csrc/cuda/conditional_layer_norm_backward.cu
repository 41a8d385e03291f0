// conditional_layer_norm, backward. With g = dy * scale, xhat = (h - mean) * rstd and h as in the forward pass,
//   dh = rstd * (g - mean(g) - xhat * mean(g * xhat)),  dresidual = dh,  dx = dropout'(dh).
//
// Stage 1, a persistent grid: 16 warps per multiprocessor, each block with a run of neighbouring rows. A row has as
// many warps as give each thread 16 bytes (4 columns where such accesses do not fit), a block one to four such teams.
// A thread reads its columns of the next row of dy, x and the residual before it works on this one; sums over a row are
// shuffles and one barrier; the three sums over rows that parameters need, of dy * xhat, dy and dx, stay in registers
// until the sequence ends. Then the block adds its teams' up and stores one float32 partial per kind into a slot
// (partials.cuh). Rows too long for 256 threads' registers take a
// slow way: the sums of further columns are kept in the slot. Stage 2 adds slots up by task, and all of them. No
// atomics: the same bits every time. Bytes per element: dy, x, residual, dx and, with dropout, dresidual once; 8 per
// row; and per kind 12 / (rows per part) for the slots. Flops: 18, and with dropout 12 integer operations.
// bf16, 16-byte accesses, sm_80 and sm_90: 124 registers and 8 KiB of shared memory (16 warps on a multiprocessor), no
// spills. Times: not measured.
#include "layer_norm_sums.cuh"

namespace camtl::cuda {
namespace {

template <class S>
struct Arguments {
    Sequences sequences;
    Runs runs;
    Kinds kinds;
    int packs;
    Sublayer<S> before;
    const S* dy;
    int64_t dy_stride;
    Parameter weight, gamma, beta;
    const float* mean;
    const float* rstd;
    float over_features;  // 1 / D
    S* dx;
    S* dresidual;
    float* partials;  // [slots, kinds, D]
    int* slot_tasks;  // [slots], -1: nothing there
};

// What a thread reads of a row.
template <class S, int V, int kPacks>
struct Raw {
    Pack<S, V> dy[kPacks], x[kPacks], beside[kPacks];
    float mean, rstd;
};

// kBeyond: a row has columns beyond those in its threads' registers.
template <class S, int V, int kPacks, bool kBeyond>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const Arguments<S> a) {
    __shared__ float parts[2][kMaxWarps][2];
    __shared__ float shared[kThreads * kPacks * V];
    const Sequences& sequences = a.sequences;
    const int64_t D = a.before.features;
    const int step = static_cast<int>(blockDim.x), teams = static_cast<int>(blockDim.y);
    const auto pack = [&](int k) { return static_cast<int>(threadIdx.x) + k * step; };
    const bool with_residual = a.before.residual != nullptr;
    const bool inputs = a.dx != nullptr || a.dresidual != nullptr || a.kinds.x >= 0;
    const Keeps keeps(a.before.dropout);
    const int begin = blockIdx.x * a.runs.each;
    const int end = sequences.rows - begin < a.runs.each ? sequences.rows : begin + a.runs.each;
    const int stop = sequences.stop();
    int first = 0, last = 0;
    if (a.runs.by_sequence) {
        const Met met(sequences, begin, end, blockIdx.x == 0, blockIdx.x + 1 == gridDim.x);
        first = met.first;
        last = met.last;
    }
    const bool per_task = a.runs.slots.per_run > 0;
    const int64_t width = a.kinds.count * D;
    // Sets (0) or adds to the columns of a kind beyond those in registers; one team only has such.
    const auto further = [&](float* slot, int kind, int p, const float (&values)[V], bool add) {
        if (slot == nullptr || kind < 0) {
            return;
        }
        float* to = slot + kind * D + int64_t{p} * V;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            to[i] = add ? to[i] + values[i] : 0.0f;
        }
    };
    const auto clear_further = [&](float* slot) {
        for (int p = pack(kPacks); kBeyond && p < a.packs; p += step) {
            const float nothing[V] = {};
            further(slot, a.kinds.scale, p, nothing, false);
            further(slot, a.kinds.shift, p, nothing, false);
            further(slot, a.kinds.x, p, nothing, false);
        }
    };
    Sums<V, kPacks> of_scale = {}, of_shift = {}, of_x = {};
    const auto put_sums = [&](float* slot, bool add) {
        if (a.kinds.scale >= 0) {
            flush<V, kPacks>(slot + a.kinds.scale * D, a.packs, add, of_scale, shared);
        }
        if (a.kinds.shift >= 0) {
            flush<V, kPacks>(slot + a.kinds.shift * D, a.packs, add, of_shift, shared);
        }
        if (a.kinds.x >= 0) {
            flush<V, kPacks>(slot + a.kinds.x * D, a.packs, add, of_x, shared);
        }
    };
    if (a.partials != nullptr && per_task) {
        for (int t = 0; t < sequences.tasks; ++t) {
            float* slot = a.partials + a.runs.slots.at(blockIdx.x, 0, t) * width;
            put_sums(slot, false);
            clear_further(slot);
        }
    }
    float* open = nullptr;  // the slot of the sums in registers
    const auto close = [&]() {
        if (open != nullptr) {
            put_sums(open, per_task);
        } else {  // of a task that is none
            clear<V, kPacks>(of_scale);
            clear<V, kPacks>(of_shift);
            clear<V, kPacks>(of_x);
        }
    };
    float scale[kPacks][V];
    int side = 0;
    for (int s = first; s <= last; ++s) {
        const int low = !a.runs.by_sequence || sequences.begin(s) < begin ? begin : sequences.begin(s);
        int high = a.runs.by_sequence ? sequences.end(s) : stop;
        high = high < end ? high : end;
        const int task = sequences.task(s);
        float* slot = nullptr;  // where this part's sums go
        if (a.partials != nullptr) {
            if (task >= 0) {
                slot = a.partials + a.runs.slots.at(blockIdx.x, s, task) * width;
            }
            if (!per_task) {
                if (a.slot_tasks != nullptr && threadIdx.x == 0 && threadIdx.y == 0) {
                    a.slot_tasks[int64_t{blockIdx.x} + s] = slot_task(sequences, s, begin, end);
                }
                if (low < high || !a.runs.by_sequence) {
                    clear_further(slot);
                }
            }
        }
        if (low >= high && a.runs.by_sequence) {
            continue;
        }
        if (open != slot) {  // (block, task): sums of neighbours with one task go on
            close();
            open = slot;
        }
#pragma unroll
        for (int k = 0; k < kPacks; ++k) {
            if (pack(k) < a.packs) {
                read_scale<S, V>(a.weight, a.gamma, a.beta, task, int64_t{pack(k)} * V, scale[k]);
            }
        }
        Raw<S, V, kPacks> now = {}, next = {};
        const auto fetch = [&](int row, Raw<S, V, kPacks>& raw) {
            if (row < high) {
                raw.mean = a.mean[row];
                raw.rstd = a.rstd[row];
#pragma unroll
                for (int k = 0; k < kPacks; ++k) {
                    if (pack(k) < a.packs) {
                        const int64_t column = int64_t{pack(k)} * V;
                        raw.dy[k] = load_once<V>(a.dy + row * a.dy_stride + column);
                        raw.x[k] = a.before.template load_x<V>(row, column);
                        if (with_residual) {
                            raw.beside[k] = a.before.template load_residual<V>(row, column);
                        }
                    }
                }
            }
        };
        int row = low + static_cast<int>(threadIdx.y);
        fetch(row, next);
        for (int top = low; top < high; top += teams, row += teams) {
            const bool live = row < high;
            now = next;
            fetch(row + teams, next);
            float g[kPacks][V], xhat[kPacks][V], sums[2] = {};
            unsigned kept[kPacks] = {};
#pragma unroll
            for (int k = 0; k < kPacks; ++k) {
                if (live && pack(k) < a.packs) {
                    kept[k] =
                        a.before.template join<V>(row, int64_t{pack(k)} * V, now.x[k], now.beside[k], keeps, xhat[k]);
#pragma unroll
                    for (int i = 0; i < V; ++i) {
                        const float dy = widen(now.dy[k].v[i]);
                        xhat[k][i] = (xhat[k][i] - now.mean) * now.rstd;
                        g[k][i] = dy * scale[k][i];
                        of_shift[k][i] += dy;
                        of_scale[k][i] = fmaf(dy, xhat[k][i], of_scale[k][i]);
                        sums[0] += g[k][i];
                        sums[1] = fmaf(g[k][i], xhat[k][i], sums[1]);
                    }
                }
            }
            // f(pack, dy, g, xhat, kept) for the columns beyond those in registers
            const auto anew = [&](auto&& f) {
                for (int p = pack(kPacks); kBeyond && live && p < a.packs; p += step) {
                    float dy[V], slope[V], normal[V];
                    widen_all<V>(load<V>(a.dy + row * a.dy_stride + int64_t{p} * V), dy);
                    const unsigned mask = a.before.template at<V>(row, int64_t{p} * V, keeps, normal);
                    read_scale<S, V>(a.weight, a.gamma, a.beta, task, int64_t{p} * V, slope);
#pragma unroll
                    for (int i = 0; i < V; ++i) {
                        normal[i] = (normal[i] - now.mean) * now.rstd;
                        slope[i] *= dy[i];
                    }
                    f(p, dy, slope, normal, mask);
                }
            };
            anew([&](int p, float (&dy)[V], float (&slope)[V], float (&normal)[V], unsigned) {
                further(slot, a.kinds.shift, p, dy, true);
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    sums[0] += slope[i];
                    sums[1] = fmaf(slope[i], normal[i], sums[1]);
                    dy[i] *= normal[i];
                }
                further(slot, a.kinds.scale, p, dy, true);
            });
            if (!inputs) {
                continue;
            }
            row_sums<2>(sums, parts[side]);
            side ^= 1;
            const float level = sums[0] * a.over_features, along = sums[1] * a.over_features;
            // dh of one pack: its stores, and what it adds to the sum of dx
            const auto put = [&](int p, const float (&slope)[V], const float (&normal)[V], unsigned mask,
                                 float (&of_dx)[V]) {
                const int64_t at = row * D + int64_t{p} * V;
                Pack<S, V> out;
                float dh[V];
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    dh[i] = (slope[i] - level - normal[i] * along) * now.rstd;
                    out.v[i] = narrow<S>(dh[i]);
                }
                if (a.dresidual != nullptr) {
                    store<V>(a.dresidual + at, out);
                }
                if (a.before.dropout.seed != nullptr) {
#pragma unroll
                    for (int i = 0; i < V; ++i) {
                        dh[i] = (mask >> i & 1) != 0 ? dh[i] * a.before.dropout.grow : 0.0f;
                        out.v[i] = narrow<S>(dh[i]);
                    }
                }
                if (a.dx != nullptr) {
                    store<V>(a.dx + at, out);
                }
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    of_dx[i] += dh[i];
                }
            };
#pragma unroll
            for (int k = 0; k < kPacks; ++k) {
                if (live && pack(k) < a.packs) {
                    put(pack(k), g[k], xhat[k], kept[k], of_x[k]);
                }
            }
            anew([&](int p, float (&)[V], float (&slope)[V], float (&normal)[V], unsigned mask) {
                float of_dx[V] = {};
                put(p, slope, normal, mask, of_dx);
                further(slot, a.kinds.x, p, of_dx, true);
            });
        }
    }
    close();
    // rows of no sequence
    for (int row = (stop > begin ? stop : begin) + static_cast<int>(threadIdx.y); row < end; row += teams) {
        for (int p = threadIdx.x; p < a.packs; p += step) {
            Pack<S, V> zero;
#pragma unroll
            for (int i = 0; i < V; ++i) {
                zero.v[i] = narrow<S>(0.0f);
            }
            if (a.dx != nullptr) {
                store<V>(a.dx + row * D + int64_t{p} * V, zero);
            }
            if (a.dresidual != nullptr) {
                store<V>(a.dresidual + row * D + int64_t{p} * V, zero);
            }
        }
    }
}

template <class S, int V, int kPacks, bool kBeyond>
void run(Arguments<S>& a, int D, const Launch& where) {
    a.packs = D / V;
    const int warps = static_cast<int>(row_warps(a.packs, kPacks));
    launch(kOp, backward_kernel<S, V, kPacks, kBeyond>, dim3(static_cast<unsigned>(a.runs.blocks)),
           dim3(32 * warps, a.runs.teams), where, a);
}

}  // namespace

int64_t conditional_layer_norm_backward_workspace(const ConditionalLayerNormBackward& b, int device) {
    const Kinds kinds(b);
    if (kinds.count == 0) {
        return 0;
    }
    const Runs r = runs(b.layout, b.features, device);
    return slots_workspace(r.slots, kinds.count * b.features);
}

void conditional_layer_norm_backward(const ConditionalLayerNormBackward& b, const NormTables& tables, void* workspace,
                                     const Launch& where) {
    const Sequences rows = sequences(b.layout, where, kOp);
    const int D = as_int(b.features, kOp, "features");
    const Kinds kinds(b);
    with_storage(b.dtype, kOp, [&](auto storage) {
        using S = decltype(storage);
        check(cudaSetDevice(where.device), kOp);
        if (D == 0) {
            return;
        }
        const Runs r = runs(b.layout, b.features, where.device);
        const auto narrow = [&](unsigned bit) { return (tables.narrow & bit) != 0; };
        const Parameter weight{b.weight, 0, narrow(kWeight)}, gamma{b.gamma, tables.gamma_stride, narrow(kGamma)};
        float* partials = kinds.count > 0 ? static_cast<float*>(workspace) : nullptr;
        int* tasks = r.by_sequence ? slot_tasks(r.slots, kinds.count * b.features, partials) : nullptr;
        Arguments<S> a{rows,
                       r,
                       kinds,
                       0,
                       {static_cast<const S*>(b.x), b.x_stride, static_cast<const S*>(b.residual), b.residual_stride,
                        Parameter{b.x_bias, 0, narrow(kXBias)}, dropping(b.dropout), b.features},
                       static_cast<const S*>(b.dy),
                       b.dy_stride,
                       weight,
                       gamma,
                       Parameter{b.beta, tables.beta_stride, narrow(kBeta)},
                       static_cast<const float*>(b.mean),
                       static_cast<const float*>(b.rstd),
                       1.0f / static_cast<float>(D),
                       static_cast<S*>(b.dx),
                       static_cast<S*>(b.dresidual),
                       partials,
                       tasks};
        constexpr int kWide = 16 / sizeof(S);
        const bool wide = D % kWide == 0 && aligned<S>(kWide, b.dy, b.dy_stride) &&
                          aligned<S>(kWide, b.x, b.x_stride) && aligned<S>(kWide, b.residual, b.residual_stride) &&
                          aligned<S>(kWide, b.dx, D) && aligned<S>(kWide, b.dresidual, D) &&
                          aligned<S>(kWide, a.before.x_bias) && aligned<S>(kWide, weight) && aligned<S>(kWide, gamma) &&
                          aligned<S>(kWide, a.beta) && aligned<float>(kWide, partials, D);
        if (rows.rows > 0) {
            constexpr int kSingles = 4;  // columns of a thread that its registers hold
            if (wide && D <= kThreads * kWide) {
                run<S, kWide, 1, false>(a, D, where);
            } else if (D <= kThreads * kSingles) {
                run<S, 1, kSingles, false>(a, D, where);
            } else {
                run<S, 1, 2, true>(a, D, where);
            }
        }
        if (kinds.count > 0) {
            const FinalArguments<S> f{r,
                                      kinds,
                                      r.by_sequence ? rows.tasks : 0,
                                      b.features,
                                      weight,
                                      gamma,
                                      partials,
                                      tasks,
                                      {b.dweight, narrow(kWeight)},
                                      {b.dbias, narrow(kBias)},
                                      {b.dgamma, narrow(kGamma)},
                                      {b.dbeta, narrow(kBeta)},
                                      {b.dbias_shift, narrow(kBiasShift)},
                                      {b.dx_bias, narrow(kXBias)}};
            if (f.tasks >= 65535) {
                throw std::invalid_argument("conditional_layer_norm (cuda): more than 65534 tasks");
            }
            launch(kOp, parameters_kernel<S>,
                   dim3(static_cast<unsigned>(divide_up(D, kSlotColumns)), static_cast<unsigned>(f.tasks + 1),
                        static_cast<unsigned>(kinds.count)),
                   dim3(kSlotColumns, kSlotLanes), where, f);
        }
    });
}

}  // namespace camtl::cuda
