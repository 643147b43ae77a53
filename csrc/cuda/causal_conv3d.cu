// Causal convolution in space and time; contract in opensora/ops/causal_conv3d.py.
//
//   y = bias + residual + sum over taps of weight[tap] a,  a = x, or silu(group norm of x)
//
// A product of matrices that are never laid out. A block computes 8 x 16 pixels of one frame in 128
// output channels. Of 32 input channels at a time it holds those pixels with their halo, so that
// every tap reads the same shared memory; weights of one tap follow one another through a ring of
// three buffers. Norm and SiLU are applied to the halo once for all taps; zeros around x stay zero.
// The sums of the output's groups are taken as it is stored: the next norm needs no pass of its
// own. Axes: B batch, T frames, H height, W width, I input and O output channels, all dense with
// the channels last.
#include "portable.h"

namespace opensora {

struct CausalConv3d {
  const void* x;         // [B, T, H, W, I]
  const void* weight;    // [O, KT, KH, KW, I]
  const void* bias;      // [O] or null
  const void* residual;  // like y, or null
  void* y;               // [B, T, H, W, O]
  // The norm of x: [B, G, 2] or null, [I], [I].
  const float* mean_rstd;
  const void *norm_weight, *norm_bias;
  float* moments;  // [B, tiles, O / 4, 3] or null: count, mean, sum of squared distances from it
  int B, T, H, W, I, O;
  int KT, KH, KW;  // 1 or 3 each
  int G;
};

struct JoinMoments {
  const float* moments;  // [B, tiles, O / 4, 3]
  float* mean_rstd;      // [B, G, 2]
  int tiles, quads, G;   // quads = O / 4
  float eps;
};

namespace causal_conv3d {

constexpr int ROWS = 8, COLUMNS = 16;  // pixels of a tile
constexpr int OUT = 128, IN = 32;      // channels of a tile, and of a step
constexpr int THREADS = 256;
constexpr int BUFFERS = 3;                    // of weights
constexpr int PACKS = IN / 8;                 // of a pixel's, or a weight's, channels of a step
constexpr int WEIGHT_PACKS = OUT * PACKS;     // of one tap
constexpr int STAGED = OUT + 4;               // floats from one pixel to the next in the epilogue
constexpr int HALF = ROWS / 2 * COLUMNS;      // pixels that are stored at a time
constexpr int QUADS = OUT / 4;                // channels whose moments are taken together
constexpr int SHARERS = THREADS / (OUT / 8);  // threads that store the same channels

HOST_DEVICE int ceiling(int a, int b) { return (a + b - 1) / b; }

// Tiles of one sample; blocks of all: those that share pixels follow one another.
HOST_DEVICE int tiles_of(const CausalConv3d& a) {
  return a.T * ceiling(a.H, ROWS) * ceiling(a.W, COLUMNS);
}

HOST_DEVICE int64_t blocks_of(const CausalConv3d& a) {
  return static_cast<int64_t>(a.B) * tiles_of(a) * ceiling(a.O, OUT);
}

struct Tile {
  int sample, index;       // of the sample's tiles
  int frame, row, column;  // the first pixel
  int output;              // the first channel
};

HOST_DEVICE Tile tile_of(int64_t block, const CausalConv3d& a) {
  const int outputs = ceiling(a.O, OUT), tiles = tiles_of(a);
  const int64_t all = block / outputs;
  const int index = static_cast<int>(all % tiles);
  const int across = ceiling(a.W, COLUMNS), down = ceiling(a.H, ROWS);
  return {static_cast<int>(all / tiles), index,
          index / across / down,         index / across % down * ROWS,
          index % across * COLUMNS,      static_cast<int>(block % outputs) * OUT};
}

// The halo: pixels of the tile and those that its taps reach.
struct Halo {
  int frames, rows, columns;
};

HOST_DEVICE Halo halo_of(const CausalConv3d& a) {
  return {a.KT, ROWS + a.KH - 1, COLUMNS + a.KW - 1};
}

HOST_DEVICE int pixels(const Halo& h) { return h.frames * h.rows * h.columns; }

// The place of a halo's pixel among those of x, or -1 outside of it.
HOST_DEVICE int64_t source_of(int pixel, const Halo& h, const Tile& tile, const CausalConv3d& a) {
  const int frame = tile.frame + pixel / (h.rows * h.columns) - (a.KT - 1);
  const int row = tile.row + pixel / h.columns % h.rows - a.KH / 2;
  const int column = tile.column + pixel % h.columns - a.KW / 2;
  if (frame < 0 || row < 0 || row >= a.H || column < 0 || column >= a.W) return -1;
  return ((static_cast<int64_t>(tile.sample) * a.T + frame) * a.H + row) * a.W + column;
}

// The halo's pixel that a tap multiplies for the tile's pixel (row, column).
HOST_DEVICE int tapped(int tap, int row, int column, const Halo& h, const CausalConv3d& a) {
  const int kt = tap / (a.KH * a.KW), kh = tap / a.KW % a.KH, kw = tap % a.KW;
  return (kt * h.rows + row + kh) * h.columns + column + kw;
}

// Where a pack of a row of IN numbers lies. Eight rows in turn, one pack of each, meet all banks:
// two rows fill 128 bytes, and every second row moves its packs on by one.
HOST_DEVICE int swizzled(int row, int pack) { return row * PACKS + (pack ^ (row >> 1 & 3)); }

// The place of the tile's pixel in y, in pixels, or -1 outside.
HOST_DEVICE int64_t target_of(int row, int column, const Tile& tile, const CausalConv3d& a) {
  row += tile.row;
  column += tile.column;
  if (row >= a.H || column >= a.W) return -1;
  return ((static_cast<int64_t>(tile.sample) * a.T + tile.frame) * a.H + row) * a.W + column;
}

HOST_DEVICE int64_t shared_bytes(const CausalConv3d& a) {
  const int64_t loop =
      16 * (static_cast<int64_t>(pixels(halo_of(a))) * PACKS + BUFFERS * WEIGHT_PACKS);
  const int64_t epilogue = 4 * HALF * STAGED;
  static_assert(4 * HALF * STAGED >= 12 * QUADS * SHARERS, "moments take the epilogue's place");
  return loop > epilogue ? loop : epilogue;
}

// How many numbers there are, their mean, and the sum of their squared distances from it.
struct Moments {
  float count, mean, squares;
};

// Chan, Golub and LeVeque, 1979.
HOST_DEVICE Moments join(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  if (count == 0.0f) return a;
  const float distance = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + distance * share,
          a.squares + b.squares + distance * distance * a.count * share};
}

// Sums of numbers, as distances from the first of them: nothing cancels where the mean is large.
struct Sums {
  float count = 0.0f, first = 0.0f, sum = 0.0f, squares = 0.0f;

