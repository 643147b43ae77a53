// GroupNorm and SiLU, channels last; contract in opensora/ops/groupnorm_silu.py.
//
//   forward   u = (x - mean) * rstd * weight + bias;  y = u * sigmoid(u), or u
//   backward  du = dy * s * (1 + u * (1 - s)) with s = sigmoid(u), or dy;  n = (x - mean) * rstd
//             dx = rstd * (du * weight - mean(du * weight) - n * mean(du * weight * n))
//             dweight = sum of du * n, dbias = sum of du
//
// Memory-bound, two passes over memory: a unit, CHUNK_ELEMENTS of neighbouring pixels, leaves the
// moments of its channels, two-pass while it is in the cache; they are joined in double; then every
// unit is normalised. Pixels are walked in rows of REPEAT at a time, so that a row is whole Vecs
// for any number of channels: the parameters are repeated to match. Axes: B batch, P pixels, C
// channels, G groups, L = C * repeat columns of a row.
#include "../simd.h"

namespace opensora {

struct GroupnormSilu {
  const void* x;              // [B, P, C]
  const void* grad;           // [B, P, C], backward only
  void* out;                  // y or dx, [B, P, C]
  const void *weight, *bias;  // [C]
  float* mean_rstd;           // [B, G, 2]
  float* partial;  // [B, chunks, SUMS, C]: mean, what its rounding missed, squared deviations
  float* rows;     // [B, ROWS, L]: parameters of every column, in the order of lanes
  double* sums;    // [B, 2, C]: sums of du and du * n, backward only
  int64_t B, P, C, G, repeat, pixels, chunks;
  float eps;
  bool silu, bf16;
};

constexpr int64_t ROWS = 6;
constexpr int64_t SUMS = 3;                // rows of a partial sum
constexpr int64_t CHUNK_ELEMENTS = 32768;  // 64 KB of bfloat16
constexpr int64_t WIDEST = 32;             // columns, a multiple of every WIDTH

namespace OPENSORA_SIMD {
namespace {

// Call visit(first element, elements) for the rows of a unit; the last one may be short.
template <class Visit>
inline __attribute__((always_inline)) void for_rows(const GroupnormSilu& a, int64_t unit,
                                                    Visit visit) {
  const int64_t batch = unit / a.chunks, chunk = unit % a.chunks, L = a.C * a.repeat;
  const int64_t first = chunk * a.pixels, rest = a.P - first;
  const int64_t begin = (batch * a.P + first) * a.C;
  const int64_t end = begin + (rest < a.pixels ? rest : a.pixels) * a.C;
  for (int64_t i = begin; i < end; i += L) visit(i, end - i < L ? end - i : L);
}

// Add the columns of a row [L], stored in the order of lanes, to the channels [C] they belong to.
template <class T, class To>
void fold(const GroupnormSilu& a, const float* row, To* channels) {
  for (int64_t c = 0; c < a.C; ++c) {
    To total = 0;
    for (int64_t i = c; i < a.C * a.repeat; i += a.C) total += row[slot<T>(i)];
    channels[c] = total;
  }
}

template <class T>
void spread(const GroupnormSilu& a, const float* channels, float* row) {
  for (int64_t i = 0; i < a.C * a.repeat; ++i) row[slot<T>(i)] = channels[i % a.C];
}

inline int64_t pixels_of(const GroupnormSilu& a, int64_t chunk) {
  const int64_t rest = a.P - chunk * a.pixels;
  return rest < a.pixels ? rest : a.pixels;
}

// scratch: [SUMS, L]
template <class T>
__attribute__((flatten)) void moments(const GroupnormSilu& a, float* scratch, int64_t unit) {
  const int64_t L = a.C * a.repeat;
  const T* x = static_cast<const T*>(a.x);
  float *means = a.partial + unit * SUMS * a.C, *missed = means + a.C, *squares = missed + a.C;
  float *mean = scratch, *sum = mean + L, *square = sum + L;
  __builtin_memset(sum, 0, sizeof(float) * L);
  for_rows(a, unit, [=](int64_t at, int64_t length) {
    for_columns(length,
                [=](int64_t i, int64_t n) { store(sum + i, load(sum + i) + load(x + at + i, n)); });
  });
  fold<T>(a, sum, means);
  const float count = pixels_of(a, unit % a.chunks);
  for (int64_t c = 0; c < a.C; ++c) means[c] /= count;
  spread<T>(a, means, mean);
  __builtin_memset(sum, 0, sizeof(float) * 2 * L);
  for_rows(a, unit, [=](int64_t at, int64_t length) {
    for_columns(length, [=](int64_t i, int64_t n) {
      const Vec centred = only<T>(load(x + at + i, n) - load(mean + i), n);
      store(sum + i, load(sum + i) + centred);
      store(square + i, load(square + i) + centred * centred);
    });
  });
  fold<T>(a, sum, missed);
  fold<T>(a, square, squares);
  for (int64_t c = 0; c < a.C; ++c) {
    missed[c] /= count;
    squares[c] -= missed[c] * missed[c] * count;
  }
}

template <class T>
float parameter(const void* row, int64_t c) {
  return to_float(static_cast<const T*>(row)[c]);
}

// Join the moments of group `unit` of B * G, and write its statistics and its columns' parameters.
template <class T>
void join(const GroupnormSilu& a, int64_t unit) {
  const int64_t batch = unit / a.G, group = unit % a.G, width = a.C / a.G, L = a.C * a.repeat;
  const float* partial = a.partial + batch * a.chunks * SUMS * a.C;
  const auto mean_of = [=](int64_t chunk, int64_t c) {
    const float* means = partial + chunk * SUMS * a.C + c;
    return (double)means[0] + means[a.C];
  };
  double mean = 0, squares = 0;
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
    double sum = 0;
    for (int64_t c = group * width; c < (group + 1) * width; ++c) sum += mean_of(chunk, c);
    mean += sum * pixels_of(a, chunk);
  }
  const double count = (double)a.P * width;
  mean /= count;
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
    for (int64_t c = group * width; c < (group + 1) * width; ++c) {
      const double off = mean_of(chunk, c) - mean;
      squares += partial[(chunk * SUMS + 2) * a.C + c] + off * off * pixels_of(a, chunk);
    }
  }
  const double rstd = 1.0 / __builtin_sqrt(squares / count + a.eps);
  a.mean_rstd[unit * 2] = mean;
  a.mean_rstd[unit * 2 + 1] = rstd;
  const float rounded = mean;
  float *means = a.rows + batch * ROWS * L, *factor = means + L, *shift = factor + L;
  for (int64_t i = 0; i < L; ++i) {
    const int64_t c = i % a.C;
    if (c / width != group) continue;
    const double scale = rstd * parameter<T>(a.weight, c);
    means[slot<T>(i)] = rounded;
    factor[slot<T>(i)] = scale;
    // What rounding took from the mean comes off here.
    shift[slot<T>(i)] = parameter<T>(a.bias, c) - (mean - rounded) * scale;
  }
}

template <class T, bool SILU>
__attribute__((flatten)) void apply(const GroupnormSilu& a, int64_t unit) {
  const int64_t L = a.C * a.repeat;
  const float *mean = a.rows + unit / a.chunks * ROWS * L, *factor = mean + L, *shift = factor + L;
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.out);
  for_rows(a, unit, [=](int64_t at, int64_t length) {
    for_columns(length, [=](int64_t i, int64_t n) {
      const Vec u = (load(x + at + i, n) - load(mean + i)) * load(factor + i) + load(shift + i);
      store(y + at + i, SILU ? u * sigmoid(u) : u, n);
    });
  });
}

