// Threads of a kernel as fibers of one thread of the CPU. A fiber runs until it has to wait, so
// what a kernel does between two barriers happens at once; the order of the fibers is drawn anew
// for every round, so that a missing barrier shows as a wrong result. A barrier that not all reach,
// and a store beyond a block's shared memory, end the launch with an error.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

struct Index {
  unsigned x;
};
Index thread_index();
Index block_index();
Index grid_size();

void block_barrier();
void cluster_arrive();
void cluster_wait();
void warp_barrier();

unsigned char* shared_memory();
// The place in the shared memory of another block of the cluster.
void* of_rank(void* own, int rank, size_t bytes);

using WarpWords = uint32_t[32][6];
WarpWords& warp_words();

void progressed();
void yield();

template <class Condition>
void wait(const Condition& reached) {
  progressed();  // it has arrived
  while (!reached()) yield();
  progressed();
}

}  // namespace emulation
