// Failures inside of a call, as the C interface has them.
#pragma once

#include "api/error.h"
#include "gpu/product.h"

namespace twinfuse::gpu {

// Runs `body(call)` with the call's context current. `op` begins every text.
template <class Body>
TwinfuseStatus serve(const char* op, int32_t dtype, const TwinfuseContext& context,
                     const Body& body) {
  const auto text = [op](const std::exception& error) {
    return std::string(op) + ": " + error.what();
  };
  try {
    if (dtype == TWINFUSE_FLOAT64) throw Unsupported("no GPU kernel takes float64");
    const Current current(context);
    const bool whole = dtype == TWINFUSE_FLOAT32;
    const Type type = whole ? Type::fp32 : dtype == TWINFUSE_BFLOAT16 ? Type::bf16 : Type::fp16;
    const Precision precision = !whole                                         ? Precision::ieee
                                : context.precision == TWINFUSE_PRECISION_TF32 ? Precision::tf32
                                                                               : Precision::tf32x3;
    body(Call{context, current.device(), type, precision});
    return TWINFUSE_OK;
  } catch (const Unsupported& error) {
    return fail(TWINFUSE_UNSUPPORTED, text(error));
  } catch (const DriverError& error) {
    return fail(TWINFUSE_DRIVER_ERROR, text(error));
  } catch (const std::logic_error& error) {
    // Arguments that a kernel was not compiled for: nothing was launched with them.
    return fail(TWINFUSE_UNSUPPORTED, text(error));
  } catch (const OutOfMemory&) {
    return out_of_memory(op);
  }
}

}  // namespace twinfuse::gpu
