// The CUDA ops of csrc/ops_cuda.cu, host side and kernels, on the CPU: torch.ops.<LEAML_LIBRARY>.* for pytest.
#include "cuda_emulation.h"

#include "kernels.cuh"
#include "ops_common.h"

namespace leaml {

constexpr bool kOnDevice = false;

struct Device {
  int32_t index = -1;
  explicit Device(const Tensor&) {}
  // all ones, so NaN: what is read without having been written shows
  Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef size, ScalarType dtype) const {
    Tensor result = torch::stable::empty(size, dtype);
    memset(result.data_ptr(), 0xff, size_t(result.numel()) * (dtype == ScalarType::Float ? 4 : 1));
    return result;
  }
};

inline long launches;

template <class Kernel, class... Args>
void launch(const Device&, unsigned blocks, Kernel kernel, const Args&... args) {
  ++launches;
  emulation::launch(blocks, cuda::kThreads, kernel, args...);
}

}  // namespace leaml

#define LEAML_EMULATED
#define LEAML_KEY CPU
#include "ops_cuda.cu"

__global__ void broken_barrier() {
  if (threadIdx.x % 32 < 16) __syncwarp();
}

extern "C" {
long leaml_vector_accesses() { return leaml::cuda::vector_accesses; }
long leaml_launches() { return leaml::launches; }
void leaml_row_coefficients(double lr, double beta1, double beta2, double decay, float step, float* out) {
  const leaml::Hyper h = leaml::hyper_of(lr, beta1, beta2, 1e-8, decay, false, false, 0);
  const leaml::RowCoefficients c = leaml::row_coefficients(h, lr, step);
  out[0] = c.decay, out[1] = c.step_size, out[2] = c.inverse_root2;
}
const char* leaml_broken_barrier() {
  try {
    emulation::launch(1, 32, broken_barrier);
  } catch (const std::runtime_error& error) {
    return emulation::failure;
  }
  return nullptr;
}
}
