// Test only: the CUDA half of camtl._native as a module that runs on the CPU.
#include <pybind11/pybind11.h>

void camtl_bind_cuda(pybind11::module_& m);

PYBIND11_MODULE(cuda_emulated, m) { camtl_bind_cuda(m); }
