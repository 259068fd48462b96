#include "../base/memory.h"
#include "repacking.h"
#include "tile-instructions.h"
#include "tile.h"

#include "ggml-cpu.h"
#include "ggml.h"

// upstream, private
#include "repack.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <vector>

namespace hobbit {

namespace {

#ifdef HOBBIT_TILES

constexpr int ROWS  = 8;         // of weights that are interleaved
constexpr int CHUNK = 8 * ROWS;  // bytes: eight quants of each row
constexpr int COLS  = 16;        // rows of inputs at a time

// A super-block of a type, of eight rows: SUB_BLOCKS sub-blocks with a scale and a minimum each, of so many CHUNKS of quants.
struct q4_K {
    static constexpr ggml_type TYPE       = GGML_TYPE_Q4_K;
    static constexpr int       SUB_BLOCKS = 8;
    static constexpr int       CHUNKS     = QK_K / SUB_BLOCKS / 8;
    static constexpr int       MASK       = 15;
    using block                           = block_q4_Kx8;

    // The chunks of sub-block `s` lie one behind the other, this much to the left in their bytes.
    static const uint8_t * chunks(const block & b, int s) { return b.qs + s / 2 * CHUNKS * CHUNK; }

    static int shift(int s) { return s % 2 * 4; }

    // Of row r `scale[s][r]` and `min[s / 2][r][s % 2]`.
    static void unpack(const block & b, uint8_t (*scale)[ROWS], uint8_t (*min)[ROWS][2]) {
        for (int s = 0; s < SUB_BLOCKS; ++s) {
            uint64_t low;
            uint32_t high;
            memcpy(&low, b.scales + s * 12, 8);
            memcpy(&high, b.scales + s * 12 + 8, 4);
            // Rows 0 to 3: six bits; rows 4 to 7: four of `high` and the two above the six. Scales in the lower half of `low`.
            const uint64_t two = low >> 6 & 0x0303030303030303;
            const auto     s0 = (uint32_t) (low & 0x3f3f3f3f), m0 = (uint32_t) (low >> 32 & 0x3f3f3f3f);
            const uint32_t s4 = (high & 0x0f0f0f0f) | (uint32_t) two << 4;
            const uint32_t m4 = (high >> 4 & 0x0f0f0f0f) | (uint32_t) (two >> 32) << 4;
            const __m128i  m  = _mm_set_epi32(0, 0, (int) m4, (int) m0);
            memcpy(scale[s], &s0, 4);
            memcpy(scale[s] + 4, &s4, 4);
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

int64_t eight_bytes(const int8_t * x) {
    int64_t v;
    memcpy(&v, x, sizeof(v));
    return v;
}

// A set of instructions: integers of eight rows, two of each row, which are added up at the end.

// What those of 256 bits have in common: a vector for rows 0 to 3, and one for 4 to 7.
struct of_256 {
    struct ints {
        __m256i half[2];
    };

    static ints zero() { return { { _mm256_setzero_si256(), _mm256_setzero_si256() } }; }

    static ints quants(const uint8_t * chunk, int shift, int mask) {
        ints out;
        for (int h = 0; h < 2; ++h) {
            const __m256i x = _mm256_loadu_si256((const __m256i *) chunk + h);
            out.half[h]     = _mm256_and_si256(_mm256_srli_epi16(x, shift), _mm256_set1_epi8((char) mask));
        }
        return out;
    }

    // A byte of each row to where the bytes of `to` that are not negative are, of eight.
    static ints spread(const uint8_t * bytes, int64_t to) {
        ints          out;
        const __m256i places =
            _mm256_or_si256(_mm256_set1_epi64x(to), _mm256_setr_epi64x(0, 0x0808080808080808, 0, 0x0808080808080808));
        for (int h = 0; h < 2; ++h) {
            int32_t four;
            memcpy(&four, bytes + h * 4, sizeof(four));
            out.half[h] = _mm256_shuffle_epi8(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four)), places);
        }
        return out;
    }

    static __m256i of_rows(const ints & sum) {
        return _mm256_permute4x64_epi64(_mm256_hadd_epi32(sum.half[0], sum.half[1]), 0xd8);
    }
};

// Plain AVX2 adds products of bytes in 16 bits: eight of at most 15 * 128.
struct avx2 : of_256 {
    static constexpr const char * NAME = "AVX2";

    static ints scales(const uint8_t * of_rows) { return spread(of_rows, (int64_t) 0x8000800080008000); }

    template <int CHUNKS>
    static void add(ints & sum, const ints * quants, const ints & scales, const int8_t * x) {
        for (int h = 0; h < 2; ++h) {
            __m256i dots = _mm256_setzero_si256();
            for (int j = 0; j < CHUNKS; ++j) {
                const __m256i eight = _mm256_set1_epi64x(eight_bytes(x + j * 8));
                dots                = _mm256_add_epi16(dots, _mm256_maddubs_epi16(quants[j].half[h], eight));
            }
            sum.half[h] = _mm256_add_epi32(sum.half[h], _mm256_madd_epi16(dots, scales.half[h]));
        }
    }
};

#    ifdef HOBBIT_TILES_VNNI

// Sums of 16 products are within 16 bits too, so that they are multiplied as such: by the scale and, where their sign is, by nothing.
constexpr int64_t SCALE_AND_NOTHING = (int64_t) 0x8080800080808000;

struct avx_vnni : of_256 {
    static constexpr const char * NAME = "AVX VNNI";

