// conditional_layer_norm, forward: h = dropout(x + x_bias) + residual, xhat = (h - mean) * rstd,
// y = xhat * ((1 + gamma[t]) * weight + beta[t]) + bias + bias_shift[t]. The backward pass is in the file beside.
//
// A warp takes kRows rows (to D = 512, or 256 where 16-byte accesses do not fit), beyond that a block of up to eight
// warps does. All loads of a thread, kPacks packs of x and of the residual for each row, are in flight before the first
// is used; h then stays in registers: the mean is one sum over them, the variance a second one around it. Parameters
// come from the first-level cache, once for neighbouring rows of one task; x and the residual pass it by. Rows too long
// for eight warps' registers compute the rest of h anew, from the second-level cache, in each of the three passes.
// Bytes per element: x, residual and y once, and 8 per row. Flops: 10, and with dropout 12 integer operations.
// bf16, 16-byte accesses, sm_80 and sm_90: 111 and 114 registers (16 warps on a multiprocessor), no spills. Times: not
// measured.
#include "layer_norm.cuh"

namespace camtl::cuda {
namespace {

constexpr char kOp[] = "conditional_layer_norm";
constexpr int kRows = 2;
constexpr int kWarpsOfSingles = 4;  // of a block whose warps have rows of their own

template <class S>
struct Arguments {
    Sequences sequences;
    int packs;
    Sublayer<S> before;
    Parameter weight, bias, gamma, beta, bias_shift;
    float eps;
    S* y;
    float* mean;
    float* rstd;
};

template <class S, int V>
__device__ __forceinline__ void read_shift(const Arguments<S>& a, int task, int64_t column, float (&shift)[V]) {
    read<S, V>(a.bias, column, shift);
    if (a.bias_shift.data != nullptr && task >= 0) {
        float more[V];
        read<S, V>(a.bias_shift, task * a.bias_shift.stride + column, more);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            shift[i] += more[i];
        }
    }
}

template <class S, int V, int kPacks>
__global__ void __launch_bounds__(32 * kMaxWarps, 2) forward_kernel(const Arguments<S> a) {
    __shared__ float parts[2][kMaxWarps][kRows];
    const int first = (blockIdx.x * blockDim.y + threadIdx.y) * kRows, rows = a.sequences.rows;
    if (first >= rows) {
        return;  // whole warps, and only where they need no others
    }
    const int step = static_cast<int>(blockDim.x);
    const auto pack = [&](int k) { return static_cast<int>(threadIdx.x) + k * step; };
    const bool with_residual = a.before.residual != nullptr;
    Pack<S, V> of_x[kRows][kPacks], beside[kRows][kPacks];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int k = 0; k < kPacks; ++k) {
            if (first + r < rows && pack(k) < a.packs) {
                of_x[r][k] = a.before.template load_x<V>(first + r, int64_t{pack(k)} * V);
            }
        }
    }
    if (with_residual) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int k = 0; k < kPacks; ++k) {
                if (first + r < rows && pack(k) < a.packs) {
                    beside[r][k] = a.before.template load_residual<V>(first + r, int64_t{pack(k)} * V);
                }
            }
        }
    }
    const Keeps keeps(a.before.dropout);
    // f(h of a pack) for the packs of row r beyond those in registers
    const auto further = [&](int r, auto&& f) {
        for (int p = pack(kPacks); p < a.packs; p += step) {
            float values[V];
            a.before.template at<V>(first + r, int64_t{p} * V, keeps, values);
            f(p, values);
        }
    };

    float h[kRows][kPacks][V], mean[kRows], rstd[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        mean[r] = rstd[r] = 0.0f;
        if (first + r < rows) {
            const auto add = [&](int, const float (&values)[V]) {
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    mean[r] += values[i];
                }
            };
#pragma unroll
            for (int k = 0; k < kPacks; ++k) {
                if (pack(k) < a.packs) {
                    a.before.template join<V>(first + r, int64_t{pack(k)} * V, of_x[r][k], beside[r][k], keeps,
                                              h[r][k]);
                    add(k, h[r][k]);
                }
            }
            further(r, add);
        }
    }
    row_sums<kRows>(mean, parts[0]);
    const float D = static_cast<float>(a.before.features);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        mean[r] /= D;
        if (first + r < rows) {
            const auto add = [&](int, const float (&values)[V]) {
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    const float centred = values[i] - mean[r];
                    rstd[r] = fmaf(centred, centred, rstd[r]);
                }
            };