  HOST_DEVICE void add(float x) {
    if (count == 0.0f) first = x;
    const float distance = x - first;
    count += 1.0f;
    sum += distance;
    squares += distance * distance;
  }
  HOST_DEVICE Moments moments() const {
    if (count == 0.0f) return {0.0f, 0.0f, 0.0f};
    const float mean = sum / count;
    return {count, first + mean, squares - sum * mean};
  }
};

// Norm and SiLU of eight channels of one sample, from `channel` on.
template <class Number>
struct Normaliser {
  float mean[8], factor[8], shift[8];

  DEVICE Normaliser(const CausalConv3d& a, int sample, int channel) {
    const auto* weights = static_cast<const Pack*>(a.norm_weight);
    const auto* biases = static_cast<const Pack*>(a.norm_bias);
    Numbers<Number>::load(weights[channel / 8], factor);
    Numbers<Number>::load(biases[channel / 8], shift);
    UNROLL for (int i = 0; i < 8; ++i) {
      const int group = (channel + i) / (a.I / a.G);
      const float* row = a.mean_rstd + (static_cast<int64_t>(sample) * a.G + group) * 2;
      mean[i] = row[0];
      factor[i] *= row[1];
    }
  }

  DEVICE Pack operator()(const Pack& pack) const {
    float u[8];
    Numbers<Number>::load(pack, u);
    UNROLL for (int i = 0; i < 8; ++i) {
      u[i] = (u[i] - mean[i]) * factor[i] + shift[i];
      u[i] *= inverse(1.0f + power_of_2(-1.4426950408889634f * u[i]));
    }
    return Numbers<Number>::store(u);
  }
};

// Copy the halo's channels [channel, channel + IN), normalised if there is a norm. A thread has the
// same pack of every pixel, and nobody waits but for its own copies.
template <class Number>
DEVICE void load_halo(const CausalConv3d& a, const Tile& tile, const Halo& halo, int channel,
                      Pack* place) {
  const auto* x = static_cast<const Pack*>(a.x);
  const int pack = threadIdx.x % PACKS;
  for (int pixel = threadIdx.x / PACKS; pixel < pixels(halo); pixel += THREADS / PACKS) {
    const int64_t source = source_of(pixel, halo, tile, a);
    const int64_t at = (source < 0 ? 0 : source) * (a.I / 8) + channel / 8 + pack;
    copy_async(place + swizzled(pixel, pack), x + at, source >= 0);
  }
  commit();
  wait<0>();
  if (a.mean_rstd == nullptr) return;
  const Normaliser<Number> normalise(a, tile.sample, channel + pack * 8);
  for (int pixel = threadIdx.x / PACKS; pixel < pixels(halo); pixel += THREADS / PACKS) {
    Pack* own = place + swizzled(pixel, pack);
    if (source_of(pixel, halo, tile, a) >= 0) *own = normalise(*own);
  }
}

// Start to copy the weights of one tap and IN channels; zeros for outputs past the last. They are
// six in seven of all bytes that a block reads, and the processor's other block reads the same.
DEVICE void load_weights(const CausalConv3d& a, int output, int tap, int channel, Pack* place) {
  const auto* weight = static_cast<const Pack*>(a.weight);
  const int taps = a.KT * a.KH * a.KW;
  UNROLL for (int k = 0; k < WEIGHT_PACKS / THREADS; ++k) {
    const int i = k * THREADS + threadIdx.x, row = i / PACKS, pack = i % PACKS;
    const bool there = output + row < a.O;
    const int64_t from = static_cast<int64_t>(there ? output + row : 0) * taps + tap;
    copy_async<true>(place + swizzled(row, pack), weight + from * (a.I / 8) + channel / 8 + pack,
                     there);
  }
}

// Four rows of pixels and 32 channels: what a warp computes, in tiles of 16 pixels x 8 channels.
struct Product {
  float sums[4][4][4];
};

// The warp's share of one tap: product += halo (shifted by the tap) * weights'.
template <class Number>
DEVICE void multiply_tap(Product& product, const CausalConv3d& a, const Halo& halo, int tap,
                         const Pack* pixels, const Pack* weights) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int first = tapped(tap, warp / 4 * 4, lane % 16, halo, a);
  const int output = warp % 4 * 32 + lane / 16 * 8 + lane % 8;
  UNROLL for (int k = 0; k < IN / 16; ++k) {
    uint32_t left[4][4], right[2][4];
    UNROLL for (int i = 0; i < 4; ++i) {
      load_matrices(left[i], pixels + swizzled(first + i * halo.columns, 2 * k + lane / 16));
    }
    UNROLL for (int j = 0; j < 2; ++j) {
      load_matrices(right[j], weights + swizzled(output + 16 * j, 2 * k + lane / 8 % 2));
    }
    UNROLL for (int i = 0; i < 4; ++i) {
      UNROLL for (int j = 0; j < 4; ++j) {
        const uint32_t column[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
        multiply<Number>(product.sums[i][j], left[i], column);
      }
    }
  }
}

// Put the warp's product into `staged` [HALF, STAGED].
DEVICE void stage(const Product& product, float* staged) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  UNROLL for (int i = 0; i < 4; ++i) {
    UNROLL for (int j = 0; j < 4; ++j) {
      UNROLL for (int k = 0; k < 4; ++k) {
        const int pixel = i * COLUMNS + lane / 4 + k / 2 * 8;
        const int channel = warp % 4 * 32 + j * 8 + lane % 4 * 2 + k % 2;
        staged[pixel * STAGED + channel] = product.sums[i][j][k];
      }
    }
  }
}

