// Check qk_norm_rope alone: its tiles for many shapes, then its values.
#include "../qk_norm_rope.cu"
#include "harness.h"

using namespace harness;

namespace {

// Every head of q and k belongs to one lane of one tile, and none of v to any.
void check_tiles() {
  for (int N = 1; N <= 70; ++N) {
    for (int H = 1; H <= 33; ++H) {
      std::vector<int> seen(static_cast<size_t>(N) * 3 * H);
      const int64_t tiles = qk_norm_rope::tiles(N, H);
      for (int64_t i = 0; i < tiles; ++i) {
        const qk_norm_rope::Tile tile = qk_norm_rope::tile_of(i, N, H);
        HOLDS(tile.count >= 1 && tile.count <= WARP, "tile %d of %d x %d", int(i), N, H);
        for (int lane = 0; lane < tile.count; ++lane) {
          const int64_t place = qk_norm_rope::place_of(tile, lane, H);
          const int token = qk_norm_rope::token_of(tile, lane, H);
          HOLDS(token == place / (3 * H), "token of head %d", int(place));
          const bool key = (tile.head + lane) % (2 * H) >= H;
          HOLDS(key == (place / H % 3 == 1), "key or query, head %d", int(place));
          ++seen[place];
        }
      }
      for (size_t i = 0; i < seen.size(); ++i) {
        HOLDS(seen[i] == (i / H % 3 < 2), "head %zu of %d x %d is seen %d times", i, N, H, seen[i]);
      }
    }
  }
}

// A head's packs lie apart from all others', and eight heads meet different banks.
template <class T, int D>
void check_strides() {
  constexpr int stride = HEAD_STRIDE<T, D>, packs = HEAD_PACKS<T, D>;
  static_assert(packs * PER_PACK<T> == D && stride >= packs, "heads must not overlap");
  for (int pack = 0; pack < packs; ++pack) {
    unsigned banks = 0;
    for (int lane = 0; lane < 8; ++lane) banks |= 1u << ((lane * stride + pack) % 8);
    HOLDS(banks == 0xff, "bank conflict in pack %d", pack);
  }
}

void check_values(int N, int H, bool norm, bool rotary, bool legacy, bool inplace) {
  constexpr int D = 72;
  const int positions = 3, inner = 2;
  const size_t numbers = static_cast<size_t>(N) * 3 * H * D;
  Array<Bf16> qkv(numbers), out(numbers), q_weight(D), k_weight(D);
  Array<float> cos(positions * D), sin(positions * D);
  fill(qkv, 1.0f, 0.25f);
  fill(q_weight, 0.25f, 1.0f);
  fill(k_weight, -0.25f, 1.0f);
  for (int i = 0; i < positions * D; ++i) {
    cos.host[i] = std::cos(drawn(i / 2));
    sin.host[i] = std::sin(drawn(i / 2));
  }
  std::vector<double> expected(numbers);
  for (size_t head = 0; head < numbers / D; ++head) {
    const int part = static_cast<int>(head / H % 3), token = static_cast<int>(head / H / 3);
    std::vector<double> x(D);
    for (int d = 0; d < D; ++d) x[d] = value(qkv.host[head * D + d]);
    const auto rotate = [&] {
      const size_t row = static_cast<size_t>(token / inner % positions) * D;
      for (int d = 0; d < D; d += 2) {
        const double c = cos.host[row + d], s = sin.host[row + d], even = x[d], odd = x[d + 1];
        x[d] = even * c - odd * s;
        x[d + 1] = odd * c + even * s;
      }
    };
    if (part < 2 && rotary && legacy) rotate();
    if (part < 2 && norm) {
      double total = 0.0;
      for (const double one : x) total += one * one;
      const auto& weight = part == 0 ? q_weight.host : k_weight.host;
      for (int d = 0; d < D; ++d) x[d] *= value(weight[d]) / std::sqrt(total / D + 1e-6);
    }
    if (part < 2 && rotary && !legacy) rotate();
    for (int d = 0; d < D; ++d) expected[head * D + d] = x[d];
  }
  QkNormRope a{};
  Bf16* input = qkv.sent();
  a.qkv = reinterpret_cast<const Pack*>(input);
  a.out = reinterpret_cast<Pack*>(inplace ? input : out.sent());
  if (norm) {
    a.rules.q_weight = q_weight.sent();
    a.rules.k_weight = k_weight.sent();
    a.rules.weight_type = Type::bf16;
  }
  if (rotary) {
    a.rules.cos = cos.sent();
    a.rules.sin = sin.sent();
    a.rules.wide_table = true;
  }
  a.rules.legacy = legacy;
  a.rules.eps = 1e-6f;
  a.N = N;
  a.H = H;
  a.positions = positions;
  a.inner = inner;
  launch(qk_norm_rope::run<Bf16, D>, 2, qk_norm_rope::WARPS * WARP, qk_norm_rope::SHARED<Bf16, D>,
         a);
  Array<Bf16>& written = inplace ? qkv : out;
  written.fetch();
  compare("qk_norm_rope", written.host, expected, 0.004);
}

}  // namespace

int main() {
  check_tiles();
  check_strides<Bf16, 72>();
  check_strides<Bf16, 64>();
  check_strides<float, 72>();
  check_strides<float, 64>();
  in_every_order([] {
    for (const int N : {1, 7, 37}) {
      for (const int H : {1, 5, 16}) {
        for (int rules = 0; rules < 16; ++rules) {
          check_values(N, H, rules & 1, rules & 2, rules & 4, rules & 8);
        }
      }
    }
  });
  std::printf("qk_norm_rope: tiles and values agree\n");
}
