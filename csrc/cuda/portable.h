// The device functions that kernels are written in. nvcc compiles them to instructions; any C++
// compiler compiles them to the emulator's (emulator.h), so that the same kernels run on a machine
// without a GPU, thread by thread.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define HOST_DEVICE __host__ __device__ __forceinline__
#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define UNROLL _Pragma("unroll")
#define UNROLL_BY_3 _Pragma("unroll 3")
#else
#include "emulator.h"
#define HOST_DEVICE inline
#define DEVICE inline
#define KERNEL(threads, blocks) void
#define UNROLL
#define UNROLL_BY_3
#endif

namespace opensora {

constexpr int WARP = 32;

// Sixteen bytes: what one lane moves at a time.
struct alignas(16) Pack {
  uint32_t words[4];
};

// Numbers of 16 bits, as they lie in memory.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

HOST_DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
HOST_DEVICE int least(int a, int b) { return a < b ? a : b; }

template <class T>
constexpr int PER_PACK = 16 / static_cast<int>(sizeof(T));

// ---- numbers ------------------------------------------------------------------------------------

DEVICE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

DEVICE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// Two numbers of 16 bits from one word, the lower half first; and back, rounded to nearest even.
template <class T>
struct Pair;

template <>
struct Pair<Bf16> {
  static DEVICE void unpack(uint32_t word, float& low, float& high) {
    low = as_float(word << 16);
    high = as_float(word & 0xffff0000u);
  }
  static DEVICE uint32_t pack(float low, float high) {
#if defined(__CUDACC__)
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    uint32_t word;
    memcpy(&word, &both, 4);
    return word;
#else
    return emulator::bf16_bits(low) | emulator::bf16_bits(high) << 16;
#endif
  }
};

template <>
struct Pair<F16> {
  static DEVICE void unpack(uint32_t word, float& low, float& high) {
#if defined(__CUDACC__)
    __half2 both;
    memcpy(&both, &word, 4);
    const float2 wide = __half22float2(both);
    low = wide.x;
    high = wide.y;
#else
    low = emulator::f16_value(word & 0xffffu);
    high = emulator::f16_value(word >> 16);
#endif
  }
  static DEVICE uint32_t pack(float low, float high) {
#if defined(__CUDACC__)
    const __half2 both = __floats2half2_rn(low, high);
    uint32_t word;
    memcpy(&word, &both, 4);
    return word;
#else
    return emulator::f16_bits(low) | emulator::f16_bits(high) << 16;
#endif
  }
};

// The numbers of a pack in float32, and back.
template <class T>
struct Numbers {
  static DEVICE void load(const Pack& pack, float* x) {
    UNROLL for (int i = 0; i < 4; ++i) { Pair<T>::unpack(pack.words[i], x[2 * i], x[2 * i + 1]); }
  }
  static DEVICE Pack store(const float* x) {
    Pack pack;
    UNROLL for (int i = 0; i < 4; ++i) { pack.words[i] = Pair<T>::pack(x[2 * i], x[2 * i + 1]); }
    return pack;
  }
  static DEVICE float one(const T* at) {
    float low, high;
    Pair<T>::unpack(at->bits, low, high);
    return low;
  }
  static DEVICE void put(T* at, float x) {
    at->bits = static_cast<uint16_t>(Pair<T>::pack(x, 0.0f));
  }
  static DEVICE float round(float x) {
    float low, high;
    Pair<T>::unpack(Pair<T>::pack(x, 0.0f), low, high);
    return low;
  }
};

template <>
struct Numbers<float> {
  static DEVICE void load(const Pack& pack, float* x) {
    UNROLL for (int i = 0; i < 4; ++i) { x[i] = as_float(pack.words[i]); }
  }
  static DEVICE Pack store(const float* x) {
    Pack pack;
    UNROLL for (int i = 0; i < 4; ++i) { pack.words[i] = as_bits(x[i]); }
    return pack;
  }
  static DEVICE float one(const float* at) { return *at; }
  static DEVICE void put(float* at, float x) { *at = x; }
  static DEVICE float round(float x) { return x; }
};

// 1 / sqrt(x), 2^x and 1 / x, to 2 units in the last place of float32 or better.
DEVICE float inverse_sqrt(float x) {
#if defined(__CUDACC__)
  return rsqrtf(x);
#else
  return 1.0f / std::sqrt(x);
#endif
}

DEVICE float power_of_2(float x) { return exp2f(x); }

DEVICE float inverse(float x) {
#if defined(__CUDACC__)
  return __frcp_rn(x);
#else
  return 1.0f / x;
#endif
}

// ---- memory and products, by instruction --------------------------------------------------------

// The dynamic shared memory of this block, of 16-byte alignment.
DEVICE unsigned char* shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
#else
  return emulator::shared();
#endif
}

#if defined(__CUDACC__)

// The address of a place in shared memory, as instructions take it.
DEVICE uint32_t shared_address(const void* place) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

// Start to copy 16 bytes to shared memory; zeros, and nothing is read, if not `there`. `cached`: by
// way of the first cache, for what another block of the same processor reads as well.
template <bool cached = false>
DEVICE void copy_async(Pack* to, const Pack* from, bool there = true) {
  const uint32_t place = shared_address(to), bytes = there ? 16 : 0;
  if (cached) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(bytes)
                 : "memory");
  }
}

// Read shared memory here and now, where a compiler would rather keep a register from earlier on.
DEVICE Pack load_again(const Pack* place) {
  Pack pack;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(pack.words[0]), "=r"(pack.words[1]), "=r"(pack.words[2]), "=r"(pack.words[3])
               : "r"(shared_address(place)));
  return pack;
}

// Read 16 bytes that no kernel writes by one load, which a compiler may otherwise split.
DEVICE Pack load_constant(const void* place) {
  Pack pack;
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(pack.words[0]), "=r"(pack.words[1]), "=r"(pack.words[2]), "=r"(pack.words[3])
               : "l"(place));
  return pack;
}

// Close a group of copies; wait until all but the last `LEFT` groups of this thread have arrived.
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LEFT>
DEVICE void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Load four 8x8 matrices of 16-bit numbers: lane 8i + j gives the address of row j of matrix i;
// lane 4r + c receives numbers 2c and 2c + 1 of row r of matrix i in words[i].
DEVICE void load_matrices(uint32_t (&words)[4], const Pack* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8] by a warp. Lane 4r + q holds of c: row r, columns 2q and
// 2q + 1, then of row r + 8; of a: row r and r + 8 at columns 2q, 2q + 1, then both at columns
// 2q + 8, 2q + 9; of b: rows 2q, 2q + 1, then 2q + 8, 2q + 9, of column r.
template <class T>
DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define MULTIPLY(type, name)                                                                  \
  template <>                                                                                 \
  DEVICE void multiply<type>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                       \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"       \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));         \
  }
MULTIPLY(Bf16, "bf16")
MULTIPLY(F16, "f16")
#undef MULTIPLY

#else

template <bool cached = false>
void copy_async(Pack* to, const Pack* from, bool there = true) {
  emulator::copy_async(to, from, there);
}

inline Pack load_again(const Pack* place) { return *place; }

inline Pack load_constant(const void* place) { return *static_cast<const Pack*>(place); }

inline void commit() { emulator::commit(); }

template <int LEFT>
void wait() {
  emulator::wait(LEFT);
}

inline void load_matrices(uint32_t (&words)[4], const Pack* row) {
  emulator::load_matrices(words, row);
}

template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::multiply(
      c, a, b, [](uint32_t word, float& low, float& high) { Pair<T>::unpack(word, low, high); });
}

#endif

}  // namespace opensora
