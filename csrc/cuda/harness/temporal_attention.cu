// Check temporal_attention alone: its plans and places for many shapes, then its values.
#include "../temporal_attention.cu"
#include "harness.h"

using namespace harness;
namespace op = temporal_attention;

namespace {

// Plans fit: whole groups, no more shared memory than sm_80 has, lanes that have work.
template <class T, int D>
void check_plans(int most_frames) {
  for (int frames = 1; frames <= most_frames; ++frames) {
    for (int heads = 1; heads <= 32; ++heads) {
      const op::Plan plan = op::plan_of<T, D>(frames, heads);
      HOLDS(plan.group >= 1 && heads % plan.group == 0, "%d frames, %d heads", frames, heads);
      HOLDS(plan.bytes <= 163 << 10, "%d bytes for %d frames", int(plan.bytes), frames);
      HOLDS(plan.threads % WARP == 0 && plan.threads <= op::MOST_THREADS, "%d threads",
            plan.threads);
      HOLDS(plan.threads - WARP < plan.group * frames, "an idle warp at %d frames", frames);
    }
  }
}

// Every pack of qkv is read by one thread of one block, every pack of out written by one, and
// places in shared memory differ.
void check_places(int B, int T, int S, int H, int group, int packs) {
  TemporalAttention a{};
  a.T = T;
  a.S = S;
  a.H = H;
  a.group = group;
  a.patch_stride = 3 * H * packs;
  a.frame_stride = S * a.patch_stride;
  a.batch_stride = T * a.frame_stride;
  std::vector<int> read(B * a.batch_stride), written(read.size() / 3);
  for (int64_t block = 0; block < static_cast<int64_t>(B) * S * (H / group); ++block) {
    const op::Unit u = op::unit_of(block, S, H, group);
    std::vector<int> slots(3 * T * group * packs);
    for (int i = 0; i < 3 * T * group * packs; ++i) {
      const op::Piece p = op::piece_of(i, 3, group, packs);
      const int64_t place = op::place_in_qkv(a, u, p, packs);
      const int64_t token = (static_cast<int64_t>(u.sample) * T + p.frame) * S + u.patch;
      HOLDS(place == ((token * 3 + p.part) * H + u.head + p.head) * packs + p.pack, "pack %d", i);
      ++read[place];
      ++slots[op::slot_of(p.frame, p.part, p.head, 3, group) * packs + p.pack];
    }
    for (const int count : slots) HOLDS(count == 1, "a slot is filled %d times", count);
    for (int i = 0; i < T * group * packs; ++i) {
      ++written[op::place_in_out(a, u, op::piece_of(i, 1, group, packs), packs)];
    }
    std::vector<int> tasks(T * group);
    for (int i = 0; i < T * group; ++i) {
      const op::Task task = op::task_of(i, T);
      ++tasks[op::slot_of(task.frame, 0, task.head, 1, group)];
    }
    for (const int count : tasks) HOLDS(count == 1, "a query has %d lanes", count);
  }
  for (const int count : read) HOLDS(count == 1, "a pack is read %d times", count);
  for (const int count : written) HOLDS(count == 1, "a pack is written %d times", count);
}

void check_values(int B, int T, int S, int H) {
  constexpr int D = 72;
  const size_t rows = static_cast<size_t>(B) * T * S;
  Array<Bf16> qkv(rows * 3 * H * D), out(rows * H * D), weight(D);
  Array<float> cos(T * D), sin(T * D);
  fill(qkv);
  fill(weight, 0.25f, 1.0f);
  for (int i = 0; i < T * D; ++i) {
    cos.host[i] = std::cos(drawn(i / 2));
    sin.host[i] = std::sin(drawn(i / 2));
  }
  const auto at = [&](int b, int t, int s, int part, int h) {
    return ((((static_cast<size_t>(b) * T + t) * S + s) * 3 + part) * H + h) * D;
  };
  const auto prepared = [&](size_t from, int t) {
    std::vector<double> x(D);
    double total = 0.0;
    for (int d = 0; d < D; ++d) total += std::pow(value(qkv.host[from + d]), 2);
    for (int d = 0; d < D; ++d) {
      x[d] = value(qkv.host[from + d]) * value(weight.host[d]) / std::sqrt(total / D + 1e-6);
    }
    for (int d = 0; d < D; d += 2) {
      const double c = cos.host[t * D + d], s = sin.host[t * D + d], even = x[d], odd = x[d + 1];
      x[d] = even * c - odd * s;
      x[d + 1] = odd * c + even * s;
    }
    return x;
  };
  std::vector<double> expected(out.host.size());
  for (int row = 0; row < B * S * H; ++row) {
    const int h = row % H, s = row / H % S, b = row / H / S;
    std::vector<std::vector<double>> keys;
    for (int t = 0; t < T; ++t) keys.push_back(prepared(at(b, t, s, 1, h), t));
    for (int t = 0; t < T; ++t) {
      const std::vector<double> q = prepared(at(b, t, s, 0, h), t);
      std::vector<double> p(T);
      double total = 0.0;
      for (int k = 0; k < T; ++k) {
        double score = 0.0;
        for (int d = 0; d < D; ++d) score += q[d] * keys[k][d];
        total += p[k] = std::exp(score / std::sqrt(double(D)));
      }
      double* y = &expected[((static_cast<size_t>(b) * T + t) * S + s) * H * D + h * D];
      for (int k = 0; k < T; ++k) {
        for (int d = 0; d < D; ++d) y[d] += p[k] / total * value(qkv.host[at(b, k, s, 2, h) + d]);
      }
    }
  }
  const op::Plan plan = op::plan_of<Bf16, D>(T, H);
  TemporalAttention a{};
  a.qkv = reinterpret_cast<const Pack*>(qkv.sent());
  a.out = reinterpret_cast<Pack*>(out.sent());
  a.patch_stride = 3 * H * D / 8;
  a.frame_stride = S * a.patch_stride;
  a.batch_stride = T * a.frame_stride;
  a.rules.q_weight = a.rules.k_weight = weight.sent();
  a.rules.weight_type = Type::bf16;
  a.rules.cos = cos.sent();
  a.rules.sin = sin.sent();
  a.rules.wide_table = true;
  a.rules.eps = 1e-6f;
  a.T = T;
  a.S = S;
  a.H = H;
  a.group = plan.group;
  a.scale = static_cast<float>(1.4426950408889634 / std::sqrt(double(D)));
  auto* kernel = op::run<Bf16, Bf16, D>;
  if (plan.wide) kernel = op::run<Bf16, float, D>;
  launch(kernel, static_cast<int64_t>(B) * S * (H / plan.group), plan.threads, plan.bytes, a);
  out.fetch();
  compare("temporal_attention", out.host, expected, 0.01);
}

}  // namespace

int main() {
  check_plans<Bf16, 72>(256);
  check_plans<Bf16, 64>(256);
  check_plans<float, 72>(178);
  for (const int T : {1, 2, 5, 15, 16, 17, 64}) {
    for (const int H : {1, 2, 6, 16}) {
      for (int group = 1; group <= H; ++group) {
        if (H % group == 0) check_places(2, T, 3, H, group, 9);
      }
    }
  }
  in_every_order([] {
    for (const int T : {1, 2, 5, 15, 16, 17, 30, 96, 97, 130, 256}) check_values(1, T, 2, 4);
    check_values(2, 15, 3, 16);
    check_values(1, 60, 2, 3);
  });
  std::printf("temporal_attention: plans, places and values agree\n");
}
