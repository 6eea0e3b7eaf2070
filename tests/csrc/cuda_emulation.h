// Runs CUDA device code on the CPU: one fiber a thread, blocks one after another.
//
// Catches: barriers and shuffles that not all lanes reach together, vector accesses off their alignment, and, through
// the address sanitizer, reads and writes out of bounds. Does not see: races between blocks, coalescing, speed.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kWarpSize = 32;
constexpr size_t kStack = 1 << 17;  // kernel arguments alone are 32 KB
enum class At { running, warp_barrier, block_barrier, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  At at = At::running;
  const void* place = nullptr;  // which barrier
};

inline std::vector<Fiber>* fibers;
inline int current;
inline ucontext_t scheduler;
inline std::function<void()>* body;
inline uint32_t exchange[64][kWarpSize];
inline const char* failure;

inline void entry() {
  (*body)();
  Fiber& f = (*fibers)[size_t(current)];
  f.at = At::done;
  swapcontext(&f.context, &scheduler);
}

inline void wait(At at, const void* place) {
  Fiber& f = (*fibers)[size_t(current)];
  f.at = at;
  f.place = place;
  swapcontext(&f.context, &scheduler);
}

inline void resume(size_t i) {
  current = int(i);
  threadIdx.x = unsigned(i);
  Fiber& f = (*fibers)[i];
  f.at = At::running;
  swapcontext(&scheduler, &f.context);
}

// All fibers of [begin, end) stand at one barrier of this kind; fails where some stand elsewhere or are gone.
inline bool together(size_t begin, size_t end, At at) {
  size_t there = 0;
  const void* place = nullptr;
  for (size_t i = begin; i < end; ++i) {
    Fiber& f = (*fibers)[i];
    if (f.at != at) continue;
    if (there++ && f.place != place) failure = "threads wait at different barriers";
    place = f.place;
  }
  if (there && there != end - begin) {
    for (size_t i = begin; i < end; ++i)
      if ((*fibers)[i].at == At::done) failure = "a barrier that threads have left behind";
    if (at == At::warp_barrier) failure = failure ? failure : "a warp barrier that not all lanes reach";
  }
  return there == end - begin;
}

template <class Kernel, class... Args>
void launch(unsigned blocks, unsigned threads, Kernel kernel, const Args&... args) {
  std::vector<Fiber> all(threads);
  std::function<void()> call = [&] { kernel(args...); };
  fibers = &all;
  body = &call;
  failure = nullptr;
  gridDim.x = blocks;
  blockDim.x = threads;
  for (unsigned block = 0; block < blocks; ++block) {
    blockIdx.x = block;
    for (Fiber& f : all) {
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = nullptr;
      makecontext(&f.context, entry, 0);
    }
    for (size_t i = 0; i < threads; ++i) resume(i);
    for (bool moved = true; moved && !failure;) {
      moved = false;
      for (size_t w = 0; w < threads; w += kWarpSize)
        while (together(w, w + kWarpSize, At::warp_barrier) && !failure) {
          moved = true;
          for (size_t i = w; i < w + kWarpSize; ++i) resume(i);
        }
      if (!failure && together(0, threads, At::block_barrier) && !failure) {
        moved = true;
        for (size_t i = 0; i < threads; ++i) resume(i);
      }
    }
    for (Fiber& f : all)
      if (!failure && f.at != At::done) failure = "threads wait for ever";
    if (failure) throw std::runtime_error(failure);
  }
}

template <class T>
T shuffle(T value, int from) {
  static_assert(sizeof(T) == 4);
  static char before, after;
  const int warp = current / kWarpSize, lane = current % kWarpSize;
  memcpy(&exchange[warp][lane], &value, 4);
  wait(At::warp_barrier, &before);
  T result;
  memcpy(&result, &exchange[warp][from & (kWarpSize - 1)], 4);
  wait(At::warp_barrier, &after);
  return result;
}

inline void full(unsigned mask) {
  if (mask != ~0u) throw std::runtime_error("wanted a full mask");
}

}  // namespace emulation

inline void __syncthreads() {
  static char place;
  emulation::wait(emulation::At::block_barrier, &place);
}
inline void __syncwarp() {
  static char place;
  emulation::wait(emulation::At::warp_barrier, &place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  emulation::full(mask);
  return emulation::shuffle(value, (emulation::current % emulation::kWarpSize) ^ offset);
}
inline unsigned __ballot_sync(unsigned mask, bool bit) {
  emulation::full(mask);
  static char before, after;
  const int warp = emulation::current / emulation::kWarpSize;
  emulation::exchange[warp][emulation::current % emulation::kWarpSize] = bit;
  emulation::wait(emulation::At::warp_barrier, &before);
  unsigned result = 0;
  for (int i = 0; i < emulation::kWarpSize; ++i) result |= emulation::exchange[warp][i] << i;
  emulation::wait(emulation::At::warp_barrier, &after);
  return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

[[noreturn]] inline void __trap() {
  static char place;
  emulation::failure = "a kernel stopped itself (__trap)";
  for (;;) emulation::wait(emulation::At::block_barrier, &place);
}

namespace leaml::cuda {
inline long vector_accesses;  // of 16 bytes
template <class V>
void check_alignment(const void* p) {
  if (sizeof(V) == 16) ++vector_accesses;
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V)) emulation::failure = "an access off its alignment";
}
template <class V>
V load_as(const void* p) {
  check_alignment<V>(p);
  V x;
  memcpy(&x, p, sizeof(V));
  return x;
}
template <class V>
void store_as(void* p, const V& x) {
  check_alignment<V>(p);
  memcpy(p, &x, sizeof(V));
}
template <class V>
void store_shared(void* p, const V& x) {
  store_as(p, x);
}
}  // namespace leaml::cuda