// Add bias and residual to half of the tile's pixels, round once, store, and count what is stored.
template <class Number>
DEVICE void store_half(const CausalConv3d& a, const Tile& tile, int half, const float* staged,
                       Sums (&sums)[2]) {
  const int pack = threadIdx.x % (OUT / 8), channel = tile.output + pack * 8;
  if (channel >= a.O) return;
  float bias[8] = {};
  if (a.bias != nullptr) {
    Numbers<Number>::load(static_cast<const Pack*>(a.bias)[channel / 8], bias);
  }
  for (int pixel = threadIdx.x / (OUT / 8); pixel < HALF; pixel += SHARERS) {
    const int row = half * (ROWS / 2) + pixel / COLUMNS;
    const int64_t target = target_of(row, pixel % COLUMNS, tile, a);
    if (target < 0) continue;
    const int64_t at = target * (a.O / 8) + channel / 8;
    float y[8];
    UNROLL for (int i = 0; i < 8; i += 4) {
      Numbers<float>::load(*reinterpret_cast<const Pack*>(staged + pixel * STAGED + pack * 8 + i),
                           y + i);
    }
    float added[8] = {};
    if (a.residual != nullptr) {
      Numbers<Number>::load(static_cast<const Pack*>(a.residual)[at], added);
    }
    UNROLL for (int i = 0; i < 8; ++i) { y[i] += bias[i] + added[i]; }
    const Pack rounded = Numbers<Number>::store(y);
    static_cast<Pack*>(a.y)[at] = rounded;
    if (a.moments == nullptr) continue;
    Numbers<Number>::load(rounded, y);
    UNROLL for (int i = 0; i < 8; ++i) { sums[i / 4].add(y[i]); }
  }
}

