#include "eight-rows.h"
#include "repacking.h"
#include "tile-trial.h"
#include "tile.h"

#include "ggml.h"

// upstream, private: the tables, then the blocks
#define GGML_COMMON_IMPL_CPP
#include "ggml-common.h"
#include "repack.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

namespace hobbit {

namespace {

#ifdef HOBBIT_TILES

using eight_rows::CHUNK;
using eight_rows::load;
using eight_rows::ROWS;

constexpr int COLS = 16;  // rows of inputs at a time

__m256 eight_halves(const ggml_half * x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x)); }

// K-quants: a super-block of eight rows is SUB_BLOCKS sub-blocks, with a scale and a minimum of each row, of CHUNKS chunks.

struct q4_K {
    static constexpr ggml_type TYPE       = GGML_TYPE_Q4_K;
    static constexpr int       SUB_BLOCKS = 8;
    static constexpr int       CHUNKS     = QK_K / SUB_BLOCKS / 8;
    static constexpr int       MASK       = 15;
    using block                           = block_q4_Kx8;

    // The chunks of sub-block `s`, one behind the other; `shift`: by so many bits to the left in their bytes.
    static const uint8_t * chunks(const block & b, int s) { return b.qs + s / 2 * CHUNKS * CHUNK; }

    static int shift(int s) { return s % 2 * 4; }

    // Of row r `scale[s][r]` and `min[s / 2][r][s % 2]`.
    static void unpack(const block & b, uint8_t (*scale)[ROWS], uint8_t (*min)[ROWS][2]) {
        for (int s = 0; s < SUB_BLOCKS; ++s) {
            // Rows 0 to 3 have six bits in `low`, scales in its first half; rows 4 to 7 four bits in `high`, and two above those six.
            const auto     low   = load<uint64_t>(b.scales + s * 12);
            const auto     high  = load<uint32_t>(b.scales + s * 12 + 8);
            const uint64_t six   = low & 0x3f3f3f3f3f3f3f3f;
            const uint64_t two   = low >> 6 & 0x0303030303030303;
            const uint32_t s4    = (high & 0x0f0f0f0f) | (uint32_t) two << 4;
            const uint32_t m4    = (high >> 4 & 0x0f0f0f0f) | (uint32_t) (two >> 32) << 4;
            const __m128i  m     = _mm_set_epi32(0, 0, (int) m4, (int) (six >> 32));
            const uint64_t eight = (uint32_t) six | (uint64_t) s4 << 32;
            memcpy(scale[s], &eight, sizeof(eight));
            auto * pairs = (__m128i *) min[s / 2];
            _mm_storeu_si128(pairs, s % 2 == 0 ? m : _mm_unpacklo_epi8(_mm_loadu_si128(pairs), m));
        }
    }
};

struct q2_K {
    static constexpr ggml_type TYPE       = GGML_TYPE_Q2_K;
    static constexpr int       SUB_BLOCKS = 16;
    static constexpr int       CHUNKS     = QK_K / SUB_BLOCKS / 8;
    static constexpr int       MASK       = 3;
    using block                           = block_q2_Kx8;

    static const uint8_t * chunks(const block & b, int s) { return b.qs + (s / 8 * 2 + s % 2) * CHUNKS * CHUNK; }

    static int shift(int s) { return s % 8 / 2 * 2; }

    static void unpack(const block & b, uint8_t (*scale)[ROWS], uint8_t (*min)[ROWS][2]) {
        const __m128i four = _mm_set1_epi8(15);
        const __m128i even = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        for (int s = 0; s < SUB_BLOCKS; s += 2) {
            const __m128i both = _mm_loadu_si128((const __m128i *) (b.scales + s * ROWS));
            _mm_storeu_si128((__m128i *) scale[s], _mm_shuffle_epi8(_mm_and_si128(both, four), even));
            _mm_storeu_si128((__m128i *) min[s / 2], _mm_and_si128(_mm_srli_epi16(both, 4), four));
        }
    }
};

template <typename W, typename I>
struct k_quants {
    using type                      = W;
    using set                       = I;
    static constexpr int LENGTH     = QK_K;
    static constexpr int SUB_LENGTH = QK_K / W::SUB_BLOCKS;

    struct inputs {
        int8_t  quants[QK_K];
        int16_t sums[W::SUB_BLOCKS];  // of the quants
        float   scale;
    };

    struct sums {
        __m256 of_quants, of_mins;
    };

    static void put(inputs & to, const char * row, int64_t b) {
        const block_q8_K & x = ((const block_q8_K *) row)[b];
        memcpy(to.quants, x.qs, sizeof(x.qs));
        for (int s = 0; s < W::SUB_BLOCKS; ++s) {
            const int16_t * of_16 = x.bsums + s * SUB_LENGTH / 16;
            to.sums[s]            = (int16_t) (SUB_LENGTH == 16 ? of_16[0] : of_16[0] + of_16[1]);
        }
        to.scale = x.d;
    }

