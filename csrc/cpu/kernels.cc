// The kernel table of one instruction set. Compiled once per set, with its flags and TWINFUSE_ISA.
#include "cpu/kernels.h"

#include "cpu/conv_relu.h"
#include "cpu/linear_relu.h"
#include "cpu/lstm.h"

#define TWINFUSE_STRING_OF(x) #x
#define TWINFUSE_STRING(x) TWINFUSE_STRING_OF(x)

// Sets with instructions for bfloat16 alone leave the other types to the next set.
#if defined(TWINFUSE_DOT_BF16)
#define TWINFUSE_KERNELS(op) {nullptr, nullptr, op<Bf16>, nullptr}
#else
#define TWINFUSE_KERNELS(op) {op<float>, op<double>, op<Bf16>, op<F16>}
#endif

namespace twinfuse::cpu::TWINFUSE_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    TWINFUSE_STRING(TWINFUSE_ISA),          TWINFUSE_KERNELS(linear_relu_forward),
    TWINFUSE_KERNELS(linear_relu_backward), TWINFUSE_KERNELS(conv_relu_forward),
    TWINFUSE_KERNELS(conv_relu_backward),   TWINFUSE_KERNELS(lstm_forward),
    TWINFUSE_KERNELS(lstm_backward),
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
