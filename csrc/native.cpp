// leaml_plugin._native: what the package asks the machine without a torch type in between (pybind11).
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

// The instruction set whose clone of cpu_kernels.cpp runs here: as that file chooses it.
std::string instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
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

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LEAML_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LEAML_CLONES
#endif

struct Row {
  uint32_t *w, *m, *v;
  const uint32_t* g;
  int64_t words, state_words;  // of w and g, of m and v
};

// Reads g, reads and writes back w, m and v, 64 words of state at a time, asking for what comes 2 KB later.
LEAML_CLONES void move_row(const Row& row, const Row& next, uint32_t zero) {
  const int64_t steps = row.state_words / 64, share = steps > 0 ? row.words / steps : row.words;
  for (int64_t s = 0; s <= steps; ++s) {
    const int64_t b = s * share, e = s < steps ? b + share : row.words;
    const int64_t sb = s * 64, se = s < steps ? sb + 64 : row.state_words;
    const bool own = s + 8 < steps;
    const Row& ahead = own ? row : next;
    const int64_t at = own ? s + 8 : s + 8 - steps;
    if (at * 64 < ahead.state_words) {
      for (int64_t i = 0; i < share; i += 16) __builtin_prefetch(ahead.w + at * share + i);
      for (int64_t i = 0; i < share; i += 16) __builtin_prefetch(ahead.g + at * share + i);
      for (int64_t i = 0; i < 64; i += 16) __builtin_prefetch(ahead.m + at * 64 + i);
      for (int64_t i = 0; i < 64; i += 16) __builtin_prefetch(ahead.v + at * 64 + i);
    }
    uint32_t *__restrict w = row.w, *__restrict m = row.m, *__restrict v = row.v;
    const uint32_t* __restrict g = row.g;
    for (int64_t i = b; i < e; ++i) w[i] ^= g[i] & zero;
    for (int64_t i = sb; i < se; ++i) m[i] ^= zero;
    for (int64_t i = sb; i < se; ++i) v[i] ^= zero;
  }
}

// The memory traffic of a sparse step without its arithmetic, for the benchmark: the limit that scattered rows set.
// Values stay what they are. The addresses must stay valid as long as `move` is called.
class RowTraffic {
 public:
  void add(uintptr_t w, uintptr_t g, uintptr_t m, uintptr_t v, int64_t row_bytes, int64_t state_bytes) {
    if (w == 0 || g == 0 || m == 0 || v == 0 || row_bytes < 0 || row_bytes % 4 != 0 || state_bytes < 0 ||
        state_bytes % 4 != 0)
      throw py::value_error("RowTraffic.add: wanted four addresses and sizes that are multiples of 4, got " +
                            std::to_string(row_bytes) + " and " + std::to_string(state_bytes) + " bytes");
    rows_.push_back({reinterpret_cast<uint32_t*>(w), reinterpret_cast<uint32_t*>(m), reinterpret_cast<uint32_t*>(v),
                     reinterpret_cast<const uint32_t*>(g), row_bytes / 4, state_bytes / 4});
  }

  void move() const {
    for (size_t i = 0; i < rows_.size(); ++i) move_row(rows_[i], rows_[i + 1 < rows_.size() ? i + 1 : i], zero_);
  }

 private:
  std::vector<Row> rows_;
  volatile uint32_t zero_ = 0;  // what a compiler must not know
};

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "What leaml_plugin asks the machine: processor features, and how fast memory moves.";
  py::class_<RowTraffic>(m, "RowTraffic", "The memory traffic of a sparse optimizer step without its arithmetic.")
      .def(py::init<>())
      .def("add", &RowTraffic::add, py::arg("w"), py::arg("g"), py::arg("m"), py::arg("v"), py::arg("row_bytes"),
           py::arg("state_bytes"), "One row by its addresses: weight, gradient, both moments.")
      .def("move", &RowTraffic::move, "Read all gradients; read and write back, unchanged, everything else.");
  m.def("cpu_features", &cpu_features,
        "dict: instruction_set (which clone of the CPU kernels runs), architecture, avx2, avx512, compiler");
}
