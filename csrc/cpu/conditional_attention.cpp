#include "camtl/conditional_attention.h"
#include "parallel.h"
namespace camtl::cpu::CAMTL_ISA {
void conditional_attention_forward(const ConditionalAttentionForward&) {}
void conditional_attention_backward(const ConditionalAttentionBackward&) {}
}