// Join the sums of the threads that stored the same channels, one after the other.
DEVICE void store_moments(const CausalConv3d& a, const Tile& tile, const Sums (&sums)[2],
                          Moments* all) {
  const int pack = threadIdx.x % (OUT / 8), sharer = threadIdx.x / (OUT / 8);
  UNROLL for (int i = 0; i < 2; ++i) { all[(2 * pack + i) * SHARERS + sharer] = sums[i].moments(); }
  __syncthreads();
  const int quad = threadIdx.x;
  if (quad >= QUADS || tile.output + quad * 4 >= a.O) return;
  Moments total = all[quad * SHARERS];
  for (int i = 1; i < SHARERS; ++i) total = join(total, all[quad * SHARERS + i]);
  const int64_t row = static_cast<int64_t>(tile.sample) * tiles_of(a) + tile.index;
  float* to = a.moments + (row * (a.O / 4) + tile.output / 4 + quad) * 3;
  to[0] = total.count;
  to[1] = total.mean;
  to[2] = total.squares;
}

template <class Number>
KERNEL(THREADS, 2)
run(CausalConv3d a) {
  const Tile tile = tile_of(blockIdx.x, a);
  const Halo halo = halo_of(a);
  Pack* ring = reinterpret_cast<Pack*>(shared());
  Pack* x = ring + BUFFERS * WEIGHT_PACKS;
  const int taps = a.KT * a.KH * a.KW, steps = taps * (a.I / IN);
  const auto prefetch = [&](int step) {
    if (step < steps) {
      load_weights(a, tile.output, step % taps, step / taps * IN,
                   ring + step % BUFFERS * WEIGHT_PACKS);
    }
    commit();  // of nothing as well: groups are counted
  };
  for (int step = 0; step < BUFFERS - 1; ++step) prefetch(step);
  Product product{};
  for (int step = 0; step < steps; ++step) {
    const int tap = step % taps;
    if (tap == 0) {
      __syncthreads();  // nobody reads the last channels any more
      load_halo<Number>(a, tile, halo, step / taps * IN, x);
    }
    wait<BUFFERS - 2>();
    __syncthreads();  // this tap's weights are here, and nobody reads the buffer of the last one
    prefetch(step + BUFFERS - 1);
    multiply_tap<Number>(product, a, halo, tap, x, ring + step % BUFFERS * WEIGHT_PACKS);
  }  // the groups that are still open copy nothing
  float* staged = reinterpret_cast<float*>(shared());
  Sums sums[2];
  for (int half = 0; half < 2; ++half) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) / (THREADS / 2) == half) stage(product, staged);
    __syncthreads();
    store_half<Number>(a, tile, half, staged, sums);
  }
  if (a.moments == nullptr) return;
  __syncthreads();
  store_moments(a, tile, sums, reinterpret_cast<Moments*>(shared()));
}

