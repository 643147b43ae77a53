// Choose the instruction set of the CPU kernels: once, the widest that the processor has.
#include "simd.h"

#include <atomic>
#include <initializer_list>

namespace opensora {
namespace {

bool has(Simd set) {
#if defined(__x86_64__)
  // These also ask the operating system whether it saves the wide registers.
  if (set == Simd::avx512_bf16) {
    return has(Simd::avx512) && __builtin_cpu_supports("avx512bf16");
  }
  if (set == Simd::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (set == Simd::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return set == Simd::plain;
}

Simd widest() {
  for (const Simd set : {Simd::avx512_bf16, Simd::avx512, Simd::avx2}) {
    if (has(set)) return set;
  }
  return Simd::plain;
}

std::atomic<Simd>& current() {
  static std::atomic<Simd> set{widest()};
  return set;
}

}  // namespace

Simd simd() { return current().load(std::memory_order_relaxed); }

}  // namespace opensora

// For opensora/_extension.py: the set in use, and a way for tests to use a narrower one.
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int opensora_simd() { return static_cast<int>(opensora::simd()); }

EXPORT int opensora_use_simd(int set) {
  const auto wanted = static_cast<opensora::Simd>(set);
  if (!opensora::has(wanted)) return 0;
  opensora::current().store(wanted);
  return 1;
}
