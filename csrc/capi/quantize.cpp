// Types of tensors, and quantisation.
#include "../ggml/quantize.h"

#include "common.h"

using hobbit::guarded;

bool hobbit_type(int32_t type, hobbit_type_info * info) {
    bool       known  = false;
    const auto status = guarded(nullptr, [&] {
        hobbit_type_info out = {};
        known                = hobbit::type_facts(type, out);
        hobbit::copy_out(info, out);
    });
    return status == HOBBIT_OK && known;
}

void hobbit_quantize_init(int32_t type) { hobbit::prepare_quantizer(type); }

hobbit_status hobbit_quantize(int32_t type, const float * src, void * dst, int64_t n_rows, int64_t n_per_row,
                              const float * imatrix, hobbit_error * error) {
    return guarded(error, [&] { hobbit::quantize(type, src, dst, n_rows, n_per_row, imatrix); });
}

hobbit_status hobbit_quantize_feedback(int32_t type, const float * src, void * dst, int64_t n_rows, int64_t n_per_row,
                                       const float * factor, hobbit_error * error) {
    return guarded(error, [&] { hobbit::quantize_feedback(type, src, dst, n_rows, n_per_row, factor); });
}

hobbit_status hobbit_dequantize(int32_t type, const void * src, float * dst, int64_t n, hobbit_error * error) {
    return guarded(error, [&] { hobbit::dequantize(type, src, dst, n); });
}
