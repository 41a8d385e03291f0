// The Python module camtl._native. Tensors cross this border as addresses (0: none) with sizes and strides
// counted in elements; the callers in camtl/native/ allocate outputs and check what they pass. The interpreter
// lock is released while a kernel runs. C++ exceptions arrive as ValueError, MemoryError or RuntimeError.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "camtl/bias_gelu.h"
#include "camtl/conditional_attention.h"
#include "camtl/conditional_layer_norm.h"
#include "camtl/film.h"
#include "camtl/multitask_loss.h"
#include "camtl/select_uncertain.h"
#include "cpu/isa.h"

using namespace camtl::bindings;

namespace {

// clang-format off: it would put each member of a struct on a line of its own
void bind_film(py::module_& m) {
    m.def("film_forward", [](int dtype, const py::tuple& rows, int64_t D, Address x, int64_t x_stride, Address gamma,
                             Address beta, Address y, int threads) {
        const camtl::FilmForward a{static_cast<camtl::DType>(dtype), layout(rows), D, at(x), x_stride, at(gamma),
                                   at(beta), at(y), threads};
        py::gil_scoped_release release;
        camtl::cpu::film_forward(a);
    });
    m.def("film_backward", [](int dtype, const py::tuple& rows, int64_t D, Address dy, int64_t dy_stride, Address x,
                              int64_t x_stride, Address gamma, Address dx, Address dgamma, Address dbeta,
                              int threads) {
        const camtl::FilmBackward a{static_cast<camtl::DType>(dtype), layout(rows), D, at(dy), dy_stride, at(x),
                                    x_stride, at(gamma), at(dx), at(dgamma), at(dbeta), threads};
        py::gil_scoped_release release;
        camtl::cpu::film_backward(a);
    });
}

void bind_conditional_layer_norm(py::module_& m) {
    m.def("conditional_layer_norm_forward",
          [](int dtype, const py::tuple& rows, int64_t D, Address x, int64_t x_stride, Address residual,
             int64_t residual_stride, Address weight, Address bias, Address gamma, Address beta, Address bias_shift,
             Address x_bias, const py::tuple& drop, double eps, Address y, Address mean, Address rstd, int threads) {
              const camtl::ConditionalLayerNormForward a{
                  static_cast<camtl::DType>(dtype), layout(rows), D, at(x), x_stride, at(residual), residual_stride,
                  at(weight), at(bias), at(gamma), at(beta), at(bias_shift), at(x_bias), dropout(drop), eps, at(y),
                  at(mean), at(rstd), threads};
              py::gil_scoped_release release;
              camtl::cpu::conditional_layer_norm_forward(a);
          });
    m.def("conditional_layer_norm_backward",
          [](int dtype, const py::tuple& rows, int64_t D, Address dy, int64_t dy_stride, Address x, int64_t x_stride,
             Address residual, int64_t residual_stride, Address weight, Address gamma, Address beta, Address x_bias,
             const py::tuple& drop, Address mean, Address rstd, Address dx, Address dresidual, Address dweight,
             Address dbias, Address dgamma, Address dbeta, Address dbias_shift, Address dx_bias, int threads) {
              const camtl::ConditionalLayerNormBackward a{
                  static_cast<camtl::DType>(dtype), layout(rows), D, at(dy), dy_stride, at(x), x_stride,
                  at(residual), residual_stride, at(weight), at(gamma), at(beta), at(x_bias), dropout(drop),
                  at(mean), at(rstd), at(dx), at(dresidual), at(dweight), at(dbias), at(dgamma), at(dbeta),
                  at(dbias_shift), at(dx_bias), threads};
              py::gil_scoped_release release;
              camtl::cpu::conditional_layer_norm_backward(a);
          });
}

void bind_conditional_attention(py::module_& m) {
    m.def("conditional_attention_forward", [](const py::tuple& shape, const py::tuple& q, const py::tuple& k,
                                              const py::tuple& v, Address out, Address lse) {
        const camtl::ConditionalAttentionForward a{attention_shape(shape), strided(q), strided(k), strided(v),
                                                   at(out), at(lse)};
        py::gil_scoped_release release;
        camtl::cpu::conditional_attention_forward(a);
    });
    m.def("conditional_attention_backward",
          [](const py::tuple& shape, const py::tuple& q, const py::tuple& k, const py::tuple& v, const py::tuple& dout,
             Address lse, const py::tuple& dq, const py::tuple& dk, const py::tuple& dv, Address dtable,
             Address dgamma, Address dbeta) {
              const camtl::ConditionalAttentionBackward a{
                  attention_shape(shape), strided(q), strided(k), strided(v), strided(dout), at(lse), strided(dq),
                  strided(dk), strided(dv), at(dtable), at(dgamma), at(dbeta)};
              py::gil_scoped_release release;
              camtl::cpu::conditional_attention_backward(a);
          });
}

void bind_bias_gelu(py::module_& m) {
    m.def("bias_gelu_forward", [](int dtype, int64_t rows, int64_t D, Address x, int64_t x_stride, Address bias,
                                  Address y, int threads) {
        const camtl::BiasGeluForward a{static_cast<camtl::DType>(dtype), rows, D, at(x), x_stride, at(bias), at(y),
                                       threads};
        py::gil_scoped_release release;
        camtl::cpu::bias_gelu_forward(a);
    });
    m.def("bias_gelu_backward", [](int dtype, int64_t rows, int64_t D, Address dy, int64_t dy_stride, Address x,
                                   int64_t x_stride, Address bias, Address dx, Address dbias, int threads) {
        const camtl::BiasGeluBackward a{static_cast<camtl::DType>(dtype), rows, D, at(dy), dy_stride, at(x), x_stride,
                                        at(bias), at(dx), at(dbias), threads};
        py::gil_scoped_release release;
        camtl::cpu::bias_gelu_backward(a);
    });
}

// (dtype, batch, features, sizes, loss_types, task_ids, x, x_stride, weight, labels, label_columns, threads);
// the two vectors must outlive the result.
camtl::MultitaskHeads multitask_heads(const py::tuple& t, const std::vector<int64_t>& sizes,
                                      const std::vector<int64_t>& loss_types) {
    if (sizes.size() != loss_types.size() || sizes.empty()) {
        throw std::invalid_argument("head sizes and loss types must have one entry per task");
    }
    camtl::MultitaskHeads h{};
    h.dtype = static_cast<camtl::DType>(t[0].cast<int>());
    h.batch = t[1].cast<int64_t>();
    h.features = t[2].cast<int64_t>();
    h.tasks = static_cast<int64_t>(sizes.size());
    for (const int64_t size : sizes) {
        h.max_size = size > h.max_size ? size : h.max_size;
    }
    h.sizes = sizes.data();
    h.loss_types = loss_types.data();
    h.task_ids = at<const int64_t>(t[5].cast<Address>());
    h.x = at<const void>(t[6].cast<Address>());
    h.x_stride = t[7].cast<int64_t>();
    h.weight = at<const void>(t[8].cast<Address>());
    h.labels = at<const double>(t[9].cast<Address>());
    h.label_columns = t[10].cast<int64_t>();
    h.threads = t[11].cast<int>();
    return h;
}

void bind_multitask_loss(py::module_& m) {
    m.def("multitask_loss_forward", [](const py::tuple& heads, Address bias, Address loss, Address logits,
                                       Address entropy, Address z) {
        const auto sizes = heads[3].cast<std::vector<int64_t>>(), kinds = heads[4].cast<std::vector<int64_t>>();
        const camtl::MultitaskLossForward a{multitask_heads(heads, sizes, kinds), at(bias), at(loss), at(logits),
                                            at(entropy), at(z)};
        py::gil_scoped_release release;
        camtl::cpu::multitask_loss_forward(a);
    });
    m.def("multitask_loss_backward", [](const py::tuple& heads, Address z, Address dloss, Address dlogits,
                                        Address dentropy, Address dx, Address dweight, Address dbias) {
        const auto sizes = heads[3].cast<std::vector<int64_t>>(), kinds = heads[4].cast<std::vector<int64_t>>();
        const camtl::MultitaskLossBackward a{multitask_heads(heads, sizes, kinds), at(z), at(dloss), at(dlogits),
                                             at(dentropy), at(dx), at(dweight), at(dbias)};
        py::gil_scoped_release release;
        camtl::cpu::multitask_loss_backward(a);
    });
}

using Ints = std::vector<int64_t>;

void bind_select_uncertain(py::module_& m) {
    // borrow and reserve: a list of one int per task, or empty for none
    m.def("select_uncertain_forward", [](bool is_double, int64_t candidates, int64_t tasks, int64_t places,
                                         bool reference_score, Address entropy, Address task_ids, const Ints& borrow,
                                         const Ints& reserve, Address indices, Address scores) {
        const camtl::SelectUncertainForward a{is_double, candidates, tasks, places, reference_score, at(entropy),
                                              at<const int64_t>(task_ids), borrow.empty() ? nullptr : borrow.data(),
                                              reserve.empty() ? nullptr : reserve.data(), at<int64_t>(indices),
                                              at(scores)};
        py::gil_scoped_release release;
        camtl::cpu::select_uncertain_forward(a);
    });
    m.def("select_uncertain_backward", [](bool is_double, int64_t candidates, int64_t tasks, bool reference_score,
                                          Address entropy, Address task_ids, const Ints& borrow, Address dscores,
                                          Address dentropy) {
        const camtl::SelectUncertainBackward a{is_double, candidates, tasks, reference_score, at(entropy),
                                               at<const int64_t>(task_ids), borrow.empty() ? nullptr : borrow.data(),
                                               at(dscores), at(dentropy)};
        py::gil_scoped_release release;
        camtl::cpu::select_uncertain_backward(a);
    });
}
// clang-format on

}  // namespace

