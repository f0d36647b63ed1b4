// Just enough of CUDA to run the kernels of csrc on the CPU: the threads of a block are fibers of one host thread,
// blocks run one after another. Include it before the kernels, with DDFUP_CUDA_EMULATOR defined.
//
// Stricter than a GPU: a thread that ends while its block or warp waits for it is an error, and blocks can run their
// threads in falling order (`reversed`), which brings to light a barrier that is missing. Asynchronous copies arrive as
// late as they may; until then their targets are NaN.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

using std::max;
using std::min;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

constexpr int kMostThreads = 1024, kWarp = 32, kStack = 256 * 1024;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// Fibers start by makecontext and live on from block to block; between them and the scheduler it takes _longjmp,
// because swapcontext calls the kernel each time.
struct Block {
  jmp_buf scheduler;
  jmp_buf fiber[kMostThreads];
  bool started[kMostThreads] = {};
  State state[kMostThreads];
  uint64_t exchange[kMostThreads];
  std::unique_ptr<char[]> stacks{new char[static_cast<size_t>(kMostThreads) * kStack]};
  std::function<void()> body;
  std::exception_ptr error;
  std::vector<std::vector<Copy>> copies[kMostThreads];  // groups on their way
  std::vector<Copy> open_copies[kMostThreads];          // of the group not committed yet
  int current = 0;
};

inline Block block;
inline bool reversed = false;

inline void wait(State at) {
  const int self = block.current;
  block.state[self] = at;
  if (!_setjmp(block.fiber[self])) _longjmp(block.scheduler, 1);
}

inline void copy_async(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    throw std::runtime_error("a copy is not aligned");
  block.open_copies[block.current].push_back({to, from, bytes});
  std::memset(to, 0xff, bytes);
}
inline void commit_copies() {
  block.copies[block.current].push_back(std::exchange(block.open_copies[block.current], {}));
}
inline void wait_copies(size_t most_left) {
  auto& groups = block.copies[block.current];
  while (groups.size() > most_left) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

inline void live() {
  for (;;) {
    try {
      block.body();
    } catch (...) {
      block.error = std::current_exception();  // a fiber has no caller to throw to
    }
    wait(State::kDone);
  }
}

inline void resume(int i) {
  block.current = i;
  if (_setjmp(block.scheduler)) return;
  if (block.started[i]) _longjmp(block.fiber[i], 1);
  block.started[i] = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = block.stacks.get() + static_cast<size_t>(i) * kStack;
  start.uc_stack.ss_size = kStack;
  start.uc_link = nullptr;
  makecontext(&start, live, 0);
  setcontext(&start);
}

// Lets the threads [first, last) go on if all of them wait at this kind of barrier.
inline bool release(int first, int last, State at) {
  int waiting = 0;
  for (int i = first; i < last; ++i) waiting += block.state[i] == at;
  if (waiting < last - first) return false;
  std::fill(block.state + first, block.state + last, State::kReady);
  return true;
}

inline void run_block(int threads) {
  std::fill(block.state, block.state + threads, State::kReady);
  for (int i = 0; i < threads; ++i) block.copies[i].clear(), block.open_copies[i].clear();
  for (bool moving = true; moving;) {
    moving = false;
    for (int step = 0; step < threads; ++step) {
      const int i = reversed ? threads - 1 - step : step;
      if (block.state[i] != State::kReady) continue;
      threadIdx = {static_cast<unsigned>(i) % blockDim.x, static_cast<unsigned>(i) / blockDim.x, 0};
      resume(i);
      moving = true;
    }
    for (int warp = 0; warp < threads; warp += kWarp)
      release(warp, std::min(warp + kWarp, threads), State::kAtWarpBarrier);
    release(0, threads, State::kAtBlockBarrier);
  }
  if (std::any_of(block.state, block.state + threads, [](State state) { return state != State::kDone; })) {
    std::fill(block.started, block.started + threads, false);  // or the fibers would go on from their barriers
    throw std::runtime_error("a barrier is not reached by all threads");
  }
  if (block.error) std::rethrow_exception(std::exchange(block.error, nullptr));
  for (int i = 0; i < threads; ++i) {
    bool left = !block.open_copies[i].empty();
    for (const auto& group : block.copies[i]) left |= !group.empty();
    if (left) throw std::runtime_error("a copy is not waited for");
  }
}

template <typename Kernel, typename... Arguments>
void launch(Kernel* kernel, int64_t blocks, int block_x, int block_y, const Arguments&... arguments) {
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  blockDim = {static_cast<unsigned>(block_x), static_cast<unsigned>(block_y), 1};
  block.body = [&] { kernel(arguments...); };
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx = {static_cast<unsigned>(reversed ? blocks - 1 - i : i), 0, 0};
    run_block(block_x * block_y);
  }
}

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::kAtBlockBarrier); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  if (mask != ~0u) throw std::runtime_error("only whole warps shuffle here");
  const int self = emulator::block.current;
  std::memcpy(&emulator::block.exchange[self], &value, sizeof value);
  emulator::wait(emulator::State::kAtWarpBarrier);
  std::memcpy(&value, &emulator::block.exchange[self ^ other], sizeof value);
  emulator::wait(emulator::State::kAtWarpBarrier);
  return value;
}

template <typename T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) throw std::runtime_error("a load is not aligned");
  return *from;
}

// A store past the caches, as far as there are any.
template <typename T>
void __stcs(T* to, T value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T)) throw std::runtime_error("a store is not aligned");
  std::memcpy(to, &value, sizeof value);
}
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline unsigned __float_as_uint(float value) { return emulator::bits_as<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return emulator::bits_as<float>(bits); }
inline long long __double_as_longlong(double value) { return emulator::bits_as<long long>(value); }
inline double __longlong_as_double(long long bits) { return emulator::bits_as<double>(bits); }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half half) {
  const unsigned sign = (half.bits & 0x8000u) << 16, exponent = half.bits >> 10 & 0x1fu, fraction = half.bits & 0x3ffu;
  if (exponent == 0) {
    const float tiny = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -tiny : tiny;
  }
  return __uint_as_float(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

// Both round to nearest even.
inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  unsigned result;
  if (size > 0x7f800000u) {
    result = 0x7fffu;
  } else if (size >= 0x477ff000u) {
    result = 0x7c00u;
  } else if (size < 0x38800000u) {
    result = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u;  // the adder rounds
  } else {
    result = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | result)};
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
