// float32 layers in IEEE arithmetic. "row" variants are for batches so small that every row can
// have a multiprocessor of its own, or a group of them.
#include "variant_row.cuh"

namespace rnnfast::cuda {

// LANES, UNITS, WARPS, WARP_SPLITS, TERMS, ROWS
static const Variant kVariants[] = {
    variant<ByFma<float, 32, 1, 1, 4, 8, 1>>("block 32 row"),
    variant<ByFma<float, 32, 1, 1, 4, 8, 4>>("block 32"),
    variant<ByFma<float, 32, 2, 1, 8, 8, 1>>("block 64 row"),
    variant<ByFma<float, 32, 2, 1, 8, 8, 4>>("block 64"),
    variant<ByFma<float, 32, 2, 2, 8, 16, 1>>("block 128 row"),
    variant<ByFma<float, 32, 2, 2, 8, 16, 4>>("block 128"),
    variant<ByFma<float, 32, 2, 3, 4, 48, 1>>("block 192 row"),
    variant<ByFma<float, 32, 2, 3, 4, 48, 4>>("block 192"),
    variant<ByFma<float, 32, 2, 1, 16, 32, 1>>("cluster 512 row"),
    variant<ByFma<float, 32, 2, 1, 16, 32, 4>>("cluster 512"),
    variant<ByFma<float, 32, 2, 1, 16, 32, 1>, true>("grid 512 row"),
    variant<ByFma<float, 32, 2, 1, 16, 32, 4>, true>("grid 512"),
    variant<ByFma<float, 16, 2, 1, 16, 32, 1>, true>("grid 1024 row"),
    variant<ByFma<float, 16, 2, 1, 16, 32, 4>, true>("grid 1024"),
    variant<ByFma<float, 16, 1, 1, 16, 64, 1>, true>("grid 2048 row"),
    variant<ByFma<float, 16, 1, 1, 16, 64, 4>, true>("grid 2048"),
};

Variants f32_variants() { return {kVariants, int(std::size(kVariants))}; }

}  // namespace rnnfast::cuda