// Lay out what the backward needs of every column: mean, rstd, weight, bias.
template <class T>
void backward_rows(const GroupnormSilu& a, int64_t batch) {
  const int64_t width = a.C / a.G, L = a.C * a.repeat;
  float* rows = a.rows + batch * ROWS * L;
  for (int64_t i = 0; i < L; ++i) {
    const int64_t c = i % a.C, at = slot<T>(i);
    const float* statistics = a.mean_rstd + (batch * a.G + c / width) * 2;
    rows[at] = statistics[0];
    rows[L + at] = statistics[1];
    rows[2 * L + at] = parameter<T>(a.weight, c);
    rows[3 * L + at] = parameter<T>(a.bias, c);
  }
}

// Normalised x and the gradient before it is multiplied by the weight.
struct Gradient {
  Vec n, du;
};

template <class T, bool SILU>
inline Gradient gradient(const T* x, const T* grad, const float* rows, int64_t L, int64_t i,
                         int64_t n) {
  Gradient g;
  g.n = (load(x, n) - load(rows + i)) * load(rows + L + i);
  g.du = load(grad, n);
  if (SILU) {
    const Vec u = g.n * load(rows + 2 * L + i) + load(rows + 3 * L + i);
    const Vec s = sigmoid(u);
    g.du = g.du * s * (u * (s * -1.0f + 1.0f) + 1.0f);
  }
  return g;
}

