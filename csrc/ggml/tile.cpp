#include "tile.h"

#include "tile-instructions.h"
#include "tile-trial.h"

#include "ggml-cpu.h"
#include "ggml.h"

// upstream, private: the blocks, then the tables
#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#define GGML_COMMON_IMPL_CPP
#include "ggml-common.h"

#include <algorithm>
#include <cstring>

namespace hobbit {

namespace {

#ifdef HOBBIT_TILES

constexpr int64_t BLOCK = 32;

// A type of weights: bytes without sign that are BIAS more than the quants. Upstream's product of two rows has SUMS running sums for its
// blocks in turn, added up at the end.
struct q8_0 {
    static constexpr ggml_type TYPE = GGML_TYPE_Q8_0;
    static constexpr int       BIAS = 128;
    static constexpr int       SUMS = 1;
    using block                     = block_q8_0;

    static __m256i bytes(const block & b) {
        return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *) b.qs), _mm256_set1_epi8((char) BIAS));
    }
};

// The low halves are the first sixteen.
__m256i unpacked(const uint8_t * halves) {
    const __m128i x = _mm_loadu_si128((const __m128i *) halves);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(x, 4), x), _mm256_set1_epi8(15));
}

struct q4_0 {
    static constexpr ggml_type TYPE = GGML_TYPE_Q4_0;
    static constexpr int       BIAS = 8;
    static constexpr int       SUMS = 1;
    using block                     = block_q4_0;

    static __m256i bytes(const block & b) { return unpacked(b.qs); }
};

struct iq4_nl {
    static constexpr ggml_type TYPE = GGML_TYPE_IQ4_NL;
    static constexpr int       BIAS = 128;
    static constexpr int       SUMS = 2;
    using block                     = block_iq4_nl;

    static __m256i bytes(const block & b) {
        const __m128i values = _mm_add_epi8(_mm_loadu_si128((const __m128i *) kvalues_iq4nl), _mm_set1_epi8((char) BIAS));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), unpacked(b.qs));
    }
};

// A set of instructions: blocks of how many rows of inputs lie in one vector, and the product of a block of weights with them, in units
// of both scales.

// What those of 256 bits have in common.
struct of_256 {
    static constexpr int LANES = 1;
    using floats               = __m256;

    static floats set(float x) { return _mm256_set1_ps(x); }

    static floats load(const float * x) { return _mm256_load_ps(x); }

    static floats mul(floats a, floats b) { return _mm256_mul_ps(a, b); }

    static floats add_product(floats a, floats b, floats sum) { return _mm256_fmadd_ps(a, b, sum); }

    static __m256 lane(floats x, int) { return x; }
};

// Plain AVX2 multiplies bytes without sign by bytes with sign: the sign goes to the other side.
struct avx2 : of_256 {
    static constexpr const char * NAME = "AVX2";
    static constexpr int VECTORS = 1;  // of inputs at a time, by four rows of weights: as many as there are registers for

    struct inputs {
        int8_t quants[BLOCK];
        float  scale[8];
    };

    struct weights {
        __m256i sign, size;

        weights(__m256i bytes, int bias) :
            sign(_mm256_sub_epi8(bytes, _mm256_set1_epi8((char) bias))), size(_mm256_abs_epi8(sign)) {}
    };

    static void put(inputs & to, int, const block_q8_0 & x, int) {
        memcpy(to.quants, x.qs, sizeof(x.qs));
        std::fill_n(to.scale, 8, _cvtsh_ss(x.d));
    }

    static floats product(const weights & w, const inputs & x) {
        const __m256i y = _mm256_sign_epi8(_mm256_load_si256((const __m256i *) x.quants), w.sign);
        return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_maddubs_epi16(w.size, y), _mm256_set1_epi16(1)));
    }
};

#    ifdef HOBBIT_TILES_VNNI

// (w + bias) x - bias x, of which the last is `offset`.
void put_vnni(const block_q8_0 & x, int bias, int8_t * quants, int32_t * offset, float * scale) {
    const __m256i q    = _mm256_loadu_si256((const __m256i *) x.qs);
    const __m256i zero = _mm256_setzero_si256();
    _mm256_store_si256((__m256i *) quants, q);
    _mm256_store_si256((__m256i *) offset, _mm256_sub_epi32(zero, add_products(zero, _mm256_set1_epi8((char) bias), q)));
    _mm256_store_ps(scale, _mm256_set1_ps(_cvtsh_ss(x.d)));
}

struct avx_vnni : of_256 {
    static constexpr const char * NAME    = "AVX VNNI";
    static constexpr int          VECTORS = 2;