    static void add(const typename W::block & w, const inputs * x, int64_t n_c, sums * to) {
        constexpr int PAIRS = W::SUB_BLOCKS / 2;
        uint8_t       scale[W::SUB_BLOCKS][ROWS];
        uint8_t       min[PAIRS][ROWS][2];
        W::unpack(w, scale, min);
        typename I::ints products[COLS];
        std::fill_n(products, n_c, I::zero());
        for (int s = 0; s < W::SUB_BLOCKS; ++s) {
            typename I::ints quants[W::CHUNKS];
            for (int j = 0; j < W::CHUNKS; ++j) {
                quants[j] = I::quants(W::chunks(w, s) + j * CHUNK, W::shift(s), W::MASK);
            }
            const typename I::ints scales = I::scales(scale[s]);
            for (int64_t c = 0; c < n_c; ++c) {
                I::template add_scaled<W::CHUNKS>(products[c], quants, scales, x[c].quants + s * SUB_LENGTH);
            }
        }
        __m256i mins[PAIRS];
        for (int p = 0; p < PAIRS; ++p) {
            mins[p] = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *) min[p]));
        }
        const __m256 d    = eight_halves(w.d);
        const __m256 dmin = eight_halves(w.dmin);
        for (int64_t c = 0; c < n_c; ++c) {
            __m256i of_mins = _mm256_setzero_si256();
            for (int p = 0; p < PAIRS; ++p) {
                const __m256i two = _mm256_set1_epi32(load<int32_t>(&x[c].sums[2 * p]));
                of_mins           = _mm256_add_epi32(of_mins, _mm256_madd_epi16(two, mins[p]));
            }
            const __m256 scale_x   = _mm256_set1_ps(x[c].scale);
            const __m256 of_quants = _mm256_cvtepi32_ps(I::of_rows(products[c]));
            to[c].of_quants        = _mm256_fmadd_ps(of_quants, _mm256_mul_ps(d, scale_x), to[c].of_quants);
            to[c].of_mins = _mm256_fmadd_ps(_mm256_cvtepi32_ps(of_mins), _mm256_mul_ps(dmin, scale_x), to[c].of_mins);
        }
    }

    static __m256 result(const sums & of) { return _mm256_sub_ps(of.of_quants, of.of_mins); }
};

// Four bits that stand for a value each: blocks of 32 with a scale of each row. The first sixteen are the lower halves of the bytes.

struct q4_0 {
    static constexpr ggml_type TYPE = GGML_TYPE_Q4_0;
    static constexpr int       BIAS = 8;
    using block                     = block_q4_0x8;

    // Of numbers with sign: upstream's repacking makes them such.
    static __m128i values() { return _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1); }

    static __m256 scales(const block & b) { return eight_halves(b.d); }
};

struct iq4_nl {
    static constexpr ggml_type TYPE = GGML_TYPE_IQ4_NL;
    static constexpr int       BIAS = 128;
    using block                     = block_iq4_nlx8;

    static __m128i values() { return _mm_loadu_si128((const __m128i *) kvalues_iq4nl); }

    static __m256 scales(const block & b) { return eight_halves(b.d); }
};

struct mxfp4 {
    static constexpr ggml_type TYPE = GGML_TYPE_MXFP4;
    static constexpr int       BIAS = 12;
    using block                     = block_mxfp4x8;

    static __m128i values() { return _mm_loadu_si128((const __m128i *) kvalues_mxfp4); }

    // 2^(e - 128), of which the smallest two are denormal.
    static __m256 scales(const block & b) {
        const __m256i e     = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) b.e));
        const __m256i small = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
        const __m256i large = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
        return _mm256_castsi256_ps(_mm256_blendv_epi8(small, large, _mm256_cmpgt_epi32(e, _mm256_set1_epi32(1))));
    }
};

template <typename W, typename I>
struct of_values {
    using type                  = W;
    using set                   = I;
    static constexpr int LENGTH = 32;
    static constexpr int CHUNKS = LENGTH / 8;
    static constexpr int BIAS   = I::BIASED ? W::BIAS : 0;

    struct inputs {
        int8_t  quants[LENGTH];
        int32_t start[2];  // of the two integers of each row
        float   scale;
    };

    using sums = __m256;

    static void put(inputs & to, const char * row, int64_t b) {
        const block_q8_0 & x = ((const block_q8_0 *) row)[b];
        memcpy(to.quants, x.qs, sizeof(x.qs));
        to.start[0] = -BIAS * std::accumulate(x.qs, x.qs + LENGTH, 0);
        to.start[1] = 0;
        to.scale    = _cvtsh_ss(x.d);
    }

