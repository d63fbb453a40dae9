// weight_bucket on CUDA: many contiguous tensors copied, and cast where their types differ, by one launch for up to
// kPieces of them. The table of addresses travels as the kernel's parameter: no buffer, no copy, no host sync, and safe
// in a CUDA graph. A block finds its tensor by bisection and moves one tile; every byte is read once and written once,
// 16 at a time where both ends allow it.
#pragma once

#include "cuda/elements.cuh"

namespace scope_fast {

constexpr int kCopyThreads = 256;
constexpr int kCopyPackets = 4;  // a thread's loads in flight
constexpr int kPieces = 127;     // a parameter block holds 4 KiB on every architecture and toolkit

struct Piece {
  const void* from;
  void* to;
  int64_t count;
  int32_t first_block;
  int16_t from_type, to_type;  // Element; equal ones are unsigned
};

struct PieceTable {
  Piece pieces[kPieces];
  int32_t size;
};
static_assert(sizeof(PieceTable) <= 4096);

template <class From, class To>
struct Tile {
  static constexpr int kPacket = 16 / (sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
  static constexpr int64_t kElements = int64_t{kCopyThreads} * kCopyPackets * kPacket;
};

template <class From, class To>
__host__ __device__ void convert_element(const From& from, To& to) {
  from_float(to_float(from), to);
}
__host__ __device__ inline void convert_element(const uint8_t& from, uint8_t& to) { to = from; }
__host__ __device__ inline void convert_element(const uint16_t& from, uint16_t& to) { to = from; }
__host__ __device__ inline void convert_element(const uint32_t& from, uint32_t& to) { to = from; }
__host__ __device__ inline void convert_element(const uint64_t& from, uint64_t& to) { to = from; }

// f(From{}, To{}) for a cast between two floating types or a move of equal unsigned ones; false for anything else
template <class F>
__host__ __device__ bool with_elements(Element from, Element to, const F& f) {
  if (from == to) {
    switch (from) {
      case Element::u8: f(uint8_t{}, uint8_t{}); return true;
      case Element::u16: f(uint16_t{}, uint16_t{}); return true;
      case Element::u32: f(uint32_t{}, uint32_t{}); return true;
      case Element::u64: f(uint64_t{}, uint64_t{}); return true;
      default: return false;
    }
  }
  bool known = false;
  with_float(from, [&](auto a) { known = with_float(to, [&](auto b) { f(a, b); }); });
  return known;
}

template <class From, class To>
__device__ void copy_tile(const Piece& piece, int64_t first) {
  constexpr int kPacket = Tile<From, To>::kPacket;
  using Source = Packet<From, kPacket>;
  using Target = Packet<To, kPacket>;
  const From* from = static_cast<const From*>(piece.from) + first;
  To* to = static_cast<To*>(piece.to) + first;
  const int64_t left = piece.count - first;
  const uintptr_t ends = reinterpret_cast<uintptr_t>(piece.from) | reinterpret_cast<uintptr_t>(piece.to);
  if (left >= Tile<From, To>::kElements && ends % 16 == 0) {
    Source read[kCopyPackets];
#pragma unroll
    for (int i = 0; i < kCopyPackets; ++i) {
      read[i] = reinterpret_cast<const Source*>(from)[i * kCopyThreads + threadIdx.x];
    }
#pragma unroll
    for (int i = 0; i < kCopyPackets; ++i) {
      Target written;
#pragma unroll
      for (int j = 0; j < kPacket; ++j) convert_element(read[i].values[j], written.values[j]);
      reinterpret_cast<Target*>(to)[i * kCopyThreads + threadIdx.x] = written;
    }
  } else {  // a tensor's last tile, or an end in the middle of 16 bytes
    const int64_t count = left < Tile<From, To>::kElements ? left : Tile<From, To>::kElements;
    for (int64_t i = threadIdx.x; i < count; i += kCopyThreads) convert_element(from[i], to[i]);
  }
}

__global__ void __launch_bounds__(kCopyThreads) weight_bucket_kernel(const __grid_constant__ PieceTable table) {
  const int32_t block = blockIdx.x;
  int low = 0, high = table.size;
  while (high - low > 1) {  // the last piece whose first block is not beyond this one
    const int middle = (low + high) / 2;
    (table.pieces[middle].first_block <= block ? low : high) = middle;
  }
  const Piece& piece = table.pieces[low];
  with_elements(static_cast<Element>(piece.from_type), static_cast<Element>(piece.to_type), [&](auto a, auto b) {
    using From = decltype(a);
    using To = decltype(b);
    copy_tile<From, To>(piece, (block - piece.first_block) * Tile<From, To>::kElements);
  });
}

// pieces: any number, none of them empty; first_block is filled in here
inline cudaError_t launch_weight_bucket(Piece* pieces, int64_t size, cudaStream_t stream) {
  PieceTable table;
  for (int64_t begin = 0; begin < size; begin += kPieces) {
    table.size = static_cast<int32_t>(size - begin < kPieces ? size - begin : kPieces);
    int64_t num_blocks = 0;
    for (int32_t i = 0; i < table.size; ++i) {
      Piece& piece = table.pieces[i] = pieces[begin + i];
      piece.first_block = static_cast<int32_t>(num_blocks);
      const auto from = static_cast<Element>(piece.from_type), to = static_cast<Element>(piece.to_type);
      const bool known = with_elements(from, to, [&](auto a, auto b) {
        constexpr int64_t kElements = Tile<decltype(a), decltype(b)>::kElements;
        num_blocks += (piece.count + kElements - 1) / kElements;
      });
      if (!known) return cudaErrorInvalidValue;
    }
    const cudaError_t status = launch(weight_bucket_kernel, num_blocks, kCopyThreads, stream, table);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace scope_fast
