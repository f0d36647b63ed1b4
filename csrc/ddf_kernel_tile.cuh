// Device code of the forward pass for large images where x is contiguous: forward_tile_kernel, for K = 3, products,
// stride 1, dilation 1, scales 1 and 2.
//
// Here it is not the threads of the loop over channels that wait for memory: copies that need no thread bring the
// features of a 2D tile, channel by channel, to shared memory while earlier channels are computed.
//
// Free of torch and of launches, as ddf_kernel.cuh.
#pragma once

#include "ddf_kernel.cuh"

namespace ddfup {
namespace cuda {

// How the kernel is cut for a type and scale, as measured on an H100. CHUNK: bytes of features per copy, 16 or 8.
template <typename T, int SCALE, int CHUNK>
struct Tiling {
  static_assert(SCALE == 1 || SCALE == 2);
  static constexpr bool kSmall = sizeof(T) == 2;
  static constexpr int kThreads = SCALE == 1 && !kSmall ? 256 : 128;
  static constexpr int kBlocks = kThreads == 256 ? 3 : 4;  // per multiprocessor, to leave registers for
  // A thread's pixels: neighbouring columns, which move as one vector, and neighbouring rows.
  static constexpr int kColumns = 2, kRows = SCALE == 1 && kSmall ? 4 : 2;
  // Channels per barrier, and how many such groups have room: the one computed and those on their way.
  static constexpr int kGroup = SCALE == 2 ? (kSmall ? 4 : 2) : kSmall && CHUNK == 16 ? 4 : 1;
  static constexpr int kStages = kGroup == 1 ? 4 : 3;
  // Whether results should be the first to leave the caches.
  static constexpr bool kStream = SCALE == 2 || CHUNK == 8;
  static constexpr int64_t kMostChannels = SCALE == 2 ? 64 : 32;  // of a slice

  static constexpr int kDown = kThreads / kWarp / SCALE;  // threads along y; a warp lies along x
  static constexpr int kWidth = kWarp * kColumns, kHeight = kDown * kRows;
};

// Starts a copy of BYTES from global to shared memory. Copies are waited for in groups: a thread that calls
// wait_copies<N> goes on when all groups but its last N have arrived.
#ifdef DDFUP_CUDA_EMULATOR
template <int BYTES>
void copy_async(void* to, const void* from) {
  emulator::copy_async(to, from, BYTES);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int N>
void wait_copies() {
  emulator::wait_copies(N);
}
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  using Chunk = Vector<unsigned, BYTES / 4>;
  *static_cast<Chunk*>(to) = *static_cast<const Chunk*>(from);
}
__device__ __forceinline__ void commit_copies() {}
template <int N>
__device__ __forceinline__ void wait_copies() {}
#else
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(BYTES) : "memory");
  }
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#endif

// The two elements of a word.
template <typename T>
__device__ __forceinline__ void unpack(unsigned word, float* low, float* high) {
  if constexpr (std::is_same_v<T, __half>) {
    *low = __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu)));
    *high = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
  } else {
    *low = __uint_as_float(word << 16);
    *high = __uint_as_float(word & 0xffff0000u);
  }
}

template <typename T>
__device__ __forceinline__ unsigned pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  }
}

// Two neighbouring elements of global memory.
template <typename T>
__device__ __forceinline__ void load_pair(const T* from, float (&to)[2]) {
  if constexpr (sizeof(T) == 2) {
    unpack<T>(__ldg(reinterpret_cast<const unsigned*>(from)), &to[0], &to[1]);
  } else {
    to[0] = load(from), to[1] = load(from + 1);
  }
}

// The two elements at `at` in shared memory, and one on each side of them.
template <typename T>
__device__ __forceinline__ void load_window(const T* at, float (&to)[4]) {
  if constexpr (sizeof(T) == 2) {
    const unsigned* words = reinterpret_cast<const unsigned*>(at);
    float unused;
    unpack<T>(words[-1], &unused, &to[0]);
    unpack<T>(words[0], &to[1], &to[2]);
    unpack<T>(words[1], &to[3], &unused);
  } else {
    const auto middle = *reinterpret_cast<const Vector<T, 2>*>(at);
    to[0] = at[-1], to[1] = middle.value[0], to[2] = middle.value[1], to[3] = at[2];
  }
}

