// gated_linear_fwd and linear_act_fwd by CUTLASS's collectives: launchers for GatedLinearFwd, as those of
// csrc/gated_linear.h. With a gate, both weights have one row stride, and H is a multiple of kGroup.
#pragma once

#include "../gated_linear.h"

namespace fusedmlp::by_cutlass {

inline constexpr int kGroup = 32;  // columns of g, or of u, that lie together in a tile

const char* fwd_sm90(const GatedLinearFwd&, void* stream);
const char* fwd_sm100(const GatedLinearFwd&, void* stream);

}  // namespace fusedmlp::by_cutlass
