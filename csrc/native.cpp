// leaml_plugin._native: what the package asks the machine without a torch type in between (pybind11).
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

// The instruction set whose clone of cpu_kernels.cpp runs here.
std::string instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return "x86-64-v4";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return "x86-64-v3";
#endif
  return "baseline";
}

py::dict cpu_features() {
  py::dict result;
  result["instruction_set"] = instruction_set();
#if defined(__x86_64__) && defined(__GNUC__)
  result["architecture"] = "x86_64";
  result["avx2"] = bool(__builtin_cpu_supports("avx2"));
  result["avx512"] = bool(__builtin_cpu_supports("avx512f"));
#elif defined(__aarch64__)
  result["architecture"] = "aarch64";
#else
  result["architecture"] = "other";
#endif
  result["compiler"] = __VERSION__;
  return result;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "What leaml_plugin asks the machine: processor features and the compiler of the kernels.";
  m.def("cpu_features", &cpu_features,
        "dict: instruction_set (which clone of the CPU kernels runs), architecture, avx2, avx512, compiler");
}
