// GPU kernels, by the functions that the ops call.
#include "gpu/image.h"
#include "gpu/launch.h"
#include "modules.h"

namespace py = pybind11;
using namespace twinfuse::gpu;

namespace {

TwinfuseContext context_of(int index, uintptr_t stream) {
  TwinfuseContext context = {};
  context.device = TWINFUSE_CUDA;
  context.device_index = index;
  context.stream = reinterpret_cast<void*>(stream);
  return context;
}

py::list kernels() {
  py::list rows;
  for (int i = 0; i < kCudaKernelCount; i++) {
    const CudaKernel& kernel = kCudaKernels[i];
    rows.append(py::make_tuple(kernel.arch, kernel.entry, kernel.registers, kernel.image.offset));
  }
  return rows;
}

// What `packed` holds, in a buffer that ends where it ends.
py::bytes unpack_bytes(const std::string& packed, uint32_t size, const char* kernel) {
  const std::vector<unsigned char> block(packed.begin(), packed.end());
  const auto code = unpack(block.data(), {0, static_cast<uint32_t>(block.size()), size}, kernel);
  return py::bytes(reinterpret_cast<const char*>(code.data()), code.size());
}

int resident(int index, uintptr_t stream, const char* entry, int threads, uint32_t shared) {
  const py::gil_scoped_release others_run;
  const Current current(context_of(index, stream));
  return current.device().cuda_kernel(entry, threads, shared).resident;
}

void launch(int index, uintptr_t stream, const char* entry, int threads, uint32_t shared,
            int64_t blocks, const std::string& arguments) {
  const TwinfuseContext context = context_of(index, stream);
  const Current current(context);
  Device& device = current.device();
  launch_cuda(device, device.cuda_kernel(entry, threads, shared), entry, {Blocks::all, blocks},
              threads, shared, arguments.data(), context.stream);
}

void set_bits_of(int index, uintptr_t stream, uintptr_t words, int64_t count) {
  const TwinfuseContext context = context_of(index, stream);
  const Current current(context);
  set_bits(current.device(), reinterpret_cast<void*>(words), count, context.stream);
}

// On a device that need not have kernels of any other kind.
void find(int index, const char* entry) {
  std::string why;
  const Driver* found = driver(&why);
  if (!found) throw Unsupported(why);
  Device(*found, nullptr, index).cuda_kernel(entry, 32, 0);
}

}  // namespace

void define_gpu(py::module_& m) {
  m.def("cuda_kernels", &kernels);
  m.def("unpack", &unpack_bytes);
  m.def("cuda_resident", &resident);
  m.def("cuda_launch", &launch);
  m.def("cuda_set_bits", &set_bits_of);
  m.def("cuda_find", &find);
}
