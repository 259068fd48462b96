#include "tile-q8_0.h"

#include "../base/memory.h"

#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cstring>
#include <random>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#    define HOBBIT_TILES
#    if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#        define HOBBIT_TILES_AVX512
#    endif
#    if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#        define HOBBIT_TILES_VNNI
#    endif
#    include <immintrin.h>
#endif

namespace hobbit {

namespace {

#ifdef HOBBIT_TILES

constexpr int64_t BLOCK = 32;

struct block_q8_0 {
    uint16_t scale;  // half precision
    int8_t   quants[BLOCK];
};

static_assert(sizeof(block_q8_0) == 34);

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

        explicit weights(const int8_t * q) : sign(_mm256_loadu_si256((const __m256i *) q)), size(_mm256_abs_epi8(sign)) {}
    };

    static void put(inputs & to, int, const block_q8_0 & x) {
        memcpy(to.quants, x.quants, sizeof(x.quants));
        std::fill_n(to.scale, 8, _cvtsh_ss(x.scale));
    }

    static floats product(const weights & w, const inputs & x) {
        const __m256i y = _mm256_sign_epi8(_mm256_load_si256((const __m256i *) x.quants), w.sign);
        return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_maddubs_epi16(w.size, y), _mm256_set1_epi16(1)));
    }
};

// The instructions called VNNI sum four products without a detour, of bytes without sign by bytes with sign: (w + 128) x - 128 x, of which
// the last is `offset`.
[[maybe_unused]] void put_vnni(const block_q8_0 & x, int8_t * quants, int32_t * offset, float * scale) {
    memcpy(quants, x.quants, sizeof(x.quants));
    std::fill_n(scale, 8, _cvtsh_ss(x.scale));
    for (int i = 0; i < 8; ++i) {
        const int8_t * q = x.quants + i * 4;
        offset[i]        = -128 * (q[0] + q[1] + q[2] + q[3]);
    }
}

