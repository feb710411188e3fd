#include "time_loop_16bit.cuh"

namespace rnnfast::cuda {

Variants bf16_variants() { return variants_of<bf16>(); }

}  // namespace rnnfast::cuda
