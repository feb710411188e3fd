#include "variant_row.cuh"

namespace rnnfast::cuda {

// LANES, UNITS, WARPS, WARP_SPLITS, TERMS, ROWS
static const Variant kVariants[] = {
    variant<ByFma<double, 32, 1, 1, 4, 8, 4>>("block 32"),
    variant<ByFma<double, 32, 2, 1, 8, 8, 4>>("block 64"),
    variant<ByFma<double, 32, 2, 2, 8, 16, 4>>("block 128"),
    variant<ByFma<double, 16, 2, 1, 16, 16, 4>>("cluster 512"),
    variant<ByFma<double, 16, 2, 1, 16, 16, 4>, true>("grid 512"),
};

Variants f64_variants() { return {kVariants, int(std::size(kVariants))}; }

}  // namespace rnnfast::cuda
