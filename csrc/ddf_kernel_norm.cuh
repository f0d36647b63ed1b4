// Layer normalisation of short rows, the channels of a pixel where they are last in memory, and its gradients; free of
// torch, as ddf_kernel.cuh. No atomics: every sum has one owner and a fixed order, so results repeat exactly.
//
// A row is too short for a block, and too long for a thread to read it straight from memory, where its neighbours would
// be far away: a block takes many rows at once into shared memory, where each belongs to a thread.
#pragma once

#include "ddf_kernel.cuh"

namespace ddfup {
namespace cuda {

constexpr int kNormValues = 5120;   // floats of shared memory: few enough for eleven blocks at a time
constexpr int kNormChannels = 256;  // more are PyTorch's

struct NormCall {
  const float *in, *weight, *bias;
  float* out;
  int64_t rows;
  int channels, rows_per_block;
  float eps;
};

struct NormBackwardCall {
  // As that of Call, and for the same reasons.
  int64_t enough_blocks = 1024;
  const float *grad, *in, *weight;
  float *grad_in, *grad_weight, *grad_bias;
  float* partial;  // what every block has summed up for every channel's weight, then for every channel's bias
  int64_t rows;
  int channels, rows_per_turn;
  float eps;
};

// What the gradient of a row takes from the whole row.
struct __align__(16) NormRow {
  float mean, scale;  // of its values
  float even, steep;  // mean of its weighted gradient, and of that times the normalised values
};

// An odd distance between the rows in shared memory, so that threads that read the same channel meet no bank twice.
__host__ __device__ constexpr int norm_pitch(int channels) { return channels | 1; }

// Copies rows into shared memory, VECTOR floats at a time.
template <int VECTOR>
__device__ __forceinline__ void take_rows(const float* from, int rows, int channels, float* to) {
  const int pitch = norm_pitch(channels), pieces = channels / VECTOR;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < rows * pieces; i += kThreads) {
    float piece[VECTOR];
    if constexpr (VECTOR == 1) {
      piece[0] = load(from + i);
    } else {
      load_vector(from + i * VECTOR, piece);
    }
    float* at = to + i / pieces * pitch + i % pieces * VECTOR;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) at[e] = piece[e];
  }
}

// VECTOR floats are read and written at a time; it divides the number of channels.
template <int VECTOR>
__global__ void __launch_bounds__(kThreads) channel_norm_kernel(const NormCall call) {
  __shared__ float values[kNormValues];
  const int channels = call.channels, pitch = norm_pitch(channels), pieces = channels / VECTOR;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * call.rows_per_block;
  const int rows = static_cast<int>(min(static_cast<int64_t>(call.rows_per_block), call.rows - first));
  float* out = call.out + first * channels;
  const int thread = static_cast<int>(threadIdx.x);

  take_rows<VECTOR>(call.in + first * channels, rows, channels, values);
  __syncthreads();
  if (thread < rows) {
    float* row = values + thread * pitch;
    float sum = 0, square = 0;
    for (int c = 0; c < channels; ++c) sum += row[c];
    const float mean = sum / channels;
    for (int c = 0; c < channels; ++c) square += (row[c] - mean) * (row[c] - mean);
    const float scale = 1.0f / sqrtf(square / channels + call.eps);
    for (int c = 0; c < channels; ++c) row[c] = (row[c] - mean) * scale * load(call.weight + c) + load(call.bias + c);
  }
  __syncthreads();
  for (int i = thread; i < rows * pieces; i += kThreads) {
    const float* from = values + i / pieces * pitch + i % pieces * VECTOR;
    Vector<float, VECTOR> piece;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) piece.value[e] = from[e];
    *reinterpret_cast<Vector<float, VECTOR>*>(out + i * VECTOR) = piece;
  }
}