// scratch: [SUMS, L], of which two rows are used, as of `partial`
template <class T, bool SILU>
__attribute__((flatten)) void sums(const GroupnormSilu& a, float* scratch, int64_t unit) {
  const int64_t L = a.C * a.repeat;
  const float* rows = a.rows + unit / a.chunks * ROWS * L;
  const T *x = static_cast<const T*>(a.x), *grad = static_cast<const T*>(a.grad);
  float *du = scratch, *dun = scratch + L;
  __builtin_memset(scratch, 0, sizeof(float) * 2 * L);
  for_rows(a, unit, [=](int64_t at, int64_t length) {
    for_columns(length, [=](int64_t i, int64_t n) {
      const Gradient g = gradient<T, SILU>(x + at + i, grad + at + i, rows, L, i, n);
      store(du + i, load(du + i) + g.du);
      store(dun + i, load(dun + i) + g.du * g.n);
    });
  });
  fold<T>(a, du, a.partial + unit * SUMS * a.C);
  fold<T>(a, dun, a.partial + (unit * SUMS + 1) * a.C);
}

// Join the sums of sample `batch`, and write the two means of its groups.
template <class T>
void join_sums(const GroupnormSilu& a, int64_t batch) {
  const int64_t width = a.C / a.G, L = a.C * a.repeat;
  double *du = a.sums + batch * 2 * a.C, *dun = du + a.C;
  for (int64_t i = 0; i < 2 * a.C; ++i) {
    du[i] = 0;
    for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
      du[i] += a.partial[(batch * a.chunks + chunk) * SUMS * a.C + i];
    }
  }
  float* rows = a.rows + batch * ROWS * L;
  for (int64_t group = 0; group < a.G; ++group) {
    double mean = 0, mean_n = 0;
    for (int64_t c = group * width; c < (group + 1) * width; ++c) {
      mean += du[c] * parameter<T>(a.weight, c);
      mean_n += dun[c] * parameter<T>(a.weight, c);
    }
    for (int64_t i = 0; i < L; ++i) {
      if (i % a.C / width != group) continue;
      rows[4 * L + slot<T>(i)] = mean / ((double)a.P * width);
      rows[5 * L + slot<T>(i)] = mean_n / ((double)a.P * width);
    }
  }
}

template <class T, bool SILU>
__attribute__((flatten)) void apply_backward(const GroupnormSilu& a, int64_t unit) {
  const int64_t L = a.C * a.repeat;
  const float* rows = a.rows + unit / a.chunks * ROWS * L;
  const T *x = static_cast<const T*>(a.x), *grad = static_cast<const T*>(a.grad);
  T* dx = static_cast<T*>(a.out);
  for_rows(a, unit, [=](int64_t at, int64_t length) {
    for_columns(length, [=](int64_t i, int64_t n) {
      const Gradient g = gradient<T, SILU>(x + at + i, grad + at + i, rows, L, i, n);
      // Rounded, as the mean is: of a single value the gradient is zero.
      const Vec scaled = rounded_product(g.du, load(rows + 2 * L + i));
      const Vec d = scaled - load(rows + 4 * L + i) - g.n * load(rows + 5 * L + i);
      store(dx + at + i, d * load(rows + L + i), n);
    });
  });
}

}  // namespace

void groupnorm_silu_moments(const GroupnormSilu& a, float* scratch, int64_t begin, int64_t end) {
  const auto one = a.bf16 ? moments<Bf16> : moments<float>;
  for (int64_t unit = begin; unit < end; ++unit) one(a, scratch, unit);
}

void groupnorm_silu_join(const GroupnormSilu& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit)
    a.bf16 ? join<Bf16>(a, unit) : join<float>(a, unit);
}

void groupnorm_silu_apply(const GroupnormSilu& a, int64_t begin, int64_t end) {
  const auto one = a.bf16   ? a.silu ? apply<Bf16, true> : apply<Bf16, false>
                   : a.silu ? apply<float, true>
                            : apply<float, false>;
  for (int64_t unit = begin; unit < end; ++unit) one(a, unit);
}

