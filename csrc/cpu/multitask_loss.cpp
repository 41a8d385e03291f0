// multitask_loss: each sample meets the head rows of its own task only, where one product with all heads
// computes sum(sizes) columns and keeps a task's few.
//
// Forward: per sample C_t dot products of length D in acc; log-softmax, losses and entropies from them in
// double, as C_t is small. A task's loss adds its samples in their order. Backward: dz [B, C_max] first; then
// dx per sample, and dweight per task and block of columns, the samples of the task in their order. No sum
// depends on the number of threads.
// Bytes: features and the heads in use once each way, dx and all of dweight written; 2 C_t D flops a sample
// forward, twice that back.
#include "camtl/multitask_loss.h"

#include <cstdio>
#include <stdexcept>

#include "parallel.h"
#include "plan.h"

namespace camtl::cpu::CAMTL_ISA {
namespace {

constexpr int kHeadRows = 4;                          // head rows that share one read of a sample's features
constexpr int kVectors = kRegisters >= 32 ? 4 : 2;    // vectors of columns in a tile of dweight
constexpr int64_t kSamples = 16;                      // samples of a work item
constexpr int64_t kRun = 64;                          // samples of dweight that are added up before the total
constexpr double kLn2 = 0.693147180559945309417;

LossType kind_of(const MultitaskHeads& h, int64_t task) { return static_cast<LossType>(h.loss_types[task]); }

// Under compile nobody has looked at the values before.
void check(const MultitaskHeads& h) {
    Layout layout;
    layout.rows = layout.batch = h.batch;
    layout.rows_per_sequence = 1;
    layout.task_ids = h.task_ids;
    layout.tasks = h.tasks;
    check_layout(layout);
    for (int64_t b = 0; h.labels != nullptr && b < h.batch; ++b) {
        const int64_t task = h.task_ids[b];
        const double label = h.labels[b * h.label_columns];
        const double classes = static_cast<double>(h.sizes[task]);
        if (kind_of(h, task) == LossType::ce && !(label >= 0 && label < classes && label == std::floor(label))) {
            char text[160];
            std::snprintf(
                text, sizeof text, "labels must be a class number in [0, %lld) for ce; got %g at %lld (task %lld)",
                static_cast<long long>(h.sizes[task]), label, static_cast<long long>(b), static_cast<long long>(task));
            throw std::invalid_argument(text);
        }
        if (kind_of(h, task) == LossType::bce && h.label_columns < h.sizes[task]) {
            throw std::invalid_argument("labels must have a column for every class where a loss type is bce");
        }
    }
}

// first[t]: the head row where task t begins.
void first_rows(const MultitaskHeads& h, int64_t* first) {
    int64_t rows = 0;
    for (int64_t task = 0; task < h.tasks; ++task) {
        first[task] = rows;
        rows += h.sizes[task];
    }
}

// z[r] = w[r] . x for R rows. Two accumulators a row: products wait for the sum before the last.
template <int R, class A, class S>
CAMTL_INLINE void dots(A* z, const S* x, const A* w, int64_t D) {
    constexpr int W = kLanes<A>;
    vec<A> even[R] = {}, odd[R] = {};
    int64_t d = 0;
    for (; d + 2 * W <= D; d += 2 * W) {
        const vec<A> a = load(x + d, Full<W>{}), b = load(x + d + W, Full<W>{});
        for (int r = 0; r < R; ++r) {
            even[r] += a * load(w + r * D + d, Full<W>{});
            odd[r] += b * load(w + r * D + d + W, Full<W>{});
        }
    }
    each_vector<A>(D - d, [&](int64_t i, auto n) {
        const vec<A> a = load(x + d + i, n);
        for (int r = 0; r < R; ++r) {
            even[r] += a * load(w + r * D + d + i, n);
        }
    });
    for (int r = 0; r < R; ++r) {
        z[r] = sum<A>(even[r] + odd[r]);
    }
}

// body(Full<R>{}, r) for groups of up to kHeadRows of the rows 0 .. C - 1.
template <class F>
CAMTL_INLINE void each_group(int64_t C, F&& body) {
    int64_t r = 0;
    for (; r + kHeadRows <= C; r += kHeadRows) {
        body(Full<kHeadRows>{}, r);
    }
    switch (C - r) {
        case 3:
            return body(Full<3>{}, r);
        case 2:
            return body(Full<2>{}, r);
        case 1:
            return body(Full<1>{}, r);
        default:
            return;
    }
}

// log softmax(z)[c] = z[c] - shift
template <class A>
double log_partition(const A* z, int64_t C) {
    double highest = static_cast<double>(z[0]), total = 0;
    for (int64_t c = 1; c < C; ++c) {
        highest = static_cast<double>(z[c]) > highest ? static_cast<double>(z[c]) : highest;
    }
    for (int64_t c = 0; c < C; ++c) {
        total += std::exp(static_cast<double>(z[c]) - highest);
    }
    return highest + std::log(total);
}

// -sum p ln p, p = softmax(z)
template <class A>
double softmax_entropy(const A* z, int64_t C, double shift) {
    double total = 0;
    for (int64_t c = 0; c < C; ++c) {
        const double log_p = static_cast<double>(z[c]) - shift;
        total -= std::exp(log_p) * log_p;
    }
    return total;
}

// ln(1 + e^-|z|)
double soft(double z) { return std::log1p(std::exp(-std::fabs(z))); }

double sigmoid(double z) {
    const double e = std::exp(-std::fabs(z));
    return z >= 0 ? 1 / (1 + e) : e / (1 + e);
}

template <class S>
void forward(const MultitaskLossForward& a) {
    using A = acc_t<S>;
    const MultitaskHeads& h = a.heads;
    check(h);
    const int64_t B = h.batch, D = h.features, columns = h.max_size;
    const Scratch first(sizeof(int64_t) * static_cast<std::size_t>(h.tasks));
    first_rows(h, first.as<int64_t>());
    const Scratch losses(sizeof(double) * static_cast<std::size_t>(B));

    parallel_for((B + kSamples - 1) / kSamples, h.threads, [&](int64_t item, int) {
        const int64_t end = (item + 1) * kSamples < B ? (item + 1) * kSamples : B;
        for (int64_t b = item * kSamples; b < end; ++b) {
            const int64_t task = h.task_ids[b], C = h.sizes[task], row = first.as<int64_t>()[task];
            const S* x = static_cast<const S*>(h.x) + b * h.x_stride;
            const A* weight = static_cast<const A*>(h.weight) + row * D;
            const A* bias = static_cast<const A*>(a.bias) + row;
            A* z = static_cast<A*>(a.z) + b * columns;
            S* logits = static_cast<S*>(a.logits) + b * columns;
            each_group(C, [&](auto R, int64_t r) { dots<R>(z + r, x, weight + r * D, D); });
            for (int64_t c = 0; c < C; ++c) {
                z[c] += bias[c];
            }
            for (int64_t c = C; c < columns; ++c) {
                z[c] = 0;
            }
            each_vector<A>(C, [&](int64_t c, auto n) { store(logits + c, load(z + c, n), n); });
            each_vector<A>(columns - C, [&](int64_t c, auto n) { store(logits + C + c, splat(A(-INFINITY)), n); });

            const double* y = h.labels == nullptr ? nullptr : h.labels + b * h.label_columns;
            double loss = 0, entropy = 0;
            if (kind_of(h, task) == LossType::bce) {
                for (int64_t c = 0; c < C; ++c) {
                    const double v = static_cast<double>(z[c]), size = std::fabs(v), rest = soft(v);
                    entropy += size * sigmoid(-size) + rest;
                    loss += y == nullptr ? 0 : (v > 0 ? v : 0) - v * y[c] + rest;
                }
                entropy /= static_cast<double>(C) * kLn2;
                loss /= static_cast<double>(C);
            } else {
                const double shift = log_partition(z, C);
                entropy = softmax_entropy(z, C, shift) / (std::log(static_cast<double>(C)) + 1e-5);
                if (y != nullptr && kind_of(h, task) == LossType::mse) {
                    const double distance = static_cast<double>(z[0]) - y[0];
                    loss = distance * distance;
                } else if (y != nullptr) {
                    loss = shift - static_cast<double>(z[static_cast<int64_t>(y[0])]);
                }
            }
            losses.as<double>()[b] = loss;
            static_cast<A*>(a.entropy)[b] = static_cast<A>(entropy);
        }
    });

    const Scratch totals(2 * sizeof(double) * static_cast<std::size_t>(h.tasks));
    double *total = totals.as<double>(), *count = total + h.tasks;
    for (int64_t task = 0; task < 2 * h.tasks; ++task) {
        total[task] = 0;
    }
    for (int64_t b = 0; b < B; ++b) {
        total[h.task_ids[b]] += losses.as<double>()[b];
        count[h.task_ids[b]] += 1;
    }
    for (int64_t task = 0; task < h.tasks; ++task) {
        static_cast<A*>(a.loss)[task] = static_cast<A>(count[task] > 0 ? total[task] / count[task] : 0);
    }
}

// The samples of each task, in their order: [begin[t], begin[t + 1]) of `samples`.
struct ByTask {
    ByTask(const MultitaskHeads& h)
        : begins(sizeof(int64_t) * static_cast<std::size_t>(h.tasks + 2)),
          order(sizeof(int64_t) * static_cast<std::size_t>(h.batch)) {
        int64_t* next = begins.as<int64_t>() + 1;  // next[t] moves from task t's begin to its end
        for (int64_t task = -1; task <= h.tasks; ++task) {
            next[task] = 0;
        }
        for (int64_t b = 0; b < h.batch; ++b) {
            ++next[h.task_ids[b] + 1];
        }
        for (int64_t task = 0; task < h.tasks; ++task) {
            next[task + 1] += next[task];
        }
        for (int64_t b = 0; b < h.batch; ++b) {
            order.as<int64_t>()[next[h.task_ids[b]]++] = b;
        }
    }
    int64_t begin(int64_t task) const { return begins.as<int64_t>()[task]; }
    int64_t count(int64_t task) const { return begin(task + 1) - begin(task); }
    const int64_t* samples(int64_t task) const { return order.as<int64_t>() + begin(task); }

