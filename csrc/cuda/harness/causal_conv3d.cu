// Check causal_conv3d alone: its tiles, halos and banks for many shapes, then its values.
#include "../causal_conv3d.cu"
#include "harness.h"

using namespace harness;
namespace op = causal_conv3d;

namespace {

CausalConv3d shape(int B, int T, int H, int W, int I, int O, int KT, int KH, int KW) {
  CausalConv3d a{};
  a.B = B;
  a.T = T;
  a.H = H;
  a.W = W;
  a.I = I;
  a.O = O;
  a.KT = KT;
  a.KH = KH;
  a.KW = KW;
  return a;
}

// Every pixel of y in every channel has one place in one tile, and each of its taps finds in the
// halo the pixel that the definition names, or the zero around x.
void check_tiles(const CausalConv3d& a) {
  const int outputs = op::ceiling(a.O, op::OUT);
  const op::Halo halo = op::halo_of(a);
  std::vector<int> seen(static_cast<size_t>(a.B) * a.T * a.H * a.W * outputs);
  std::vector<int> indices(static_cast<size_t>(a.B) * op::tiles_of(a));
  for (int64_t block = 0; block < op::blocks_of(a); ++block) {
    const op::Tile tile = op::tile_of(block, a);
    if (tile.output == 0) ++indices[tile.sample * op::tiles_of(a) + tile.index];
    for (int row = 0; row < op::ROWS; ++row) {
      for (int column = 0; column < op::COLUMNS; ++column) {
        const int64_t target = op::target_of(row, column, tile, a);
        if (target < 0) continue;
        ++seen[target * outputs + tile.output / op::OUT];
        const int w = target % a.W, h = target / a.W % a.H, t = target / a.W / a.H % a.T;
        const int64_t b = target / a.W / a.H / a.T;
        for (int tap = 0; tap < a.KT * a.KH * a.KW; ++tap) {
          const int from_t = t + tap / (a.KH * a.KW) - (a.KT - 1);
          const int from_h = h + tap / a.KW % a.KH - a.KH / 2, from_w = w + tap % a.KW - a.KW / 2;
          const bool inside =
              from_t >= 0 && from_h >= 0 && from_h < a.H && from_w >= 0 && from_w < a.W;
          const int64_t from = ((b * a.T + from_t) * a.H + from_h) * a.W + from_w;
          const int pixel = op::tapped(tap, row, column, halo, a);
          HOLDS(pixel >= 0 && pixel < op::pixels(halo), "tap %d leaves the halo", tap);
          HOLDS(op::source_of(pixel, halo, tile, a) == (inside ? from : -1), "tap %d of %d %d %d",
                tap, t, h, w);
        }
      }
    }
  }
  for (const int count : seen) HOLDS(count == 1, "a pixel is computed %d times", count);
  for (const int count : indices) HOLDS(count == 1, "a tile has %d sets of sums", count);
}

// Packs of a step lie apart; eight rows in turn, wherever they begin, meet all banks.
void check_banks() {
  std::vector<int> seen(600 * op::PACKS);
  for (int row = 0; row < 600; ++row) {
    for (int pack = 0; pack < op::PACKS; ++pack) ++seen[op::swizzled(row, pack)];
  }
  for (const int count : seen) HOLDS(count == 1, "a place is taken %d times", count);
  for (int first = 0; first < 32; ++first) {
    for (int pack = 0; pack < op::PACKS; ++pack) {
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) banks |= 1u << (op::swizzled(first + i, pack) % 8);
      HOLDS(banks == 0xff, "bank conflict at row %d", first);
    }
  }
}

