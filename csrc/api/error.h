// Failure texts: "op: argument: expected ..., got ...".
#pragma once

#include <string>

#include "twinfuse/core.h"

namespace twinfuse {

// Keeps the text for twinfuse_last_error() and returns `status`.
TwinfuseStatus fail(TwinfuseStatus status, std::string text);

TwinfuseStatus invalid(const char* op, const char* argument, const std::string& expected,
                       const std::string& got);

}  // namespace twinfuse
