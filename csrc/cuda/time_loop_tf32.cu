// float32 layers whose products may run in TF32.
#include "variant_row.cuh"

namespace rnnfast::cuda {

// WARPS, UNIT_TILES, SPLITS, K_STEPS
static const Variant kVariants[] = {
    variant<ByTensorCores<tf32, 4, 1, 1, 8>>("block 64"),
    variant<ByTensorCores<tf32, 8, 1, 2, 8>>("block 128"),
    variant<ByTensorCores<tf32, 12, 1, 1, 24>>("block 192"),
    variant<ByTensorCores<tf32, 2, 2, 8, 8>>("cluster 512"),
    variant<ByTensorCores<tf32, 2, 2, 8, 8>, true>("grid 512"),
    variant<ByTensorCores<tf32, 1, 2, 16, 8>, true>("grid 1024"),
    variant<ByTensorCores<tf32, 1, 1, 16, 16>, true>("grid 2048"),
};

Variants tf32_variants() { return {kVariants, int(std::size(kVariants))}; }

}  // namespace rnnfast::cuda
