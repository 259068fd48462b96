#include "error-feedback.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace hobbit {

namespace {

constexpr int64_t TILE  = 32;  // rows that go through R together: R is larger than the caches, so it is read once for many
constexpr int64_t GROUP = 4;   // of these in registers
constexpr int64_t LANES = 16;

// GCC's and Clang's vectors, on any CPU; of unaligned floats.
using floats = float __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

// sums[r][c] += errors[r][i] rows[i][c] for the rows r of the tile, i below `n`, columns c from `begin` on. `strip`: n * LANES floats.
void spread(const float * errors, int64_t n, const float * rows, int64_t n_per_row, int64_t begin, float * strip,
            float * sums) {
    int64_t c = begin;
    for (; c + LANES <= n_per_row; c += LANES) {
        // Rows of R are some power of two apart, so in the same few sets of a cache.
        for (int64_t i = 0; i < n; ++i) {
            memcpy(strip + i * LANES, rows + i * n_per_row + c, LANES * sizeof(float));
        }
        for (int64_t r = 0; r < TILE; r += GROUP) {
            floats at[GROUP];
            for (int64_t g = 0; g < GROUP; ++g) {
                at[g] = *(const floats *) (sums + (r + g) * n_per_row + c);
            }
            for (int64_t i = 0; i < n; ++i) {
                const floats factor = *(const floats *) (strip + i * LANES);
                for (int64_t g = 0; g < GROUP; ++g) {
                    at[g] += errors[(r + g) * n + i] * factor;
                }
            }
            for (int64_t g = 0; g < GROUP; ++g) {
                *(floats *) (sums + (r + g) * n_per_row + c) = at[g];
            }
        }
    }
    for (; c < n_per_row; ++c) {
        for (int64_t r = 0; r < TILE; ++r) {
            for (int64_t i = 0; i < n; ++i) {
                sums[r * n_per_row + c] += errors[r * n + i] * rows[i * n_per_row + c];
            }
        }
    }
}

// One tile at a time.
class feedback {
  public:
    feedback(const block_shape & block, const block_quantizer & quantize, int64_t n_per_row, const float * factor) :
        block_(block),
        quantize_(quantize),
        n_(n_per_row),
        factor_(factor),
        importance_(n_per_row),
        moments_(n_per_row),
        sums_(TILE * n_per_row),
        wanted_(TILE * block.columns),
        back_(TILE * block.columns),
        errors_(TILE * block.columns),
        product_(block.columns),
        strip_(block.columns * LANES),
        bytes_(TILE * block.bytes) {
        for (int64_t i = 0; i < n_; ++i) {
            const int64_t end = (i / block_.columns + 1) * block_.columns;
            for (int64_t j = i; j < n_; ++j) {
                const float square = factor[i * n_ + j] * factor[i * n_ + j];
                moments_[i] += square;
                importance_[i] += j < end ? square : 0;
            }
        }
    }

    void run(const float * src, char * dst, int64_t rows) {
        share_.assign(TILE, 0);
        lost_.assign(TILE, 0);
        nearest_.assign(TILE, 0);
        std::fill(sums_.begin(), sums_.end(), 0.0f);
        std::fill(errors_.begin(), errors_.end(), 0.0f);
        for (int64_t at = 0; at < n_; at += block_.columns) {
            store(src, dst, 0, rows, at);
            count(src, rows, at);
            spread(errors_.data(), block_.columns, factor_ + at * n_, n_, at + block_.columns, strip_.data(), sums_.data());
        }
        for (int64_t r = 0; r < rows; ++r) {
            if (!(lost_[r] <= TOO_MUCH * nearest_[r])) {
                std::fill_n(sums_.begin() + r * n_, n_, 0.0f);
                for (int64_t at = 0; at < n_; at += block_.columns) {
                    store(src, dst, r, r + 1, at);
                }
            }
        }
    }

  private:
    static constexpr double TOO_MUCH = 2;  // the first block tells no more than about

