// conditional_layer_norm: bias, dropout, residual and a layer norm with a weight per task, in one pass over memory.
//
// Forward: a chunk's rows share a task, whose scale and shift are made once. A row's h stays in the first-level
// cache while it is summed (mean), summed again around that (variance; in one pass large means would cancel) and
// turned into y. Backward: h again from the inputs, with the mean and rstd that were kept, and
//   g = dy * scale,  dh = rstd * (g - mean(g) - xhat * mean(g * xhat)),  dresidual = dh,  dx = dropout(dh).
// Each chunk also sums dy * xhat, dy and dx over its rows. With S_t those of dy * xhat added up over task t:
//   dweight = sum_t (1 + gamma_t) S_t,  dgamma_t = weight * S_t,  dbeta_t = S_t.
// Bytes per element: forward read x and residual, write y; backward read dy, x and residual, write dx and
// dresidual. About 10 flops forward, 20 back, and some 15 integer operations more each way for the dropout.
#include "camtl/conditional_layer_norm.h"

#include "parallel.h"
#include "philox.h"
#include "plan.h"
#include "reduce.h"

namespace camtl::cpu::CAMTL_ISA {
namespace {

// h of one row: dropout(x + x_bias) + residual. Null: not there.
template <class S>
struct Sublayer {
    using A = acc_t<S>;
    const S* x;
    const A* x_bias;
    const A* kept;  // 0 or 1 / (1 - p)
    const S* residual;

    template <class N>
    CAMTL_INLINE vec<A> operator()(int64_t d, N n) const {
        vec<A> h = load(x + d, n);
        if (x_bias != nullptr) {
            h += load(x_bias + d, n);
        }
        if (kept != nullptr) {
            h = dropped(h, load(kept + d, n));
        }
        if (residual != nullptr) {
            h += load(residual + d, n);
        }
        return h;
    }

