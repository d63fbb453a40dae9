// Element types of the CUDA kernels: named at run time, converted through float, moved 16 bytes at a time.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"

namespace scope_fast {

enum class Element : int32_t { f64, f32, f16, bf16, u8, u16, u32, u64 };  // the unsigned ones: bits that are only moved

// explicit: torch compiles with the implicit conversions of half types switched off
__host__ __device__ inline float to_float(float x) { return x; }
__host__ __device__ inline float to_float(double x) { return static_cast<float>(x); }
__host__ __device__ inline float to_float(__half x) { return __half2float(x); }
__host__ __device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__host__ __device__ inline void from_float(float x, float& to) { to = x; }
__host__ __device__ inline void from_float(float x, double& to) { to = x; }
__host__ __device__ inline void from_float(float x, __half& to) { to = __float2half_rn(x); }
__host__ __device__ inline void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// f(T{}) with the floating type that `element` names; false when it names none. f is a host lambda in a launcher, a device
// lambda in a kernel: nvcc takes --expt-relaxed-constexpr, as in every build of torch's, to allow both
template <class F>
__host__ __device__ bool with_float(Element element, const F& f) {
  switch (element) {
    case Element::f64: f(double{}); return true;
    case Element::f32: f(float{}); return true;
    case Element::f16: f(__half{}); return true;
    case Element::bf16: f(__nv_bfloat16{}); return true;
    default: return false;
  }
}

// kSize elements that start on 16 bytes: the compiler moves them with the widest loads and stores there are
template <class T, int kSize>
struct alignas(16) Packet {
  T values[kSize];
};

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace scope_fast
