// Run CUDA kernels on a processor, thread by thread, to test what they compute without a GPU.
//
// Every thread of a block is a fiber that runs until it waits: at a barrier, or in an instruction
// that a whole warp takes part in. Tests choose who runs first, how far warps drift apart, and when
// asynchronous copies arrive, so that a missing barrier shows as a wrong value in one of the
// orders; shared memory begins as NaN. What differs from a GPU: one block at a time, caches, and
// the rounding of sums inside `multiply`.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

namespace opensora {
namespace emulator {

struct Index {
  unsigned x, y, z;
};

inline uint32_t bf16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

inline float f16_value(uint32_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float x = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                          : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  if (exponent == 31) x = fraction ? NAN : INFINITY;
  return bits & 0x8000u ? -x : x;
}

inline uint32_t f16_bits(float x) {
  const uint32_t sign = std::signbit(x) ? 0x8000u : 0;
  x = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7fffu;
  if (x >= 65520.0f) return sign | 0x7c00u;
  int exponent;
  std::frexp(x, &exponent);
  exponent = std::max(exponent, -13);  // x < 2^exponent; below 2^-14 steps stay as they are
  const float steps = std::nearbyint(std::ldexp(x, 11 - exponent));  // ties to even
  return sign | (static_cast<uint32_t>(steps) + (static_cast<uint32_t>(exponent + 13) << 10));
}

struct Copy {
  void* to;
  const void* from;
  bool there;
};

enum class State { ready, block_barrier, warp_barrier, done };

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  std::vector<char> stack = std::vector<char>(64 << 10);
  bool started = false;
  State state = State::ready;
  void* payload = nullptr;               // of the collective that it waits in
  void (*collective)(void**) = nullptr;  // one for all lanes of a warp; null: a plain barrier
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

// What a GPU leaves open, and tests choose.
struct Order {
  int turns = 0;       // of warps and lanes: 0 one after the other, 1 backwards, 2 shuffled
  bool hurry = false;  // a warp runs on to the block's barrier, instead of one step like all others
  bool early = false;  // an asynchronous copy arrives at once, instead of when it is waited for
};

// What runs now. One block at a time, in one thread of the process.
struct Machine {
  Index thread{}, block{}, grid{}, size{};
  std::vector<Fiber> fibers;
  std::vector<unsigned char> memory;
  std::function<void()> kernel;
  jmp_buf scheduler;
  Fiber* running = nullptr;
  Order order;
};

constexpr int ORDERS = 12;

inline Machine& machine() {
  static Machine one;
  return one;
}

inline unsigned char* shared() { return machine().memory.data(); }

// Give the processor back, until the scheduler finds that the wait is over.
inline void park(State state) {
  machine().running->state = state;
  if (_setjmp(machine().running->at) == 0) _longjmp(machine().scheduler, 1);
}

inline void enter() {
  machine().kernel();
  machine().running->state = State::done;
  _longjmp(machine().scheduler, 1);
}

inline void collect(void (*collective)(void**), void* payload) {
  Fiber& fiber = *machine().running;
  fiber.collective = collective;
  fiber.payload = payload;
  park(State::warp_barrier);
}

inline void run(const Copy& copy) {
  copy.there ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
}

inline void copy_async(void* to, const void* from, bool there) {
  const Copy copy{to, from, there};
  machine().order.early ? run(copy) : machine().running->open.push_back(copy);
}

inline void commit() {
  Fiber& fiber = *machine().running;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

inline void wait(size_t left) {
  std::vector<std::vector<Copy>>& groups = machine().running->groups;
  while (groups.size() > left) {
    for (const Copy& copy : groups.front()) run(copy);
    groups.erase(groups.begin());
  }
}

struct Matrices {
  uint32_t* words;
  const void* row;
};

inline void load_matrices(uint32_t (&words)[4], const void* row) {
  Matrices mine{words, row};
  collect(
      [](void** lanes) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const auto* row = static_cast<Matrices*>(lanes[8 * i + lane / 4])->row;
            std::memcpy(static_cast<Matrices*>(lanes[lane])->words + i,
                        static_cast<const char*>(row) + lane % 4 * 4, 4);
          }
        }
      },
      &mine);
}

struct Product {
  float* c;
  const uint32_t *a, *b;
  void (*unpack)(uint32_t, float&, float&);
};

inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     void (*unpack)(uint32_t, float&, float&)) {
  Product mine{c, a, b, unpack};
  collect(
      [](void** lanes) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const Product& p = *static_cast<Product*>(lanes[lane]);
          const int r = lane / 4, q = lane % 4 * 2;
          for (int i = 0; i < 4; ++i) {
            float* row = left[r + i % 2 * 8] + q + i / 2 * 8;
            p.unpack(p.a[i], row[0], row[1]);
          }
          for (int i = 0; i < 2; ++i) {
            p.unpack(p.b[i], right[q + 8 * i][r], right[q + 8 * i + 1][r]);
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          const Product& p = *static_cast<Product*>(lanes[lane]);
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = p.c[i];
            for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
            p.c[i] = sum;
          }
        }
      },
      &mine);
}

