// Failure texts: "op: argument: expected ..., got ...".
#pragma once

#include <exception>
#include <string>

#include "twinfuse/core.h"

namespace twinfuse {

// Keeps the text for twinfuse_last_error() and returns `status`.
TwinfuseStatus fail(TwinfuseStatus status, std::string text);

TwinfuseStatus invalid(const char* op, const char* argument, const std::string& expected,
                       const std::string& got);

TwinfuseStatus out_of_memory(const char* op);

// Exceptions (no memory for a message, say) must not cross the C interface.
template <class Body>
TwinfuseStatus guarded(const Body& body) {
  try {
    return body();
  } catch (const std::exception&) {
    return fail(TWINFUSE_OUT_OF_MEMORY, "");  // an empty text needs no memory
  }
}

}  // namespace twinfuse
