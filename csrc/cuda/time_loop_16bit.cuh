// The variants of the 16-bit types. A thread of 512 has 128 registers, of which the matrix takes up
// to 64; so a block holds 64 x 1024 weights, and a cluster of 16 all of H = 1024.
#pragma once

#include "variant_row.cuh"

namespace rnnfast::cuda {

// WARPS, UNIT_TILES, SPLITS, K_STEPS. Warps that share a split read the same part of the state from
// shared memory; warps that share units leave more sums to add. Two tiles of units a warp halve the
// former for twice the latter, which is less.
template <class Number>
inline const Variant k16BitVariants[] = {
    variant<ByTensorCores<Number, 2, 1, 1, 2>>("block 32"),
    variant<ByTensorCores<Number, 4, 1, 1, 4>>("block 64"),
    variant<ByTensorCores<Number, 8, 1, 1, 8>>("block 128"),
    variant<ByTensorCores<Number, 8, 2, 2, 8>>("block 256"),
    variant<ByTensorCores<Number, 2, 2, 4, 8>>("cluster 512"),
    variant<ByTensorCores<Number, 2, 2, 8, 8>>("cluster 1024"),
    variant<ByTensorCores<Number, 2, 2, 4, 8>, true>("grid 512"),
    variant<ByTensorCores<Number, 2, 2, 8, 8>, true>("grid 1024"),
    variant<ByTensorCores<Number, 1, 2, 16, 8>, true>("grid 2048"),
};

template <class Number>
Variants variants_of() {
  return {k16BitVariants<Number>, int(std::size(k16BitVariants<Number>))};
}

}  // namespace rnnfast::cuda