void groupnorm_silu_rows(const GroupnormSilu& a, int64_t begin, int64_t end) {
  for (int64_t batch = begin; batch < end; ++batch) {
    a.bf16 ? backward_rows<Bf16>(a, batch) : backward_rows<float>(a, batch);
  }
}

void groupnorm_silu_sums(const GroupnormSilu& a, float* scratch, int64_t begin, int64_t end) {
  const auto one = a.bf16   ? a.silu ? sums<Bf16, true> : sums<Bf16, false>
                   : a.silu ? sums<float, true>
                            : sums<float, false>;
  for (int64_t unit = begin; unit < end; ++unit) one(a, scratch, unit);
}

void groupnorm_silu_join_sums(const GroupnormSilu& a, int64_t begin, int64_t end) {
  for (int64_t batch = begin; batch < end; ++batch) {
    a.bf16 ? join_sums<Bf16>(a, batch) : join_sums<float>(a, batch);
  }
}

void groupnorm_silu_backward(const GroupnormSilu& a, int64_t begin, int64_t end) {
  const auto one = a.bf16   ? a.silu ? apply_backward<Bf16, true> : apply_backward<Bf16, false>
                   : a.silu ? apply_backward<float, true>
                            : apply_backward<float, false>;
  for (int64_t unit = begin; unit < end; ++unit) one(a, unit);
}

}  // namespace OPENSORA_SIMD
}  // namespace opensora

#ifdef OPENSORA_BIND
#include <numeric>
#include <vector>

#include "../common.h"