    struct inputs {
        int8_t  quants[BLOCK];
        int32_t offset[8];
        float   scale[8];
    };

    struct weights {
        __m256i shifted;

        weights(__m256i bytes, int) : shifted(bytes) {}
    };

    static void put(inputs & to, int, const block_q8_0 & x, int bias) { put_vnni(x, bias, to.quants, to.offset, to.scale); }

    static floats product(const weights & w, const inputs & x) {
        return _mm256_cvtepi32_ps(add_products(_mm256_load_si256((const __m256i *) x.offset), w.shifted,
                                               _mm256_load_si256((const __m256i *) x.quants)));
    }
};

#    endif

#    ifdef HOBBIT_TILES_AVX512

struct avx512_vnni {
    static constexpr const char * NAME    = "AVX512 VNNI";
    static constexpr int          LANES   = 2;
    static constexpr int          VECTORS = 4;
    using floats                          = __m512;

    struct inputs {
        int8_t  quants[2 * BLOCK];
        int32_t offset[16];
        float   scale[16];
    };

    struct weights {
        __m512i shifted;

        weights(__m256i bytes, int) : shifted(_mm512_broadcast_i64x4(bytes)) {}
    };

    static void put(inputs & to, int lane, const block_q8_0 & x, int bias) {
        put_vnni(x, bias, to.quants + lane * BLOCK, to.offset + lane * 8, to.scale + lane * 8);
    }

    static floats product(const weights & w, const inputs & x) {
        return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_load_si512(x.offset), w.shifted, _mm512_load_si512(x.quants)));
    }

    static floats set(float x) { return _mm512_set1_ps(x); }

    static floats load(const float * x) { return _mm512_load_ps(x); }

    static floats mul(floats a, floats b) { return _mm512_mul_ps(a, b); }

    static floats add_product(floats a, floats b, floats sum) { return _mm512_fmadd_ps(a, b, sum); }

    static __m256 lane(floats x, int i) { return i == 0 ? _mm512_castps512_ps256(x) : _mm512_extractf32x8_ps(x, 1); }
};

#    endif

// In the order of upstream's hsum_float_8.
float sum_of(__m256 x) {
    __m128 sum = _mm_add_ps(_mm256_extractf128_ps(x, 1), _mm256_castps256_ps128(x));
    sum        = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    sum        = _mm_add_ss(sum, _mm_movehdup_ps(sum));
    return _mm_cvtss_f32(sum);
}

template <typename I>
int64_t n_vectors(int64_t n_c) {
    return (n_c + I::LANES - 1) / I::LANES;
}

template <typename I>
size_t prepared_bytes(int64_t n, int64_t n_c) {
    return (size_t) (n_vectors<I>(n_c) * (n / BLOCK)) * sizeof(typename I::inputs);
}

// [vector][block]; where rows do not fill the last vector, the last row stands for those that are missing.
template <typename W, typename I>
void prepare(const char * const * rows, int64_t n, int64_t n_c, std::byte * to) {
    auto * out = (typename I::inputs *) to;
    for (int64_t v = 0; v < n_vectors<I>(n_c); ++v) {
        for (int64_t b = 0; b < n / BLOCK; ++b, ++out) {
            for (int lane = 0; lane < I::LANES; ++lane) {
                I::put(*out, lane, ((const block_q8_0 *) rows[std::min(v * I::LANES + lane, n_c - 1)])[b], W::BIAS);
            }
        }
    }
}

// R rows of weights by V vectors of inputs -> out[0 .. n_c)[r ...].
template <typename W, typename I, int R, int V>
void multiply_tile(int64_t n_blocks, const char * weights, size_t row_bytes, int64_t r, const typename I::inputs * x,
                   int64_t n_c, float * const * out) {
    typename I::floats sums[W::SUMS][R][V];
    // One running sum after the other, not in turns: there are registers for one of them.
    for (int s = 0; s < W::SUMS; ++s) {
        typename I::floats sum[R][V];
        for (auto & row : sum) {
            std::fill_n(row, V, I::set(0.0f));
        }
        for (int64_t b = s; b < n_blocks; b += W::SUMS) {
            for (int i = 0; i < R; ++i) {
                const typename W::block & block = ((const typename W::block *) (weights + (r + i) * row_bytes))[b];
                // The rows of the next tile: these end before a processor has seen that they are a stream.
                _mm_prefetch((const char *) &block + R * row_bytes, _MM_HINT_T0);
                const typename I::weights w(W::bytes(block), W::BIAS);
                const typename I::floats  scale = I::set(_cvtsh_ss(block.d));
                for (int v = 0; v < V; ++v) {
                    const typename I::inputs & y = x[v * n_blocks + b];
                    sum[i][v] = I::add_product(I::mul(scale, I::load(y.scale)), I::product(w, y), sum[i][v]);
                }
            }
        }
        memcpy(sums[s], sum, sizeof(sum));
    }
    for (int64_t c = 0; c < std::min<int64_t>(n_c, V * I::LANES); ++c) {
        for (int i = 0; i < R; ++i) {
            __m256 sum = I::lane(sums[0][i][c / I::LANES], (int) (c % I::LANES));
            for (int s = 1; s < W::SUMS; ++s) {
                sum = _mm256_add_ps(sum, I::lane(sums[s][i][c / I::LANES], (int) (c % I::LANES)));
            }
            out[c][r + i] = sum_of(sum);
        }
    }
}