    static void add(const typename W::block & w, const inputs * x, int64_t n_c, sums * to) {
        const __m128i    values = _mm_add_epi8(W::values(), _mm_set1_epi8((char) BIAS));
        typename I::ints chunks[CHUNKS];
        for (int j = 0; j < CHUNKS; ++j) {
            chunks[j] = I::values(values, I::quants((const uint8_t *) w.qs + j % 2 * CHUNK, j / 2 * 4, 15));
        }
        const __m256 d = W::scales(w);
        for (int64_t c = 0; c < n_c; ++c) {
            const auto products = I::template dots<CHUNKS>(load<int64_t>(x[c].start), chunks, x[c].quants);
            const auto of_rows  = _mm256_cvtepi32_ps(I::of_rows(products));
            to[c]               = _mm256_fmadd_ps(of_rows, _mm256_mul_ps(d, _mm256_set1_ps(x[c].scale)), to[c]);
        }
    }

    static __m256 result(const sums & of) { return of; }
};

// The kernel of products P, one of the two above.

template <typename P>
size_t prepared_bytes(int64_t n, int64_t n_c) {
    return (size_t) (n / P::LENGTH * n_c) * sizeof(typename P::inputs);
}

// [block][row]
template <typename P>
void prepare(const char * const * rows, int64_t n, int64_t n_c, std::byte * to) {
    auto * out = (typename P::inputs *) to;
    for (int64_t b = 0; b < n / P::LENGTH; ++b) {
        for (int64_t c = 0; c < n_c; ++c, ++out) {
            P::put(*out, rows[c], b);
        }
    }
}

template <typename P>
void multiply(int64_t n, const char * weights, size_t row_bytes, int64_t n_r, const std::byte * prepared, int64_t n_c,
              float * const * out) {
    for (int64_t r = 0; r < n_r; r += ROWS) {
        const auto * w = (const typename P::type::block *) (weights + (size_t) r * row_bytes);
        for (int64_t c0 = 0; c0 < n_c; c0 += COLS) {
            const auto *     x     = (const typename P::inputs *) prepared + c0;
            const int64_t    n_now = std::min<int64_t>(COLS, n_c - c0);
            typename P::sums sums[COLS];
            memset(sums, 0, sizeof(sums));
            for (int64_t b = 0; b < n / P::LENGTH; ++b) {
                P::add(w[b], x + b * n_c, n_now, sums);
            }
            for (int64_t c = 0; c < n_now; ++c) {
                _mm256_storeu_ps(out[c0 + c] + r, P::result(sums[c]));
            }
        }
    }
}

template <typename P>
constexpr tile_kernel kernel() {
    return { P::set::NAME, P::type::TYPE, P::LENGTH, prepared_bytes<P>, prepare<P>, multiply<P> };
}

template <typename I>
void add_kernels(std::vector<tile_kernel> & to) {
    for (const tile_kernel & one : { kernel<k_quants<q4_K, I>>(), kernel<k_quants<q2_K, I>>(), kernel<of_values<q4_0, I>>(),
                                     kernel<of_values<iq4_nl, I>>(), kernel<of_values<mxfp4, I>>() }) {
        to.push_back(one);
    }
}

#endif

bool has_bits_of_gemv(const tile_kernel & kernel) {
    constexpr int         N = TRIAL_LENGTH, N_R = 16;
    const repack_kernel * repacked = find_repack_kernel(kernel.type, N, N_R);
    if (repacked == nullptr) {
        return false;
    }
    const auto arrange  = [&](std::byte * w) { repack_slice(*repacked, N, N_R, w); };
    const auto multiply = [&](const std::byte * w, const char * x, float * out) {
        repacked->gemv(N, out, N_R, w, x, 1, N_R);
    };
    return has_bits_of({ N_R, arrange, multiply }, kernel);
}

}  // namespace

const std::vector<tile_kernel> & repacked_tile_kernels() {
    static const std::vector<tile_kernel> kernels = [] {
        std::vector<tile_kernel> all;
#ifdef HOBBIT_TILES
#    ifdef HOBBIT_TILES_AVX512
        add_kernels<eight_rows::avx512_vnni>(all);
#    endif
#    ifdef HOBBIT_TILES_VNNI
        add_kernels<eight_rows::avx_vnni>(all);
#    endif
        add_kernels<eight_rows::avx2>(all);
#endif
        return all;
    }();
    return kernels;
}

const tile_kernel * find_repacked_tile_kernel(int32_t type) {
    static const auto found = first_with_bits(repacked_tile_kernels(), has_bits_of_gemv);
    const auto        at    = found.find(type);
    return at == found.end() ? nullptr : at->second;
}

}  // namespace hobbit