#    ifdef HOBBIT_TILES_VNNI

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

        explicit weights(const int8_t * q) :
            shifted(_mm256_xor_si256(_mm256_loadu_si256((const __m256i *) q), _mm256_set1_epi8((char) 0x80))) {}
    };

    static void put(inputs & to, int, const block_q8_0 & x) { put_vnni(x, to.quants, to.offset, to.scale); }

    static floats product(const weights & w, const inputs & x) {
        const __m256i offset = _mm256_load_si256((const __m256i *) x.offset);
        const __m256i quants = _mm256_load_si256((const __m256i *) x.quants);
#        ifdef __AVXVNNI__
        return _mm256_cvtepi32_ps(_mm256_dpbusd_avx_epi32(offset, w.shifted, quants));
#        else
        return _mm256_cvtepi32_ps(_mm256_dpbusd_epi32(offset, w.shifted, quants));
#        endif
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

        explicit weights(const int8_t * q) :
            shifted(_mm512_xor_si512(_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) q)),
                                     _mm512_set1_epi8((char) 0x80))) {}
    };

    static void put(inputs & to, int lane, const block_q8_0 & x) {
        put_vnni(x, to.quants + lane * BLOCK, to.offset + lane * 8, to.scale + lane * 8);
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
template <typename I>
void prepare(const char * const * rows, int64_t n, int64_t n_c, std::byte * to) {
    auto * out = (typename I::inputs *) to;
    for (int64_t v = 0; v < n_vectors<I>(n_c); ++v) {
        for (int64_t b = 0; b < n / BLOCK; ++b, ++out) {
            for (int lane = 0; lane < I::LANES; ++lane) {
                I::put(*out, lane, ((const block_q8_0 *) rows[std::min(v * I::LANES + lane, n_c - 1)])[b]);
            }
        }
    }
}

// R rows of weights by V vectors of inputs -> out[0 .. n_c)[r ...].
template <typename I, int R, int V>
void multiply_tile(int64_t n_blocks, const char * weights, size_t row_bytes, int64_t r, const typename I::inputs * x,
                   int64_t n_c, float * const * out) {
    typename I::floats sums[R][V];
    for (auto & row : sums) {
        std::fill_n(row, V, I::set(0.0f));
    }
    for (int64_t b = 0; b < n_blocks; ++b) {
        for (int i = 0; i < R; ++i) {
            const block_q8_0 &        block = ((const block_q8_0 *) (weights + (r + i) * row_bytes))[b];
            const typename I::weights w(block.quants);
            const typename I::floats  scale = I::set(_cvtsh_ss(block.scale));
            for (int v = 0; v < V; ++v) {
                const typename I::inputs & y = x[v * n_blocks + b];
                sums[i][v]                   = I::add_product(I::mul(scale, I::load(y.scale)), I::product(w, y), sums[i][v]);
            }
        }
    }
    for (int64_t c = 0; c < std::min<int64_t>(n_c, V * I::LANES); ++c) {
        for (int i = 0; i < R; ++i) {
            out[c][r + i] = sum_of(I::lane(sums[i][c / I::LANES], (int) (c % I::LANES)));
        }
    }
}

template <typename I, int V>
void multiply_columns(int64_t n_blocks, const char * weights, size_t row_bytes, int64_t n_r, const typename I::inputs * x,
                      int64_t n_c, float * const * out) {
    int64_t r = 0;
    for (; r + 4 <= n_r; r += 4) {
        multiply_tile<I, 4, V>(n_blocks, weights, row_bytes, r, x, n_c, out);
    }
    for (; r < n_r; ++r) {
        multiply_tile<I, 1, V>(n_blocks, weights, row_bytes, r, x, n_c, out);
    }
}

template <typename I>
void multiply(int64_t n, const char * weights, size_t row_bytes, int64_t n_r, const std::byte * inputs, int64_t n_c,
              float * const * out) {
    const int64_t n_blocks = n / BLOCK;
    const auto *  x        = (const typename I::inputs *) inputs;
    int64_t       c        = 0;
    for (; c + (I::VECTORS - 1) * I::LANES < n_c; c += I::VECTORS * I::LANES, x += I::VECTORS * n_blocks) {
        multiply_columns<I, I::VECTORS>(n_blocks, weights, row_bytes, n_r, x, n_c - c, out + c);
    }
    for (; c < n_c; c += I::LANES, x += n_blocks) {
        multiply_columns<I, 1>(n_blocks, weights, row_bytes, n_r, x, n_c - c, out + c);
    }
}

template <typename I>
constexpr tile_kernel kernel() {
    return { I::NAME, prepared_bytes<I>, prepare<I>, multiply<I> };
}

#endif

bool has_bits_of_upstream(const tile_kernel & kernel) {
    constexpr int64_t               N = 96, N_R = 5, N_C = 11;
    const auto *                    traits = ggml_get_type_traits_cpu(GGML_TYPE_Q8_0);
    const size_t                    row    = ggml_row_size(GGML_TYPE_Q8_0, N);
    std::minstd_rand                random(1);
    std::normal_distribution<float> normal;
    std::vector<float>              values(N);
    std::vector<char>               rows(row * (N_R + N_C));
    for (int64_t i = 0; i < N_R + N_C; ++i) {
        std::generate(values.begin(), values.end(), [&] { return normal(random); });
        traits->from_float(values.data(), &rows[(size_t) i * row], N);
    }
    const char *       inputs[N_C];
    float *            out[N_C];
    std::vector<float> tiled(N_R * N_C), plain(N_R * N_C);
    for (int64_t c = 0; c < N_C; ++c) {
        inputs[c] = &rows[(size_t) (N_R + c) * row];
        out[c]    = &tiled[(size_t) (c * N_R)];
        for (int64_t r = 0; r < N_R; ++r) {
            traits->vec_dot(N, &plain[(size_t) (c * N_R + r)], 0, &rows[(size_t) r * row], 0, inputs[c], 0, 1);
        }
    }
    std::vector<std::byte> room(kernel.prepared_bytes(N, N_C) + 64);
    auto *                 prepared = (std::byte *) align_up((size_t) room.data(), 64);
    kernel.prepare(inputs, N, N_C, prepared);
    kernel.multiply(N, rows.data(), row, N_R, prepared, N_C, out);
    return memcmp(tiled.data(), plain.data(), plain.size() * sizeof(float)) == 0;
}

}  // namespace

const std::vector<tile_kernel> & tile_kernels() {
    static const std::vector<tile_kernel> kernels = {
#ifdef HOBBIT_TILES
#    ifdef HOBBIT_TILES_AVX512
        kernel<avx512_vnni>(),
#    endif
#    ifdef HOBBIT_TILES_VNNI
        kernel<avx_vnni>(),
#    endif
        kernel<avx2>(),
#endif
    };
    return kernels;
}

const tile_kernel * find_tile_kernel(int32_t type) {
    static const tile_kernel * found = [] {
        const auto & kernels = tile_kernels();
        const auto   at      = std::find_if(kernels.begin(), kernels.end(), has_bits_of_upstream);
        return at == kernels.end() ? nullptr : &*at;
    }();
    return type == GGML_TYPE_Q8_0 ? found : nullptr;
}

}  // namespace hobbit