// Let the warp of fibers [first, last) go on if all its lanes wait for one another.
inline bool release_warp(size_t first) {
  std::vector<Fiber>& fibers = machine().fibers;
  const size_t last = std::min(first + 32, fibers.size());
  size_t waiting = 0, done = 0;
  void* lanes[32] = {};
  for (size_t i = first; i < last; ++i) {
    waiting += fibers[i].state == State::warp_barrier;
    done += fibers[i].state == State::done;
    lanes[i - first] = fibers[i].payload;
  }
  if (waiting == 0 || waiting + done < last - first) return false;
  void (*collective)(void**) = fibers[first].collective;
  for (size_t i = first; i < last; ++i) {
    if (fibers[i].collective != collective) throw std::runtime_error("a warp has split up");
  }
  if (collective) {
    if (waiting < 32) throw std::runtime_error("a warp's instruction lacks lanes");
    collective(lanes);
  }
  for (size_t i = first; i < last; ++i) {
    if (fibers[i].state == State::warp_barrier) fibers[i].state = State::ready;
  }
  return true;
}

// Let the block go on after its barrier; false if it is done.
inline bool release_block() {
  bool waiting = false;
  for (Fiber& fiber : machine().fibers) {
    if (fiber.state == State::warp_barrier) throw std::runtime_error("a warp waits for ever");
    if (fiber.state != State::block_barrier) continue;
    fiber.state = State::ready;
    waiting = true;
  }
  return waiting;
}

// Let a fiber run until it waits or ends; on a stack frame of its own, for the jump back.
__attribute__((noinline)) inline void run_fiber(Fiber& fiber) {
  if (_setjmp(machine().scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Run every ready lane of a warp once.
inline void run_warp(size_t first, const std::vector<size_t>& turns) {
  Machine& m = machine();
  for (const size_t turn : turns) {
    const size_t i = first + turn;
    if (i >= m.fibers.size() || m.fibers[i].state != State::ready) continue;
    m.running = &m.fibers[i];
    m.thread = {static_cast<unsigned>(i), 0, 0};
    run_fiber(m.fibers[i]);
  }
}

// The numbers below `count` in the order of this run.
inline std::vector<size_t> turns(size_t count, std::mt19937& random) {
  std::vector<size_t> all(count);
  std::iota(all.begin(), all.end(), size_t{0});
  if (machine().order.turns == 1) std::reverse(all.begin(), all.end());
  if (machine().order.turns == 2) std::shuffle(all.begin(), all.end(), random);
  return all;
}

inline void run_block() {
  Machine& m = machine();
  const size_t warps = (m.fibers.size() + 31) / 32;
  std::mt19937 random(m.block.x);
  do {
    bool released = true;
    while (released) {
      released = false;
      for (const size_t warp : turns(warps, random)) {
        do run_warp(32 * warp, turns(32, random));
        while (release_warp(32 * warp) && (released = true) && m.order.hurry);
      }
    }
  } while (release_block());
}

// Run a kernel as <<<blocks, threads, bytes>>> would.
inline void launch(int64_t blocks, int threads, size_t bytes, std::function<void()> kernel) {
  constexpr size_t GUARD = 64;
  Machine& m = machine();
  m.kernel = std::move(kernel);
  m.grid = {static_cast<unsigned>(blocks), 1, 1};
  m.size = {static_cast<unsigned>(threads), 1, 1};
  m.memory.resize(bytes + GUARD);
  m.fibers.resize(threads);
  for (int64_t block = 0; block < blocks; ++block) {
    m.block = {static_cast<unsigned>(block), 0, 0};
    std::fill(m.memory.begin(), m.memory.end(), static_cast<unsigned char>(0xff));
    for (Fiber& fiber : m.fibers) {
      fiber.started = false;
      fiber.state = State::ready;
      fiber.groups.clear();
      fiber.open.clear();
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.data();
      fiber.start.uc_stack.ss_size = fiber.stack.size();
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, enter, 0);
    }
    run_block();
    for (size_t i = 0; i < GUARD; ++i) {
      if (m.memory[bytes + i] != 0xff) throw std::runtime_error("written past shared memory");
    }
  }
}

}  // namespace emulator
}  // namespace opensora

#define threadIdx opensora::emulator::machine().thread
#define blockIdx opensora::emulator::machine().block
#define gridDim opensora::emulator::machine().grid
#define blockDim opensora::emulator::machine().size

inline void __syncthreads() { opensora::emulator::park(opensora::emulator::State::block_barrier); }

// For tests: choose one of ORDERS orders for the kernels that follow (emulator::Order).
extern "C" __attribute__((visibility("default"), used)) inline void opensora_emulator_order(
    int order) {
  opensora::emulator::machine().order = {order % 3, order / 3 % 2 == 1, order / 6 % 2 == 1};
}

inline void __syncwarp() { opensora::emulator::collect(nullptr, nullptr); }
