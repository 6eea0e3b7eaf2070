// leaml_plugin._native: what the package asks the machine without a torch type in between (pybind11).
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

// The instruction set whose clone of cpu_kernels.cpp runs here: as that file chooses it.
std::string instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
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

#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define LEAML_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LEAML_CLONES
#endif

struct Row {
  uint32_t *w, *m, *v;
  const uint32_t* g;
  int64_t words, state_words;  // of w and g, of m and v
};

// Reads g, reads and writes back w, m and v, 64 words of state at a time, asking for what comes `distance` such steps
// later (0: for nothing).
LEAML_CLONES void move_row(const Row& row, const Row& next, uint32_t zero, int64_t distance) {
  const int64_t steps = row.state_words / 64, share = steps > 0 ? row.words / steps : row.words;
  for (int64_t s = 0; s <= steps; ++s) {
    const int64_t b = s * share, e = s < steps ? b + share : row.words;
    const int64_t sb = s * 64, se = s < steps ? sb + 64 : row.state_words;
    const bool own = s + distance < steps;
    const Row& ahead = own ? row : next;
    const int64_t at = own ? s + distance : s + distance - steps;
    if (distance > 0 && at * 64 < ahead.state_words) {
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

  void move(int64_t distance) const {
    if (distance < 0 || distance % 256 != 0)
      throw py::value_error("RowTraffic.move: wanted a distance of 0 or of whole steps of 256 bytes, got " +
                            std::to_string(distance));
    for (size_t i = 0; i < rows_.size(); ++i)
      move_row(rows_[i], rows_[i + 1 < rows_.size() ? i + 1 : i], zero_, distance / 256);
  }

 private:
  std::vector<Row> rows_;
  volatile uint32_t zero_ = 0;  // what a compiler must not know
};

// Streams, for the benchmark's limits: how fast one thread reads two buffers side by side, or rewrites one. A word of
// each line asks for the line 2 KiB later where kPrefetch says so: some machines stream faster with it, some without; and
// some read faster still where it is two pieces of each buffer at once, asked for 1 KiB early.
constexpr int64_t kLine = 16, kChunk = 64, kAhead = 512, kPiece = 2048;  // 32-bit words

template <bool kPrefetch>
inline __attribute__((always_inline)) uint32_t read_both(const uint32_t* __restrict a, const uint32_t* __restrict b,
                                                         int64_t words) {
  uint32_t sums[kChunk] = {};  // as many as keep several vectors of any width going
  int64_t i = 0;
  for (; i + kChunk <= words; i += kChunk) {
    if constexpr (kPrefetch)  // beyond the end it asks for nothing that hurts
      for (int64_t j = 0; j < kChunk; j += kLine) {
        __builtin_prefetch(a + i + j + kAhead);
        __builtin_prefetch(b + i + j + kAhead);
      }
    for (int64_t j = 0; j < kChunk; ++j) sums[j] += a[i + j] ^ b[i + j];
  }
  uint32_t sum = 0;
  for (; i < words; ++i) sum += a[i] ^ b[i];
  for (uint32_t part : sums) sum += part;
  return sum;
}

template <bool kPrefetch>
inline __attribute__((always_inline)) uint32_t read_pieces(const uint32_t* a, const uint32_t* b, int64_t words) {
  uint32_t sums[2][kChunk / 2] = {};
  int64_t base = 0;
  for (; base + 2 * kPiece <= words; base += 2 * kPiece) {
    for (int64_t i = base; i < base + kPiece; i += kChunk / 2) {
      // at the end of a piece what comes is the piece after next
      const int64_t ahead = kAhead / 2 + (i + kAhead / 2 < base + kPiece ? 0 : kPiece);
      for (int64_t q = 0; q < 2; ++q) {
        const uint32_t *__restrict x = a + q * kPiece + i, *__restrict y = b + q * kPiece + i;
        if constexpr (kPrefetch)
          for (int64_t j = 0; j < kChunk / 2; j += kLine) {
            __builtin_prefetch(x + j + ahead);
            __builtin_prefetch(y + j + ahead);
          }
        for (int64_t j = 0; j < kChunk / 2; ++j) sums[q][j] += x[j] ^ y[j];
      }
    }
  }
  uint32_t sum = 0;
  for (; base < words; ++base) sum += a[base] ^ b[base];
  for (const auto& parts : sums)
    for (uint32_t part : parts) sum += part;
  return sum;
}

template <bool kPrefetch>
inline __attribute__((always_inline)) void rewrite(uint32_t* a, int64_t words, uint32_t zero) {
  int64_t i = 0;
  for (; i + kChunk <= words; i += kChunk) {
    if constexpr (kPrefetch)
      for (int64_t j = 0; j < kChunk; j += kLine) __builtin_prefetch(a + i + j + kAhead);
    for (int64_t j = 0; j < kChunk; ++j) a[i + j] ^= zero;
  }
  for (; i < words; ++i) a[i] ^= zero;
}

LEAML_CLONES uint32_t read_plain(const uint32_t* a, const uint32_t* b, int64_t n) { return read_both<false>(a, b, n); }
LEAML_CLONES uint32_t read_ahead(const uint32_t* a, const uint32_t* b, int64_t n) { return read_both<true>(a, b, n); }
LEAML_CLONES uint32_t read_four_plain(const uint32_t* a, const uint32_t* b, int64_t n) { return read_pieces<false>(a, b, n); }
LEAML_CLONES uint32_t read_four_ahead(const uint32_t* a, const uint32_t* b, int64_t n) { return read_pieces<true>(a, b, n); }
LEAML_CLONES void rewrite_plain(uint32_t* a, int64_t n, uint32_t zero) { rewrite<false>(a, n, zero); }
LEAML_CLONES void rewrite_ahead(uint32_t* a, int64_t n, uint32_t zero) { rewrite<true>(a, n, zero); }

void check_buffer(const char* name, bool null, int64_t bytes) {
  if (null || bytes < 0 || bytes % 4 != 0)
    throw py::value_error(std::string(name) + ": wanted addresses and a size that is a multiple of 4, got " +
                          std::to_string(bytes) + " bytes");
}

uint32_t stream_read(uintptr_t a, uintptr_t b, int64_t bytes, bool prefetch, int64_t streams) {
  check_buffer("stream_read", a == 0 || b == 0, bytes);
  if (streams != 2 && streams != 4)
    throw py::value_error("stream_read: wanted 2 or 4 streams, got " + std::to_string(streams));
  const auto *first = reinterpret_cast<const uint32_t*>(a), *second = reinterpret_cast<const uint32_t*>(b);
  const auto two = prefetch ? read_ahead : read_plain, four = prefetch ? read_four_ahead : read_four_plain;
  return (streams == 2 ? two : four)(first, second, bytes / 4);
}

void stream_rewrite(uintptr_t a, int64_t bytes, bool prefetch) {
  check_buffer("stream_rewrite", a == 0, bytes);
  static volatile uint32_t zero = 0;  // what a compiler must not know
  (prefetch ? rewrite_ahead : rewrite_plain)(reinterpret_cast<uint32_t*>(a), bytes / 4, zero);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "What leaml_plugin asks the machine: processor features, and how fast memory moves.";
  py::class_<RowTraffic>(m, "RowTraffic", "The memory traffic of a sparse optimizer step without its arithmetic.")
      .def(py::init<>())
      .def("add", &RowTraffic::add, py::arg("w"), py::arg("g"), py::arg("m"), py::arg("v"), py::arg("row_bytes"),
           py::arg("state_bytes"), "One row by its addresses: weight, gradient, both moments.")
      .def("move", &RowTraffic::move, py::arg("distance") = 2048,
           "Read all gradients; read and write back, unchanged, everything else. What lies `distance` bytes of state "
           "ahead is prefetched; 0 prefetches nothing.");
  m.def("stream_read", &stream_read, py::arg("a"), py::arg("b"), py::arg("bytes"), py::arg("prefetch"),
        py::arg("streams") = 2,
        "Read two buffers of so many bytes side by side, each as one stream or (4 streams) as two; returns the sum of "
        "a ^ b over their 32-bit words.");
  m.def("stream_rewrite", &stream_rewrite, py::arg("a"), py::arg("bytes"), py::arg("prefetch"),
        "Read and write back, unchanged, a buffer of so many bytes.");
  m.def("cpu_features", &cpu_features,
        "dict: instruction_set (which clone of the CPU kernels runs), architecture, avx2, avx512, compiler");
}
