// camtl._native.cuda: as bindings.cpp, for kernels that are launched on a stream.
#include "bindings.h"

#include "camtl/conditional_attention.h"
#include "camtl/conditional_layer_norm.h"
#include "camtl/film.h"

using namespace camtl::bindings;

namespace {

// (device, stream, dtype of tables, task ids are int32)
camtl::cuda::Launch launch(const py::tuple& t) {
    return {t[0].cast<int>(), at(t[1].cast<Address>()), static_cast<camtl::DType>(t[2].cast<int>()), t[3].cast<bool>()};
}

// clang-format off: it would put each member of a struct on a line of its own
void bind_film(py::module_& m) {
    m.def("film_forward", [](int dtype, const py::tuple& rows, int64_t D, Address x, int64_t x_stride, Address gamma,
                             int64_t gamma_stride, Address beta, int64_t beta_stride, Address y,
                             const py::tuple& where) {
        const camtl::FilmForward a{static_cast<camtl::DType>(dtype), layout(rows), D, at(x), x_stride, at(gamma),
                                   at(beta), at(y), 1};
        const camtl::cuda::Launch l = launch(where);
        py::gil_scoped_release release;
        camtl::cuda::film_forward(a, {gamma_stride, beta_stride}, l);
    });
    m.def("film_backward_workspace", [](const py::tuple& rows, int64_t D, int device) {
        camtl::FilmBackward a{};
        a.layout = layout(rows);
        a.features = D;
        a.dbeta = a.dgamma = &a;  // wanted
        return camtl::cuda::film_backward_workspace(a, device);
    });
    m.def("film_backward", [](int dtype, const py::tuple& rows, int64_t D, Address dy, int64_t dy_stride, Address x,
                              int64_t x_stride, Address gamma, int64_t gamma_stride, Address dx, Address dgamma,
                              Address dbeta, Address workspace, const py::tuple& where) {
        const camtl::FilmBackward a{static_cast<camtl::DType>(dtype), layout(rows), D, at(dy), dy_stride, at(x),
                                    x_stride, at(gamma), at(dx), at(dgamma), at(dbeta), 1};
        const camtl::cuda::Launch l = launch(where);
        py::gil_scoped_release release;
        camtl::cuda::film_backward(a, {gamma_stride, 0}, at(workspace), l);
    });
}

// (p, address of seed and offset on the device)
camtl::Dropout dropout_on_device(const py::tuple& t) {
    camtl::Dropout d;
    d.p = t[0].cast<double>();
    d.on_device = at<const int64_t>(t[1].cast<Address>());
    return d;
}

// (narrow, gamma_stride, beta_stride, bias_shift_stride)
camtl::cuda::NormTables norm_tables(const py::tuple& t) {
    return {t[0].cast<unsigned>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>()};
}

void bind_conditional_layer_norm(py::module_& m) {
    m.def("conditional_layer_norm_forward",
          [](int dtype, const py::tuple& rows, int64_t D, Address x, int64_t x_stride, Address residual,
             int64_t residual_stride, Address weight, Address bias, Address gamma, Address beta, Address bias_shift,
             Address x_bias, const py::tuple& tables, const py::tuple& drop, double eps, Address y, Address mean,
             Address rstd, const py::tuple& where) {
              const camtl::ConditionalLayerNormForward a{
                  static_cast<camtl::DType>(dtype), layout(rows), D, at(x), x_stride, at(residual), residual_stride,
                  at(weight), at(bias), at(gamma), at(beta), at(bias_shift), at(x_bias), dropout_on_device(drop), eps,
                  at(y), at(mean), at(rstd), 1};
              const camtl::cuda::NormTables kinds = norm_tables(tables);
              const camtl::cuda::Launch l = launch(where);
              py::gil_scoped_release release;
              camtl::cuda::conditional_layer_norm_forward(a, kinds, l);
          });
    // which gradients are wanted, in bits, as the struct has them: dweight, dbias, dgamma, dbeta, dbias_shift, dx_bias
    m.def("conditional_layer_norm_backward_workspace", [](const py::tuple& rows, int64_t D, unsigned wanted,
                                                          int device) {
        camtl::ConditionalLayerNormBackward a{};
        a.layout = layout(rows);
        a.features = D;
        void** const gradients[] = {&a.dweight, &a.dbias, &a.dgamma, &a.dbeta, &a.dbias_shift, &a.dx_bias};
        for (unsigned i = 0; i < 6; ++i) {
            *gradients[i] = (wanted >> i & 1) != 0 ? &a : nullptr;
        }
        return camtl::cuda::conditional_layer_norm_backward_workspace(a, device);
    });
    m.def("conditional_layer_norm_backward",
          [](int dtype, const py::tuple& rows, int64_t D, Address dy, int64_t dy_stride, Address x, int64_t x_stride,
             Address residual, int64_t residual_stride, Address weight, Address gamma, Address beta, Address x_bias,
             const py::tuple& tables, const py::tuple& drop, Address mean, Address rstd, Address dx,
             Address dresidual, Address dweight, Address dbias, Address dgamma, Address dbeta, Address dbias_shift,
             Address dx_bias, Address workspace, const py::tuple& where) {
              const camtl::ConditionalLayerNormBackward a{
                  static_cast<camtl::DType>(dtype), layout(rows), D, at(dy), dy_stride, at(x), x_stride,
                  at(residual), residual_stride, at(weight), at(gamma), at(beta), at(x_bias),
                  dropout_on_device(drop), at(mean), at(rstd), at(dx), at(dresidual), at(dweight), at(dbias),
                  at(dgamma), at(dbeta), at(dbias_shift), at(dx_bias), 1};
              const camtl::cuda::NormTables kinds = norm_tables(tables);
              const camtl::cuda::Launch l = launch(where);
              py::gil_scoped_release release;
              camtl::cuda::conditional_layer_norm_backward(a, kinds, at(workspace), l);
          });
}

// attention_shape() with dropout's seed and offset on the device
camtl::AttentionShape attention_on_device(const py::tuple& t, const py::tuple& drop) {
    camtl::AttentionShape s = attention_shape(t);
    s.dropout = dropout_on_device(drop);
    return s;
}

void bind_conditional_attention(py::module_& m) {
    m.def("conditional_attention_forward",
          [](const py::tuple& shape, const py::tuple& drop, const py::tuple& q, const py::tuple& k, const py::tuple& v,
             Address out, Address lse, const py::tuple& where) {
              const camtl::ConditionalAttentionForward a{attention_on_device(shape, drop), strided(q), strided(k),
                                                         strided(v), at(out), at(lse)};
              const camtl::cuda::Launch l = launch(where);
              py::gil_scoped_release release;
              camtl::cuda::conditional_attention_forward(a, l);
          });
    m.def("conditional_attention_backward_workspace", [](const py::tuple& shape, bool bias_gradients, int device) {
        return camtl::cuda::conditional_attention_backward_workspace(attention_shape(shape), bias_gradients, device);
    });
    m.def("conditional_attention_backward",
          [](const py::tuple& shape, const py::tuple& drop, const py::tuple& q, const py::tuple& k, const py::tuple& v,
             const py::tuple& dout, Address lse, const py::tuple& dq, const py::tuple& dk, const py::tuple& dv,
             Address dtable, Address dgamma, Address dbeta, Address workspace, const py::tuple& where) {
              const camtl::ConditionalAttentionBackward a{
                  attention_on_device(shape, drop), strided(q), strided(k), strided(v), strided(dout), at(lse),
                  strided(dq), strided(dk), strided(dv), at(dtable), at(dgamma), at(dbeta)};
              const camtl::cuda::Launch l = launch(where);
              py::gil_scoped_release release;
              camtl::cuda::conditional_attention_backward(a, at(workspace), l);
          });
}
// clang-format on

}  // namespace

void camtl_bind_cuda(py::module_& m) {
    bind_film(m);
    bind_conditional_layer_norm(m);
    bind_conditional_attention(m);
}