// Writes neighbouring elements by one instruction.
template <typename T, bool STREAM, int COUNT>
__device__ __forceinline__ void store(T* to, const float (&from)[COUNT]) {
  constexpr int kWords = sizeof(T) * COUNT / 4;
  Vector<unsigned, kWords> words;
#pragma unroll
  for (int e = 0; e < kWords; ++e) {
    if constexpr (sizeof(T) == 2) {
      words.value[e] = pack<T>(from[2 * e], from[2 * e + 1]);
    } else {
      words.value[e] = __float_as_uint(from[e]);
    }
  }
  if constexpr (!STREAM) {
    *reinterpret_cast<Vector<unsigned, kWords>*>(to) = words;
  } else if constexpr (kWords == 1) {
    __stcs(reinterpret_cast<unsigned*>(to), words.value[0]);
  } else if constexpr (kWords == 2) {
    __stcs(reinterpret_cast<uint2*>(to), make_uint2(words.value[0], words.value[1]));
  } else {
    __stcs(reinterpret_cast<uint4*>(to), make_uint4(words.value[0], words.value[1], words.value[2], words.value[3]));
  }
}

// A block owns a tile of grid pixels and loops over the channels of its slice; a thread holds the spatial filters of
// its pixels in registers (scale 2: for one sub-row and both sub-columns). ddf_launch.cuh sees to it that a row of
// features is a whole number of aligned chunks: so each chunk lies either inside the image or outside, and it is copied
// as it is or not at all. Around the tile there is a border of one row, and of one chunk on the left and right.
//
// Outside the image lie zeros, or with Padding::kReplicate copies of the nearest pixel: there rows are copied twice,
// and of the chunks on the left and right only the element next to the image is filled in, as only it is used. A weight
// that is not finite gives NaN with a zero outside, as in the reference.
template <typename T, int SCALE, int CHUNK>
__global__ void __launch_bounds__(Tiling<T, SCALE, CHUNK>::kThreads, Tiling<T, SCALE, CHUNK>::kBlocks)
    forward_tile_kernel(const Call<T> call) {
  using Tile = Tiling<T, SCALE, CHUNK>;
  constexpr int kTaps = 9, kRows = Tile::kRows, kColumns = Tile::kColumns, kCount = Tile::kThreads;
  constexpr int kStages = Tile::kStages, kGroup = Tile::kGroup;
  constexpr int kSize = static_cast<int>(sizeof(T)), kPer = CHUNK / kSize;  // elements per chunk
  constexpr int kTileRows = Tile::kHeight + 2, kRowChunks = Tile::kWidth / kPer + 2;
  constexpr int kChunks = kTileRows * kRowChunks, kRounds = (kChunks + kCount - 1) / kCount;
  constexpr int kPitch = kRowChunks * kPer;                  // elements from row to row
  constexpr int kTileBytes = round_up(kChunks * CHUNK, 16);  // of one channel
  constexpr int kGroupBytes = kGroup * kTileBytes;
  constexpr int kFilter = SCALE * kTaps, kFilterPitch = round_up(kFilter, 4);
  static_assert(kStage % kGroup == 0 && kPer % kColumns == 0 && Tile::kWidth % kPer == 0 && 2 * kRounds <= 32);
  __shared__ __align__(16) float filters[kStage][SCALE][kFilterPitch];
  __shared__ __align__(16) unsigned char tiles[kStages * kGroupBytes];

  const Problem& p = call.problem;
  const Job job = job_of_block(p, call.work);
  const bool replicate = p.padding == Padding::kReplicate;
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  const int down = warp % Tile::kDown, sub = warp / Tile::kDown;  // sub: the sub-row
  const int across = (width + Tile::kWidth - 1) / Tile::kWidth;
  const int pixel_block = static_cast<int>(job.pixel_block);
  const int tile_x = pixel_block % across * Tile::kWidth, tile_y = pixel_block / across * Tile::kHeight;
  const int x = tile_x + thread % kWarp * kColumns, y = tile_y + down * kRows;
  const int count = job.end - job.begin;

  // The chunks this thread copies, or -1. Those that stay zero are written once, in every slot.
  int source[kRounds];
  unsigned edges = 0;  // two bits per chunk: whether it is the first and the last of a row that is replicated
  const Strides& fs = call.features_strides;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int index = thread + r * kCount, piece = index % kRowChunks;
    const int from_y = tile_y - 1 + index / kRowChunks, from_x = tile_x + (piece - 1) * kPer;
    const bool row_inside = replicate ? from_y <= height : from_y >= 0 && from_y < height;
    const bool inside = index < kChunks && row_inside && from_x >= 0 && from_x < width;
    source[r] = inside ? clamped(from_y, height) * static_cast<int>(fs.y) + from_x : -1;
    if (replicate) {
      if (inside && from_x == 0) edges |= 1u << 2 * r;
      if (inside && from_x + kPer == width && piece < kRowChunks - 1) edges |= 2u << 2 * r;
    } else if (index < kChunks && !inside) {
      for (int slot = 0; slot < kStages * kGroup; ++slot) {
        auto* const words = reinterpret_cast<unsigned*>(tiles + slot * kTileBytes + index * CHUNK);
#pragma unroll
        for (int e = 0; e < CHUNK / 4; ++e) words[e] = 0;
      }
    }
  }
  const T* plane = call.features + job.n * fs.n + job.begin * fs.c;
  // Starts the copies of the channels from `first` on to the slots of a stage.
  const auto start_copies = [&](int first, int stage) {
    unsigned char* to = tiles + stage * kGroupBytes + thread * CHUNK;
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (first + k < count) {
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          if (source[r] >= 0) copy_async<CHUNK>(to + k * kTileBytes + r * kCount * CHUNK, plane + source[r]);
        }
        plane += fs.c;
      }
    }
    commit_copies();  // also where there is nothing to copy, to keep count
  };
  // Fills in what lies left and right of the chunks that this thread has copied to a stage.
  const auto replicate_edges = [&](int stage) {
    unsigned char* to = tiles + stage * kGroupBytes + thread * CHUNK;
#pragma unroll 1
    for (int k = 0; k < kGroup; ++k, to += kTileBytes) {
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        T* const chunk = reinterpret_cast<T*>(to + r * kCount * CHUNK);
        if (edges & 1u << 2 * r) chunk[-1] = chunk[0];
        if (edges & 2u << 2 * r) chunk[kPer] = chunk[kPer - 1];
      }
    }
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) start_copies(stage * kGroup, stage);

  float spatial[kRows][SCALE][kTaps][kColumns];
  const Strides& ss = call.spatial_strides;
