// What the harnesses share: arrays on the GPU, numbers to fill them with, comparisons.
//
// A harness is a program of its own: it checks the index arithmetic of one op for many shapes, then
// runs its kernels and compares them with plain loops in double. It needs no torch:
//
//   nvcc -std=c++17 -arch=native csrc/cuda/harness/<op>.cu -o <op> && compute-sanitizer ./<op>
//   g++ -std=c++17 -O2 -x c++ csrc/cuda/harness/<op>.cu -o <op> && ./<op>        # emulated
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../portable.h"

namespace harness {

using namespace opensora;

// Stop with a message if something does not hold.
#define HOLDS(condition, ...)          \
  do {                                 \
    if (!(condition)) {                \
      std::printf("%s: ", #condition); \
      std::printf(__VA_ARGS__);        \
      std::printf("\n");               \
      std::exit(1);                    \
    }                                  \
  } while (false)

// Numbers that kernels read and write.
template <class T>
class Array {
 public:
  explicit Array(size_t count) : host(count) {
#if defined(__CUDACC__)
    HOLDS(cudaMalloc(&device_, bytes()) == cudaSuccess, "no GPU, or not %zu bytes of it", bytes());
#endif
  }
  ~Array() {
#if defined(__CUDACC__)
    cudaFree(device_);
#endif
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  // The device's copy of `host`, sent there now.
  T* sent() {
#if defined(__CUDACC__)
    cudaMemcpy(device_, host.data(), bytes(), cudaMemcpyHostToDevice);
    return device_;
#else
    return host.data();
#endif
  }
  // Bring back what a kernel wrote.
  void fetch() {
#if defined(__CUDACC__)
    const cudaError_t error = cudaMemcpy(host.data(), device_, bytes(), cudaMemcpyDeviceToHost);
    HOLDS(error == cudaSuccess, "%s", cudaGetErrorString(error));
#endif
  }
  size_t bytes() const { return host.size() * sizeof(T); }

  std::vector<T> host;

 private:
  T* device_ = nullptr;
};

template <class Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks, int threads, int64_t bytes,
            const Arguments& arguments) {
#if defined(__CUDACC__)
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(bytes));
  kernel<<<static_cast<unsigned>(blocks), threads, bytes>>>(arguments);
  const cudaError_t error = cudaGetLastError();
  HOLDS(error == cudaSuccess, "%s", cudaGetErrorString(error));
#else
  emulator::launch(blocks, threads, bytes, [&] { kernel(arguments); });
#endif
}

// Run a check; if it is emulated, in every order that the emulator knows.
template <class Check>
void in_every_order(Check check) {
#if defined(__CUDACC__)
  check();
#else
  for (int order = 0; order < emulator::ORDERS; ++order) {
    opensora_emulator_order(order);
    check();
  }
#endif
}

// bfloat16 numbers of either sign up to 2, the same in every run.
inline float drawn(size_t i) {
  uint32_t x = static_cast<uint32_t>(i) * 2654435761u + 12345u;
  x ^= x >> 15;
  x *= 2246822519u;
  x ^= x >> 13;
  return static_cast<float>(static_cast<int>(x % 256) - 128) / 64.0f;
}

inline float value(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline Bf16 rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

inline void fill(Array<Bf16>& array, float scale = 1.0f, float shift = 0.0f) {
  for (size_t i = 0; i < array.host.size(); ++i) {
    array.host[i] = rounded(drawn(i) * scale + shift);
  }
}

// Fail where numbers differ by more than bfloat16's rounding of them and `slack` of the largest.
inline void compare(const char* name, const std::vector<Bf16>& found,
                    const std::vector<double>& expected, double slack) {
  double largest = 0.0;
  for (const double x : expected) largest = std::fmax(largest, std::fabs(x));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::fabs(value(found[i]) - expected[i]);
    HOLDS(error <= std::fabs(expected[i]) / 128 + slack * largest, "%s: %f, expected %f, at %zu",
          name, value(found[i]), expected[i], i);
  }
}

}  // namespace harness