#pragma unroll
            for (int k = 0; k < kPacks; ++k) {
                if (pack(k) < a.packs) {
                    add(k, h[r][k]);
                }
            }
            further(r, add);
        }
    }
    row_sums<kRows>(rstd, parts[1]);

    int task[kRows];
    Walk walk(a.sequences, first);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        rstd[r] = 1.0f / sqrtf(rstd[r] / D + a.eps);
        if (first + r < rows) {
            if (r > 0) {
                walk.moves_on(first + r);
            }
            task[r] = a.sequences.task(walk.sequence);
            if (threadIdx.x == 0) {
                a.mean[first + r] = task[r] == kNoSequence ? 0.0f : mean[r];
                a.rstd[first + r] = task[r] == kNoSequence ? 0.0f : rstd[r];
            }
        }
    }
    const auto put = [&](int r, int64_t column, const float (&values)[V], const float (&scale)[V],
                         const float (&shift)[V]) {
        Pack<S, V> out;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float normal = (values[i] - mean[r]) * rstd[r];
            out.v[i] = narrow<S>(task[r] == kNoSequence ? 0.0f : fmaf(normal, scale[i], shift[i]));
        }
        store<V>(a.y + (first + r) * a.before.features + column, out);
    };
    float scale[V], shift[V];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
        if (pack(k) < a.packs && first < rows) {
            const int64_t column = int64_t{pack(k)} * V;
            read_scale<S, V>(a.weight, a.gamma, a.beta, task[0], column, scale);
            read_shift<S, V>(a, task[0], column, shift);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                if (first + r < rows) {
                    if (r > 0 && task[r] != task[r - 1]) {
                        read_scale<S, V>(a.weight, a.gamma, a.beta, task[r], column, scale);
                        read_shift<S, V>(a, task[r], column, shift);
                    }
                    put(r, column, h[r][k], scale, shift);
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        if (first + r < rows) {
            further(r, [&](int p, const float (&values)[V]) {
                read_scale<S, V>(a.weight, a.gamma, a.beta, task[r], int64_t{p} * V, scale);
                read_shift<S, V>(a, task[r], int64_t{p} * V, shift);
                put(r, int64_t{p} * V, values, scale, shift);
            });
        }
    }
}

template <class S, int V, int kPacks>
void run(Arguments<S>& a, int D, const Launch& where) {
    a.packs = D / V;
    const int warps = static_cast<int>(row_warps(a.packs, kPacks)), high = warps > 1 ? 1 : kWarpsOfSingles;
    const int64_t blocks = divide_up(a.sequences.rows, kRows * high);
    launch(kOp, forward_kernel<S, V, kPacks>, dim3(static_cast<unsigned>(blocks)), dim3(32 * warps, high), where, a);
}

}  // namespace

void conditional_layer_norm_forward(const ConditionalLayerNormForward& f, const NormTables& tables,
                                    const Launch& where) {
    const Sequences rows = sequences(f.layout, where, kOp);
    const int D = as_int(f.features, kOp, "features");
    with_storage(f.dtype, kOp, [&](auto storage) {
        using S = decltype(storage);
        const auto parameter = [&](const void* data, unsigned bit, int64_t stride = 0) {
            return Parameter{data, stride, (tables.narrow & bit) != 0};
        };
        Arguments<S> a{rows,
                       0,
                       {static_cast<const S*>(f.x), f.x_stride, static_cast<const S*>(f.residual), f.residual_stride,
                        parameter(f.x_bias, kXBias), dropping(f.dropout), f.features},
                       parameter(f.weight, kWeight),
                       parameter(f.bias, kBias),
                       parameter(f.gamma, kGamma, tables.gamma_stride),
                       parameter(f.beta, kBeta, tables.beta_stride),
                       parameter(f.bias_shift, kBiasShift, tables.bias_shift_stride),
                       static_cast<float>(f.eps),
                       static_cast<S*>(f.y),
                       static_cast<float*>(f.mean),
                       static_cast<float*>(f.rstd)};
        check(cudaSetDevice(where.device), kOp);
        if (rows.rows == 0 || D == 0) {
            return;
        }
        constexpr int kWide = 16 / sizeof(S);
        const bool wide = D % kWide == 0 && aligned<S>(kWide, f.x, f.x_stride) &&
                          aligned<S>(kWide, f.residual, f.residual_stride) && aligned<S>(kWide, f.y, D) &&
                          aligned<S>(kWide, a.before.x_bias) && aligned<S>(kWide, a.weight) &&
                          aligned<S>(kWide, a.bias) && aligned<S>(kWide, a.gamma) && aligned<S>(kWide, a.beta) &&
                          aligned<S>(kWide, a.bias_shift);
        wide ? run<S, kWide, 16 / kWide>(a, D, where) : run<S, 1, 8>(a, D, where);
    });
}

}  // namespace camtl::cuda
