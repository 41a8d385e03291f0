// The instruction sets kernels are compiled for, and the list of kernels that dispatch.cpp picks from.
#pragma once

#include "camtl/bias_gelu.h"
#include "camtl/conditional_attention.h"
#include "camtl/conditional_layer_norm.h"
#include "camtl/film.h"
#include "camtl/multitask_loss.h"

// One line per kernel: its name and its argument.
#define CAMTL_CPU_KERNELS(KERNEL)                                         \
    KERNEL(film_forward, FilmForward)                                     \
    KERNEL(film_backward, FilmBackward)                                   \
    KERNEL(conditional_layer_norm_forward, ConditionalLayerNormForward)   \
    KERNEL(conditional_layer_norm_backward, ConditionalLayerNormBackward) \
    KERNEL(conditional_attention_forward, ConditionalAttentionForward)    \
    KERNEL(conditional_attention_backward, ConditionalAttentionBackward)  \
    KERNEL(bias_gelu_forward, BiasGeluForward)                            \
    KERNEL(bias_gelu_backward, BiasGeluBackward)                          \
    KERNEL(multitask_loss_forward, MultitaskLossForward)                  \
    KERNEL(multitask_loss_backward, MultitaskLossBackward)

namespace camtl::cpu {

// Names of the instruction sets this build has and this processor runs, the widest first.
const char* const* available_isas();  // ends with null
const char* current_isa();

// For tests and comparisons. False if `name` is none of available_isas(). Not for use while kernels run.
bool set_isa(const char* name);

}  // namespace camtl::cpu
