// RMSNorm of queries and keys, then rotary positions (or the other way round); contract in
// opensora/ops/qk_norm_rope.py, arithmetic in heads.h.
//
// Memory-bound: q and k are read and written once, v is copied unless in place. q and k of a token
// are 2H heads in a row. A warp takes 32 of them, of one token or several: it copies them to shared
// memory 16 bytes at a time, each lane prepares its own, and they go back the same way. Warps share
// nothing but the weights. Axes: N tokens, H heads, D head width.
#include "heads.h"

namespace opensora {

struct QkNormRope {
  const Pack* qkv;  // [N, 3, H, D]
  Pack* out;        // like qkv, or qkv itself
  HeadRules rules;
  int N, H;
  int positions, inner;  // a token's position is token / inner % positions
};

namespace qk_norm_rope {

constexpr int WARPS = 4;

// The tile of a warp: heads [first, first + count) of the 2H N of q and k, token after token.
struct Tile {
  int token, head;  // where it begins; head < 2H
  int count;        // of the warp's lanes that have a head
};

HOST_DEVICE int64_t tiles(int64_t N, int64_t H) { return (2 * H * N + WARP - 1) / WARP; }

HOST_DEVICE Tile tile_of(int64_t tile, int64_t N, int64_t H) {
  const int64_t first = tile * WARP;
  return {static_cast<int>(first / (2 * H)), static_cast<int>(first % (2 * H)),
          static_cast<int>(least(2 * H * N - first, int64_t{WARP}))};
}

// The token of a tile's i-th head, and the head's place among all heads of qkv [N, 3H].
HOST_DEVICE int token_of(const Tile& tile, int i, int H) {
  return tile.token + (tile.head + i) / (2 * H);
}

HOST_DEVICE int64_t place_of(const Tile& tile, int i, int H) {
  const int head = (tile.head + i) % (2 * H);
  return static_cast<int64_t>(token_of(tile, i, H)) * 3 * H + head;
}

template <class T, int D>
constexpr int64_t SHARED = 2 * D * 4 + WARPS * WARP * HEAD_STRIDE<T, D> * 16;

template <class T, int D>
KERNEL(WARPS* WARP, sizeof(T) == 4 ? 2 : 3)
run(QkNormRope a) {
  constexpr int PACKS = HEAD_PACKS<T, D>, STRIDE = HEAD_STRIDE<T, D>;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  float* weights = reinterpret_cast<float*>(shared());
  Pack* heads = reinterpret_cast<Pack*>(shared() + 2 * D * 4) + warp * WARP * STRIDE;
  stage_weights<D>(a.rules, weights);
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * WARPS + warp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * WARPS;
  for (int64_t i = first; i < tiles(a.N, a.H); i += step) {
    const Tile tile = tile_of(i, a.N, a.H);
    UNROLL for (int k = 0; k < PACKS; ++k) {
      const int head = (k * WARP + lane) / PACKS, pack = (k * WARP + lane) % PACKS;
      if (head < tile.count) {
        copy_async(heads + head * STRIDE + pack, a.qkv + place_of(tile, head, a.H) * PACKS + pack);
      }
    }
    commit();
    wait<0>();
    __syncwarp();
    if (lane < tile.count) {
      const int token = token_of(tile, lane, a.H);
      const bool key = (tile.head + lane) % (2 * a.H) >= a.H;
      Pack* own = heads + lane * STRIDE;
      prepare<T, D>(own, a.rules, weights + key * D, token / a.inner % a.positions,
                    [&](int k, const auto& x) { own[k] = Numbers<T>::store(x); });
    }
    __syncwarp();
    UNROLL for (int k = 0; k < PACKS; ++k) {
      const int head = (k * WARP + lane) / PACKS, pack = (k * WARP + lane) % PACKS;
      if (head < tile.count) {
        a.out[place_of(tile, head, a.H) * PACKS + pack] = heads[head * STRIDE + pack];
      }
    }  // the next copy writes to each place from the lane that read it
  }
  if (a.out == a.qkv) return;
  for (int64_t token = first; token < a.N; token += step) {
    const int64_t v = (token * 3 + 2) * a.H * PACKS;
    for (int i = lane; i < a.H * PACKS; i += WARP) a.out[v + i] = a.qkv[v + i];
  }
}

}  // namespace qk_norm_rope
}  // namespace opensora