// A block takes `rows_per_turn` rows at a time, until all blocks together have taken every row. Each of these first
// belongs to a thread; then threads own channels, either several threads one, each some of the rows, or one a few.
// VECTOR floats are read at a time; it divides the number of channels.
template <int VECTOR>
__global__ void __launch_bounds__(kThreads) channel_norm_backward_kernel(const NormBackwardCall call) {
  constexpr int kOwned = kNormChannels / kThreads;
  __shared__ float values[kNormValues];
  __shared__ NormRow of_row[kThreads];
  const int channels = call.channels, pitch = norm_pitch(channels);
  const int thread = static_cast<int>(threadIdx.x);
  const int columns = min(channels, kThreads), slots = kThreads / columns, slot = thread / columns;
  float* grads = values + call.rows_per_turn * pitch;
  // The channel that is the thread's e-th; none if it is not below `channels`.
  const auto channel = [=](int e) { return slot < slots ? thread % columns + e * kThreads : channels; };

  float weight_sum[kOwned] = {}, bias_sum[kOwned] = {};
  const int64_t step = static_cast<int64_t>(gridDim.x) * call.rows_per_turn;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * call.rows_per_turn; first < call.rows; first += step) {
    const int rows = static_cast<int>(min(static_cast<int64_t>(call.rows_per_turn), call.rows - first));
    __syncthreads();  // until the rows of the turn before are done with
    take_rows<VECTOR>(call.in + first * channels, rows, channels, values);
    take_rows<VECTOR>(call.grad + first * channels, rows, channels, grads);
    __syncthreads();
    if (thread < rows) {
      const float *row = values + thread * pitch, *grad = grads + thread * pitch;
      float sum = 0, grad_sum = 0, square = 0, product = 0;
      for (int c = 0; c < channels; ++c) {
        sum += row[c];
        grad_sum += grad[c] * load(call.weight + c);
      }
      const float mean = sum / channels;
      for (int c = 0; c < channels; ++c) {
        const float centred = row[c] - mean;
        square += centred * centred;
        product += centred * (grad[c] * load(call.weight + c));
      }
      const float scale = 1.0f / sqrtf(square / channels + call.eps);
      of_row[thread] = {mean, scale, grad_sum / channels, product * scale / channels};
    }
    __syncthreads();
    float* grad_in = call.grad_in + first * channels;
#pragma unroll
    for (int e = 0; e < kOwned; ++e) {
      const int c = channel(e);
      if (c >= channels) continue;
      const float weight = load(call.weight + c);
      for (int r = slot; r < rows; r += slots) {
        const NormRow row = of_row[r];
        const float grad = grads[r * pitch + c], normalized = (values[r * pitch + c] - row.mean) * row.scale;
        weight_sum[e] += grad * normalized;
        bias_sum[e] += grad;
        grad_in[r * channels + c] = row.scale * (grad * weight - row.even - normalized * row.steep);
      }
    }
  }

  __syncthreads();
#pragma unroll
  for (int e = 0; e < kOwned; ++e) {
    const int c = channel(e);
    if (c >= channels) continue;
    values[slot * channels + c] = weight_sum[e];
    values[(slots + slot) * channels + c] = bias_sum[e];
  }
  __syncthreads();
  for (int i = thread; i < 2 * channels; i += kThreads) {
    const float* from = values + i / channels * slots * channels + i % channels;
    float sum = 0;
    for (int s = 0; s < slots; ++s) sum += from[s * channels];
    call.partial[static_cast<int64_t>(i) * gridDim.x + blockIdx.x] = sum;
  }
}

// A warp adds up what the blocks of the kernel above have for one of the sums.
__global__ void __launch_bounds__(kWarp) channel_norm_sum_kernel(const NormBackwardCall call, int pieces) {
  const int i = static_cast<int>(blockIdx.x), lane = static_cast<int>(threadIdx.x);
  const float* from = call.partial + static_cast<int64_t>(i) * pieces;
  float sum = 0;
#pragma unroll 8
  for (int piece = lane; piece < pieces; piece += kWarp) sum += load(from + piece);
  for (int other = kWarp / 2; other >= 1; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
  if (lane > 0) return;
  if (i < call.channels) {
    call.grad_weight[i] = sum;
  } else {
    call.grad_bias[i - call.channels] = sum;
  }
}

}  // namespace cuda
}  // namespace ddfup