#pragma unroll
  for (int q = 0; q < kRows; ++q) {
    const T* from = call.spatial_filter + job.n * ss.n + min(y + q, height - 1) * ss.y + min(x, width - kColumns);
#pragma unroll
    for (int j = 0; j < SCALE; ++j) {
      const T* at = from + ((sub * SCALE + j) * p.heads + job.head) * kTaps * ss.c;
#pragma unroll
      for (int k = 0; k < kTaps; ++k, at += ss.c) load_pair(at, spatial[q][j][k]);
    }
  }

  const Strides& os = call.output_strides;
  T* out = call.result + job.n * os.n + job.begin * os.c + (static_cast<int64_t>(y) * SCALE + sub) * os.y +
           static_cast<int64_t>(x) * SCALE;
  const int rows = x < width ? height - y : 0;  // rows to write, may be less than 0 or more than kRows
  const unsigned char* const window = tiles + (down * kRows * kPitch + kPer + thread % kWarp * kColumns) * kSize;

  int stage = 0, next_stage = kStages - 1;
#pragma unroll 1
  for (int c = 0; c < count; c += kGroup) {
    if (c % kStage == 0) {
      if (c > 0) __syncthreads();  // the previous filters have been read
      const int staged = min(kStage, count - c) * kTaps;
      const T* from = call.channel_filter + (job.n * SCALE * SCALE * p.channels + job.begin + c) * kTaps;
#pragma unroll
      for (int position = 0; position < SCALE * SCALE; ++position, from += p.channels * kTaps) {
        for (int i = thread; i < staged; i += kCount) {
          filters[i / kTaps][position / SCALE][position % SCALE * kTaps + i % kTaps] = load(from + i);
        }
      }
    }
    wait_copies<kStages - 2>();
    if (edges != 0) replicate_edges(stage);
    __syncthreads();  // everyone's copies have arrived, and everyone has read the slots to be filled next
    start_copies(c + (kStages - 1) * kGroup, next_stage);
    const unsigned char* here = window + stage * kGroupBytes;
    stage = stage + 1 == kStages ? 0 : stage + 1;
    next_stage = next_stage + 1 == kStages ? 0 : next_stage + 1;

    if (rows > 0) {
#pragma unroll 1
      for (int k = 0; k < kGroup && c + k < count; ++k, here += kTileBytes, out += os.c) {
        float filter[kFilterPitch];
        copy_row<kFilterPitch>(filters[c % kStage + k][sub], filter);
        float sum[kRows][kColumns * SCALE] = {};
#pragma unroll
        for (int r = 0; r < kRows + 2; ++r) {
          float feature[kColumns + 2];
          load_window(reinterpret_cast<const T*>(here) + r * kPitch, feature);
#pragma unroll
          for (int q = 0; q < kRows; ++q) {
            if (q > r || r - q >= 3) continue;
#pragma unroll
            for (int j = 0; j < SCALE; ++j) {
#pragma unroll
              for (int v = 0; v < 3; ++v) {
                const int tap = (r - q) * 3 + v;
#pragma unroll
                for (int e = 0; e < kColumns; ++e) {
                  sum[q][e * SCALE + j] += spatial[q][j][tap][e] * filter[j * kTaps + tap] * feature[v + e];
                }
              }
            }
          }
        }
        T* to = out;
#pragma unroll
        for (int q = 0; q < kRows; ++q, to += call.work.row_step) {
          if (q < rows) store<T, Tile::kStream>(to, sum[q]);
        }
      }
    }
  }
}

}  // namespace cuda
}  // namespace ddfup