    Scratch begins, order;
};

// dz of one sample. `scale` is dloss of its task over the number of the task's samples.
template <class A, class S>
void logit_gradients(A* dz, const A* z, int64_t C, LossType kind, const double* y, double scale, const S* dlogits,
                     double dentropy) {
    if (dlogits != nullptr) {
        each_vector<A>(C, [&](int64_t c, auto n) { store(dz + c, load(dlogits + c, n), n); });
    } else {
        for (int64_t c = 0; c < C; ++c) {
            dz[c] = 0;
        }
    }
    if (kind == LossType::bce) {
        const double each = scale / static_cast<double>(C), share = dentropy / (static_cast<double>(C) * kLn2);
        for (int64_t c = 0; c < C; ++c) {
            const double v = static_cast<double>(z[c]), p = sigmoid(v), q = sigmoid(-v);
            const double gradient = (y == nullptr ? 0 : each * (p - y[c])) - share * v * p * q;
            dz[c] += static_cast<A>(gradient);
        }
        return;
    }
    const double share = dentropy / (std::log(static_cast<double>(C)) + 1e-5);
    const double shift = log_partition(z, C), entropy = softmax_entropy(z, C, shift);
    const bool ce = kind == LossType::ce && y != nullptr;
    const int64_t target = ce ? static_cast<int64_t>(y[0]) : -1;
    for (int64_t c = 0; c < C; ++c) {
        const double log_p = static_cast<double>(z[c]) - shift, p = std::exp(log_p);
        double gradient = C == 1 ? 0 : -share * p * (log_p + entropy);
        gradient += ce ? scale * (p - (c == target ? 1 : 0)) : 0;
        dz[c] += static_cast<A>(gradient);
    }
    if (kind == LossType::mse && y != nullptr) {
        dz[0] += static_cast<A>(scale * 2 * (static_cast<double>(z[0]) - y[0]));
    }
}

// R rows and V vectors of n columns of dweight: out[r * D + ..] = sum over samples of dz[sample][r] * x[sample].
template <int R, int V, class A, class S, class N>
CAMTL_INLINE void weight_tile(A* out, int64_t D, const S* x, int64_t x_stride, const A* dz, int64_t dz_stride,
                              const int64_t* samples, int64_t count, N n) {
    constexpr int W = kLanes<A>;
    vec<A> total[R][V] = {};
    for (int64_t begin = 0; begin < count; begin += kRun) {
        const int64_t end = begin + kRun < count ? begin + kRun : count;
        vec<A> run[R][V] = {};
        for (int64_t i = begin; i < end; ++i) {
            const S* features = x + samples[i] * x_stride;
            const A* gradient = dz + samples[i] * dz_stride;
            for (int v = 0; v < V; ++v) {
                const vec<A> part = load(features + v * W, n);
                for (int r = 0; r < R; ++r) {
                    run[r][v] += part * gradient[r];
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < V; ++v) {
                total[r][v] += run[r][v];
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) {
            store(out + r * D + v * W, total[r][v], n);
        }
    }
}

template <class S>
void backward(const MultitaskLossBackward& a) {
    using A = acc_t<S>;
    const MultitaskHeads& h = a.heads;
    check(h);
    const int64_t B = h.batch, D = h.features, columns = h.max_size;
    const Scratch firsts(sizeof(int64_t) * static_cast<std::size_t>(h.tasks));
    const int64_t* first = firsts.as<int64_t>();
    first_rows(h, firsts.as<int64_t>());
    const ByTask by_task(h);
    const Scratch gradients(sizeof(A) * static_cast<std::size_t>(B * columns));
    A* dz_all = gradients.as<A>();

    parallel_for((B + kSamples - 1) / kSamples, h.threads, [&](int64_t item, int) {
        const int64_t end = (item + 1) * kSamples < B ? (item + 1) * kSamples : B;
        for (int64_t b = item * kSamples; b < end; ++b) {
            const int64_t task = h.task_ids[b], C = h.sizes[task];
            const double dloss = a.dloss == nullptr ? 0 : static_cast<double>(static_cast<const A*>(a.dloss)[task]);
            A* dz = dz_all + b * columns;
            logit_gradients<A, S>(
                dz, static_cast<const A*>(a.z) + b * columns, C, kind_of(h, task),
                h.labels == nullptr ? nullptr : h.labels + b * h.label_columns,
                dloss / static_cast<double>(by_task.count(task)),
                a.dlogits == nullptr ? nullptr : static_cast<const S*>(a.dlogits) + b * columns,
                a.dentropy == nullptr ? 0 : static_cast<double>(static_cast<const A*>(a.dentropy)[b]));
            if (a.dx == nullptr) {
                continue;
            }
            S* dx = static_cast<S*>(a.dx) + b * D;
            const A* weight = static_cast<const A*>(h.weight) + first[task] * D;
            each_vector<A>(D, [&](int64_t d, auto n) {
                vec<A> total{};
                for (int64_t c = 0; c < C; ++c) {
                    total += load(weight + c * D + d, n) * dz[c];
                }
                store(dx + d, total, n);
            });
        }
    });

    if (a.dweight != nullptr) {
        constexpr int W = kLanes<A>;
        const int64_t blocks = (D + kVectors * W - 1) / (kVectors * W);
        parallel_for(h.tasks * blocks, h.threads, [&](int64_t item, int) {
            const int64_t task = item / blocks, d = item % blocks * kVectors * W;
            const int64_t count = by_task.count(task), rest = D - d;
            const int64_t* samples = by_task.samples(task);
            const S* x = static_cast<const S*>(h.x) + d;
            each_group(h.sizes[task], [&](auto R, int64_t r) {
                A* out = static_cast<A*>(a.dweight) + (first[task] + r) * D + d;
                if (rest >= kVectors * W) {
                    weight_tile<R, kVectors>(out, D, x, h.x_stride, dz_all + r, columns, samples, count, Full<W>{});
                    return;
                }
                each_vector<A>(rest, [&](int64_t i, auto n) {
                    weight_tile<R, 1>(out + i, D, x + i, h.x_stride, dz_all + r, columns, samples, count, n);
                });
            });
        });
    }
    if (a.dbias != nullptr) {
        parallel_for(h.tasks, h.threads, [&](int64_t task, int) {
            const int64_t* samples = by_task.samples(task);
            for (int64_t c = 0; c < h.sizes[task]; ++c) {
                double total = 0;
                for (int64_t i = 0; i < by_task.count(task); ++i) {
                    total += static_cast<double>(dz_all[samples[i] * columns + c]);
                }
                static_cast<A*>(a.dbias)[first[task] + c] = static_cast<A>(total);
            }
        });
    }
}

}  // namespace

void multitask_loss_forward(const MultitaskLossForward& a) {
    with_storage(a.heads.dtype, [&](auto storage) { forward<decltype(storage)>(a); });
}

void multitask_loss_backward(const MultitaskLossBackward& a) {
    with_storage(a.heads.dtype, [&](auto storage) { backward<decltype(storage)>(a); });
}

}  // namespace camtl::cpu::CAMTL_ISA
