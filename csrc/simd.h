// Vectors of float for the CPU kernels, one width per instruction set.
//
// Every file in cpu/ is compiled once per instruction set, with OPENSORA_SIMD naming the set and
// its namespace: plain (16-byte vectors, any processor), avx2 (32), avx512 (64), avx512_bf16 (64,
// and products of bfloat16). The vectors are the compiler's own extension (GCC, Clang): one source
// serves them all.
//
// Everything here has internal linkage, and no other header may be included by code that is
// compiled for more than the plain set: the linker keeps one copy of an inline function, and if
// that copy came from the avx512 build, older processors would stop at it.
#pragma once

#include <stdint.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>  // for two instructions that vectors cannot express; all of it is inlined
#endif

namespace opensora {

enum class Simd : int { plain, avx2, avx512, avx512_bf16 };  // as in opensora/_extension.py

// Return the set that the kernels run on: the widest that this processor has.
Simd simd();

namespace OPENSORA_SIMD {
namespace {

#if defined(__AVX512F__)
constexpr int64_t BYTES = 64;
#elif defined(__AVX2__)
constexpr int64_t BYTES = 32;
#else
constexpr int64_t BYTES = 16;
#endif

typedef float Floats __attribute__((vector_size(BYTES)));
typedef uint32_t Bits __attribute__((vector_size(BYTES)));
// The same where it lies in memory, at any address.
typedef Floats FloatsAt __attribute__((aligned(1), may_alias));
typedef Bits BitsAt __attribute__((aligned(1), may_alias));

// A bfloat16 as it lies in memory: the upper half of a float.
struct Bf16 {
  uint16_t bits;
};

// WIDTH neighbouring columns as floats. Loaded from float, `a` holds the first half of them and
// `b` the second. Loaded from bfloat16, `a` holds the even columns and `b` the odd ones: each is
// then one shift or one mask away from memory, with no shuffle (2x faster, GCC 12 on Zen 4).
// So a Vec must be stored as the type it was loaded as, or kept whole as floats.
struct Vec {
  Floats a, b;
};
constexpr int64_t WIDTH = 2 * BYTES / 4;
constexpr int64_t LANES = BYTES / 4;

inline Vec operator+(Vec v, Vec w) { return {v.a + w.a, v.b + w.b}; }
inline Vec operator-(Vec v, Vec w) { return {v.a - w.a, v.b - w.b}; }
inline Vec operator*(Vec v, Vec w) { return {v.a * w.a, v.b * w.b}; }
inline Vec operator+(Vec v, float s) { return {v.a + s, v.b + s}; }
inline Vec operator-(Vec v, float s) { return {v.a - s, v.b - s}; }
inline Vec operator*(Vec v, float s) { return {v.a * s, v.b * s}; }

inline Bits lane_numbers() {
  Bits lane;
  for (int64_t i = 0; i < LANES; ++i) lane[i] = i;
  return lane;
}

// Combine the lanes of a vector by halves: four steps, where one lane after the other takes
// sixteen.
template <class Combine>
inline __attribute__((always_inline)) float reduce(Floats v, Combine combine) {
#if defined(__clang__)
  for (int64_t half = BYTES / 8; half > 0; half /= 2) {
    Floats other = v;
    for (int64_t i = 0; i < half; ++i) other[i] = v[i + half];
    v = combine(v, other);
  }
#else
#pragma GCC unroll 4
  for (uint32_t half = BYTES / 8; half > 0; half /= 2) {
    v = combine(v, __builtin_shuffle(v, lane_numbers() ^ half));
  }
#endif
  return v[0];
}

struct Add {
  Floats operator()(Floats one, Floats other) const { return one + other; }
};
struct Larger {
  Floats operator()(Floats one, Floats other) const { return one > other ? one : other; }
};

// Reduce each of LANES vectors; lane i of the result is reduce(v[i]), with a quarter of the steps.
template <class Combine>
__attribute__((noinline)) Floats reduce_each(Floats* v, Combine combine) {
#pragma GCC unroll 4
  for (int64_t half = LANES / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i) {
      // Lanes with this bit go on with the second vector, the others with the first one.
#if defined(__clang__)
      Floats one, other;
      for (int64_t l = 0; l < LANES; ++l) {
        one[l] = l & half ? v[i + half][l] : v[i][l];
        other[l] = l & half ? v[i + half][l ^ half] : v[i][l ^ half];
      }
#else
      Bits stay, cross;
      for (int64_t l = 0; l < LANES; ++l) {
        stay[l] = l & half ? LANES + l : l;
        cross[l] = l & half ? LANES + (l ^ half) : l ^ half;
      }
      const Floats one = __builtin_shuffle(v[i], v[i + half], stay);
      const Floats other = __builtin_shuffle(v[i], v[i + half], cross);
#endif
      v[i] = combine(one, other);
    }
  }
  return v[0];
}

inline float sum(Floats v) { return reduce(v, Add{}); }

inline float sum(Vec v) { return sum(v.a + v.b); }

inline Vec load(const float* from) {
  const FloatsAt* at = (const FloatsAt*)from;
  return {at[0], at[1]};
}

inline Vec widened_pairs(Bits pairs) {
  return {(Floats)(pairs << 16), (Floats)(pairs & 0xffff0000u)};
}

inline Vec load(const Bf16* from) {
  Bits pairs = *(const BitsAt*)from;
#if defined(__x86_64__)
  asm("" : "+v"(pairs));  // load once: the compiler would rather read it twice than keep it
#endif
  return widened_pairs(pairs);
}

inline void store(float* to, Vec v) {
  FloatsAt* at = (FloatsAt*)to;
  at[0] = v.a;
  at[1] = v.b;
}

// Round to nearest, ties to even, `a` into the lower halves. A NaN stays one: those that come from
// bfloat16 input or from the processor have an empty lower half, so that the rounding does not
// carry out of it. The instruction takes numbers below 1.2e-38 for 0.
inline Bits rounded_pairs(Vec v) {
#if defined(__AVX512BF16__)
  typedef uint16_t Halves __attribute__((vector_size(BYTES)));
  Halves order;
  for (int64_t i = 0; i < WIDTH; ++i) order[i] = i / 2 + i % 2 * (WIDTH / 2);
  return (Bits)_mm512_permutexvar_epi16((__m512i)order,
                                        (__m512i)_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a));
#else
  Bits a = (Bits)v.a, b = (Bits)v.b;
  a += 0x7fffu + ((a >> 16) & 1u);
  b += 0x7fffu + ((b >> 16) & 1u);
  return (a >> 16) | (b & 0xffff0000u);
#endif
}

inline void store(Bf16* to, Vec v) { *(BitsAt*)to = rounded_pairs(v); }

// The same for the first `count` columns at a row's ragged end; the other lanes of a load are 0.
template <class T>
inline Vec load(const T* from, int64_t count) {
  if (count == WIDTH) return load(from);
  T padded[WIDTH] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return load(padded);
}

template <class T>
inline void store(T* to, Vec v, int64_t count) {
  if (count == WIDTH) return store(to, v);
  T padded[WIDTH];
  store(padded, v);
  for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

// Load and store pairs of neighbouring columns: `a` holds the even ones and `b` the odd ones.
inline Vec load_pairs(const Bf16* from) { return load(from); }

inline Vec load_pairs(const float* from) {
  const Vec v = load(from);
  Vec pairs;
#if defined(__clang__)
  for (int64_t i = 0; i < BYTES / 8; ++i) {
    pairs.a[i] = v.a[2 * i], pairs.a[i + BYTES / 8] = v.b[2 * i];
    pairs.b[i] = v.a[2 * i + 1], pairs.b[i + BYTES / 8] = v.b[2 * i + 1];
  }
#else
  Bits even;
  for (int64_t i = 0; i < BYTES / 4; ++i) even[i] = 2 * i;
  pairs.a = __builtin_shuffle(v.a, v.b, even);
  pairs.b = __builtin_shuffle(v.a, v.b, even + 1u);
#endif
  return pairs;
}

inline void store_pairs(Bf16* to, Vec v) { store(to, v); }

inline void store_pairs(float* to, Vec pairs) {
  Vec v;
#if defined(__clang__)
  for (int64_t i = 0; i < BYTES / 8; ++i) {
    v.a[2 * i] = pairs.a[i], v.b[2 * i] = pairs.a[i + BYTES / 8];
    v.a[2 * i + 1] = pairs.b[i], v.b[2 * i + 1] = pairs.b[i + BYTES / 8];
  }
#else
  Bits order;
  for (int64_t i = 0; i < BYTES / 4; ++i) order[i] = i / 2 + i % 2 * (BYTES / 4);
  v.a = __builtin_shuffle(pairs.a, pairs.b, order);
  v.b = __builtin_shuffle(pairs.a, pairs.b, order + (uint32_t)(BYTES / 8));
#endif
  store(to, v);
}

// Round to T and back.
inline Vec rounded_to(const float*, Vec v) { return v; }

inline Vec rounded_to(const Bf16*, Vec v) { return widened_pairs(rounded_pairs(v)); }

// Where column `i` of a row of T lies if the row's Vecs are stored as floats.
template <class T>
inline int64_t slot(int64_t i) {
  if (sizeof(T) == 4) return i;
  const int64_t column = i % WIDTH;
  return i - column + column % 2 * (BYTES / 4) + column / 2;
}

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) {
  const uint32_t bits = (uint32_t)value.bits << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

// Load or store memory of another type U in the order of lanes that T has.
template <class T, class U>
inline Vec load_as(const U* from, int64_t count) {
  if constexpr (sizeof(T) == sizeof(U)) {
    return load(from, count);
  } else {
    float wide[WIDTH] = {};
    for (int64_t i = 0; i < count; ++i) wide[slot<T>(i)] = to_float(from[i]);
    return load(wide);
  }
}

template <class T, class U>
inline void store_as(U* to, Vec v, int64_t count) {
  if constexpr (sizeof(T) == sizeof(U)) {
    store(to, v, count);
  } else {
    float wide[WIDTH], ordered[WIDTH] = {};
    store(wide, v);
    for (int64_t i = 0; i < count; ++i) ordered[slot<U>(i)] = wide[slot<T>(i)];
    store(to, load(ordered), count);
  }
}

// Set the lanes past the first `count` columns of a Vec that was loaded from T to zero.
template <class T>
inline Vec only(Vec v, int64_t count) {
  if (count == WIDTH) return v;
  Bits a{}, b{};
  for (int64_t i = 0; i < WIDTH; ++i) {
    const int64_t at = slot<T>(i);
    const uint32_t keep = i < count ? ~0u : 0u;
    at < BYTES / 4 ? a[at] = keep : b[at - BYTES / 4] = keep;
  }
  return {(Floats)((Bits)v.a & a), (Floats)((Bits)v.b & b)};
}

// Return v * w rounded, in an expression where the compiler would fuse it with an addition.
inline Vec rounded_product(Vec v, Vec w) {
#if defined(__clang__)
#pragma clang fp contract(off)
#elif __GNUC__ >= 12
  return {__builtin_assoc_barrier(v.a * w.a), __builtin_assoc_barrier(v.b * w.b)};
#endif
  return {v.a * w.a, v.b * w.b};
}

// Return e^x within 2 units in the last place for x in [-87, 88], and the limits' beyond it: e^x is
// 2^n e^r with |r| <= ln(2) / 2, and e^r a polynomial (Taylor's, its last terms fitted). NaN stays.
inline Floats exponential(Floats x) {
  x = x > 88.0f ? Floats{} + 88.0f : x;
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats n = (x * 1.44269504f + magic) - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  // 2^n: n goes to the exponent's place.
  const Bits power = (Bits)(n + (magic + 127.0f)) << 23;
  return y * (Floats)power;
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

inline Vec sigmoid(Vec v) { return {sigmoid(v.a), sigmoid(v.b)}; }

// Call visit(column, count) for every vector of a row; count < WIDTH at a ragged end alone.
template <class Visit>
inline __attribute__((always_inline)) void for_columns(int64_t C, Visit visit) {
  int64_t i = 0;
  for (; i + WIDTH <= C; i += WIDTH) visit(i, WIDTH);
  if (i < C) visit(i, C - i);
}

// Sum term(column, count) over a row. Two Vecs, four accumulators, hide the latency of the
// addition; the order is fixed, so the result does not depend on the number of threads.
template <class Term>
inline __attribute__((always_inline)) float sum_columns(int64_t C, Term term) {
  Vec even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * WIDTH <= C; i += 2 * WIDTH) {
    even = even + term(i, WIDTH);
    odd = odd + term(i + WIDTH, WIDTH);
  }
  for (; i + WIDTH <= C; i += WIDTH) even = even + term(i, WIDTH);
  if (i < C) odd = odd + term(i, C - i);
  return sum(even + odd);
}

}  // namespace
}  // namespace OPENSORA_SIMD
}  // namespace opensora

// Declare a kernel of all sets; SIMD_CALL then picks the one that simd() names.
#if defined(__x86_64__)
#define SIMD_DECLARE_RETURNING(type, name, ...) \
  namespace avx2 {                              \
  type name(__VA_ARGS__);                       \
  }                                             \
  namespace avx512 {                            \
  type name(__VA_ARGS__);                       \
  }                                             \
  namespace avx512_bf16 {                       \
  type name(__VA_ARGS__);                       \
  }
#define SIMD_CALL(name)                            \
  (simd() == Simd::avx512_bf16 ? avx512_bf16::name \
   : simd() == Simd::avx512    ? avx512::name      \
   : simd() == Simd::avx2      ? avx2::name        \
                               : plain::name)
#else
#define SIMD_DECLARE_RETURNING(type, name, ...)
#define SIMD_CALL(name) (plain::name)
#endif
#define SIMD_DECLARE(name, ...) SIMD_DECLARE_RETURNING(void, name, __VA_ARGS__)
