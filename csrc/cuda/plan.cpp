// Which kernel runs a layer, how it is laid out on the device, and its launch.
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

#include "time_loop.h"
#include "variants.h"

namespace rnnfast::cuda {
namespace {

constexpr int kPortableCluster = 8, kLargestCluster = 16;

Variants variants_of(Numbers numbers) {
  switch (numbers) {
    case Numbers::f32: return f32_variants();
    case Numbers::tf32: return tf32_variants();
    case Numbers::f64: return f64_variants();
    case Numbers::bf16: return bf16_variants();
    case Numbers::f16: return f16_variants();
  }
  return {nullptr, 0};
}

struct Device {
  int index = 0, multiprocessors = 0, major = 0, shared = 0, cooperative = 0;
};

cudaError_t current_device(Device* device) {
  cudaError_t error = cudaGetDevice(&device->index);
  const auto get = [&](cudaDeviceAttr attribute, int* value) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device->index);
  };
  get(cudaDevAttrMultiProcessorCount, &device->multiprocessors);
  get(cudaDevAttrComputeCapabilityMajor, &device->major);
  get(cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared);
  get(cudaDevAttrCooperativeLaunch, &device->cooperative);
  return error;
}

const void* kernel_of(const Variant& v, bool backward) {
  return reinterpret_cast<const void*>(backward ? v.backward : v.forward);
}

cudaLaunchConfig_t config_of(const Variant& v, int blocks, int groups, size_t shared,
                             cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks) * groups);
  config.blockDim = dim3(v.threads);
  config.dynamicSmemBytes = shared;
  config.attrs = attribute;
  config.numAttrs = 1;
  if (v.far) {
    attribute->id = cudaLaunchAttributeCooperative;
    attribute->val.cooperative = 1;
  } else if (blocks > 1) {
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim = {unsigned(blocks), 1, 1};
  } else {
    config.numAttrs = 0;
  }
  return config;
}

// How many groups of blocks the device runs at the same time, 0 if none. Asked of the driver once
// for each device, kernel and number of blocks and tiles.
int resident_groups(const Device& device, const Variant& v, bool backward, int blocks, int tiles) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int>, int> known;
  const void* kernel = kernel_of(v, backward);
  const auto key = std::make_tuple(device.index, kernel, blocks, tiles);
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  const size_t shared = v.shared(tiles, backward);
  if (shared > size_t(device.shared)) return known[key] = 0;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           device.shared);
  int groups = 0;
  if (v.far || blocks == 1) {
    int per_multiprocessor = 0;
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, v.threads,
                                                            shared);
    }
    groups = per_multiprocessor * device.multiprocessors / blocks;
  } else {
    // A GPU may run code that was compiled for older ones, which has no clusters.
    cudaFuncAttributes compiled = {};
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&compiled, kernel);
    if (error == cudaSuccess && compiled.ptxVersion < 90) return known[key] = 0;
    if (error == cudaSuccess && blocks > kPortableCluster) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = config_of(v, blocks, 1, shared, &attribute);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&groups, kernel, &config);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // a refusal here is an answer, not a failure of what comes later
    return 0;            // and the next call asks again: it may have lacked memory
  }
  return known[key] = groups;
}

int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

bool lay_out(const Device& device, const Variant& v, int64_t B, int H, bool backward, Plan* plan) {
  const int blocks = ceil_div(H, v.units);
  if (H > v.largest_hidden_size) return false;
  if (v.far ? !device.cooperative || blocks == 1
            : blocks > kLargestCluster || (blocks > 1 && device.major < 9)) {
    return false;
  }
  int resident = resident_groups(device, v, backward, blocks, 1);
  if (resident == 0) return false;

  // As many groups as run at once; each takes more tiles a step where the rows are more than that.
  // The more tiles, the fewer meetings, but shared memory ends them; what is left over waits for
  // its turn, as further blocks of the grid or (FAR, where all must be resident) in a loop over
  // groups.
  const int rows = ceil_div(B, v.tile_rows);
  int tiles = std::max(1, ceil_div(rows, resident));
  while (tiles > 1 && (v.shared(tiles, backward) > size_t(device.shared) ||
                       (resident = resident_groups(device, v, backward, blocks, tiles)) == 0)) {
    --tiles;
  }
  int groups = ceil_div(rows, tiles);
  if (v.far) {
    groups = std::min(groups, resident_groups(device, v, backward, blocks, tiles));
    if (groups == 0) return false;
  }
  plan->variant = &v;
  plan->blocks = blocks;
  plan->tiles = tiles;
  plan->groups = groups;
  plan->shared = v.shared(tiles, backward);
  plan->workspace =
      v.far ? size_t(groups) * (kCounterStride * 8 + 2 * size_t(tiles) * v.state_tile) : 0;
  return true;
}

}  // namespace

Refusal make_plan(Numbers numbers, int64_t B, int H, bool backward, Plan* plan, const char* only) {
  Device device;
  if (current_device(&device) != cudaSuccess) {
    cudaGetLastError();
    return Refusal::capability;
  }
  if (device.major < 8) return Refusal::capability;
  const Variants variants = variants_of(numbers);
  for (int i = 0; i < variants.count; ++i) {
    const Variant& v = variants.rows[i];
    if (only && std::strcmp(only, v.name) != 0) continue;
    // A row of its own for every multiprocessor, or group of them, while there are enough.
    if (!only && v.tile_rows == 1 && B * ceil_div(H, v.units) > device.multiprocessors) continue;
    if (lay_out(device, v, B, H, backward, plan)) return Refusal::none;
  }
  return Refusal::hidden_size;
}

const char* name_of(const Variant& variant) { return variant.name; }

cudaError_t launch(const Plan& plan, const Layer& layer, bool backward, cudaStream_t stream) {
  const Variant& v = *plan.variant;
  if (plan.workspace > 0) {
    const cudaError_t error = cudaMemsetAsync(layer.workspace, 0, plan.workspace, stream);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config =
      config_of(v, plan.blocks, plan.groups, plan.shared, &attribute);
  config.stream = stream;
  Layer p = layer;
  Grid grid = {plan.blocks, plan.tiles};
  void* args[] = {&p, &grid};
  return cudaLaunchKernelExC(&config, kernel_of(v, backward), args);
}

}  // namespace rnnfast::cuda
