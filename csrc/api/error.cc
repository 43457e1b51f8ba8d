#include "api/error.h"

#include <utility>

namespace twinfuse {
namespace {

thread_local std::string last_error;

}  // namespace

TwinfuseStatus fail(TwinfuseStatus status, std::string text) {
  last_error = std::move(text);
  return status;
}

TwinfuseStatus invalid(const char* op, const char* argument, const std::string& expected,
                       const std::string& got) {
  return fail(TWINFUSE_INVALID_ARGUMENT,
              std::string(op) + ": " + argument + ": expected " + expected + ", got " + got);
}

TwinfuseStatus out_of_memory(const char* op) {
  return fail(TWINFUSE_OUT_OF_MEMORY, std::string(op) + ": the framework has no memory to lend");
}

}  // namespace twinfuse

extern "C" const char* twinfuse_last_error(void) { return twinfuse::last_error.c_str(); }

extern "C" int32_t twinfuse_abi_version(void) { return TWINFUSE_ABI_VERSION; }

extern "C" const char* twinfuse_version(void) { return TWINFUSE_VERSION; }
