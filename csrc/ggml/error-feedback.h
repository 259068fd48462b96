// Quantising with what is rounded away made good in later columns: GPTQ (Frantar et al. 2023), in the form of LDLQ (Chee et al. 2023,
// QuIP, theorem 1), a block of the type at a time.
//
// A product sees inputs x whose second moments are H = E[x x^T]; a row w stored as q is off by e x with e = w - q, in the mean of squares
// by e H e^T. Nearest values minimise |e| and leave the rest to luck. With H = R R^T, R upper triangular, e H e^T = |e R|^2, and of that the
// part in a block B of columns is, with all blocks before it done,
//
//     (e R)_B = (s_B + e_B) R_BB,  s_B = sum over the blocks A before B of e_A R_AB R_BB^-1
//
// so what is stored is to be nearest to w_B + s_B, where column i weighs (R_BB R_BB^T)_ii.
//
// Where columns go together closely, what is owed can outgrow the weights, and with them the errors. A row that so comes to lose more than
// twice what nearest values would, as far as the first block tells, is quantised to these.
#pragma once

#include <cstdint>
#include <functional>

namespace hobbit {

// `n_rows` rows of one block -> their bytes, a block after the other, and the floats these stand for; by the importance of each column.
using block_quantizer =
    std::function<void(const float * src, void * dst, float * back, int64_t n_rows, const float * importance)>;

struct block_shape {
    int64_t columns;
    int64_t bytes;
    float   largest;  // magnitude that the type can hold: what is made good never goes beyond
};

// `n_rows` rows of `n_per_row` floats, a multiple of the block; factor: R, [n_per_row][n_per_row], whose squares can be added up. Each row comes out the same whatever
// rows it is quantised with. Throws std::bad_alloc, and what `quantize` throws.
void quantize_with_feedback(const block_shape & block, const block_quantizer & quantize, const float * src, void * dst,
                            int64_t n_rows, int64_t n_per_row, const float * factor);

}  // namespace hobbit
