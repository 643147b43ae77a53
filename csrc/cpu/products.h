// Products of small matrices that lie in the first cache levels, float32 sums throughout.
//
// Matrices hold words of 32 bits: one float, or two neighbouring bfloat16 of the dimension that is
// summed over, the way one instruction of AVX512_BF16 multiplies and adds them. The right factor
// lies with its columns in lanes, the left one is read a word at a time.
#pragma once

#include "../simd.h"

namespace opensora {
namespace OPENSORA_SIMD {
namespace {

// Rows of a product that are computed at once, with two vectors of columns: what the registers
// hold.
constexpr int64_t TILE_ROWS = BYTES == 64 ? 8 : 4;

inline int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Values of T per word.
template <class T>
constexpr int64_t PER_WORD = 4 / sizeof(T);

// Return total + x * y, or with bfloat16 total + both products of each lane's pair.
template <class T>
inline Floats multiply_add(Floats total, Bits x, Bits y) {
  if constexpr (sizeof(T) == 4) {
    return total + (Floats)x * (Floats)y;
  } else {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)x, (__m512bh)y);
#else
    total = total + (Floats)(x << 16) * (Floats)(y << 16);
    return total + (Floats)(x & 0xffff0000u) * (Floats)(y & 0xffff0000u);
#endif
  }
}

// A left factor: word (row, k) lies at `words[row * row_stride + k * step]`.
struct Left {
  const uint32_t* words;
  int64_t row_stride, step;
};

// total[r][c] = sum over k of left(r, k) * right[k][c], for TILE_ROWS rows and C vectors.
template <class T, int C>
inline __attribute__((always_inline)) void tile(Left left, const uint32_t* right, int64_t stride,
                                                int64_t K, Floats (&total)[TILE_ROWS][C]) {
  for (int64_t r = 0; r < TILE_ROWS; ++r) {
    for (int c = 0; c < C; ++c) total[r][c] = Floats{};
  }
  for (int64_t k = 0; k < K; ++k) {
    Bits y[C];
    for (int c = 0; c < C; ++c) y[c] = *(const BitsAt*)(right + k * stride + c * LANES);
#pragma GCC unroll 8
    for (int64_t r = 0; r < TILE_ROWS; ++r) {
      const Bits x = Bits{} + left.words[r * left.row_stride + k * left.step];
      for (int c = 0; c < C; ++c) total[r][c] = multiply_add<T>(total[r][c], x, y[c]);
    }
  }
}

// Call visit(row, column, a, b) with the product's values, two vectors at a time (one at an odd
// end, b then being zero). Rows go up to the next multiple of TILE_ROWS, so `left` has those too.
template <class T, class Visit>
inline __attribute__((always_inline)) void multiply(Left left, const uint32_t* right,
                                                    int64_t stride, int64_t rows, int64_t columns,
                                                    int64_t K, Visit visit) {
  const auto at = [&](int64_t row) {
    return Left{left.words + row * left.row_stride, left.row_stride, left.step};
  };
  int64_t column = 0;
  for (; column + LANES < columns; column += 2 * LANES) {
    for (int64_t row = 0; row < rows; row += TILE_ROWS) {
      Floats total[TILE_ROWS][2];
      tile<T, 2>(at(row), right + column, stride, K, total);
#pragma GCC unroll 8
      for (int64_t r = 0; r < TILE_ROWS; ++r) visit(row + r, column, total[r][0], total[r][1]);
    }
  }
  if (column >= columns) return;
  for (int64_t row = 0; row < rows; row += TILE_ROWS) {
    Floats total[TILE_ROWS][1];
    tile<T, 1>(at(row), right + column, stride, K, total);
#pragma GCC unroll 8
    for (int64_t r = 0; r < TILE_ROWS; ++r) visit(row + r, column, total[r][0], Floats{});
  }
}

// Transpose a square of LANES x LANES words and keep the first `count` of its rows.
inline void transpose_square(const uint32_t* from, int64_t from_stride, uint32_t* to,
                             int64_t to_stride, int64_t count) {
#if defined(__clang__)
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t c = 0; c < LANES; ++c) to[r * to_stride + c] = from[c * from_stride + r];
  }
#else
  Bits v[LANES];
  for (int64_t r = 0; r < LANES; ++r) v[r] = *(const BitsAt*)(from + r * from_stride);
  // Swap the off-diagonal quarters of squares of 2, 4, ... rows.
