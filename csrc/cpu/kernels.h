// The table of CPU kernels of each instruction set.
#pragma once

#include "api/calls.h"

namespace twinfuse::cpu {

// Indexed by TwinfuseDtype. Matrices that are written have unit stride along one of their
// dimensions; images and `grad_bias` may have any strides. Those that a set has not are those of
// the next one (isa.cc).
struct Kernels {
  const char* isa;
  TwinfuseStatus (*linear_relu_forward[TWINFUSE_DTYPE_COUNT])(const LinearReluForward&,
                                                              const TwinfuseContext&);
  TwinfuseStatus (*linear_relu_backward[TWINFUSE_DTYPE_COUNT])(const LinearReluBackward&,
                                                               const TwinfuseContext&);
  TwinfuseStatus (*conv_relu_forward[TWINFUSE_DTYPE_COUNT])(const ConvReluForward&,
                                                            const TwinfuseContext&);
  TwinfuseStatus (*conv_relu_backward[TWINFUSE_DTYPE_COUNT])(const ConvReluBackward&,
                                                             const TwinfuseContext&);
  TwinfuseStatus (*lstm_forward[TWINFUSE_DTYPE_COUNT])(const LstmForward&, const TwinfuseContext&);
  TwinfuseStatus (*lstm_backward[TWINFUSE_DTYPE_COUNT])(const LstmBackward&,
                                                        const TwinfuseContext&);
};

// The table for this processor (or for TWINFUSE_ISA); see twinfuse_isa().
const Kernels& active_kernels();

}  // namespace twinfuse::cpu
