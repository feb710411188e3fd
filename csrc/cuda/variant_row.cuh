// A row of the table from a product, for the files that compile the kernels.
#pragma once

#include "time_loop.cuh"

namespace rnnfast::cuda {

template <class Product, bool FAR = false>
constexpr Variant variant(const char* name) {
  return {name,
          FAR,
          Product::kTerms,
          Product::kUnits,
          Product::kThreads,
          Product::kTileRows,
          SharedLayout<Product, FAR>::kStateTile * sizeof(typename Product::State),
          [](int tiles, bool backward) {
            return SharedLayout<Product, FAR>(tiles, backward).total;
          },
          time_loop<Product, FAR, false>,
          time_loop<Product, FAR, true>};
}

}  // namespace rnnfast::cuda
