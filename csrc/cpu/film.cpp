// film: y = (1 + gamma[t]) * x + beta[t].
//
// Forward: one pass over rows, chunks of kChunkRows rows of one task to a thread. Backward: the same pass gives
// dx and, per chunk, partial sums of dy * x and dy for dgamma and dbeta, added afterwards in the chunks' order.
// Bytes per element: forward read x, write y; backward read dy and x, write dx. Two flops each way, four back.
#include "camtl/film.h"

#include "parallel.h"
#include "plan.h"
#include "reduce.h"

namespace camtl::cpu::CAMTL_ISA {
namespace {

template <class S>
void forward(const FilmForward& a) {
    using A = acc_t<S>;
    const Plan plan(a.layout, kChunkRows);
    const int64_t D = a.features;
    parallel_for(plan.size(), a.threads, [&](int64_t c, int) {
        const Chunk chunk = plan[c];
        S* y = static_cast<S*>(a.y) + chunk.begin * D;
        if (chunk.task < 0) {
            std::memset(y, 0, sizeof(S) * static_cast<std::size_t>((chunk.end - chunk.begin) * D));
            return;
        }
        const A* gamma = static_cast<const A*>(a.gamma) + chunk.task * D;
        const A* beta = static_cast<const A*>(a.beta) + chunk.task * D;
        for (int64_t row = chunk.begin; row < chunk.end; ++row, y += D) {
            const S* x = static_cast<const S*>(a.x) + row * a.x_stride;
            each_vector<A>(D, [&](int64_t d, auto n) {
                store(y + d, (load(gamma + d, n) + A(1)) * load(x + d, n) + load(beta + d, n), n);
            });
        }
    });
}

template <class S>
void backward(const FilmBackward& a) {
    using A = acc_t<S>;
    const Plan plan(a.layout, kChunkRows);
    const int64_t D = a.features;
    const bool tables = a.dgamma != nullptr || a.dbeta != nullptr;
    // [chunks, 2, D]: sums of dy * x, of dy
    const Scratch partials(tables ? sizeof(A) * static_cast<std::size_t>(plan.size() * 2 * D) : 0);
    parallel_for(plan.size(), a.threads, [&](int64_t c, int) {
        const Chunk chunk = plan[c];
        S* dx = a.dx == nullptr ? nullptr : static_cast<S*>(a.dx) + chunk.begin * D;
        if (chunk.task < 0) {
            if (dx != nullptr) {
                std::memset(dx, 0, sizeof(S) * static_cast<std::size_t>((chunk.end - chunk.begin) * D));
            }
            return;
        }
        const A* gamma = static_cast<const A*>(a.gamma) + chunk.task * D;
        A* dgamma = partials.as<A>() + c * 2 * D;
        A* dbeta = dgamma + D;
        for (int64_t row = chunk.begin; row < chunk.end; ++row) {
            const bool first = row == chunk.begin;
            const S* dy = static_cast<const S*>(a.dy) + row * a.dy_stride;
            const S* x = a.dgamma == nullptr ? nullptr : static_cast<const S*>(a.x) + row * a.x_stride;
            each_vector<A>(D, [&](int64_t d, auto n) {
                const vec<A> g = load(dy + d, n);
                if (dx != nullptr) {
                    store(dx + d, g * (load(gamma + d, n) + A(1)), n);
                }
                if (x != nullptr) {
                    const vec<A> product = g * load(x + d, n);
                    store(dgamma + d, first ? product : load(dgamma + d, n) + product, n);
                }
                if (tables) {
                    store(dbeta + d, first ? g : load(dbeta + d, n) + g, n);
                }
            });
            if (dx != nullptr) {
                dx += D;
            }
        }
    });
    if (a.dgamma != nullptr) {
        sum_by_task(static_cast<A*>(a.dgamma), partials.as<A>(), 2 * D, plan, a.layout.tasks, D, a.threads);
    }
    if (a.dbeta != nullptr) {
        sum_by_task(static_cast<A*>(a.dbeta), partials.as<A>() + D, 2 * D, plan, a.layout.tasks, D, a.threads);
    }
}

}  // namespace

void film_forward(const FilmForward& a) {
    with_storage(a.dtype, [&](auto storage) { forward<decltype(storage)>(a); });
}

void film_backward(const FilmBackward& a) {
    with_storage(a.dtype, [&](auto storage) { backward<decltype(storage)>(a); });
}

}  // namespace camtl::cpu::CAMTL_ISA