void check_values(CausalConv3d a, bool residual, int groups) {
  const size_t pixels = static_cast<size_t>(a.B) * a.T * a.H * a.W;
  const int taps = a.KT * a.KH * a.KW;
  Array<Bf16> x(pixels * a.I), weight(static_cast<size_t>(a.O) * taps * a.I), bias(a.O);
  Array<Bf16> added(pixels * a.O), y(pixels * a.O), factor(a.I), shift(a.I);
  Array<float> statistics(static_cast<size_t>(a.B) * (groups ? groups : 1) * 2);
  const int tiles = op::tiles_of(a), quads = a.O / 4;
  Array<float> moments(static_cast<size_t>(a.B) * tiles * quads * 3), joined(a.B * 2 * 2);
  fill(x);
  fill(weight, 0.125f);
  fill(bias);
  fill(added);
  fill(factor, 0.25f, 1.0f);
  fill(shift, 0.5f);
  for (size_t i = 0; i < statistics.host.size(); ++i) {
    statistics.host[i] = i % 2 ? 1.0f + drawn(i) / 4 : drawn(i) / 4;
  }
  std::vector<Bf16> input = x.host;
  if (groups) {
    for (size_t i = 0; i < input.size(); ++i) {
      const size_t channel = i % a.I, sample = i / a.I / (pixels / a.B);
      const float* row = &statistics.host[(sample * groups + channel / (a.I / groups)) * 2];
      const float n = (value(x.host[i]) - row[0]) * row[1];
      const float u = n * value(factor.host[channel]) + value(shift.host[channel]);
      input[i] = rounded(u / (1.0f + std::exp(-u)));
    }
  }
  std::vector<double> expected(pixels * a.O);
  for (size_t p = 0; p < pixels; ++p) {
    const int w = p % a.W, h = p / a.W % a.H, t = p / a.W / a.H % a.T, b = p / a.W / a.H / a.T;
    for (int o = 0; o < a.O; ++o) {
      double sum = value(bias.host[o]) + (residual ? value(added.host[p * a.O + o]) : 0.0f);
      for (int tap = 0; tap < taps; ++tap) {
        const int from_t = t + tap / (a.KH * a.KW) - (a.KT - 1);
        const int from_h = h + tap / a.KW % a.KH - a.KH / 2, from_w = w + tap % a.KW - a.KW / 2;
        if (from_t < 0 || from_h < 0 || from_h >= a.H || from_w < 0 || from_w >= a.W) continue;
        const size_t from = ((static_cast<size_t>(b) * a.T + from_t) * a.H + from_h) * a.W + from_w;
        for (int i = 0; i < a.I; ++i) {
          sum += double(value(input[from * a.I + i])) *
                 value(weight.host[(static_cast<size_t>(o) * taps + tap) * a.I + i]);
        }
      }
      expected[p * a.O + o] = sum;
    }
  }
  a.x = x.sent();
  a.weight = weight.sent();
  a.bias = bias.sent();
  if (residual) a.residual = added.sent();
  if (groups) {
    a.mean_rstd = statistics.sent();
    a.norm_weight = factor.sent();
    a.norm_bias = shift.sent();
    a.G = groups;
  }
  a.y = y.sent();
  a.moments = moments.sent();
  launch(op::run<Bf16>, op::blocks_of(a), op::THREADS, op::shared_bytes(a), a);
  y.fetch();
  compare("causal_conv3d", y.host, expected, 0.004);
  const JoinMoments join{a.moments, joined.sent(), tiles, quads, 2, 1e-6f};
  launch(op::run_join, a.B * 2, op::JOINERS, op::JOINERS * sizeof(op::Moments), join);
  joined.fetch();
  for (int row = 0; row < a.B * 2; ++row) {
    double sum = 0.0, squares = 0.0, count = 0.0;
    for (size_t p = pixels / a.B * (row / 2); p < pixels / a.B * (row / 2 + 1); ++p) {
      for (int o = row % 2 * a.O / 2; o < (row % 2 + 1) * a.O / 2; ++o) {
        const double one = value(y.host[p * a.O + o]);
        sum += one;
        squares += one * one;
        ++count;
      }
    }
    const double mean = sum / count, rstd = 1 / std::sqrt(squares / count - mean * mean + 1e-6);
    HOLDS(std::fabs(joined.host[2 * row] - mean) < 1e-5, "mean %f, expected %f",
          joined.host[2 * row], mean);
    HOLDS(std::fabs(joined.host[2 * row + 1] / rstd - 1) < 1e-4, "rstd %f, expected %f",
          joined.host[2 * row + 1], rstd);
  }
}

}  // namespace

int main() {
  check_banks();
  for (const int T : {1, 2, 4}) {
    for (const int H : {1, 7, 8, 9, 17}) {
      for (const int W : {1, 15, 16, 33}) {
        for (int kernel = 0; kernel < 8; ++kernel) {
          const int KT = kernel & 1 ? 3 : 1, KH = kernel & 2 ? 3 : 1, KW = kernel & 4 ? 3 : 1;
          check_tiles(shape(2, T, H, W, 32, 136, KT, KH, KW));
        }
      }
    }
  }
  in_every_order([] {
    check_values(shape(1, 2, 9, 17, 32, 128, 3, 3, 3), false, 0);
    check_values(shape(2, 3, 5, 6, 64, 136, 3, 3, 3), true, 4);
    check_values(shape(1, 1, 10, 33, 96, 64, 1, 3, 3), true, 0);
    check_values(shape(2, 4, 8, 16, 32, 256, 3, 1, 1), false, 8);
    check_values(shape(1, 2, 3, 4, 64, 16, 1, 1, 1), true, 16);
  });
  std::printf("causal_conv3d: tiles, halos, banks and values agree\n");
}
