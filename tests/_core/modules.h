// The parts of the test module.
#pragma once

#include <pybind11/pybind11.h>

void define_gpu(pybind11::module_& m);