// Defined in cuda/bindings.cpp where the build has CUDA.
#ifdef CAMTL_CUDA
void camtl_bind_cuda(py::module_& m);
#endif

PYBIND11_MODULE(_native, m) {
    m.doc() = "camtl's compiled kernels: cpu, and cuda where the build has it. Called by camtl.native only.";
    py::module_ cpu = m.def_submodule("cpu", "Kernels for CPU tensors.");
    bind_film(cpu);
    bind_conditional_layer_norm(cpu);
    bind_conditional_attention(cpu);
    bind_bias_gelu(cpu);
    bind_multitask_loss(cpu);
    bind_select_uncertain(cpu);
    cpu.def("available_isas", [] {
        std::vector<std::string> names;
        for (const char* const* name = camtl::cpu::available_isas(); *name != nullptr; ++name) {
            names.emplace_back(*name);
        }
        return names;
    });
    cpu.def("isa", [] { return std::string(camtl::cpu::current_isa()); });
    cpu.def("set_isa", [](const std::string& name) {
        if (!camtl::cpu::set_isa(name.c_str())) {
            throw std::invalid_argument("set_isa: " + name + " is not available here");
        }
    });
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
#ifdef CAMTL_CUDA
    py::module_ cuda = m.def_submodule("cuda", "Kernels for CUDA tensors.");
    camtl_bind_cuda(cuda);
    m.attr("cuda_architectures") = CAMTL_CUDA_ARCHITECTURES;
#else
    m.attr("cuda_architectures") = "";
#endif
    m.attr("cuda_reason") = CAMTL_CUDA_REASON;  // why there are no CUDA kernels
}