    // s_B of a row: what makes `sums` when R_BB multiplies it.
    void solve(const float * sums, int64_t at, float * owed) const {
        const int64_t n = block_.columns;
        std::copy_n(sums, n, owed);
        for (int64_t j = 0; j < n; ++j) {
            const float * of = factor_ + (at + j) * n_ + at;
            owed[j] /= of[j];
            for (int64_t k = j + 1; k < n; ++k) {
                owed[k] -= owed[j] * of[k];
            }
        }
    }

    // The block at column `at` of rows `begin` to `end`, and what is rounded away.
    void store(const float * src, char * dst, int64_t begin, int64_t end, int64_t at) {
        const int64_t n = block_.columns;
        for (int64_t r = begin; r < end; ++r) {
            float * wanted = wanted_.data() + r * n;
            solve(sums_.data() + r * n_ + at, at, wanted);
            for (int64_t j = 0; j < n; ++j) {
                // not std::clamp: of a sum that is no number, a number
                wanted[j] = std::max(-block_.largest, std::min(block_.largest, src[r * n_ + at + j] + wanted[j]));
            }
        }
        quantize_(wanted_.data() + begin * n, bytes_.data(), back_.data(), end - begin, importance_.data() + at);
        for (int64_t r = begin; r < end; ++r) {
            const char * from = bytes_.data() + (r - begin) * block_.bytes;
            memcpy(dst + (r * (n_ / n) + at / n) * block_.bytes, from, block_.bytes);
            for (int64_t j = 0; j < n; ++j) {
                errors_[r * n + j] = src[r * n_ + at + j] - back_[(r - begin) * n + j];
            }
        }
    }

    // From the first block on in which anything is rounded away, and to which so nothing is owed: adds up |(e R)_B|^2, and what nearest
    // values would lose, each column in all products, by the share of the weights that is rounded away there.
    void count(const float * src, int64_t rows, int64_t at) {
        const int64_t n = block_.columns;
        for (int64_t r = 0; r < rows; ++r) {
            std::copy_n(sums_.data() + r * n_ + at, n, product_.data());
            double stored = 0, rounded = 0;
            for (int64_t i = 0; i < n; ++i) {
                const float   e   = errors_[r * n + i];
                const float * row = factor_ + (at + i) * n_ + at;
                for (int64_t j = i; j < n; ++j) {
                    product_[j] += e * row[j];
                }
                stored += (double) moments_[at + i] * src[r * n_ + at + i] * src[r * n_ + at + i];
                rounded += (double) moments_[at + i] * e * e;
            }
            if (share_[r] == 0 && rounded > 0) {
                share_[r] = rounded / stored;
            }
            if (share_[r] > 0) {
                for (const float x : product_) {
                    lost_[r] += (double) x * x;
                }
                nearest_[r] += share_[r] * stored;
            }
        }
    }

    const block_shape &     block_;
    const block_quantizer & quantize_;
    int64_t                 n_;
    const float *           factor_;
    std::vector<float>      importance_;  // of columns for the quantiser
    std::vector<float>      moments_;     // their mean squares
    std::vector<float>      sums_;        // [TILE][n]: of e_A R_A over the blocks A that are done
    std::vector<float>      wanted_, back_, errors_, product_, strip_;
    std::vector<char>       bytes_;
    std::vector<double>     share_, lost_, nearest_;
};

}  // namespace

void quantize_with_feedback(const block_shape & block, const block_quantizer & quantize, const float * src, void * dst,
                            int64_t n_rows, int64_t n_per_row, const float * factor) {
    feedback      tile(block, quantize, n_per_row, factor);
    const int64_t row_bytes = n_per_row / block.columns * block.bytes;
    for (int64_t r = 0; r < n_rows; r += TILE) {
        tile.run(src + r * n_per_row, (char *) dst + r * row_bytes, std::min(TILE, n_rows - r));
    }
}

}  // namespace hobbit
