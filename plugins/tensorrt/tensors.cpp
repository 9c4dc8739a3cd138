#include "tensors.h"

#include <algorithm>

#include "log.h"

namespace lora_drop {

Positions::Positions(Fields const& fields) {
    for (int32_t input = 0; input < kNB_INPUTS; ++input) {
        bool const absent = (input == kIN_COUNT && fields.has_count == 0)
            || ((input == kIN_COS || input == kIN_SIN) && fields.rotary_dim == 0)
            || ((input == kIN_Q_NORM || input == kIN_K_NORM) && fields.has_norm == 0)
            || ((input == kIN_K_SCALE || input == kIN_V_SCALE) && fields.has_kv_scale == 0)
            || (input == kIN_SINKS && fields.has_sinks == 0);
        mPositions[input] = absent ? -1 : mNbInputs++;
    }
}

Tensor Positions::tensorAt(int32_t pos) const {
    if (pos >= mNbInputs)
        return kNB_INPUTS + pos - mNbInputs;
    return static_cast<Tensor>(std::find(mPositions.begin(), mPositions.end(), pos) - mPositions.begin());
}

void Positions::requireNumbers(int32_t nb_inputs, int32_t nb_outputs, Fields const& fields) const {
    if (nb_inputs != mNbInputs || nb_outputs != kNB_OUTPUTS)
        refuse(nb_inputs, " inputs and ", nb_outputs, " outputs; these fields call for ", mNbInputs, " and ",
               +kNB_OUTPUTS, ": ", describe(fields));
}

} // namespace lora_drop