#pragma GCC unroll 4
  for (int64_t half = 1; half < LANES; half *= 2) {
    Bits upper, lower;
    for (int64_t i = 0; i < LANES; ++i) {
      const bool second = i & half;
      upper[i] = second ? LANES + i - half : i;
      lower[i] = second ? LANES + i : i + half;
    }
#pragma GCC unroll 16
    for (int64_t r = 0; r < LANES; ++r) {
      if (r & half) continue;
      const Bits one = v[r], other = v[r + half];
      v[r] = __builtin_shuffle(one, other, upper);
      v[r + half] = __builtin_shuffle(one, other, lower);
    }
  }
  for (int64_t r = 0; r < count; ++r) *(BitsAt*)(to + r * to_stride) = v[r];
#endif
}

// Transpose words [rows, columns] to [columns, rows], rows in whole vectors; reads `from` in whole
// squares.
inline void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride,
                      int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += LANES) {
    for (int64_t c = 0; c < columns; c += LANES) {
      const int64_t rest = columns - c;
      transpose_square(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride,
                       rest < LANES ? rest : LANES);
    }
  }
}

// Return the largest of x[0, n). The lanes past n of its last vector become -inf.
inline float largest(float* x, int64_t n) {
  const int64_t padded = rounded_up(n, LANES);
  for (int64_t i = n; i < padded; ++i) x[i] = -__builtin_inff();
  Floats most = *(FloatsAt*)x;
  for (int64_t i = LANES; i < padded; i += LANES) {
    const Floats next = *(FloatsAt*)(x + i);
    most = next > most ? next : most;
  }
  return reduce(most, Larger{});
}

// Replace x[0, n) by e^((x - top) * scale) and return the sum. The lanes past n become 0.
inline float exponentials(float* x, int64_t n, float top, float scale) {
  Floats total{};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    FloatsAt* at = (FloatsAt*)(x + i);
    *at = exponential((*at - top) * scale);
    total = total + *at;
  }
  if (i < n) {
    FloatsAt* at = (FloatsAt*)(x + i);
    Floats lane;
    for (int64_t l = 0; l < LANES; ++l) lane[l] = l;
    const Floats e = exponential((*at - top) * scale);
    *at = lane < (float)(n - i) ? e : Floats{};
    total = total + *at;
  }
  return sum(total);
}

// Replace rows x[0, n) that are `stride` apart by softmax(x * scale). The lanes past n become 0.
// Rows are reduced together, and no vector is read that was just written in parts.
inline void softmax(float* x, int64_t stride, int64_t rows, int64_t n, float scale) {
  const int64_t whole = n / LANES * LANES;
  const auto inside = lane_numbers() < (uint32_t)(n - whole);
  for (int64_t first = 0; first < rows; first += LANES, x += LANES * stride) {
    const int64_t count = rows - first < LANES ? rows - first : LANES;
    Floats v[LANES] = {};
    float each[LANES];
    for (int64_t r = 0; r < count; ++r) {
      const float* row = x + r * stride;
      v[r] = Floats{} - __builtin_inff();
      for (int64_t i = 0; i < whole; i += LANES) v[r] = Larger{}(*(const FloatsAt*)(row + i), v[r]);
      if (whole == n) continue;
      const Floats rest = inside ? *(const FloatsAt*)(row + whole) : Floats{} - __builtin_inff();
      v[r] = Larger{}(rest, v[r]);
    }
    *(FloatsAt*)each = reduce_each(v, Larger{});
    for (int64_t r = 0; r < count; ++r) {
      float* row = x + r * stride;
      v[r] = Floats{};
      for (int64_t i = 0; i < whole; i += LANES) {
        FloatsAt* at = (FloatsAt*)(row + i);
        *at = exponential((*at - each[r]) * scale);
        v[r] = v[r] + *at;
      }
      if (whole == n) continue;
      FloatsAt* at = (FloatsAt*)(row + whole);
      *at = inside ? exponential((*at - each[r]) * scale) : Floats{};
      v[r] = v[r] + *at;
    }
    *(FloatsAt*)each = 1.0f / reduce_each(v, Add{});
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < n; i += LANES) {
        FloatsAt* at = (FloatsAt*)(x + r * stride + i);
        *at = *at * each[r];
      }
    }
  }
}

}  // namespace
}  // namespace OPENSORA_SIMD
}  // namespace opensora
