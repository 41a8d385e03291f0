// camtl._native.cuda: as bindings.cpp, for kernels that are launched on a stream.
#include "bindings.h"

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
                             Address beta, Address y, const py::tuple& where) {
        const camtl::FilmForward a{static_cast<camtl::DType>(dtype), layout(rows), D, at(x), x_stride, at(gamma),
                                   at(beta), at(y), 1};
        const camtl::cuda::Launch l = launch(where);
        py::gil_scoped_release release;
        camtl::cuda::film_forward(a, l);
    });
    m.def("film_backward_workspace", [](const py::tuple& rows, int64_t D) {
        camtl::FilmBackward a{};
        a.layout = layout(rows);
        a.features = D;
        a.dbeta = a.dgamma = &a;  // wanted
        return camtl::cuda::film_backward_workspace(a);
    });
    m.def("film_backward", [](int dtype, const py::tuple& rows, int64_t D, Address dy, int64_t dy_stride, Address x,
                              int64_t x_stride, Address gamma, Address dx, Address dgamma, Address dbeta,
                              Address workspace, const py::tuple& where) {
        const camtl::FilmBackward a{static_cast<camtl::DType>(dtype), layout(rows), D, at(dy), dy_stride, at(x),
                                    x_stride, at(gamma), at(dx), at(dgamma), at(dbeta), 1};
        const camtl::cuda::Launch l = launch(where);
        py::gil_scoped_release release;
        camtl::cuda::film_backward(a, at(workspace), l);
    });
}
// clang-format on

}  // namespace

void camtl_bind_cuda(py::module_& m) { bind_film(m); }