    static ints scales(const uint8_t * of_rows) { return spread(of_rows, SCALE_AND_NOTHING); }

    template <int CHUNKS>
    static void add(ints & sum, const ints * quants, const ints & scales, const int8_t * x) {
        for (int h = 0; h < 2; ++h) {
            __m256i dots = _mm256_setzero_si256();
            for (int j = 0; j < CHUNKS; ++j) {
                dots = add_products(dots, quants[j].half[h], _mm256_set1_epi64x(eight_bytes(x + j * 8)));
            }
            sum.half[h] = _mm256_add_epi32(sum.half[h], _mm256_madd_epi16(dots, scales.half[h]));
        }
    }
};

#    endif

#    ifdef HOBBIT_TILES_AVX512

struct avx512_vnni {
    static constexpr const char * NAME = "AVX512 VNNI";
    using ints                         = __m512i;

    static ints zero() { return _mm512_setzero_si512(); }

    static ints quants(const uint8_t * chunk, int shift, int mask) {
        return _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(chunk), (unsigned) shift),
                                _mm512_set1_epi8((char) mask));
    }

    static ints scales(const uint8_t * of_rows) {
        const __m512i s = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *) of_rows));
        return _mm512_or_si512(s, _mm512_slli_epi64(s, 32));
    }

    template <int CHUNKS>
    static void add(ints & sum, const ints * quants, const ints & scales, const int8_t * x) {
        __m512i dots = _mm512_setzero_si512();
        for (int j = 0; j < CHUNKS; ++j) {
            dots = _mm512_dpbusd_epi32(dots, quants[j], _mm512_set1_epi64(eight_bytes(x + j * 8)));
        }
        sum = _mm512_dpwssd_epi32(sum, dots, scales);
    }

    static __m256i of_rows(const ints & sum) {
        return _mm512_cvtepi64_epi32(_mm512_add_epi64(sum, _mm512_srli_epi64(sum, 32)));
    }
};

#    endif

// A super-block of a row of inputs.
template <typename W>
struct inputs {
    int8_t  quants[QK_K];
    int16_t sums[W::SUB_BLOCKS];  // of the quants
    float   scale;
};

template <typename W>
size_t prepared_bytes(int64_t n, int64_t n_c) {
    return (size_t) (n / QK_K * n_c) * sizeof(inputs<W>);
}

// [super-block][row]
template <typename W>
void prepare(const char * const * rows, int64_t n, int64_t n_c, std::byte * to) {
    constexpr int EACH = QK_K / 16 / W::SUB_BLOCKS;  // of upstream's sums
    auto *        out  = (inputs<W> *) to;
    for (int64_t b = 0; b < n / QK_K; ++b) {
        for (int64_t c = 0; c < n_c; ++c, ++out) {
            const block_q8_K & x = ((const block_q8_K *) rows[c])[b];
            memcpy(out->quants, x.qs, sizeof(x.qs));
            for (int s = 0; s < W::SUB_BLOCKS; ++s) {
                out->sums[s] = (int16_t) (x.bsums[s * EACH] + (EACH == 2 ? x.bsums[s * EACH + 1] : 0));
            }
            out->scale = x.d;
        }
    }
}

// Eight rows of weights by a super-block of n_c <= COLS rows of inputs, added to `of_quants` and `of_mins`.
template <typename W, typename I>
void multiply_block(const typename W::block & w, const inputs<W> * x, int64_t n_c, __m256 * of_quants, __m256 * of_mins) {
    constexpr int PAIRS = W::SUB_BLOCKS / 2;
    uint8_t       scale[W::SUB_BLOCKS][ROWS];
    uint8_t       min[PAIRS][ROWS][2];
    W::unpack(w, scale, min);
    typename I::ints sums[COLS];
    std::fill_n(sums, n_c, I::zero());
    for (int s = 0; s < W::SUB_BLOCKS; ++s) {
        typename I::ints quants[W::CHUNKS];
        for (int j = 0; j < W::CHUNKS; ++j) {
            quants[j] = I::quants(W::chunks(w, s) + j * CHUNK, W::shift(s), W::MASK);
        }
        const typename I::ints scales = I::scales(scale[s]);
        for (int64_t c = 0; c < n_c; ++c) {
            I::template add<W::CHUNKS>(sums[c], quants, scales, x[c].quants + s * (QK_K / W::SUB_BLOCKS));
        }
    }
    __m256i mins[PAIRS];
    for (int p = 0; p < PAIRS; ++p) {
        mins[p] = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *) min[p]));
    }
    const __m256 d    = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) w.d));
    const __m256 dmin = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) w.dmin));
    for (int64_t c = 0; c < n_c; ++c) {
        __m256i sum = _mm256_setzero_si256();
        for (int p = 0; p < PAIRS; ++p) {
            int32_t two;
            memcpy(&two, &x[c].sums[2 * p], sizeof(two));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_set1_epi32(two), mins[p]));
        }
        const __m256 scale_x = _mm256_set1_ps(x[c].scale);
        of_quants[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(I::of_rows(sums[c])), _mm256_mul_ps(d, scale_x), of_quants[c]);
        of_mins[c]   = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(dmin, scale_x), of_mins[c]);
    }
}