namespace opensora {

SIMD_DECLARE(groupnorm_silu_moments, const GroupnormSilu&, float*, int64_t, int64_t)
SIMD_DECLARE(groupnorm_silu_join, const GroupnormSilu&, int64_t, int64_t)
SIMD_DECLARE(groupnorm_silu_apply, const GroupnormSilu&, int64_t, int64_t)
SIMD_DECLARE(groupnorm_silu_rows, const GroupnormSilu&, int64_t, int64_t)
SIMD_DECLARE(groupnorm_silu_sums, const GroupnormSilu&, float*, int64_t, int64_t)
SIMD_DECLARE(groupnorm_silu_join_sums, const GroupnormSilu&, int64_t, int64_t)
SIMD_DECLARE(groupnorm_silu_backward, const GroupnormSilu&, int64_t, int64_t)

namespace {

bool is_channels_last(const Tensor& x) {
  int64_t stride = 1;
  for (int64_t k = 0; k < x.dim(); ++k) {
    // Channels, then width, height, time, and the batch last.
    const int64_t axis = k == 0 ? 1 : k + 1 < x.dim() ? x.dim() - k : 0;
    if (x.size(axis) != 1 && x.stride(axis) != stride) return false;
    stride *= x.size(axis);
  }
  return true;
}

// The arguments, and the arrays that they point to.
struct Call {
  GroupnormSilu a{};
  std::vector<float> partial, rows;
  std::vector<double> sums;
};

void prepare(Call& call, const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups,
             bool silu) {
  GroupnormSilu& a = call.a;
  CHECK_KERNEL_DTYPE(x);
  STD_TORCH_CHECK((x.dim() == 4 || x.dim() == 5) && is_channels_last(x),
                  "x must be channels last [B, C, (T,) H, W]");
  a.B = x.size(0);
  a.C = x.size(1);
  a.P = 1;
  for (int64_t i = 2; i < x.dim(); ++i) a.P *= x.size(i);
  a.G = groups;
  STD_TORCH_CHECK(groups > 0 && a.C % groups == 0, "groups must divide the channels");
  for (const Tensor* row : {&weight, &bias}) {
    STD_TORCH_CHECK(row->dim() == 1 && row->size(0) == a.C && row->is_contiguous() &&
                        row->scalar_type() == x.scalar_type(),
                    "weight and bias must be dense [C] of x's dtype");
  }
  a.repeat = WIDEST / std::gcd(a.C, WIDEST);
  const int64_t whole = CHUNK_ELEMENTS / (a.C * a.repeat);
  a.pixels = (whole > 0 ? whole : 1) * a.repeat;
  a.chunks = (a.P + a.pixels - 1) / a.pixels;
  a.silu = silu;
  a.bf16 = x.scalar_type() == ScalarType::BFloat16;
  a.x = x.const_data_ptr();
  a.weight = weight.const_data_ptr();
  a.bias = bias.const_data_ptr();
  call.partial.resize(a.B * a.chunks * SUMS * a.C);
  call.rows.resize(a.B * ROWS * a.C * a.repeat);
  a.partial = call.partial.data();
  a.rows = call.rows.data();
}

template <class Kernel>
void for_units(const GroupnormSilu& a, Kernel kernel) {
  parallel_for(0, a.B * a.chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(SUMS * a.C * a.repeat);
    kernel(scratch.data(), begin, end);
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                   int64_t groups, double eps, bool silu) {
  Call call;
  prepare(call, x, weight, bias, groups, silu);
  GroupnormSilu& a = call.a;
  a.eps = static_cast<float>(eps);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean_rstd = torch::stable::new_empty(x, {a.B, a.G, 2}, ScalarType::Float);
  if (x.numel() == 0) return {y, mean_rstd};
  a.out = y.mutable_data_ptr();
  a.mean_rstd = mean_rstd.mutable_data_ptr<float>();
  const auto moments = SIMD_CALL(groupnorm_silu_moments);
  const auto join = SIMD_CALL(groupnorm_silu_join);
  const auto apply = SIMD_CALL(groupnorm_silu_apply);
  for_units(a,
            [&](float* scratch, int64_t begin, int64_t end) { moments(a, scratch, begin, end); });
  parallel_for(0, a.B * a.G, 8, [&](int64_t begin, int64_t end) { join(a, begin, end); });
  for_units(a, [&](float*, int64_t begin, int64_t end) { apply(a, begin, end); });
  return {y, mean_rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
                                            const Tensor& weight, const Tensor& bias,
                                            const Tensor& mean_rstd, bool silu) {
  STD_TORCH_CHECK(mean_rstd.dim() == 3 && mean_rstd.size(0) == x.size(0) &&
                      mean_rstd.is_contiguous() && mean_rstd.scalar_type() == ScalarType::Float,
                  "mean_rstd must be dense float32 [B, G, 2]");
  Call call;
  prepare(call, x, weight, bias, mean_rstd.size(1), silu);
  GroupnormSilu& a = call.a;
  STD_TORCH_CHECK(grad.dim() == x.dim() && grad.numel() == x.numel() && grad.size(1) == a.C &&
                      grad.scalar_type() == x.scalar_type() && is_channels_last(grad),
                  "grad must be channels last, of the shape and dtype of x");
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = torch::stable::empty_like(weight), dbias = torch::stable::empty_like(bias);
  call.sums.resize(a.B * 2 * a.C);
  a.sums = call.sums.data();
  a.grad = grad.const_data_ptr();
  a.out = dx.mutable_data_ptr();
  a.mean_rstd = const_cast<float*>(mean_rstd.const_data_ptr<float>());
  if (x.numel() > 0) {
    const auto rows = SIMD_CALL(groupnorm_silu_rows);
    const auto sums = SIMD_CALL(groupnorm_silu_sums);
    const auto join = SIMD_CALL(groupnorm_silu_join_sums);
    const auto apply = SIMD_CALL(groupnorm_silu_backward);
    rows(a, 0, a.B);
    for_units(a, [&](float* scratch, int64_t begin, int64_t end) { sums(a, scratch, begin, end); });
    join(a, 0, a.B);
    for_units(a, [&](float*, int64_t begin, int64_t end) { apply(a, begin, end); });
  }
  for (int64_t c = 0; c < a.C; ++c) {
    double total = 0, total_n = 0;
    for (int64_t batch = 0; batch < a.B && x.numel() > 0; ++batch) {
      total += a.sums[batch * 2 * a.C + c];
      total_n += a.sums[(batch * 2 + 1) * a.C + c];
    }
    if (a.bf16) {
      using torch::headeronly::BFloat16;
      dbias.mutable_data_ptr<BFloat16>()[c] = static_cast<BFloat16>(static_cast<float>(total));
      dweight.mutable_data_ptr<BFloat16>()[c] = static_cast<BFloat16>(static_cast<float>(total_n));
    } else {
      dbias.mutable_data_ptr<float>()[c] = static_cast<float>(total);
      dweight.mutable_data_ptr<float>()[c] = static_cast<float>(total_n);
    }
  }
  return {dx, dweight, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(opensora, CPU, m) {
  m.impl("groupnorm_silu_forward", TORCH_BOX(&forward));
  m.impl("groupnorm_silu_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace opensora
#endif  // OPENSORA_BIND