#ifdef OPENSORA_BIND
#include "launch.h"

namespace opensora {
namespace {

void run(const Tensor& qkv, const Tensor& out, const HeadRules& rules, int64_t position_dim) {
  using namespace qk_norm_rope;
  const int64_t dims = qkv.dim();
  const int64_t heads = qkv.size(dims - 2), width = qkv.size(dims - 1);
  QkNormRope a{};
  a.qkv = static_cast<const Pack*>(qkv.const_data_ptr());
  a.out = static_cast<Pack*>(out.mutable_data_ptr());
  a.rules = rules;
  if (qkv.numel() == 0) return;
  const int64_t tokens = qkv.numel() / (3 * heads * width);
  STD_TORCH_CHECK(tokens < (int64_t{1} << 31) && aligned(qkv) && aligned(out),
                  "qkv must be aligned to 16 bytes and have less than 2^31 tokens");
  a.N = static_cast<int>(tokens);
  a.H = static_cast<int>(heads);
  a.positions = static_cast<int>(qkv.size(dims + position_dim));
  a.inner = 1;
  for (int64_t i = dims + position_dim + 1; i < dims - 3; ++i) {
    a.inner *= static_cast<int>(qkv.size(i));
  }
  const OnDevice device(qkv);
  with_type(qkv, [&](auto number) {
    using T = decltype(number);
    const int64_t needed = (tiles(tokens, heads) + WARPS - 1) / WARPS;
    const int64_t blocks = least(needed, int64_t{16} * device.processors());
    STD_TORCH_CHECK(width == 72 || width == 64, "D must be 64 or 72");
    width == 72 ? launch(device, qk_norm_rope::run<T, 72>, blocks, WARPS * WARP, SHARED<T, 72>, a)
                : launch(device, qk_norm_rope::run<T, 64>, blocks, WARPS * WARP, SHARED<T, 64>, a);
  });
}

// Return the rules of qkv's heads, whose shape is checked.
HeadRules rules_of(const Tensor& qkv, const std::optional<Tensor>& q_weight,
                   const std::optional<Tensor>& k_weight, const std::optional<Tensor>& cos,
                   const std::optional<Tensor>& sin, int64_t position_dim, bool legacy,
                   double eps) {
  const int64_t dims = qkv.dim();
  STD_TORCH_CHECK(qkv.is_contiguous() && dims >= 4 && qkv.size(dims - 3) == 3 &&
                      -dims <= position_dim && position_dim <= -4,
                  "qkv must be contiguous [..., N, ..., 3, H, D]");
  return head_rules(qkv, qkv.size(dims + position_dim), q_weight, k_weight, cos, sin, legacy, eps);
}

Tensor forward(const Tensor& qkv, const std::optional<Tensor>& q_weight,
               const std::optional<Tensor>& k_weight, const std::optional<Tensor>& cos,
               const std::optional<Tensor>& sin, int64_t position_dim, bool legacy, double eps) {
  const HeadRules rules = rules_of(qkv, q_weight, k_weight, cos, sin, position_dim, legacy, eps);
  Tensor y = torch::stable::empty_like(qkv);
  run(qkv, y, rules, position_dim);
  return y;
}

void inplace(const Tensor& qkv, const std::optional<Tensor>& q_weight,
             const std::optional<Tensor>& k_weight, const std::optional<Tensor>& cos,
             const std::optional<Tensor>& sin, int64_t position_dim, bool legacy, double eps) {
  const HeadRules rules = rules_of(qkv, q_weight, k_weight, cos, sin, position_dim, legacy, eps);
  run(qkv, qkv, rules, position_dim);
}

STABLE_TORCH_LIBRARY_IMPL(opensora, KERNEL_DEVICE, m) {
  m.impl("qk_norm_rope_forward.native", TORCH_BOX(&forward));
  m.impl("qk_norm_rope_inplace.native", TORCH_BOX(&inplace));
}

}  // namespace
}  // namespace opensora
#endif  // OPENSORA_BIND
