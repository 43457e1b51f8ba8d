// The ops on a GPU. All of them return as the C interface does, with the text of a failure left.
#pragma once

#include "api/calls.h"

namespace twinfuse::gpu {

TwinfuseStatus linear_relu_forward(const LinearReluForward& op, int32_t dtype,
                                   const TwinfuseContext& context);
TwinfuseStatus linear_relu_backward(const LinearReluBackward& op, int32_t dtype,
                                    const TwinfuseContext& context);
TwinfuseStatus conv_relu_forward(const ConvReluForward& op, const char* name, int32_t dtype,
                                 const TwinfuseContext& context);
TwinfuseStatus conv_relu_backward(const ConvReluBackward& op, const char* name, int32_t dtype,
                                  const TwinfuseContext& context);

TwinfuseStatus lstm_forward(const LstmForward& op, const char* name, int32_t dtype,
                            const TwinfuseContext& context);
TwinfuseStatus lstm_backward(const LstmBackward& op, const char* name, int32_t dtype,
                             const TwinfuseContext& context);
// Which of them takes the steps of a call of these sizes.
TwinfuseStatus lstm_kernel(const LstmCall& sizes, bool backward, int32_t dtype,
                           const TwinfuseContext& context, const char** kernel);

}  // namespace twinfuse::gpu