constexpr int JOINERS = 128;

// One block for a group of a sample: its tiles and quads in turn, then the threads pairwise.
KERNEL(JOINERS, 1) run_join(JoinMoments a) {
  const int sample = blockIdx.x / a.G, group = blockIdx.x % a.G, quads = a.quads / a.G;
  Moments* all = reinterpret_cast<Moments*>(shared());
  Moments total{0.0f, 0.0f, 0.0f};
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(a.tiles) * quads; i += JOINERS) {
    const int64_t row = static_cast<int64_t>(sample) * a.tiles + i / quads;
    const float* from = a.moments + (row * a.quads + group * quads + i % quads) * 3;
    total = join(total, {from[0], from[1], from[2]});
  }
  all[threadIdx.x] = total;
  for (int width = JOINERS / 2; width > 0; width /= 2) {
    __syncthreads();
    const int mine = threadIdx.x;
    if (mine < width) all[mine] = join(all[mine], all[mine + width]);
  }
  if (threadIdx.x != 0) return;
  float* to = a.mean_rstd + static_cast<int64_t>(blockIdx.x) * 2;
  to[0] = all[0].mean;
  to[1] = inverse_sqrt(all[0].squares / all[0].count + a.eps);
}

}  // namespace causal_conv3d
}  // namespace opensora

#ifdef OPENSORA_BIND
#include <vector>

#include "launch.h"

