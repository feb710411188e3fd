// What the kernels' meetings cost by themselves, on one GPU. Prints JSON: nanoseconds of a meeting
// by the number of blocks, of 512 threads each.
//   nvcc -std=c++17 -O3 -arch=sm_90a -o barriers tools/barriers.cu && ./barriers
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include "../csrc/cuda/device.cuh"
using namespace rnnfast::cuda;
using Counter = unsigned long long;
constexpr auto kAbove8 = cudaFuncAttributeNonPortableClusterSizeAllowed;
constexpr int kThreads = 512, kMeetings = 10000;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "barriers: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

__global__ void in_cluster(Counter*, int meetings) {
  for (int i = 0; i < meetings; ++i) cluster_arrive(), cluster_wait();
}
__global__ void in_grid(Counter* counter, int meetings) {
  for (int i = 1; i <= meetings; ++i) grid_arrive(counter), grid_wait(counter, gridDim.x, i);
}

// By the shortest of five launches, less one of a single meeting.
double nanoseconds(bool cluster, int blocks, Counter* counter) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cluster ? cudaLaunchAttributeClusterDimension : cudaLaunchAttributeCooperative;
  if (cluster) attribute.val.clusterDim = {unsigned(blocks), 1, 1};
  else attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {dim3(blocks), dim3(kThreads), 0, nullptr, &attribute, 1};
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin)), check(cudaEventCreate(&end));
  float shortest[2] = {1e9f, 1e9f}, ms;
  for (int i = 0; i < 10; ++i) {
    check(cudaMemset(counter, 0, sizeof(*counter))), check(cudaEventRecord(begin));
    const int meetings = i % 2 ? kMeetings : 1;
    check(cudaLaunchKernelEx(&config, cluster ? in_cluster : in_grid, counter, meetings));
    check(cudaEventRecord(end)), check(cudaEventSynchronize(end));
    check(cudaEventElapsedTime(&ms, begin, end));
    shortest[i % 2] = std::min(shortest[i % 2], ms);
  }
  return (shortest[1] - shortest[0]) * 1e6 / (kMeetings - 1);
}

int main() {
  Counter* counter;
  cudaDeviceProp device;
  check(cudaMalloc(&counter, sizeof(*counter))), check(cudaGetDeviceProperties(&device, 0));
  const bool clusters = device.major >= 9;
  if (clusters) check(cudaFuncSetAttribute(in_cluster, kAbove8, 1));
  for (const bool cluster : {true, false}) {
    const int most = !cluster ? device.multiProcessorCount : clusters ? 16 : 0;
    std::printf(cluster ? "{\"cluster\": {" : "}, \"grid\": {");
    for (int n = 2; n <= most; n *= 2)
      std::printf("%s\"%d\": %.1f", n > 2 ? ", " : "", n, nanoseconds(cluster, n, counter));
  }
  std::printf("}}\n");
}
