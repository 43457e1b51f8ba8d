// The kernel table of one instruction set. Compiled once per set, with its flags and TWINFUSE_ISA.
#include "cpu/kernels.h"

#include "cpu/conv_relu.h"
#include "cpu/linear_relu.h"
#include "cpu/lstm.h"

#define TWINFUSE_STRING_OF(x) #x
#define TWINFUSE_STRING(x) TWINFUSE_STRING_OF(x)

namespace twinfuse::cpu::TWINFUSE_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    TWINFUSE_STRING(TWINFUSE_ISA),
    {linear_relu_forward<float>, linear_relu_forward<double>, linear_relu_forward<Bf16>,
     linear_relu_forward<F16>},
    {linear_relu_backward<float>, linear_relu_backward<double>, linear_relu_backward<Bf16>,
     linear_relu_backward<F16>},
    {conv_relu_forward<float>, conv_relu_forward<double>, conv_relu_forward<Bf16>,
     conv_relu_forward<F16>},
    {conv_relu_backward<float>, conv_relu_backward<double>, conv_relu_backward<Bf16>,
     conv_relu_backward<F16>},
    {lstm_forward<float>, lstm_forward<double>, lstm_forward<Bf16>, lstm_forward<F16>},
    {lstm_backward<float>, lstm_backward<double>, lstm_backward<Bf16>, lstm_backward<F16>},
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