namespace opensora {
namespace {

bool is_channels_last(const Tensor& x) {
  int64_t stride = 1;
  for (const int64_t axis : {1, 4, 3, 2, 0}) {
    if (x.size(axis) != 1 && x.stride(axis) != stride) return false;
    stride *= x.size(axis);
  }
  return true;
}

// Check a tensor of 16-bit numbers that is read pack by pack, and return where it begins.
const void* packs(const Tensor& t, const Tensor& x, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.numel() == numel && aligned(t) &&
                      (t.dim() == 5 ? is_channels_last(t) : t.is_contiguous()),
                  "tensors must share x's dtype and be dense, channels last, aligned");
  return t.const_data_ptr();
}

CausalConv3d arguments(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, const std::vector<Tensor>& norm,
                       const std::vector<int64_t>& stride) {
  CausalConv3d a{};
  STD_TORCH_CHECK(x.dim() == 5 && weight.dim() == 5 && x.scalar_type() != ScalarType::Float,
                  "x and weight must be bfloat16 or float16 of five dimensions");
  for (const int64_t step : stride) STD_TORCH_CHECK(step == 1, "strides must be 1");
  int* sizes[] = {&a.B, &a.I, &a.T, &a.H, &a.W};
  for (int i = 0; i < 5; ++i) *sizes[i] = static_cast<int>(x.size(i));
  int* kernel[] = {&a.O, nullptr, &a.KT, &a.KH, &a.KW};
  for (const int i : {0, 2, 3, 4}) *kernel[i] = static_cast<int>(weight.size(i));
  for (const int size : {a.KT, a.KH, a.KW}) {
    STD_TORCH_CHECK(size == 1 || size == 3, "kernels must be 1 or 3");
  }
  STD_TORCH_CHECK(a.I % causal_conv3d::IN == 0 && a.O % 8 == 0,
                  "input channels must be a multiple of 32, output channels of 8");
  const int64_t pixels = x.numel() / a.I;
  a.x = packs(x, x, x.numel());
  a.weight = packs(weight, x, static_cast<int64_t>(a.O) * a.I * a.KT * a.KH * a.KW);
  if (bias) a.bias = packs(*bias, x, a.O);
  if (residual) a.residual = packs(*residual, x, pixels * a.O);
  if (!norm.empty()) {
    STD_TORCH_CHECK(norm.size() == 3 && norm[0].is_contiguous() &&
                        norm[0].scalar_type() == ScalarType::Float && norm[0].dim() == 3 &&
                        norm[0].size(0) == a.B && a.I % norm[0].size(1) == 0,
                    "norm must be [] or [mean_rstd [B, G, 2] float32, weight, bias]");
    a.G = static_cast<int>(norm[0].size(1));
    a.mean_rstd = static_cast<const float*>(norm[0].const_data_ptr());
    a.norm_weight = packs(norm[1], x, a.I);
    a.norm_bias = packs(norm[2], x, a.I);
  }
  return a;
}

Tensor empty_output(const CausalConv3d& a, const Tensor& x) {
  return torch::stable::empty({a.B, a.O, a.T, a.H, a.W}, x.scalar_type(), std::nullopt, x.device(),
                              std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast3d);
}

void start(const OnDevice& device, const Tensor& x, const CausalConv3d& a) {
  namespace op = causal_conv3d;
  auto* kernel = x.scalar_type() == ScalarType::BFloat16 ? op::run<Bf16> : op::run<F16>;
  const int64_t blocks = op::blocks_of(a);
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "too many pixels for one launch");
  launch(device, kernel, blocks, op::THREADS, op::shared_bytes(a), a);
}

Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& residual, std::vector<Tensor> norm,
               std::vector<int64_t> stride) {
  CausalConv3d a = arguments(x, weight, bias, residual, norm, stride);
  Tensor y = empty_output(a, x);
  if (y.numel() == 0) return y;
  a.y = y.mutable_data_ptr();
  start(OnDevice(x), x, a);
  return y;
}

std::tuple<Tensor, Tensor> with_statistics(const Tensor& x, const Tensor& weight,
                                           const std::optional<Tensor>& bias,
                                           const std::optional<Tensor>& residual,
                                           std::vector<Tensor> norm, std::vector<int64_t> stride,
                                           int64_t groups, double eps) {
  namespace op = causal_conv3d;
  CausalConv3d a = arguments(x, weight, bias, residual, norm, stride);
  STD_TORCH_CHECK(groups > 0 && a.O % groups == 0 && a.O / groups % 4 == 0,
                  "groups of the output must have a multiple of 4 channels");
  Tensor y = empty_output(a, x);
  Tensor mean_rstd = torch::stable::new_empty(x, {a.B, groups, 2}, ScalarType::Float);
  STD_TORCH_CHECK(y.numel() > 0, "an empty result has no statistics");
  const int tiles = op::tiles_of(a);
  Tensor moments = torch::stable::new_empty(x, {a.B, tiles, a.O / 4, 3}, ScalarType::Float);
  a.y = y.mutable_data_ptr();
  a.moments = static_cast<float*>(moments.mutable_data_ptr());
  const OnDevice device(x);
  start(device, x, a);
  const JoinMoments join{a.moments,
                         static_cast<float*>(mean_rstd.mutable_data_ptr()),
                         tiles,
                         a.O / 4,
                         static_cast<int>(groups),
                         static_cast<float>(eps)};
  launch(device, op::run_join, a.B * groups, op::JOINERS, op::JOINERS * sizeof(op::Moments), join);
  return {y, mean_rstd};
}

STABLE_TORCH_LIBRARY_IMPL(opensora, KERNEL_DEVICE, m) {
  m.impl("causal_conv3d_forward.native", TORCH_BOX(&forward));
  m.impl("causal_conv3d_with_statistics", TORCH_BOX(&with_statistics));
}

}  // namespace
}  // namespace opensora
#endif  // OPENSORA_BIND
