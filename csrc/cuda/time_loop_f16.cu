#include "time_loop_16bit.cuh"

namespace rnnfast::cuda {

Variants f16_variants() { return variants_of<f16>(); }

}  // namespace rnnfast::cuda
