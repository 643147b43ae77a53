// Attention of each patch, in each head, to itself in all frames; contract in
// opensora/ops/temporal_attention.py, norm and rotation in heads.h.
//
//   p = softmax(q k' / sqrt(D)), y = p v
//
// A block has one patch and some of its heads in all frames, in shared memory, read and written
// once. One lane has one query: its head in registers, the running sum of softmax(...) v beside it.
// Lanes of a warp are frames of few heads, so that they read the same keys at once. Memory-bound up
// to about 30 frames: T^2 D multiply-adds of float32 to 4 T D numbers moved.
// Axes: B batch, T frames, S patches, H heads, D head width.
#include "heads.h"

namespace opensora {

struct TemporalAttention {
  const Pack* qkv;                                   // [B, T, S, 3, H, D], the last three dense
  int64_t batch_stride, frame_stride, patch_stride;  // of qkv, in packs
  Pack* out;                                         // [B, T, S, H, D]
  HeadRules rules;
  int T, S, H;
  int group;    // heads of a block
  float scale;  // log2(e) / sqrt(D)
};

namespace temporal_attention {

constexpr int MOST_THREADS = 128;
constexpr int KEYS = 4;  // scored at a time

// Bytes of shared memory that one head of one frame takes: q, k and v as they came, and, if `wide`,
// k and v in float32 as well, which spares a conversion for every product.
template <class T, int D>
constexpr int64_t FRAME_BYTES = 3 * HEAD_STRIDE<T, D> * 16;
template <int D>
constexpr int64_t WIDE_BYTES = 2 * D * 4;

struct Plan {
  int group;    // heads of a block
  bool wide;    // keys and values kept in float32
  int threads;  // of a block
  int64_t bytes;
};

// Few frames leave time for conversions; of many, float32 does not fit. Threads are filled up to
// 128, and shared memory so that an SM holds three blocks, where one head leaves room.
template <class T, int D>
HOST_DEVICE Plan plan_of(int frames, int heads) {
  constexpr int64_t THIRD = 75 << 10;  // of 228 KiB, less one that the system takes of each block
  Plan plan{};
  plan.wide = sizeof(T) == 2 && frames > 16 && frames <= 96;
  const int64_t row = FRAME_BYTES<T, D> + (plan.wide ? WIDE_BYTES<D> : 0);
  for (plan.group = 1; plan.group < heads; ++plan.group) {
    const int64_t next = static_cast<int64_t>(plan.group + 1) * frames;
    if (next > MOST_THREADS || 2 * D * 4 + next * row > THIRD) break;
  }
  while (heads % plan.group != 0) --plan.group;
  const int tasks = plan.group * frames;
  plan.threads = least((tasks + WARP - 1) / WARP * WARP, MOST_THREADS);
  plan.bytes = 2 * D * 4 + tasks * row;
  return plan;
}

// What a block works on.
struct Unit {
  int sample, patch, head;  // the first of `group` heads
};

HOST_DEVICE Unit unit_of(int64_t block, int patches, int heads, int group) {
  const int groups = heads / group;
  const int64_t row = block / groups;
  return {static_cast<int>(row / patches), static_cast<int>(row % patches),
          static_cast<int>(block % groups) * group};
}

// The i-th pack of a block's copy: `part` 0 to 2 of qkv in a frame, then a pack of its heads.
struct Piece {
  int frame, part, head, pack;
};

HOST_DEVICE Piece piece_of(int i, int parts, int group, int packs) {
  const int pack = i % packs, head = i / packs % group, row = i / packs / group;
  return {row / parts, row % parts, head, pack};
}

// Places in packs: of a piece in qkv, from the block's first; and in out.
HOST_DEVICE int64_t place_in_qkv(const TemporalAttention& a, const Unit& u, const Piece& p,
                                 int packs) {
  return u.sample * a.batch_stride + p.frame * a.frame_stride + u.patch * a.patch_stride +
         (static_cast<int64_t>(p.part) * a.H + u.head + p.head) * packs + p.pack;
}

HOST_DEVICE int64_t place_in_out(const TemporalAttention& a, const Unit& u, const Piece& p,
                                 int packs) {
  const int64_t token = (static_cast<int64_t>(u.sample) * a.T + p.frame) * a.S + u.patch;
  return (token * a.H + u.head + p.head) * packs + p.pack;
}

// Task i of a block: one head in one frame. Frames run fastest.
struct Task {
  int frame, head;
};

HOST_DEVICE Task task_of(int i, int frames) { return {i % frames, i / frames}; }

// The place of a head in shared memory, in heads; part is always 0 in a layout of one part.
HOST_DEVICE int slot_of(int frame, int part, int head, int parts, int group) {
  return (frame * parts + part) * group + head;
}

// Keys or values of one head: frame t at first + t * step.
template <class Kept>
struct Rows {
  const Pack* first;
  int step;  // packs from one frame to the next
};

// o = softmax(scale q k') v, for one query q in shared memory, which leaves registers to o.
template <class T, class Kept, int D>
DEVICE void attend(const Pack* q, const Rows<Kept>& k, const Rows<Kept>& v, int frames, float scale,
                   float (&o)[D]) {
  constexpr int N = PER_PACK<T>;  // at least PER_PACK<Kept>
  float most = -INFINITY, total = 0.0f;
  UNROLL for (int i = 0; i < D; ++i) { o[i] = 0.0f; }
  for (int first = 0; first < frames; first += KEYS) {
    float s[KEYS];
    UNROLL for (int j = 0; j < KEYS; ++j) { s[j] = 0.0f; }
    UNROLL for (int i = 0; i < D; i += N) {
      float wide[N];
      Numbers<T>::load(load_again(q + i / N), wide);
      UNROLL for (int j = 0; j < KEYS; ++j) {
        float key[N];  // past the end the last one again, which is real and gets no weight
        load_numbers<Kept>(k.first + least(first + j, frames - 1) * k.step, i, key);
        UNROLL for (int n = 0; n < N; ++n) { s[j] += wide[n] * key[n]; }
      }
    }
    float highest = most;
    UNROLL for (int j = 0; j < KEYS; ++j) {
      s[j] = first + j < frames ? s[j] * scale : -INFINITY;
      highest = fmaxf(highest, s[j]);
    }
    if (highest > most) {
      const float factor = power_of_2(most - highest);
      total *= factor;
      UNROLL for (int i = 0; i < D; ++i) { o[i] *= factor; }
      most = highest;
    }
    const float shift = most == -INFINITY ? 0.0f : most;  // nothing seen yet that has a weight
    UNROLL for (int j = 0; j < KEYS; ++j) {
      s[j] = power_of_2(s[j] - shift);
      total += s[j];
      const Pack* row = v.first + least(first + j, frames - 1) * v.step;
      UNROLL for (int i = 0; i < D; i += N) {
        float value[N];
        load_numbers<Kept>(row, i, value);
        UNROLL for (int n = 0; n < N; ++n) { o[i + n] += s[j] * value[n]; }
      }
    }
  }
  const float factor = inverse(total);
  UNROLL for (int i = 0; i < D; ++i) { o[i] *= factor; }
}

template <class T, class Kept, int D>
KERNEL(MOST_THREADS, 3)
run(TemporalAttention a) {
  constexpr int PACKS = HEAD_PACKS<T, D>, STRIDE = HEAD_STRIDE<T, D>;
  constexpr bool WIDE = sizeof(Kept) > sizeof(T);
  constexpr int KEPT = HEAD_PACKS<Kept, D>;
  float* weights = reinterpret_cast<float*>(shared());
  Pack* rows = reinterpret_cast<Pack*>(shared() + 2 * D * 4);  // [T, 3, group] heads
  const int tasks = a.T * a.group;
  Pack* keys = rows + 3 * tasks * STRIDE;  // [T, group] heads, if WIDE; likewise values
  Pack* values = keys + tasks * KEPT;
  const Unit unit = unit_of(blockIdx.x, a.S, a.H, a.group);
  for (int i = threadIdx.x; i < 3 * tasks * PACKS; i += blockDim.x) {
    const Piece p = piece_of(i, 3, a.group, PACKS);
    copy_async(rows + slot_of(p.frame, p.part, p.head, 3, a.group) * STRIDE + p.pack,
               a.qkv + place_in_qkv(a, unit, p, PACKS));
  }
  commit();
  stage_weights<D>(a.rules, weights);
  wait<0>();
  __syncthreads();
  for (int i = threadIdx.x; i < tasks; i += blockDim.x) {
    const Task task = task_of(i, a.T);
    const int slot = slot_of(task.frame, 0, task.head, 1, a.group);
    Pack* key = rows + slot_of(task.frame, 1, task.head, 3, a.group) * STRIDE;
    prepare<T, D>(key, a.rules, weights + D, task.frame, [&](int n, auto& x) {
      if constexpr (WIDE) {
        constexpr int N = PER_PACK<T>;
        UNROLL for (int j = 0; j < N; ++j) { x[j] = Numbers<T>::round(x[j]); }
        store_numbers<Kept>(keys + slot * KEPT, n * N, x);
        Numbers<T>::load(key[a.group * STRIDE + n], x);
        store_numbers<Kept>(values + slot * KEPT, n * N, x);
      } else {
        key[n] = Numbers<T>::store(x);
      }
    });
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tasks; i += blockDim.x) {
    const Task task = task_of(i, a.T);
    Pack* row = rows + slot_of(task.frame, 0, task.head, 3, a.group) * STRIDE;
    prepare<T, D>(row, a.rules, weights, task.frame,
                  [&](int n, const auto& x) { row[n] = Numbers<T>::store(x); });
    Rows<Kept> k, v;
    if constexpr (WIDE) {
      k = {keys + task.head * KEPT, a.group * KEPT};
      v = {values + task.head * KEPT, a.group * KEPT};
    } else {
      k = {rows + slot_of(0, 1, task.head, 3, a.group) * STRIDE, 3 * a.group * STRIDE};
      v = {rows + slot_of(0, 2, task.head, 3, a.group) * STRIDE, 3 * a.group * STRIDE};
    }
    float o[D];
    attend<T, Kept, D>(row, k, v, a.T, a.scale, o);
    UNROLL for (int n = 0; n < PACKS; ++n) {  // where the query was, which no other lane reads
      row[n] = Numbers<T>::store(o + n * PER_PACK<T>);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tasks * PACKS; i += blockDim.x) {
    const Piece p = piece_of(i, 1, a.group, PACKS);
    a.out[place_in_out(a, unit, p, PACKS)] =
        rows[slot_of(p.frame, 0, p.head, 3, a.group) * STRIDE + p.pack];
  }
}

}  // namespace temporal_attention
}  // namespace opensora

#ifdef OPENSORA_BIND
#include "launch.h"

namespace opensora {
namespace {

template <class T, int D>
void start(const OnDevice& device, TemporalAttention a, int64_t samples) {
  namespace op = temporal_attention;
  const op::Plan plan = op::plan_of<T, D>(a.T, a.H);
  STD_TORCH_CHECK(plan.bytes <= device.most_shared(), a.T, " frames need ", plan.bytes,
                  " bytes of shared memory; there are ", device.most_shared());
  a.group = plan.group;
  const int64_t blocks = samples * a.S * (a.H / plan.group);
  auto* kernel = op::run<T, T, D>;
  if (plan.wide) kernel = op::run<T, float, D>;
  launch(device, kernel, blocks, plan.threads, plan.bytes, a);
}

Tensor forward(const Tensor& qkv, const std::optional<Tensor>& q_weight,
               const std::optional<Tensor>& k_weight, const std::optional<Tensor>& cos,
               const std::optional<Tensor>& sin, double eps) {
  STD_TORCH_CHECK(qkv.dim() == 6 && qkv.size(3) == 3, "qkv must be [B, T, S, 3, H, D]");
  const int64_t frames = qkv.size(1), heads = qkv.size(4), width = qkv.size(5);
  STD_TORCH_CHECK(qkv.stride(5) == 1 && qkv.stride(4) == width && qkv.stride(3) == heads * width,
                  "the last three dimensions of qkv must be dense");
  Tensor y = torch::stable::new_empty(qkv, {qkv.size(0), frames, qkv.size(2), heads * width});
  if (y.numel() == 0) return y;
  TemporalAttention a{};
  a.rules = head_rules(qkv, frames, q_weight, k_weight, cos, sin, false, eps);
  a.qkv = static_cast<const Pack*>(qkv.const_data_ptr());
  a.out = static_cast<Pack*>(y.mutable_data_ptr());
  a.T = static_cast<int>(frames);
  a.S = static_cast<int>(qkv.size(2));
  a.H = static_cast<int>(heads);
  a.scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(width)));
  const OnDevice device(qkv);
  with_type(qkv, [&](auto number) {
    using T = decltype(number);
    int64_t* strides[] = {&a.batch_stride, &a.frame_stride, &a.patch_stride};
    for (int i = 0; i < 3; ++i) {
      STD_TORCH_CHECK(qkv.stride(i) % PER_PACK<T> == 0 && aligned(qkv),
                      "qkv's tokens must be aligned to 16 bytes");
      *strides[i] = qkv.stride(i) / PER_PACK<T>;
    }
    STD_TORCH_CHECK(width == 72 || width == 64, "D must be 64 or 72");
    width == 72 ? start<T, 72>(device, a, qkv.size(0)) : start<T, 64>(device, a, qkv.size(0));
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(opensora, KERNEL_DEVICE, m) {
  m.impl("temporal_attention_forward.native", TORCH_BOX(&forward));
}

}  // namespace
}  // namespace opensora
#endif  // OPENSORA_BIND
