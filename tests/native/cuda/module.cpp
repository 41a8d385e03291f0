// Test only: the CUDA half of camtl._native as a module that runs on the CPU, and what tests turn.
#include <pybind11/pybind11.h>

#include "cuda_runtime.h"

void camtl_bind_cuda(pybind11::module_& m);

namespace probes {  // probes.cu
void shuffle(std::uintptr_t out, int columns, unsigned threads);
void chain(std::uintptr_t out, unsigned blocks, unsigned threads);
void wrong(std::uintptr_t out, int what);
void shared_memory(int asked, int bytes);
void product(std::uintptr_t a, std::uintptr_t b, std::uintptr_t c, int dtype);
}  // namespace probes

PYBIND11_MODULE(cuda_emulated, m) {
    camtl_bind_cuda(m);
    m.def("set_reversed", [](bool reversed) { emulation::reversed = reversed; });
    m.def("set_multiprocessors", [](int count) { emulation::multiprocessors = count; });
    pybind11::module_ p = m.def_submodule("probes");
    p.def("shuffle", &probes::shuffle);
    p.def("chain", &probes::chain);
    p.def("wrong", &probes::wrong);
    p.def("shared_memory", &probes::shared_memory);
    p.def("product", &probes::product);
}
