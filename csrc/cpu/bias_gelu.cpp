// bias_gelu: y = gelu(x + bias), gelu(a) = a * Phi(a), Phi the normal distribution's.
//
// With Q(t) = 1 - Phi(t) for t = |a|, gelu(a) = max(a, 0) - t * Q(t): no cancellation, as 1 + erf has left of 0.
// Q(t) = exp(-t^2 / 2) * R(t), and that exponential serves the derivative too: Phi(a) + a * phi(a).
// Bytes per element: forward read x, write y; backward read dy and x, write dx. Some 40 flops each way, a division
// among them.
#include "camtl/bias_gelu.h"

#include "parallel.h"
#include "plan.h"
#include "reduce.h"

namespace camtl::cpu::CAMTL_ISA {
namespace {

// exp(-t^2 / 2), and Q(t), for t = |a|, at most 14 where both are 0 in float.
template <class A>
struct Tail {
    vec<A> t, bell, q;
};

// R(t) = exp(t^2 / 2) * erfc(t / sqrt 2) / 2 as a quotient of polynomials, fitted in relative error to 6000
// Chebyshev nodes of [0, 14] by least squares with weights moved towards the largest errors (Lawson), the
// denominator taken from the round before. It is off by at most 5.5e-9 of R, 3.9e-7 with the roundings in float: all
// coefficients are positive, so nothing cancels.
CAMTL_INLINE Tail<float> tail(vec<float> a) {
    const vec<float> t = vmin<float>(splat(14.0f), vmax<float>(-a, a));  // NaN stays
    vec<float> above = t * 0.0040776134f + 0.040372565f;
    above = above * t + 0.18246186f;
    above = above * t + 0.4372509f;
    above = above * t + 0.5f;
    vec<float> below = t * 0.010220932f + 0.101205826f;
    below = below * t + 0.46742916f;
    below = below * t + 1.1992908f;
    below = below * t + 1.6723868f;
    below = below * t + 1.0f;
    const vec<float> bell = vexp(t * t * -0.5f);
    return {t, bell, bell * (above / below)};
}

// float64 is for checks, not for speed: the C library, lane by lane.
CAMTL_INLINE Tail<double> tail(vec<double> a) {
    const vec<double> t = vmin<double>(splat(40.0), vmax<double>(-a, a));
    vec<double> q;
    for (int i = 0; i < kLanes<double>; ++i) {
        q[i] = 0.5 * std::erfc(t[i] * 0.70710678118654752440);
    }
    return {t, vexp(t * t * -0.5), q};
}

template <class A>
CAMTL_INLINE vec<A> gelu(vec<A> a) {
    const Tail<A> of = tail(a);
    return vmax<A>(vec<A>{}, a) - of.t * of.q;
}

// Phi(a) + a * phi(a): with w = Q - t * phi it is w left of 0 and 1 - w right of it.
template <class A>
CAMTL_INLINE vec<A> gelu_derivative(vec<A> a) {
    const Tail<A> of = tail(a);
    const vec<A> w = of.q - of.t * of.bell * A(0.39894228040143267794);
    return a > A(0) ? A(1) - w : w;
}

Layout layout(int64_t rows) {
    Layout l;
    l.rows = rows;
    l.tasks = 1;
    return l;
}

template <class S>
void forward(const BiasGeluForward& a) {
    using A = acc_t<S>;
    const Plan plan(layout(a.rows), kChunkRows);
    const int64_t D = a.features;
    const A* bias = static_cast<const A*>(a.bias);
    parallel_for(plan.size(), a.threads, [&](int64_t c, int) {
        for (int64_t row = plan[c].begin; row < plan[c].end; ++row) {
            const S* x = static_cast<const S*>(a.x) + row * a.x_stride;
            S* y = static_cast<S*>(a.y) + row * D;
            each_vector<A>(D, [&](int64_t d, auto n) { store(y + d, gelu<A>(load(x + d, n) + load(bias + d, n)), n); });
        }
    });
}

template <class S>
void backward(const BiasGeluBackward& a) {
    using A = acc_t<S>;
    const Plan plan(layout(a.rows), kChunkRows);
    const int64_t D = a.features;
    const A* bias = static_cast<const A*>(a.bias);
    // [chunks, D]: sums of dx
    const Scratch partials(a.dbias != nullptr ? sizeof(A) * static_cast<std::size_t>(plan.size() * D) : 0);
    parallel_for(plan.size(), a.threads, [&](int64_t c, int) {
        A* partial = a.dbias == nullptr ? nullptr : partials.as<A>() + c * D;
        for (int64_t row = plan[c].begin; row < plan[c].end; ++row) {
            const bool first = row == plan[c].begin;
            const S* dy = static_cast<const S*>(a.dy) + row * a.dy_stride;
            const S* x = static_cast<const S*>(a.x) + row * a.x_stride;
            S* dx = a.dx == nullptr ? nullptr : static_cast<S*>(a.dx) + row * D;
            each_vector<A>(D, [&](int64_t d, auto n) {
                const vec<A> g = load(dy + d, n) * gelu_derivative<A>(load(x + d, n) + load(bias + d, n));
                if (dx != nullptr) {
                    store(dx + d, g, n);
                }
                if (partial != nullptr) {
                    store(partial + d, first ? g : load(partial + d, n) + g, n);
                }
            });
        }
    });
    if (a.dbias != nullptr) {
        sum_over_chunks(static_cast<A*>(a.dbias), partials.as<A>(), D, plan, D, a.threads);
    }
}

}  // namespace

void bias_gelu_forward(const BiasGeluForward& a) {
    with_storage(a.dtype, [&](auto storage) { forward<decltype(storage)>(a); });
}

void bias_gelu_backward(const BiasGeluBackward& a) {
    with_storage(a.dtype, [&](auto storage) { backward<decltype(storage)>(a); });
}

}  // namespace camtl::cpu::CAMTL_ISA
