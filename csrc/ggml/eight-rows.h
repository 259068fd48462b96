// Products of eight interleaved rows of weights with rows of inputs, in integers, by sets of vector instructions.
//
// A chunk is eight quants of each of the rows, a byte each, one row behind the other. Eight bytes of inputs go by all rows of it at once,
// which gives two integers a row; they are added up at the end.
#pragma once

#include "tile-instructions.h"

#ifdef HOBBIT_TILES

#    include <cstdint>
#    include <cstring>

namespace hobbit::eight_rows {

constexpr int ROWS  = 8;
constexpr int CHUNK = 8 * ROWS;  // bytes

template <typename T>
T load(const void * from) {
    T value;
    memcpy(&value, from, sizeof(value));
    return value;
}

// What those of 256 bits have in common: a vector for rows 0 to 3, and one for 4 to 7.
struct of_256 {
    struct ints {
        __m256i half[2];
    };

    static ints zero() { return { { _mm256_setzero_si256(), _mm256_setzero_si256() } }; }

    // A chunk of quants that are some bits of bytes.
    static ints quants(const uint8_t * chunk, int shift, int mask) {
        ints out;
        for (int h = 0; h < 2; ++h) {
            const __m256i x = _mm256_loadu_si256((const __m256i *) chunk + h);
            out.half[h]     = _mm256_and_si256(_mm256_srli_epi16(x, shift), _mm256_set1_epi8((char) mask));
        }
        return out;
    }

    // What stands in a table of sixteen for each of them.
    static ints values(__m128i table, const ints & quants) {
        const __m256i t = _mm256_broadcastsi128_si256(table);
        return { { _mm256_shuffle_epi8(t, quants.half[0]), _mm256_shuffle_epi8(t, quants.half[1]) } };
    }

    // A byte of each row to where the bytes of `to`, of eight, are not negative.
    static ints spread(const uint8_t * bytes, int64_t to) {
        const __m256i odd    = _mm256_setr_epi64x(0, 0x0808080808080808, 0, 0x0808080808080808);
        const __m256i places = _mm256_or_si256(_mm256_set1_epi64x(to), odd);
        ints          out;
        for (int h = 0; h < 2; ++h) {
            const __m128i four = _mm_cvtsi32_si128(load<int32_t>(bytes + h * 4));
            out.half[h]        = _mm256_shuffle_epi8(_mm256_cvtepu8_epi64(four), places);
        }
        return out;
    }

    // `start` for each row, and what `add(sum, quants, eight inputs)` makes of CHUNKS chunks.
    template <int CHUNKS, typename add_t>
    static ints over_chunks(int64_t start, const ints * quants, const int8_t * x, const add_t & add) {
        ints out;
        for (int h = 0; h < 2; ++h) {
            out.half[h] = _mm256_set1_epi64x(start);
            for (int j = 0; j < CHUNKS; ++j) {
                out.half[h] = add(out.half[h], quants[j].half[h], _mm256_set1_epi64x(load<int64_t>(x + j * 8)));
            }
        }
        return out;
    }

    // Of numbers of 16 bits.
    static void add_products_of(ints & sum, const ints & a, const ints & b) {
        for (int h = 0; h < 2; ++h) {
            sum.half[h] = _mm256_add_epi32(sum.half[h], _mm256_madd_epi16(a.half[h], b.half[h]));
        }
    }

    // The sums of both integers, of row 0, 1, ...
    static __m256i of_rows(const ints & sum) {
        return _mm256_permute4x64_epi64(_mm256_hadd_epi32(sum.half[0], sum.half[1]), 0xd8);
    }
};

struct avx2 : of_256 {
    static constexpr const char * NAME   = "AVX2";
    static constexpr bool         BIASED = false;

    // The operand of add_scaled.
    static ints scales(const uint8_t * of_rows) { return spread(of_rows, (int64_t) 0x8000800080008000); }

    // sum += scale * the products of CHUNKS chunks of quants that are 0 to 15; in 16 bits, of which two go by one instruction.
    template <int CHUNKS>
    static void add_scaled(ints & sum, const ints * quants, const ints & scales, const int8_t * x) {
        static_assert(2 * CHUNKS * 15 * 128 < 1 << 15);
        const auto add = [](__m256i sums, __m256i w, __m256i y) {
            return _mm256_add_epi16(sums, _mm256_maddubs_epi16(w, y));
        };
        add_products_of(sum, over_chunks<CHUNKS>(0, quants, x, add), scales);
    }

    // The products of CHUNKS chunks of values with sign; the sign goes to the other side, since one is multiplied without. `start`: what the
    // two integers of each row begin with.
    template <int CHUNKS>
    static ints dots(int64_t start, const ints * values, const int8_t * x) {
        return over_chunks<CHUNKS>(start, values, x, [](__m256i sums, __m256i w, __m256i y) {
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(y, w));
            return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        });
    }
};

#    ifdef HOBBIT_TILES_VNNI

struct avx_vnni : of_256 {
    static constexpr const char * NAME   = "AVX VNNI";
    static constexpr bool         BIASED = true;

    // Sums of products are within 16 bits, so they are multiplied as such: by the scale and, where their sign is, by nothing.
    static ints scales(const uint8_t * of_rows) { return spread(of_rows, (int64_t) 0x8080800080808000); }

    template <int CHUNKS>
    static void add_scaled(ints & sum, const ints * quants, const ints & scales, const int8_t * x) {
        static_assert(4 * CHUNKS * 15 * 128 < 1 << 15);
        add_products_of(sum, dots<CHUNKS>(0, quants, x), scales);
    }

    // The values have a bias, and are without sign; what it adds is taken off by `start`.
    template <int CHUNKS>
    static ints dots(int64_t start, const ints * values, const int8_t * x) {
        return over_chunks<CHUNKS>(start, values, x, add_products);
    }
};

#    endif

#    ifdef HOBBIT_TILES_AVX512

struct avx512_vnni {
    static constexpr const char * NAME   = "AVX512 VNNI";
    static constexpr bool         BIASED = true;
    using ints                           = __m512i;

    static ints zero() { return _mm512_setzero_si512(); }

    static ints quants(const uint8_t * chunk, int shift, int mask) {
        const __m512i x = _mm512_loadu_si512(chunk);
        return _mm512_and_si512(_mm512_srli_epi16(x, (unsigned) shift), _mm512_set1_epi8((char) mask));
    }

    static ints values(__m128i table, const ints & quants) {
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), quants);
    }

    static ints scales(const uint8_t * of_rows) {
        const __m512i s = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *) of_rows));
        return _mm512_or_si512(s, _mm512_slli_epi64(s, 32));
    }

    template <int CHUNKS>
    static void add_scaled(ints & sum, const ints * quants, const ints & scales, const int8_t * x) {
        static_assert(4 * CHUNKS * 15 * 128 < 1 << 15);
        sum = _mm512_dpwssd_epi32(sum, dots<CHUNKS>(0, quants, x), scales);
    }

    template <int CHUNKS>
    static ints dots(int64_t start, const ints * values, const int8_t * x) {
        ints out = _mm512_set1_epi64(start);
        for (int j = 0; j < CHUNKS; ++j) {
            out = _mm512_dpbusd_epi32(out, values[j], _mm512_set1_epi64(load<int64_t>(x + j * 8)));
        }
        return out;
    }

    static __m256i of_rows(const ints & sum) {
        return _mm512_cvtepi64_epi32(_mm512_add_epi64(sum, _mm512_srli_epi64(sum, 32)));
    }
};

#    endif

}  // namespace hobbit::eight_rows

#endif
