#include "emulator.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "cuda_runtime_api.h"
#include "variants.h"

namespace emulation {
namespace {

// ------------------------------------------------------------------------------------- fibers

#if defined(__x86_64__)
// Saves the registers that a call keeps, changes the stack, and returns on the other one.
struct Context {
  void* stack = nullptr;
};
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
emulation_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
void prepare(Context& context, unsigned char* stack, size_t size, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + size - 64);  // as after a call: 8 mod 16 at entry
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack = top;
}
void switch_to(Context& from, Context& to) { emulation_switch(&from.stack, to.stack); }
#else
struct Context {
  ucontext_t context;
};
void prepare(Context& context, unsigned char* stack, size_t size, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = size;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;

  uint64_t arrive(int expected) {
    const uint64_t mine = generation;
    if (++arrived == expected) {
      arrived = 0;
      ++generation;
    }
    progressed();
    return mine;
  }
  void wait(uint64_t mine) const {
    emulation::wait([&] { return generation != mine; });
  }
  void meet(int expected) { wait(arrive(expected)); }
};

struct Warp {
  Barrier barrier;
  WarpWords words;
};

constexpr size_t kGuard = 64;
constexpr unsigned char kUnwritten = 0xFF;  // NaN in every type

struct Cluster;
struct Block {
  unsigned index;
  Cluster* cluster;
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> memory;
  unsigned char* shared;
};
struct Cluster {
  std::vector<Block*> blocks;
  Barrier barrier;
};
struct Fiber {
  Context context;
  unsigned thread;
  Block* block;
  uint64_t arrival = 0;  // at the cluster's barrier
  bool done = false;
};

struct Launch {
  rnnfast::cuda::Kernel kernel;
  rnnfast::cuda::Layer layer;
  rnnfast::cuda::Grid grid;
  unsigned blocks, threads;
  size_t shared;
};

Launch launch;
Fiber* current;
Context scheduler;
uint64_t progress;
std::mt19937 order(1);

void run_thread() {
  launch.kernel(launch.layer, launch.grid);
  current->done = true;
  progressed();
  yield();
}

// Gives fibers [begin, end) a turn each, in a new order. Returns how many of them ended.
size_t take_turns(std::vector<Fiber>& fibers, size_t begin, size_t end) {
  const size_t n = end - begin, start = order() % n;
  size_t stride = 1 + order() % n, ended = 0;
  while (std::gcd(stride, n) != 1) stride = 1 + stride % n;
  for (size_t i = 0; i < n; ++i) {
    Fiber& fiber = fibers[begin + (start + i * stride) % n];
    if (fiber.done) continue;
    current = &fiber;
    switch_to(scheduler, fiber.context);
    ended += fiber.done;
  }
  return ended;
}

// Runs the blocks from `begin` on together, which may meet. Now and then a warp or a block runs as
// far ahead of the others as barriers let it.
void run_blocks(unsigned begin, unsigned end, unsigned cluster_size) {
  const unsigned count = end - begin;
  std::vector<Cluster> clusters((count + cluster_size - 1) / cluster_size);
  std::vector<Block> blocks(count);
  for (unsigned i = 0; i < count; ++i) {
    Block& block = blocks[i];
    block.index = begin + i;
    block.cluster = &clusters[i / cluster_size];
    block.cluster->blocks.push_back(&block);
    block.warps = std::vector<Warp>(launch.threads / 32);
    block.memory = std::make_unique<unsigned char[]>(launch.shared + kGuard + 16);
    block.shared = block.memory.get() + (16 - reinterpret_cast<uintptr_t>(block.memory.get()) % 16);
    std::memset(block.shared, kUnwritten, launch.shared + kGuard);
  }
  const size_t n = size_t(count) * launch.threads, stack = 32 << 10;
  const std::unique_ptr<unsigned char[]> stacks(new unsigned char[n * stack]);
  std::vector<Fiber> fibers(n);
  for (size_t i = 0; i < n; ++i) {
    fibers[i].thread = i % launch.threads;
    fibers[i].block = &blocks[i / launch.threads];
    prepare(fibers[i].context, stacks.get() + i * stack, stack, run_thread);
  }
  for (size_t left = n; left > 0;) {
    uint64_t before;
    if (order() % 4 == 0) {
      const size_t ahead = order() % 2 ? 32 : launch.threads, first = order() % (n / ahead) * ahead;
      do {
        before = progress;
        left -= take_turns(fibers, first, first + ahead);
      } while (progress != before);
    }
    before = progress;
    left -= take_turns(fibers, 0, n);
    if (left > 0 && progress == before) {
      throw std::runtime_error("deadlock: a barrier that not all reach");
    }
  }
  for (const Block& block : blocks) {
    for (size_t i = 0; i < kGuard; ++i) {
      if (block.shared[launch.shared + i] != kUnwritten) {
        throw std::runtime_error("a store beyond the shared memory of a block");
      }
    }
  }
}

}  // namespace

Index thread_index() { return {current->thread}; }
Index block_index() { return {current->block->index}; }
Index grid_size() { return {launch.blocks}; }
void progressed() { ++progress; }
void yield() { switch_to(current->context, scheduler); }
void block_barrier() { current->block->barrier.meet(int(launch.threads)); }
void cluster_arrive() {
  Cluster& cluster = *current->block->cluster;
  current->arrival = cluster.barrier.arrive(int(cluster.blocks.size() * launch.threads));
}
void cluster_wait() { current->block->cluster->barrier.wait(current->arrival); }
void warp_barrier() { current->block->warps[current->thread / 32].barrier.meet(32); }
WarpWords& warp_words() { return current->block->warps[current->thread / 32].words; }
unsigned char* shared_memory() { return current->block->shared; }
void* of_rank(void* own, int rank, size_t bytes) {
  const size_t at = static_cast<unsigned char*>(own) - current->block->shared;
  if (at + bytes > launch.shared || size_t(rank) >= current->block->cluster->blocks.size()) {
    std::fprintf(stderr, "a store beyond the cluster's shared memory\n");
    std::abort();
  }
  return current->block->cluster->blocks[rank]->shared + at;
}

}  // namespace emulation

// ------------------------------------------------------------------------------- CUDA's runtime
//
// Of a small Hopper: clusters of up to 16 blocks, 20 multiprocessors.

using namespace emulation;

static const char* last_error = "no error";

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 20; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int,
                                                          size_t shared) {
  *blocks = shared <= 227 << 10;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*,
                                           const cudaLaunchConfig_t* config) {
  *clusters = 20 / config->attrs[0].val.clusterDim.x;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** args) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  launch = {reinterpret_cast<rnnfast::cuda::Kernel>(const_cast<void*>(kernel)),
            *static_cast<rnnfast::cuda::Layer*>(args[0]),
            *static_cast<rnnfast::cuda::Grid*>(args[1]),
            config->gridDim.x,
            config->blockDim.x,
            config->dynamicSmemBytes};
  unsigned cluster = 1;
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeCooperative) cooperative = attribute.val.cooperative;
  }
  try {
    // Blocks that cannot meet run one after another.
    const unsigned together = cooperative ? launch.blocks : cluster;
    for (unsigned b = 0; b < launch.blocks; b += together) run_blocks(b, b + together, cluster);
  } catch (const std::runtime_error& error) {
    last_error = error.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : last_error;
}