    // Not just a product: what is dropped may be infinite.
    static CAMTL_INLINE vec<A> dropped(vec<A> value, vec<A> scale) { return scale != A(0) ? value * scale : vec<A>{}; }
};

template <class A>
CAMTL_INLINE vec<A> total(const vec<A> (&sums)[4]) {
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Rows of scratch, each of D numbers and aligned for vectors, `count` to a thread.
template <class A>
class Buffers {
public:
    CAMTL_INLINE Buffers(int threads, int count, int64_t D)
        : width_((D + 15) / 16 * 16),
          count_(count),
          memory_(sizeof(A) * static_cast<std::size_t>(threads * count * width_)) {}
    CAMTL_INLINE A* at(int thread, int i) const { return memory_.as<A>() + (thread * count_ + i) * width_; }

private:
    int64_t width_;
    int count_;
    Scratch memory_;
};

// (1 + gamma) * weight + beta of a task, in `scale`; weight itself without gamma.
template <class A>
CAMTL_INLINE const A* task_scale(const void* weight, const void* gamma, const void* beta, int64_t task, int64_t D,
                                 A* scale) {
    const A* w = static_cast<const A*>(weight);
    if (gamma == nullptr) {
        return w;
    }
    const A* g = static_cast<const A*>(gamma) + task * D;
    const A* b = static_cast<const A*>(beta) + task * D;
    each_vector<A>(
        D, [&](int64_t d, auto n) { store(scale + d, (load(g + d, n) + A(1)) * load(w + d, n) + load(b + d, n), n); });
    return scale;
}

template <class S>
void forward(const ConditionalLayerNormForward& a) {
    using A = acc_t<S>;
    const Plan plan(a.layout, kChunkRows);
    const int64_t D = a.features;
    const Buffers<A> buffers(a.threads, 4, D);
    parallel_for(plan.size(), a.threads, [&](int64_t c, int thread) {
        const Chunk chunk = plan[c];
        S* y = static_cast<S*>(a.y) + chunk.begin * D;
        A* means = static_cast<A*>(a.mean);
        A* rstds = static_cast<A*>(a.rstd);
        if (chunk.task < 0) {
            const std::size_t rows = static_cast<std::size_t>(chunk.end - chunk.begin);
            std::memset(y, 0, sizeof(S) * rows * static_cast<std::size_t>(D));
            std::memset(means + chunk.begin, 0, sizeof(A) * rows);
            std::memset(rstds + chunk.begin, 0, sizeof(A) * rows);
            return;
        }
        A* h = buffers.at(thread, 0);
        A* kept = a.dropout.p > 0 ? buffers.at(thread, 1) : nullptr;
        const A* scale = task_scale(a.weight, a.gamma, a.beta, chunk.task, D, buffers.at(thread, 2));
        const A* shift = static_cast<const A*>(a.bias);
        if (a.bias_shift != nullptr) {
            const A* bias_shift = static_cast<const A*>(a.bias_shift) + chunk.task * D;
            A* both = buffers.at(thread, 3);
            each_vector<A>(
                D, [&](int64_t d, auto n) { store(both + d, load(shift + d, n) + load(bias_shift + d, n), n); });
            shift = both;
        }
        for (int64_t row = chunk.begin; row < chunk.end; ++row, y += D) {
            if (kept != nullptr) {
                dropout_scales(kept, D, static_cast<uint64_t>(row * D), a.dropout);
            }
            const Sublayer<S> sublayer{
                static_cast<const S*>(a.x) + row * a.x_stride, static_cast<const A*>(a.x_bias), kept,
                a.residual == nullptr ? nullptr : static_cast<const S*>(a.residual) + row * a.residual_stride};
            vec<A> sums[4] = {};
            each_vector_in_turn<A>(D, [&](int64_t d, auto n, auto k) {
                const vec<A> value = sublayer(d, n);
                store(h + d, value, n);
                sums[k] += value;
            });
            A mean = sum<A>(total<A>(sums)) / static_cast<A>(D);
            vec<A> rests[4] = {}, squares[4] = {};
            each_vector_in_turn<A>(D, [&](int64_t d, auto n, auto k) {
                const vec<A> centred = first_lanes<A>(load(h + d, n) - mean, n);
                rests[k] += centred;
                squares[k] += centred * centred;
            });
            const A rest = sum<A>(total<A>(rests)) / static_cast<A>(D);  // what rounding took from the mean
            mean += rest;
            const A variance = sum<A>(total<A>(squares)) / static_cast<A>(D) - rest * rest;
            const A rstd = A(1) / std::sqrt(variance + static_cast<A>(a.eps));
            each_vector<A>(D, [&](int64_t d, auto n) {
                store(y + d, (load(h + d, n) - mean) * rstd * load(scale + d, n) + load(shift + d, n), n);
            });
            means[row] = mean;
            rstds[row] = rstd;
        }
    });
}

// Where the partial sums of a chunk are that somebody wants: each of D numbers, side by side.
struct Partials {
    int64_t products = -1;  // dy * xhat
    int64_t dy = -1;
    int64_t dx = -1;
    int64_t width = 0;

    explicit Partials(const ConditionalLayerNormBackward& a) {
        const auto take = [&](bool wanted) {
            if (!wanted) {
                return int64_t{-1};
            }
            width += a.features;
            return width - a.features;
        };
        products = take(a.dweight != nullptr || a.dgamma != nullptr || a.dbeta != nullptr);
        dy = take(a.dbias != nullptr || a.dbias_shift != nullptr);
        dx = take(a.dx_bias != nullptr);
    }
};

// dweight, dgamma and dbeta from sums [tasks, D] of dy * xhat by task.
template <class A>
void scale_gradients(const ConditionalLayerNormBackward& a, const A* sums) {
    const int64_t D = a.features, tasks = a.layout.tasks;
    const A* gamma = static_cast<const A*>(a.gamma);
    const A* weight = static_cast<const A*>(a.weight);
    if (a.dweight != nullptr) {
        for (int64_t d = 0; d < D; ++d) {
            double all = 0;
            for (int64_t t = 0; t < tasks; ++t) {
                const double factor = gamma == nullptr ? 1.0 : 1.0 + static_cast<double>(gamma[t * D + d]);
                all += factor * static_cast<double>(sums[t * D + d]);
            }
            static_cast<A*>(a.dweight)[d] = static_cast<A>(all);
        }
    }
    if (a.dgamma != nullptr) {
        for (int64_t t = 0; t < tasks; ++t) {
            for (int64_t d = 0; d < D; ++d) {
                static_cast<A*>(a.dgamma)[t * D + d] = weight[d] * sums[t * D + d];
            }
        }
    }
    if (a.dbeta != nullptr) {
        std::memcpy(a.dbeta, sums, sizeof(A) * static_cast<std::size_t>(tasks * D));
    }
}

template <class S>
void backward(const ConditionalLayerNormBackward& a) {
    using A = acc_t<S>;
    const Plan plan(a.layout, kChunkRows);
    const int64_t D = a.features;
    const Partials where(a);
    const Scratch partials(sizeof(A) * static_cast<std::size_t>(plan.size() * where.width));
    const Buffers<A> buffers(a.threads, 4, D);
    const bool inputs = a.dx != nullptr || a.dresidual != nullptr || a.dx_bias != nullptr;
    parallel_for(plan.size(), a.threads, [&](int64_t c, int thread) {
        const Chunk chunk = plan[c];
        if (chunk.task < 0) {
            const auto zero = [&](void* gradient) {
                if (gradient != nullptr) {
                    std::memset(static_cast<S*>(gradient) + chunk.begin * D, 0,
                                sizeof(S) * static_cast<std::size_t>((chunk.end - chunk.begin) * D));
                }
            };
            zero(a.dx);
            zero(a.dresidual);
            return;
        }
        A* xhat = buffers.at(thread, 0);
        A* slope = buffers.at(thread, 1);  // g, rounded once: in rows without variance it cancels exactly
        A* kept = a.dropout.p > 0 ? buffers.at(thread, 2) : nullptr;
        const A* scale = task_scale(a.weight, a.gamma, a.beta, chunk.task, D, buffers.at(thread, 3));
        A* partial = partials.as<A>() + c * where.width;
        std::memset(partial, 0, sizeof(A) * static_cast<std::size_t>(where.width));
        A* sum_products = where.products < 0 ? nullptr : partial + where.products;
        A* sum_dy = where.dy < 0 ? nullptr : partial + where.dy;
        A* sum_dx = where.dx < 0 ? nullptr : partial + where.dx;
        for (int64_t row = chunk.begin; row < chunk.end; ++row) {
            if (kept != nullptr) {
                dropout_scales(kept, D, static_cast<uint64_t>(row * D), a.dropout);
            }
            const Sublayer<S> sublayer{
                static_cast<const S*>(a.x) + row * a.x_stride, static_cast<const A*>(a.x_bias), kept,
                a.residual == nullptr ? nullptr : static_cast<const S*>(a.residual) + row * a.residual_stride};
            const S* dy = static_cast<const S*>(a.dy) + row * a.dy_stride;
            const A mean = static_cast<const A*>(a.mean)[row], rstd = static_cast<const A*>(a.rstd)[row];
            vec<A> sums[4] = {}, products[4] = {};
            each_vector_in_turn<A>(D, [&](int64_t d, auto n, auto k) {
                const vec<A> normal = (sublayer(d, n) - mean) * rstd, dy_d = load(dy + d, n);
                const vec<A> g = dy_d * load(scale + d, n);
                store(xhat + d, normal, n);
                store(slope + d, g, n);
                sums[k] += g;
                products[k] += first_lanes<A>(g * normal, n);
                if (sum_products != nullptr) {
                    store(sum_products + d, load(sum_products + d, n) + dy_d * normal, n);
                }
                if (sum_dy != nullptr) {
                    store(sum_dy + d, load(sum_dy + d, n) + dy_d, n);
                }
            });
            if (!inputs) {
                continue;
            }
            S* dx = a.dx == nullptr ? nullptr : static_cast<S*>(a.dx) + row * D;
            S* dresidual = a.dresidual == nullptr ? nullptr : static_cast<S*>(a.dresidual) + row * D;
            const A mean_g = sum<A>(total<A>(sums)) / static_cast<A>(D);
            const A mean_product = sum<A>(total<A>(products)) / static_cast<A>(D);
            each_vector<A>(D, [&](int64_t d, auto n) {
                vec<A> dh = (load(slope + d, n) - mean_g - load(xhat + d, n) * mean_product) * rstd;
                if (dresidual != nullptr) {
                    store(dresidual + d, dh, n);
                }
                if (kept != nullptr) {
                    dh = Sublayer<S>::dropped(dh, load(kept + d, n));
                }
                if (dx != nullptr) {
                    store(dx + d, dh, n);
                }
                if (sum_dx != nullptr) {
                    store(sum_dx + d, load(sum_dx + d, n) + dh, n);
                }
            });
        }
    });
    const int64_t tasks = a.layout.tasks;
    if (where.products >= 0) {
        const Scratch sums(sizeof(A) * static_cast<std::size_t>(tasks * D));
        sum_by_task(sums.as<A>(), partials.as<A>() + where.products, where.width, plan, tasks, D, a.threads);
        scale_gradients(a, sums.as<A>());
    }
    if (a.dbias_shift != nullptr) {
        sum_by_task(static_cast<A*>(a.dbias_shift), partials.as<A>() + where.dy, where.width, plan, tasks, D,
                    a.threads);
    }
    if (a.dbias != nullptr) {
        sum_over_chunks(static_cast<A*>(a.dbias), partials.as<A>() + where.dy, where.width, plan, D, a.threads);
    }
    if (a.dx_bias != nullptr) {
        sum_over_chunks(static_cast<A*>(a.dx_bias), partials.as<A>() + where.dx, where.width, plan, D, a.threads);
    }
}

}  // namespace

void conditional_layer_norm_forward(const ConditionalLayerNormForward& a) {
    with_storage(a.dtype, [&](auto storage) { forward<decltype(storage)>(a); });
}

void conditional_layer_norm_backward(const ConditionalLayerNormBackward& a) {
    with_storage(a.dtype, [&](auto storage) { backward<decltype(storage)>(a); });
}

}  // namespace camtl::cpu::CAMTL_ISA
