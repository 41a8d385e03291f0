#include "camtl/conditional_layer_norm.h"
#include "parallel.h"
namespace camtl::cpu::CAMTL_ISA {
void conditional_layer_norm_forward(const ConditionalLayerNormForward&) {}
void conditional_layer_norm_backward(const ConditionalLayerNormBackward&) {}
}
