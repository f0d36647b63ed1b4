// Which kernel computes what, in which blocks: host code without torch and without CUDA calls, so that it can be
// tested.
//
// `launch(kernel, blocks, block_x, block_y, arguments...)` starts a kernel, `launch.prefer_shared_memory(kernel)` says
// what it had better have; `allocate(count)` returns room for that many accumulators that lasts until the kernels have
// run.
#pragma once

#include "ddf_kernel.cuh"
#include "ddf_kernel_backward.cuh"
#include "ddf_kernel_norm.cuh"
#include "ddf_kernel_tile.cuh"

namespace ddfup {
namespace cuda {

constexpr int64_t kMost = int64_t{1} << 31;
constexpr int kMostRows = 8;

// Whether a pixel's index, and the distance from a pixel to all its taps, fit into 32 bits.
inline bool fits(const Problem& p, const Strides& strides, int64_t scale) {
  const int64_t reach = (p.kernel_size + kMostRows) * p.dilation;
  const int64_t down = min(reach, p.height) * scale * strides.y, right = min(reach, p.width) * scale * strides.x;
  return down + right < kMost && (p.height + reach) * (p.width + reach) * p.scale < kMost && p.channels < kMost / 64;
}

// Neighbouring threads take neighbouring channels where these are contiguous and x is not.
inline int lanes_of(const Problem& p, const Strides& strides) {
  if (strides.c != 1 || strides.x == 1) return 1;
  int lanes = 1;
  while (lanes < kWarp && 2 * lanes <= p.channels / p.heads) lanes *= 2;
  return lanes;
}

// Cuts the channels of a head into slices of `channels`.
inline void set_slices(Work* work, const Problem& p, int64_t channels) {
  const int64_t per_head = p.channels / p.heads;
  work->slice = min(channels, per_head);
  work->slices = divide_up(per_head, work->slice);
}

inline int64_t blocks_of(const Problem& p, const Work& work) {
  return work.pixel_blocks * work.sub_blocks * work.tap_blocks * work.slices * p.heads * p.batch;
}

// Cuts the channels to slices of `most`, then no more than it takes to have enough blocks, and to no less than `least`.
inline void set_slices_for_enough_blocks(Work* work, const Problem& p, int64_t enough, int64_t least,
                                         int64_t most = kMost) {
  int64_t channels = p.channels / p.heads;
  channels = divide_up(channels, divide_up(channels, most));
  set_slices(work, p, channels);
  while (blocks_of(p, *work) < enough && divide_up(channels, 2) >= least) {
    channels = divide_up(channels, 2);
    set_slices(work, p, channels);
  }
}

// One thread per item and slice of kWide * lanes channels.
inline Work work_of_any(const Problem& p, int lanes, int64_t items, int64_t sub_blocks) {
  Work work{};
  work.lanes = lanes;
  work.rounds = 1;
  work.pixels = items;
  work.pixel_blocks = divide_up(items, kThreads / lanes);
  work.sub_blocks = sub_blocks;
  work.tap_blocks = 1;
  set_slices(&work, p, kWide * lanes);
  return work;
}

template <typename T, int K, int COLUMNS, int ROWS, typename Launch>
void forward_rows(const Launch& launch, Call<T> call) {
  const Problem& p = call.problem;
  Work work{};
  work.lanes = 1;
  work.rounds = 1;
  work.pixels = row_groups(p.grid_height, p.dilation, ROWS) * p.grid_width;
  work.pixel_blocks = divide_up(work.pixels, kThreads / COLUMNS);
  work.sub_blocks = COLUMNS == 2 ? 1 : p.scale * p.scale;
  work.tap_blocks = 1;
  work.row_step = p.scale * p.dilation * call.output_strides.y;
  set_slices_for_enough_blocks(&work, p, call.enough_blocks, 4);
  call.work = work;
  launch(&forward_kernel<T, K, COLUMNS, ROWS>, blocks_of(p, work), kThreads / COLUMNS, COLUMNS, call);
}

// Of the kernels for quads, in blocks of up to `most_lanes` vectors of channels.
template <typename T>
Work work_of_vectors(const Call<T>& call, int most_lanes, int64_t rows, int64_t columns, int64_t sub_blocks) {
  const Problem& p = call.problem;
  constexpr int kVector = 16 / sizeof(T);
  Work work{};
  work.lanes = 1;
  while (work.lanes < most_lanes && work.lanes * kVector < p.channels / p.heads) work.lanes *= 2;
  work.pixels = rows * row_groups(columns, p.dilation, kQuad);
  work.sub_blocks = sub_blocks;
  work.tap_blocks = 1;
  set_slices(&work, p, work.lanes * kVector);
  for (work.rounds = 8; work.rounds >= 1; work.rounds /= 2) {
    work.pixel_blocks = divide_up(work.pixels, kThreads / work.lanes * work.rounds);
    if (work.rounds == 1 || blocks_of(p, work) >= call.enough_blocks) break;
  }
  return work;
}

template <typename T, int K, typename Launch>
void forward_channels_last(const Launch& launch, Call<T> call) {
  const Problem& p = call.problem;
  call.work = work_of_vectors(call, channels_last_lanes<T, K>(), p.grid_height, p.grid_width, p.scale * p.scale);
  launch(&forward_channels_last_kernel<T, K>, blocks_of(p, call.work), kThreads, 1, call);
}

// Whether all addresses of channels are multiples of 16 bytes.
template <typename T>
bool has_vectors(const Problem& p, const T* start, const Strides& s) {
  constexpr int kVector = 16 / sizeof(T);
  return p.channels / p.heads % kVector == 0 && s.c == 1 && (s.x | s.y | s.n) % kVector == 0 &&
         reinterpret_cast<uintptr_t>(start) % 16 == 0;
}

// Whether `count` neighbouring elements of a row, from a multiple of `count` on, can be moved by one instruction.
template <typename T>
bool has_runs(const T* start, const Strides& s, int64_t count) {
  return s.x == 1 && (s.y | s.c | s.n) % count == 0 &&
         reinterpret_cast<uintptr_t>(start) % (count * static_cast<int64_t>(sizeof(T))) == 0;
}

// Launches the tile kernel if the problem is large and fits it; returns whether it did.
template <typename T, int SCALE, int CHUNK, typename Launch>
bool forward_tiles(const Launch& launch, Call<T> call) {
  using Tile = Tiling<T, SCALE, CHUNK>;
  constexpr int64_t kPer = CHUNK / sizeof(T), kColumns = Tile::kColumns;
  const Problem& p = call.problem;
  const Strides& fs = call.features_strides;
  // Threads keep the offsets of their chunks within the plane in 32 bits; less than 0 means none.
  if (fs.y < 0 || p.height * fs.y + p.width >= kMost) return false;
  if (p.width % kPer != 0 || !has_runs(call.features, fs, kPer)) return false;
  if (!has_runs(call.spatial_filter, call.spatial_strides, sizeof(T) == 2 ? kColumns : 1)) return false;
  if (!has_runs(call.result, call.output_strides, kColumns * SCALE)) return false;
  Work work{};
  work.lanes = 1;
  work.rounds = 1;
  work.pixels = p.height * p.width;
  work.pixel_blocks = divide_up(p.width, Tile::kWidth) * divide_up(p.height, Tile::kHeight);
  work.sub_blocks = 1;
  work.tap_blocks = 1;
  work.row_step = SCALE * call.output_strides.y;
  if (100 * work.pixels < call.least_filled * work.pixel_blocks * Tile::kWidth * Tile::kHeight) return false;
  // Blocks are few and long: two on each multiprocessor do.
  const int64_t enough = call.enough_blocks / 4;
  set_slices_for_enough_blocks(&work, p, enough, 16, Tile::kMostChannels);
  if (blocks_of(p, work) < enough) return false;
  call.work = work;
  const auto kernel = &forward_tile_kernel<T, SCALE, CHUNK>;
  launch.prefer_shared_memory(kernel);
  launch(kernel, blocks_of(p, work), Tile::kThreads, 1, call);
  return true;
}

template <typename T, int SCALE, typename Launch>
bool forward_tiles(const Launch& launch, const Call<T>& call) {
  if (forward_tiles<T, SCALE, 16>(launch, call)) return true;
  if constexpr (sizeof(T) == 2) return forward_tiles<T, SCALE, 8>(launch, call);
  return false;
}

template <typename T, typename Launch>
void forward(const Launch& launch, Call<T> call) {
  const Problem& p = call.problem;
  const bool fit = fits(p, call.features_strides, 1);
  const int lanes = lanes_of(p, call.features_strides);
  // The kernels for speed know products and stride 1.
  const bool common = fit && p.stride == 1 && p.combine == Combine::kMul;
  // More rows per thread where elements are small: instructions, not memory, would limit the speed.
  constexpr int kRows = sizeof(T) == 2 ? 8 : 4;
  if constexpr (sizeof(T) < 8) {
    if (lanes > 1 && common && has_vectors(p, call.features, call.features_strides) &&
        has_vectors(p, call.result, call.output_strides)) {
      switch (p.kernel_size) {
        case 1:
          return forward_channels_last<T, 1>(launch, call);
        case 3:
          return forward_channels_last<T, 3>(launch, call);
        case 5:
          return forward_channels_last<T, 5>(launch, call);
        case 7:
          return forward_channels_last<T, 7>(launch, call);
      }
    }
    if (lanes == 1 && common) {
      if (p.kernel_size == 3 && p.dilation == 1) {
        if (p.scale == 1 && forward_tiles<T, 1>(launch, call)) return;
        if (p.scale == 2 && forward_tiles<T, 2>(launch, call)) return;
      }
      const bool pairs = p.scale == 2 && call.output_strides.x == 1;
      switch (p.kernel_size) {
        case 3:
          return pairs ? forward_rows<T, 3, 2, 4>(launch, call) : forward_rows<T, 3, 1, kRows>(launch, call);
        case 5:
          return pairs ? forward_rows<T, 5, 2, 2>(launch, call) : forward_rows<T, 5, 1, 4>(launch, call);
      }
    }
  }
  if (lanes == 1 && fit) {
    switch (p.kernel_size) {
      case 1:
        return forward_rows<T, 1, 1, 1>(launch, call);
      case 3:
        return forward_rows<T, 3, 1, 1>(launch, call);
      case 5:
        return forward_rows<T, 5, 1, 1>(launch, call);
      case 7:
        return forward_rows<T, 7, 1, 1>(launch, call);
    }
  }
  call.work = work_of_any(p, lanes, p.grid_height * p.grid_width, p.scale * p.scale);
  launch(&forward_any_kernel<T>, blocks_of(p, call.work), kThreads, 1, call);
}

template <typename T, int K, int SCALE, int ROWS, typename Launch>
void grad_features_rows(const Launch& launch, Call<T> call) {
  const Problem& p = call.problem;
  Work work{};
  work.lanes = 1;
  work.rounds = 1;
  work.pixels = row_groups(p.height, p.dilation, ROWS) * p.width;
  work.pixel_blocks = divide_up(work.pixels, kThreads);
  work.sub_blocks = 1;
  work.tap_blocks = 1;
  work.row_step = p.dilation * call.result_strides.y;
  set_slices_for_enough_blocks(&work, p, call.enough_blocks, 4);
  call.work = work;
  launch(&grad_features_kernel<T, K, SCALE, ROWS>, blocks_of(p, work), kThreads, 1, call);
}

template <typename T, int K, int SCALE, typename Launch>
void grad_features_channels_last(const Launch& launch, Call<T> call) {
  const Problem& p = call.problem;
  call.work = work_of_vectors(call, grad_channels_last_lanes<T, K, SCALE>(), p.height, p.width, 1);
  launch(&grad_features_channels_last_kernel<T, K, SCALE>, blocks_of(p, call.work), kThreads, 1, call);
}

// Whether a kernel for speed could be used; it leaves the border to do where that is replicated.
template <typename T, typename Launch>
bool grad_features_fast(const Launch& launch, const Call<T>& call, int lanes) {
  const Problem& p = call.problem;
  const bool common = p.stride == 1 && p.combine == Combine::kMul && p.height > 1 && p.width > 1;
  if (!common || !fits(p, call.output_strides, p.scale)) return false;
  if constexpr (sizeof(T) < 8) {
    if (lanes > 1) {
      if (!has_vectors(p, call.grad_output, call.output_strides) || !has_vectors(p, call.result, call.result_strides)) {
        return false;
      }
      switch (10 * p.kernel_size + p.scale) {
        case 31:
          return grad_features_channels_last<T, 3, 1>(launch, call), true;
        case 32:
          return grad_features_channels_last<T, 3, 2>(launch, call), true;
        case 51:
          return grad_features_channels_last<T, 5, 1>(launch, call), true;
        case 52:
          return grad_features_channels_last<T, 5, 2>(launch, call), true;
      }
      return false;
    }
    switch (10 * p.kernel_size + p.scale) {
      case 31:
        return grad_features_rows<T, 3, 1, 4>(launch, call), true;
      case 32:
        return grad_features_rows<T, 3, 2, 2>(launch, call), true;
      case 51:
        return grad_features_rows<T, 5, 1, 2>(launch, call), true;
      case 52:
        return grad_features_rows<T, 5, 2, 1>(launch, call), true;
    }
  }
  return false;
}

template <typename T, typename Launch>
void grad_features(const Launch& launch, Call<T> call) {
  const Problem& p = call.problem;
  const int lanes = lanes_of(p, call.features_strides);
  const bool fast = grad_features_fast(launch, call, lanes);
  if (fast && p.padding == Padding::kZeros) return;
  const int64_t items = fast ? 2 * p.width + 2 * (p.height - 2) : p.height * p.width;
  call.work = work_of_any(p, lanes, items, 1);
  launch(&grad_features_any_kernel<T>, blocks_of(p, call.work), kThreads, 1, call, fast);
}

template <typename T, typename Launch>
void sum_pieces(const Launch& launch, const Accumulator<T>* partial, T* result, int64_t total, int64_t pieces) {
  launch(&sum_kernel<T>, divide_up(total, kThreads), kThreads, 1, partial, result, total, static_cast<int>(pieces));
}

template <typename T, int U, int V, typename Launch, typename Allocate>
void grad_spatial_taps(const Launch& launch, const Allocate& allocate, Call<T> call) {
  const Problem& p = call.problem;
  Work work{};
  work.lanes = lanes_of(p, call.features_strides);
  work.rounds = 1;
  work.pixels = p.grid_height * p.grid_width;
  work.pixel_blocks = divide_up(work.pixels, kThreads / work.lanes);
  work.sub_blocks = p.scale * p.scale;
  work.tap_blocks = p.kernel_size / U * (p.kernel_size / V);
  set_slices_for_enough_blocks(&work, p, call.enough_blocks, 16);
  call.work = work;
  const int64_t total = p.batch * p.heads * work.sub_blocks * p.kernel_size * p.kernel_size * work.pixels;
  if (work.slices > 1) call.partial = allocate(work.slices * total);
  launch(&grad_spatial_kernel<T, U, V>, blocks_of(p, work), kThreads, 1, call);
  if (work.slices > 1) sum_pieces(launch, call.partial, call.result, total, work.slices);
}

template <typename T, int U, int V, typename Launch, typename Allocate>
void grad_channel_taps(const Launch& launch, const Allocate& allocate, Call<T> call) {
  const Problem& p = call.problem;
  Work work{};
  work.lanes = lanes_of(p, call.features_strides);
  work.pixels = p.grid_height * p.grid_width;
  work.pixel_blocks = 1;
  work.sub_blocks = p.scale * p.scale;
  work.tap_blocks = p.kernel_size / U * (p.kernel_size / V);
  set_slices(&work, p, work.lanes * grad_channel_wide<U, V>());
  // At least 16 pixels per thread: the sum over the block's threads costs as much as some of them.
  const int64_t slots = kThreads / work.lanes;
  const int64_t wanted = divide_up(call.enough_blocks, max(int64_t{1}, blocks_of(p, work)));
  work.rounds = static_cast<int>(max(int64_t{16}, divide_up(work.pixels, slots * wanted)));
  work.pixel_blocks = divide_up(work.pixels, slots * work.rounds);
  call.work = work;
  const int64_t total = p.batch * work.sub_blocks * p.channels * p.kernel_size * p.kernel_size;
  if (work.pixel_blocks > 1) call.partial = allocate(work.pixel_blocks * total);
  launch(&grad_channel_kernel<T, U, V>, blocks_of(p, work), kThreads, 1, call);
  if (work.pixel_blocks > 1) sum_pieces(launch, call.partial, call.result, total, work.pixel_blocks);
}

template <typename T, typename Launch, typename Allocate>
void grad_spatial(const Launch& launch, const Allocate& allocate, Call<T> call) {
  const int64_t size = fits(call.problem, call.features_strides, 1) ? call.problem.kernel_size : 0;
  if (size == 3) return grad_spatial_taps<T, 3, 3>(launch, allocate, call);
  if constexpr (sizeof(T) < 8) {
    if (size == 5) return grad_spatial_taps<T, 5, 5>(launch, allocate, call);
    if (size == 7) return grad_spatial_taps<T, 1, 7>(launch, allocate, call);
  }
  grad_spatial_taps<T, 1, 1>(launch, allocate, call);
}

template <typename T, typename Launch, typename Allocate>
void grad_channel(const Launch& launch, const Allocate& allocate, Call<T> call) {
  const int64_t size = fits(call.problem, call.features_strides, 1) ? call.problem.kernel_size : 0;
  if (size == 3) return grad_channel_taps<T, 3, 3>(launch, allocate, call);
  if constexpr (sizeof(T) < 8) {
    if (size == 5) return grad_channel_taps<T, 5, 5>(launch, allocate, call);
    if (size == 7) return grad_channel_taps<T, 1, 7>(launch, allocate, call);
  }
  grad_channel_taps<T, 1, 1>(launch, allocate, call);
}

// `call` with everything but rows_per_block; at most kNormChannels channels.
template <typename Launch>
void channel_norm(const Launch& launch, NormCall call) {
  call.rows_per_block = min(kThreads, kNormValues / norm_pitch(call.channels));
  const int64_t blocks = divide_up(call.rows, call.rows_per_block);
  const auto address = reinterpret_cast<uintptr_t>(call.in) | reinterpret_cast<uintptr_t>(call.out);
  const bool vectors = call.channels % 4 == 0 && address % 16 == 0;
  launch(vectors ? &channel_norm_kernel<4> : &channel_norm_kernel<1>, blocks, kThreads, 1, call);
}

// `call` with everything but rows_per_turn and partial; at most kNormChannels channels.
template <typename Launch, typename Allocate>
void channel_norm_backward(const Launch& launch, const Allocate& allocate, NormBackwardCall call) {
  call.rows_per_turn = min(kThreads, kNormValues / (2 * norm_pitch(call.channels)));
  const int64_t blocks = min(call.enough_blocks, divide_up(call.rows, call.rows_per_turn));
  call.partial = allocate(2 * call.channels * blocks);
  const auto address = reinterpret_cast<uintptr_t>(call.in) | reinterpret_cast<uintptr_t>(call.grad);
  const bool vectors = call.channels % 4 == 0 && address % 16 == 0;
  const auto kernel = vectors ? &channel_norm_backward_kernel<4> : &channel_norm_backward_kernel<1>;
  launch(kernel, blocks, kThreads, 1, call);
  launch(&channel_norm_sum_kernel, 2 * call.channels, kWarp, 1, call, static_cast<int>(blocks));
}

}  // namespace cuda
}  // namespace ddfup
