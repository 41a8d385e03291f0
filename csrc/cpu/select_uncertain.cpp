#include "camtl/select_uncertain.h"
namespace camtl::cpu {
void select_uncertain_forward(const SelectUncertainForward&) {}
void select_uncertain_backward(const SelectUncertainBackward&) {}
}
