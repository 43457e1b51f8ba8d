// What the core keeps hidden from its users, for tests. Linked with the core's objects, so it has
// kernel counters and a choice of instruction set of its own.
#include "modules.h"
#include "twinfuse/core.h"

PYBIND11_MODULE(native, m) {
  m.def("abi_version", &twinfuse_abi_version);
  m.def("version", &twinfuse_version);
  m.def("isa", &twinfuse_isa);
  m.def("isa_note", &twinfuse_isa_note);
  m.def("built_isas", &twinfuse_built_isas);
  define_gpu(m);
}