template <typename W, typename I, int V>
void multiply_columns(int64_t n_blocks, const char * weights, size_t row_bytes, int64_t n_r, const typename I::inputs * x,
                      int64_t n_c, float * const * out) {
    int64_t r = 0;
    for (; r + 4 <= n_r; r += 4) {
        multiply_tile<W, I, 4, V>(n_blocks, weights, row_bytes, r, x, n_c, out);
    }
    for (; r < n_r; ++r) {
        multiply_tile<W, I, 1, V>(n_blocks, weights, row_bytes, r, x, n_c, out);
    }
}

// V vectors at a time, and what is left over as one tile with fewer.
template <typename W, typename I, int V>
void multiply_vectors(int64_t n_blocks, const char * weights, size_t row_bytes, int64_t n_r, const typename I::inputs * x,
                      int64_t n_c, float * const * out) {
    int64_t c = 0;
    for (; c + (V - 1) * I::LANES < n_c; c += V * I::LANES, x += V * n_blocks) {
        multiply_columns<W, I, V>(n_blocks, weights, row_bytes, n_r, x, n_c - c, out + c);
    }
    if constexpr (V > 1) {
        if (c < n_c) {
            multiply_vectors<W, I, V - 1>(n_blocks, weights, row_bytes, n_r, x, n_c - c, out + c);
        }
    }
}

template <typename W, typename I>
void multiply(int64_t n, const char * weights, size_t row_bytes, int64_t n_r, const std::byte * inputs, int64_t n_c,
              float * const * out) {
    multiply_vectors<W, I, I::VECTORS>(n / BLOCK, weights, row_bytes, n_r, (const typename I::inputs *) inputs, n_c, out);
}

template <typename W, typename I>
constexpr tile_kernel kernel() {
    return { I::NAME, W::TYPE, W::SUMS * BLOCK, prepared_bytes<I>, prepare<W, I>, multiply<W, I> };
}

#endif

bool has_bits_of_upstream(const tile_kernel & kernel) {
    constexpr int64_t N_R      = 5;  // four at a time, and one
    const auto        type     = (ggml_type) kernel.type;
    const auto        multiply = [type](const std::byte * w, const char * x, float * out) {
        for (int64_t r = 0; r < N_R; ++r) {
            const std::byte * row = w + r * ggml_row_size(type, TRIAL_LENGTH);
            ggml_get_type_traits_cpu(type)->vec_dot(TRIAL_LENGTH, out + r, 0, row, 0, x, 0, 1);
        }
    };
    return has_bits_of({ N_R, nullptr, multiply }, kernel);
}

}  // namespace

const std::vector<tile_kernel> & tile_kernels() {
    static const std::vector<tile_kernel> kernels = {
#ifdef HOBBIT_TILES
#    ifdef HOBBIT_TILES_AVX512
        kernel<q8_0, avx512_vnni>(), kernel<q4_0, avx512_vnni>(), kernel<iq4_nl, avx512_vnni>(),
#    endif
#    ifdef HOBBIT_TILES_VNNI
        kernel<q8_0, avx_vnni>(),    kernel<q4_0, avx_vnni>(),    kernel<iq4_nl, avx_vnni>(),
#    endif
        kernel<q8_0, avx2>(),        kernel<q4_0, avx2>(),        kernel<iq4_nl, avx2>(),
#endif
    };
    return kernels;
}

const tile_kernel * find_tile_kernel(int32_t type, int64_t n) {
    static const auto found = first_with_bits(tile_kernels(), has_bits_of_upstream);
    const auto        at    = found.find(type);
    return at != found.end() && at->second != nullptr && n % at->second->multiple == 0 ? at->second : nullptr;
}

}  // namespace hobbit
