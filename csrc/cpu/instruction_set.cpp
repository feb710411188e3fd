// Which instruction set's time loop runs here, asked of PyTorch and of the processor.
#include <ATen/Version.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <string>

#include "time_loop.h"
#if defined(RNNFAST_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rnnfast::cpu {

namespace {

enum class Isa { Fallback, Avx2, Avx512 };

#if defined(__x86_64__)
// Whether AVX-512's kernels are to run made of AVX2's instructions, in a build for that.
bool emulating_avx512() {
#if defined(RNNFAST_EMULATE_AVX512)
  return std::getenv("RNNFAST_EMULATE_AVX512") != nullptr;
#else
  return false;
#endif
}
#endif

Isa chosen_isa() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  // The processor is asked too: the override names a set, it cannot create one.
  if (capability == "AVX512" && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::Avx512;
  }
  if (emulating_avx512()) return Isa::Avx512;
  if (capability != "DEFAULT" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Isa::Avx2;
  }
#endif
  return Isa::Fallback;
}

const Isa isa = chosen_isa();

}  // namespace

const char* instruction_set() {
  return isa == Isa::Avx512 ? "avx512" : isa == Isa::Avx2 ? "avx2" : "default";
}

#if defined(__x86_64__)
#define RNNFAST_CHOOSE(member) \
  (isa == Isa::Avx512 ? avx512::member : isa == Isa::Avx2 ? avx2::member : fallback::member)
#else
#define RNNFAST_CHOOSE(member) fallback::member
#endif

template <>
const TimeLoop<float>& time_loop<float>() {
  return RNNFAST_CHOOSE(f32);
}
template <>
const TimeLoop<double>& time_loop<double>() {
  return RNNFAST_CHOOSE(f64);
}

// AMX's products of bfloat16. A process asks Linux for the tiles' registers, once; it may be refused.
bool has_tiles() {
#if defined(RNNFAST_AMX)
  static const bool has = [] {
    if (isa != Isa::Avx512) return false;
    if (!emulating_avx512() && !__builtin_cpu_supports("avx512bf16")) return false;
#if defined(RNNFAST_EMULATE_TILES)  // a build whose tiles are arrays
    return std::getenv("RNNFAST_EMULATE_TILES") != nullptr;
#else
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return (edx & bf16) && (edx & tile) && syscall(SYS_arch_prctl, request, tile_data) == 0;
#endif
  }();
  return has;
#else
  return false;
#endif
}

bool has_bfloat16_products() {
#if defined(__x86_64__)
  static const bool has = [] {
    if (emulating_avx512() || has_tiles()) return true;
    // Intel's cores do vdpbf16ps at half the rate of float32's multiply-adds (notes/cpu.md).
    return isa == Isa::Avx512 && __builtin_cpu_supports("avx512bf16") &&
           !__builtin_cpu_is("intel");
  }();
  return has;
#else
  return false;
#endif
}

bool outruns_library() {
#if defined(__x86_64__)
  static const bool outruns = [] {
    if (emulating_avx512()) return true;
    // AMD's from Zen 5 (family 26) on, whose units have 512 bits: MKL keeps to AVX2 on AMD.
    unsigned eax = 0, ebx, ecx, edx;
    __get_cpuid(1, &eax, &ebx, &ecx, &edx);
    const unsigned family = (eax >> 8 & 0xf) + (eax >> 20 & 0xff);
    return isa == Isa::Avx512 && __builtin_cpu_is("amd") && family >= 26;
  }();
  return outruns;
#else
  return false;
#endif
}

template <>
const TimeLoop<BFloat16>& time_loop<BFloat16>() {
#if defined(__x86_64__)
#if defined(RNNFAST_AMX)
  if (has_tiles()) return amx::bf16;
#endif
  return avx512_bf16::bf16;
#else
  static const TimeLoop<BFloat16> none{};  // linked, but never called
  return none;
#endif
}

}  // namespace rnnfast::cpu