template <typename W, typename I>
void multiply(int64_t n, const char * weights, size_t row_bytes, int64_t n_r, const std::byte * prepared, int64_t n_c,
              float * const * out) {
    const int64_t n_blocks = n / QK_K;
    for (int64_t r = 0; r < n_r; r += ROWS) {
        const auto * w = (const typename W::block *) (weights + (size_t) r * row_bytes);
        for (int64_t c0 = 0; c0 < n_c; c0 += COLS) {
            const int64_t n_now = std::min<int64_t>(COLS, n_c - c0);
            __m256        of_quants[COLS], of_mins[COLS];
            std::fill_n(of_quants, n_now, _mm256_setzero_ps());
            std::fill_n(of_mins, n_now, _mm256_setzero_ps());
            for (int64_t b = 0; b < n_blocks; ++b) {
                multiply_block<W, I>(w[b], (const inputs<W> *) prepared + b * n_c + c0, n_now, of_quants, of_mins);
            }
            for (int64_t c = 0; c < n_now; ++c) {
                _mm256_storeu_ps(out[c0 + c] + r, _mm256_sub_ps(of_quants[c], of_mins[c]));
            }
        }
    }
}

template <typename W, typename I>
constexpr tile_kernel kernel() {
    return { I::NAME, W::TYPE, QK_K, prepared_bytes<W>, prepare<W>, multiply<W, I> };
}

#endif

bool has_bits_of_gemv(const tile_kernel & kernel, const repack_kernel & repacked) {
    constexpr int64_t               N = 512, N_R = 16, N_C = 19;
    const auto                      type  = (ggml_type) kernel.type;
    const auto *                    q8_K  = ggml_get_type_traits_cpu(GGML_TYPE_Q8_K);
    const size_t                    w_row = ggml_row_size(type, N), x_row = ggml_row_size(GGML_TYPE_Q8_K, N);
    std::minstd_rand                random(1);
    std::normal_distribution<float> normal;
    const auto                      numbers = [&](int64_t n) {
        std::vector<float> out((size_t) n);
        std::generate(out.begin(), out.end(), [&] { return normal(random); });
        return out;
    };
    std::vector<std::byte> w(w_row * N_R);
    std::vector<char>      x(x_row * N_C);
    ggml_quantize_chunk(type, numbers(N * N_R).data(), w.data(), 0, N_R, N, nullptr);
    repack_slice(repacked, N, N_R, w.data());
    const char *       rows[N_C];
    float *            out[N_C];
    std::vector<float> tiled(N_R * N_C), plain(N_R * N_C);
    for (int64_t c = 0; c < N_C; ++c) {
        q8_K->from_float(numbers(N).data(), &x[(size_t) c * x_row], N);
        rows[c] = &x[(size_t) c * x_row];
        out[c]  = &tiled[(size_t) (c * N_R)];
        repacked.gemv(N, &plain[(size_t) (c * N_R)], N_R, w.data(), rows[c], 1, N_R);
    }
    std::vector<std::byte> room(kernel.prepared_bytes(N, N_C) + 64);
    auto *                 prepared = (std::byte *) align_up((size_t) room.data(), 64);
    kernel.prepare(rows, N, N_C, prepared);
    kernel.multiply(N, (const char *) w.data(), w_row, N_R, prepared, N_C, out);
    return memcmp(tiled.data(), plain.data(), plain.size() * sizeof(float)) == 0;
}

}  // namespace

const std::vector<tile_kernel> & repacked_tile_kernels() {
    static const std::vector<tile_kernel> kernels = {
#ifdef HOBBIT_TILES
#    ifdef HOBBIT_TILES_AVX512
        kernel<q4_K, avx512_vnni>(), kernel<q2_K, avx512_vnni>(),
#    endif
#    ifdef HOBBIT_TILES_VNNI
        kernel<q4_K, avx_vnni>(),    kernel<q2_K, avx_vnni>(),
#    endif
        kernel<q4_K, avx2>(),        kernel<q2_K, avx2>(),
#endif
    };
    return kernels;
}

const tile_kernel * find_repacked_tile_kernel(const repack_kernel & repacked) {
    static std::mutex                                           mutex;
    static std::map<const repack_kernel *, const tile_kernel *> known;
    std::lock_guard<std::mutex>                                 lock(mutex);
    const auto [at, is_new] = known.emplace(&repacked, nullptr);
    if (is_new) {
        const auto & kernels = repacked_tile_kernels();
        const auto   first   = std::find_if(kernels.begin(), kernels.end(), [&](const tile_kernel & kernel) {
            return kernel.type == repacked.type && has_bits_of_gemv(kernel, repacked);
        });
        at->second           = first == kernels.end() ? nullptr : &*first;
    }
    return at->second;
}

}  // namespace hobbit
